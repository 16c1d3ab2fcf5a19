"""RecurrentTRPO: sequences, padding, the Fisher matrix through the LSTM, collecting, and all the rest of an algorithm."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from support.models import policy_model
from torch import nn

from sb3_trpo import RecurrentTRPO
from sb3_trpo.adapters.models import actor_parameters, components, critic_parameters
from sb3_trpo.adapters.recurrent import RecurrentAdapter
from sb3_trpo.adapters.sequences import read_sequences, without_cudnn
from sb3_trpo.optim.batch import RolloutBatch, map_inputs, normalize_advantages
from sb3_trpo.optim.critic import fit_minibatches
from sb3_trpo.optim.distributions import joint_kl
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner, kfac_layers
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.rollouts.lstm_sampler import serves_lstm

N_STEPS, N_ENVS = 9, 3
N_STATES = N_STEPS * N_ENVS
VECTOR = spaces.Box(-np.inf, np.inf, (2,))
BOX = spaces.Box(-0.5, 0.5, (2,))
DICT = spaces.Dict({"place": VECTOR, "gear": spaces.Discrete(3)})
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)

SHARED = {"shared_lstm": True, "enable_critic_lstm": False}
NONE = {"enable_critic_lstm": False}


class Wander(gym.Env):
    """Random observations; rewards and ends depend on the action, so that another action would show."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        draw = self.np_random.random()
        return self.observation_space.sample(), float(np.sum(action)) + draw, draw < 0.15, False, {}


def make_env(observation_space: spaces.Space, action_space: spaces.Space, limit: int = 4) -> DummyVecEnv:
    def make() -> gym.Env:
        return Monitor(gym.wrappers.TimeLimit(Wander(copy.deepcopy(observation_space), action_space), limit))

    return DummyVecEnv([make] * N_ENVS)


class Double(FlattenExtractor):
    """An extractor with parameters, in float64, below the LSTM."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.layer = nn.Linear(self.features_dim, self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(super().forward(observations).to(self.layer.weight.dtype)))


#: Name ↦ observation space, action space, arguments of the algorithm, arguments of the policy.
CASES: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any], dict[str, Any]]] = {
    "box": (VECTOR, BOX, {}, {}),
    "discrete": (VECTOR, spaces.Discrete(3), {}, {}),
    "multi_discrete": (VECTOR, spaces.MultiDiscrete([2, 3]), {}, {}),
    "multi_binary": (VECTOR, spaces.MultiBinary(2), {}, {}),
    "gsde": (VECTOR, BOX, {"use_sde": True, "sde_sample_freq": 2}, {}),
    "shared_lstm": (VECTOR, BOX, {}, SHARED),
    "no_critic_lstm": (VECTOR, spaces.Discrete(3), {}, NONE),
    "two_layers": (VECTOR, spaces.Discrete(3), {}, {"n_lstm_layers": 2}),
    "dict": (DICT, BOX, {"policy": "MultiInputLstmPolicy"}, {}),
    "dict_shared_lstm": (DICT, BOX, {"policy": "MultiInputLstmPolicy"}, SHARED),
    "image": (IMAGE, spaces.Discrete(2), {"policy": "CnnLstmPolicy"}, {"features_extractor_kwargs": {"features_dim": 4}}),
}


def make_model(
    name: str, *, normalize: bool = False, policy_kwargs: dict[str, Any] | None = None, **changes: Any
) -> RecurrentTRPO:
    observation_space, action_space, arguments, more = CASES[name]
    arguments = {"policy": "MlpLstmPolicy", "n_steps": N_STEPS, "batch_size": N_ENVS, "gamma": 0.9, **arguments, **changes}
    env = make_env(observation_space, action_space)
    policy_kwargs = {"lstm_hidden_size": 3, "net_arch": [4], **more, **(policy_kwargs or {})}
    model = RecurrentTRPO(
        arguments.pop("policy"),
        VecNormalize(env) if normalize else env,
        seed=0,
        device="cpu",
        policy_kwargs=policy_kwargs,
        **arguments,
    )
    with th.no_grad():  # outputs that differ from state to state
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    return model


class Quiet(BaseCallback):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at

    def _on_step(self) -> bool:
        return self.n_calls != self.stop_at


def collect(
    model: RecurrentTRPO,
    loop: Any = RecurrentTRPO.collect_rollouts,
    n_rollouts: int = 1,
    callback_class: type[BaseCallback] = Quiet,
) -> RecurrentTRPO:
    _, callback = model._setup_learn(10**6, callback_class(), reset_num_timesteps=model._last_obs is None)
    for _ in range(n_rollouts):
        assert loop(model, model.env, callback, model.rollout_buffer, model.n_steps)
    return model


class Steps:
    """The oracle: the policy run through the buffer one step at a time, as it was when acting, without any padding."""

    def __init__(self, model: RecurrentTRPO) -> None:
        self.policy = model.policy
        buffer = model.rollout_buffer
        self.dtype = next(self.policy.parameters()).dtype
        self.observations = map_inputs(th.as_tensor, buffer.observations)
        self.starts = th.as_tensor(buffer.episode_starts).to(self.dtype)
        self.actions = th.as_tensor(buffer.actions)
        self.discrete = isinstance(model.action_space, spaces.Discrete)
        self.pi = [th.as_tensor(array[0]).to(self.dtype) for array in (buffer.hidden_states_pi, buffer.cell_states_pi)]
        self.vf = [th.as_tensor(array[0]).to(self.dtype) for array in (buffer.hidden_states_vf, buffer.cell_states_vf)]

    def __iter__(self) -> Any:
        for step in range(len(self.starts)):
            actions = self.actions[step].long().flatten() if self.discrete else self.actions[step].to(self.dtype)
            yield step, map_inputs(lambda tensor, step=step: tensor[step], self.observations), actions, self.starts[step]

    def distributions(self) -> list[tuple[Any, th.Tensor]]:
        """Components, and log-probabilities, of the environments at each step."""
        states, found = tuple(self.pi), []
        for _, observations, actions, starts in self:
            distribution, states = self.policy.get_distribution(observations, states, starts)
            found.append((components(distribution), distribution.log_prob(actions)))
        return found

    def values(self) -> th.Tensor:
        """Shape ``(n_steps, n_envs)``."""
        states, found = tuple(self.vf), []
        policy = self.policy
        lstm = policy.lstm_critic if policy.lstm_critic is not None else policy.lstm_actor
        for _, observations, _, starts in self:
            found.append(policy.predict_values(observations, states, starts).flatten())
            features = policy.extract_features(observations)
            vf_features = features if policy.share_features_extractor else features[1]
            _, states = policy._process_sequence(vf_features, states, starts, lstm)
        return th.stack(found)

    def mean_kl(self, old: list[tuple[Any, th.Tensor]]) -> th.Tensor:
        kls = [joint_kl(p, q) for (p, _), (q, _) in zip(old, self.distributions(), strict=True)]
        return th.stack(kls).mean()


class Case:
    """A model in float64 with a random rollout, and everything that the update makes of it."""

    def __init__(self, name: str, **changes: Any) -> None:
        policy_kwargs = {"features_extractor_class": Double, **changes.pop("policy_kwargs", {})}
        self.model = make_model(name, policy_kwargs=policy_kwargs, **changes)
        self.model.policy.double()
        buffer = self.model.rollout_buffer
        random = np.random.default_rng(0)
        buffer.reset()
        for array in (buffer.observations, buffer.advantages, buffer.returns):
            array[:] = random.normal(size=array.shape)
        for array in (buffer.hidden_states_pi, buffer.cell_states_pi, buffer.hidden_states_vf, buffer.cell_states_vf):
            array[:] = random.normal(size=array.shape)
        # One episode goes on from before, one begins with the rollout, one has the length of the rollout.
        buffer.episode_starts[:] = random.random(buffer.episode_starts.shape) < 0.3
        buffer.episode_starts[:, 0] = 0.0
        buffer.episode_starts[0, 1:] = [1.0, 0.0]
        buffer.actions[:] = np.stack(
            [np.stack([self.model.action_space.sample() for _ in range(N_ENVS)]) for _ in range(N_STEPS)]
        ).reshape(buffer.actions.shape)
        buffer.full = True
        self.rollout = as_double(self.model.adapter.read())
        self.steps = Steps(self.model)
        self.actor = actor_parameters(self.model.policy, self.model.adapter.distribution, self.rollout.select(slice(1)).inputs)

    def surrogate(self, rollout: RolloutBatch | None = None, chunk_size: int | None = None, **kwargs: Any) -> Surrogate:
        rollout = self.rollout if rollout is None else rollout
        layers = kfac_layers(self.model.policy, self.actor)
        return Surrogate(policy_model(self.model.adapter.distribution, self.actor, layers), rollout, chunk_size, **kwargs)

    def preconditioner(self, rollout: RolloutBatch | None = None, chunk_size: int | None = None) -> KFACPreconditioner:
        return KFACPreconditioner(self.surrogate(rollout, chunk_size), 0.1)

    def move(self) -> None:
        with th.no_grad():
            for parameter in self.actor:
                parameter.add_(0.1 * th.randn(parameter.shape, dtype=parameter.dtype))

    def kl_slope(self) -> th.Tensor:
        """Gradient of the mean KL from the present policy, step by step, with its graph."""
        old = [(tuple(map(_detached, parts)), log_prob.detach()) for parts, log_prob in self.steps.distributions()]
        return flatten(th.autograd.grad(self.steps.mean_kl(old), self.actor, create_graph=True))

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.actor)

    def dense(self, product: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
        return th.stack([product(row) for row in th.eye(self.size, dtype=th.float64)])


def as_double(rollout: RolloutBatch) -> RolloutBatch:
    def double(tensor: th.Tensor) -> th.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    weights = rollout.mask.double() / rollout.mask.sum()
    rollout = replace(rollout, inputs=map_inputs(double, rollout.inputs), weights=weights)
    return replace(
        rollout, advantages=rollout.advantages.double(), returns=rollout.returns.double(), actions=double(rollout.actions)
    )


@pytest.fixture(params=["box", "discrete", "multi_discrete", "two_layers", "shared_lstm"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def garbage(rollout: RolloutBatch) -> RolloutBatch:
    """The same rollout with other padding."""
    generator = th.Generator().manual_seed(1)

    def spoil(tensor: th.Tensor) -> th.Tensor:
        if len(tensor) != rollout.n_states or not tensor.is_floating_point():
            return tensor
        noise = th.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        real = rollout.mask.view(-1, *[1] * (tensor.ndim - 1))
        return tensor.where(real, 3.0 * noise)

    assert not rollout.mask.all()
    advantages, returns = spoil(rollout.advantages), spoil(rollout.returns)
    actions = rollout.actions if rollout.actions.ndim == 2 and (rollout.actions % 1 == 0).all() else spoil(rollout.actions)
    return replace(rollout, inputs=map_inputs(spoil, rollout.inputs), actions=actions, advantages=advantages, returns=returns)


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float = 1e-10) -> None:
    th.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


class TestSequences:
    @pytest.mark.parametrize("read_before", [False, True], ids=["fresh", "after_get"])
    @pytest.mark.parametrize("name", ["box", "discrete", "dict", "two_layers", "shared_lstm", "no_critic_lstm"])
    def test_they_give_the_numbers_that_acting_gave(self, name, read_before):
        """Splits at episode starts, first states carried over or reset, and the order of the states are right."""
        model = collect(make_model(name), n_rollouts=2)
        buffer = model.rollout_buffer
        expected = {key: getattr(buffer, key).T.flatten() for key in ("log_probs", "values", "advantages", "returns")}
        assert buffer.episode_starts[1:].any()
        assert not buffer.episode_starts[0].all()
        if read_before:
            next(buffer.get())
        rollout = model.adapter.read()
        real = rollout.mask
        with th.no_grad():
            log_probs = model.adapter.distribution(rollout.inputs).log_prob(rollout.actions)
            values = model.adapter.values(rollout.inputs)
        numbers = {"log_probs": log_probs, "values": values, "advantages": rollout.advantages, "returns": rollout.returns}
        for key, array in expected.items():
            np.testing.assert_allclose(numbers[key][real].numpy(), array, atol=1e-5, err_msg=key)

    def test_states_are_reset_where_an_episode_begins_with_the_rollout(self):
        """A start at the first step of the rollout, with states left over from the episode before."""
        case = Case("box")
        buffer, first = case.model.rollout_buffer, case.rollout.inputs["actor_states"]
        begins = buffer.episode_starts.copy()
        begins[0] = 1.0
        of_env = np.concatenate([[0], np.cumsum(begins.sum(axis=0))])[:N_ENVS].astype(int)  # its first sequence
        for env, sequence in enumerate(of_env):
            goes_on = 1.0 - buffer.episode_starts[0, env]
            assert_close(first[sequence, 0], th.as_tensor(goes_on * buffer.hidden_states_pi[0][:, env]).double())
            assert_close(first[sequence, 1], th.as_tensor(goes_on * buffer.cell_states_pi[0][:, env]).double())
        assert buffer.episode_starts[0].tolist() == [0.0, 1.0, 0.0]
        assert not np.delete(first.numpy(), of_env, axis=0).any()

    def test_weights_and_padding(self, case):
        rollout = case.rollout
        buffer = case.model.rollout_buffer
        begins = buffer.episode_starts.copy()
        begins[0] = 1.0
        assert rollout.n_sequences == begins.sum()
        assert rollout.sequence_length == N_STEPS  # one episode has the length of the rollout
        assert rollout.n_states == rollout.n_sequences * rollout.sequence_length
        assert rollout.mask.sum() == N_STATES
        assert float(rollout.weights.sum()) == pytest.approx(1.0)
        padding = ~rollout.mask.view(-1, N_STEPS)
        assert padding.any()
        observations = rollout.inputs["observations"].view(-1, N_STEPS, 2)
        for row, is_padding in zip(observations, padding, strict=True):
            assert (row[is_padding] == row[~is_padding][-1]).all()

    def test_selection_takes_whole_sequences(self, case):
        rollout = case.rollout
        chosen = th.tensor([3, 0])
        part = rollout.select(chosen)
        assert (part.n_sequences, part.n_states, part.sequence_length) == (2, 2 * N_STEPS, N_STEPS)
        for actual, whole in [
            (part.advantages, rollout.advantages),
            (part.weights, rollout.weights),
            (part.actions, rollout.actions),
            (part.inputs["observations"], rollout.inputs["observations"]),
        ]:
            blocks = whole.split(N_STEPS)
            assert th.equal(actual, th.cat([blocks[3], blocks[0]]))
        assert th.equal(part.inputs["critic_states"], rollout.inputs["critic_states"][chosen])
        assert float(rollout.sample(chosen).weights.sum()) == pytest.approx(1.0)
        assert rollout.subsample(rollout.n_sequences + 5).n_sequences == 1

    @pytest.mark.parametrize(("size", "units"), [(1, 1), (N_STEPS, 1), (2 * N_STEPS, 2), (2 * N_STEPS + 1, 2), (10**6, None)])
    def test_chunks_have_at_least_one_sequence(self, case, size, units):
        chunks = case.rollout.chunks(size)
        assert chunks[0].n_sequences == (units or case.rollout.n_sequences)
        assert sum(chunk.n_sequences for chunk in chunks) == case.rollout.n_sequences
        assert_close(th.cat([chunk.inputs["actor_states"] for chunk in chunks]), case.rollout.inputs["actor_states"])

    def test_advantages_are_normalised_without_padding(self, case):
        real = case.rollout.mask
        for rollout in (case.rollout, garbage(case.rollout)):
            advantages = normalize_advantages(rollout).advantages[real]
            assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-12)
            assert float(advantages.std()) == pytest.approx(1.0, abs=1e-6)


class TestDerivatives:
    def test_fisher_matrix_is_the_dense_hessian_of_the_kl(self):
        case = Case("discrete", policy_kwargs={"lstm_hidden_size": 2, "net_arch": [3]})
        slope = case.kl_slope()
        assert float(slope.detach().abs().max()) < 1e-12
        expected = th.stack([flatten(th.autograd.grad(entry, case.actor, retain_graph=True)) for entry in slope])
        assert_close(case.dense(FisherOperator(case.surrogate(), damping=0.0)), expected)
        assert_close(case.dense(FisherOperator(case.surrogate(), damping=0.5)), expected + 0.5 * th.eye(case.size))

    @pytest.mark.parametrize("chunk_size", [None, 2 * N_STEPS, 1])
    def test_fisher_products_are_those_of_the_hessian_of_the_kl(self, case, chunk_size):
        slope = case.kl_slope()
        fisher = FisherOperator(case.surrogate(chunk_size=chunk_size), damping=0.0)
        for vector in th.randn(3, case.size, dtype=th.float64):
            expected = flatten(th.autograd.grad(slope.dot(vector), case.actor, retain_graph=True))
            assert_close(fisher(vector), expected, 1e-9)
        lstm = [p for name, p in case.model.policy.named_parameters() if name.startswith("lstm_actor")]
        assert all(any(p is q for q in case.actor) for p in lstm)

    @pytest.mark.parametrize("chunk_size", [None, N_STEPS])
    def test_gradient_is_that_of_the_steps(self, case, chunk_size):
        advantages = th.as_tensor(case.model.rollout_buffer.advantages).double()
        found = case.steps.distributions()
        objective = th.stack([th.exp(new - new.detach()) * advantages[step] for step, (_, new) in enumerate(found)]).mean()
        expected = flatten(th.autograd.grad(objective, case.actor))
        assert_close(case.surrogate(chunk_size=chunk_size).gradient(), expected)

    @pytest.mark.parametrize("chunk_size", [None, N_STEPS])
    def test_objective_and_kl_away_from_the_old_policy_are_those_of_the_steps(self, case, chunk_size):
        advantages = th.as_tensor(case.model.rollout_buffer.advantages).double()
        old = [(tuple(map(_detached, parts)), log_prob.detach()) for parts, log_prob in case.steps.distributions()]
        surrogate = case.surrogate(chunk_size=chunk_size)
        case.move()
        new = case.steps.distributions()
        ratios = th.stack([th.exp(q - p) for (_, p), (_, q) in zip(old, new, strict=True)])
        point = surrogate.evaluate()
        assert point.objective == pytest.approx(float((ratios * advantages).mean().detach()))
        assert point.kl == pytest.approx(float(case.steps.mean_kl(old).detach()))
        assert_close(surrogate.ratios()[case.rollout.mask], ratios.T.flatten().detach())

    def test_what_padding_holds_does_not_matter(self, case):
        other = garbage(case.rollout)
        vector = th.randn(case.size, dtype=th.float64)
        results = []
        for rollout in (case.rollout, other):
            surrogate = case.surrogate(rollout, ent_coef=0.01)
            fisher = FisherOperator(surrogate, damping=0.1)
            results.append(
                [
                    surrogate.gradient(),
                    fisher(vector),
                    case.preconditioner(rollout)(vector),
                    th.tensor([surrogate.entropy, *surrogate.start()]),
                ]
            )
        for one, another in zip(*results, strict=True):
            assert_close(one, another)

    def test_chunks_do_not_matter_to_the_preconditioner(self, case):
        vector = th.randn(case.size, dtype=th.float64)
        assert_close(case.preconditioner(chunk_size=N_STEPS)(vector), case.preconditioner()(vector))

    def test_preconditioner_is_positive_definite(self, case):
        inverse = case.dense(case.preconditioner())
        assert_close(inverse, inverse.T)
        assert float(th.linalg.eigvalsh(inverse)[0]) > 0.0

    def test_ratios_of_padding_cannot_overflow(self):
        """A narrow Gaussian gives padding an infinite ratio, and infinity times its weight of 0 would be NaN."""
        case = Case("box")
        with th.no_grad():
            case.model.policy.log_std.fill_(-9.0)
            likely = case.model.adapter.distribution(case.rollout.inputs).mode()
        rollout = garbage(replace(case.rollout, actions=likely))
        surrogate = case.surrogate(rollout)
        with th.no_grad():
            case.model.policy.action_net.bias.add_(1e-4)
        point = surrogate.evaluate()
        assert np.isfinite(point.objective)
        assert np.isfinite(point.kl)


def _detached(part: Any) -> Any:
    family = type(part)
    if family is th.distributions.Normal:
        return family(part.loc.detach(), part.scale.detach())
    return family(logits=part.logits.detach())


class TestCritic:
    @pytest.mark.parametrize("name", ["box", "shared_lstm", "no_critic_lstm"])
    def test_it_has_what_the_policy_has_not(self, name):
        case = Case(name)
        policy = case.model.policy
        critic = critic_parameters(policy, case.model.adapter.values, case.rollout.select(slice(1)).inputs, case.actor)
        names = {name for name, p in policy.named_parameters() if any(p is q for q in critic)}
        own = {"box": "lstm_critic.", "no_critic_lstm": "critic.", "shared_lstm": "mlp_extractor.value_net"}[name]
        assert any(found.startswith(own) for found in names)
        assert not any(found.startswith(("lstm_actor", "action_net", "features_extractor")) for found in names)

    @pytest.mark.parametrize("method", ["gauss_newton", "minibatch"])
    @pytest.mark.parametrize("name", ["box", "shared_lstm", "no_critic_lstm"])
    def test_padding_does_not_matter_and_the_policy_stays(self, name, method):
        fitted = []
        for change in (lambda rollout: rollout, garbage):
            case = Case(name, critic_method=method, learning_rate=0.01)
            actor = flatten(case.actor).clone()
            before = case.steps.values().detach()
            returns = th.as_tensor(case.model.rollout_buffer.returns).double()
            th.manual_seed(0)
            fit = case.model._fit_critic(case.model.adapter, change(case.rollout), case.actor)
            assert fit.succeeded
            assert th.equal(flatten(case.actor), actor)
            after = case.steps.values().detach()
            assert float((after - returns).square().mean()) < float((before - returns).square().mean())
            if method == "gauss_newton":
                assert fit.value_loss == pytest.approx(float((after - returns).square().mean()))
            fitted.append(flatten(case.model.policy.parameters()).detach())
        assert_close(*fitted)

    @pytest.mark.parametrize("batch_size", [1, 2 * N_STEPS])
    def test_minibatches_have_whole_sequences(self, batch_size):
        case = Case("box")
        sizes: list[int] = []

        def values(inputs: Any) -> th.Tensor:
            sizes.append(len(inputs["critic_states"]))
            return case.model.adapter.values(inputs)

        critic = critic_parameters(case.model.policy, case.model.adapter.values, case.rollout.inputs, case.actor)
        optimizer = case.model.policy.optimizer
        fit_minibatches(values, case.rollout, critic=critic, optimizer=optimizer, batch_size=batch_size, n_epochs=1)
        assert max(sizes) == max(batch_size // N_STEPS, 1)
        assert sum(sizes) == case.rollout.n_sequences


def contents(model: RecurrentTRPO) -> dict[str, np.ndarray]:
    buffer = model.rollout_buffer
    names = ["actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns"]
    names += [f"{kind}_states_{which}" for kind in ("hidden", "cell") for which in ("pi", "vf")]
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"all": buffer.observations}
    return {name: getattr(buffer, name).copy() for name in names} | {f"observations {k}": v for k, v in observations.items()}


class TestCollecting:
    @pytest.mark.parametrize(
        ("normalize", "callback_class"),
        [(False, Quiet), (True, Quiet), (True, StopTrainingOnMaxEpisodes)],
        ids=["plain", "normalized", "acting_in_numpy"],
    )
    @pytest.mark.parametrize("name", CASES)
    def test_the_buffer_is_that_of_recurrent_ppos_loop(self, name, normalize, callback_class):
        """The same random numbers are drawn, so the actions are the same too."""
        if normalize and (name == "image" or "dict" in name):
            pytest.skip("VecNormalize is tried on the others")
        filled, states = [], []
        for loop in (RecurrentTRPO.collect_rollouts, RecurrentPPO.collect_rollouts):
            # RecurrentPPO draws gSDE's first noise matrix twice where it is sampled anew.
            model = make_model(name, normalize=normalize, **({"sde_sample_freq": -1} if name == "gsde" else {}))
            th.manual_seed(3)
            collect(model, loop, 2, partial(callback_class, 10**6) if callback_class is not Quiet else Quiet)
            filled.append(contents(model))
            adapter = model.adapter
            adapter.start_rollout(model.env, N_STEPS, -1, is_watched=False)
            assert (adapter.networks is not None) == serves_lstm(model.policy)
            states.append(model._last_lstm_states)
        tolerance = 1e-4 if name == "image" else 1e-5  # SB3's loop hands convolutions transposed images
        for key, array in filled[1].items():
            np.testing.assert_allclose(filled[0][key], array, rtol=tolerance, atol=tolerance, err_msg=key)
        for one, another in zip(states[0], states[1], strict=True):
            for actual, expected in zip(one, another, strict=True):
                assert_close(actual, expected, tolerance)
        assert any(np.abs(filled[0][f"hidden_states_{which}"][0]).sum() > 0 for which in ("pi", "vf"))

    def test_a_truncated_episode_is_worth_its_last_observation_given_all_before(self):
        """By hand, for a time limit in the middle of the rollout and one at its end."""
        model = make_model("discrete")
        collect(model)  # every episode is over after four steps, of nine
        buffer = model.rollout_buffer
        _, callback = model._setup_learn(10**6, Seen())
        assert model.collect_rollouts(model.env, callback, buffer, N_STEPS)
        (seen,) = callback.callbacks if isinstance(callback, CallbackList) else (callback,)
        found = 0
        for step, (rewards, infos) in enumerate(seen.steps):
            for env, info in enumerate(infos):
                extra = float(buffer.rewards[step, env]) - rewards[env]
                if not info.get("TimeLimit.truncated", False):
                    assert extra == pytest.approx(0.0, abs=1e-6)
                    continue
                begun = max(s for s in range(step + 1) if buffer.episode_starts[s, env] or s == 0)
                states = [th.as_tensor(a[begun][:, [env]]) for a in (buffer.hidden_states_vf, buffer.cell_states_vf)]
                states = [state * (1.0 - buffer.episode_starts[begun, env]) for state in states]
                last = info["terminal_observation"][None].astype(np.float32)
                whole = th.as_tensor(np.concatenate([buffer.observations[begun : step + 1, env], last]))
                with th.no_grad():
                    value = model.policy.predict_values(whole, tuple(states), th.zeros(len(whole)))[-1].item()
                assert extra == pytest.approx(0.9 * value, abs=1e-5)
                found += 1
        assert found > 2

    @pytest.mark.parametrize("stop_at", [1, 5, N_STEPS + 2])
    def test_stopped_in_the_middle_it_goes_on_as_recurrent_ppo(self, stop_at):
        filled = []
        for loop in (RecurrentTRPO.collect_rollouts, RecurrentPPO.collect_rollouts):
            model = make_model("box")
            th.manual_seed(3)
            _, callback = model._setup_learn(10**6, Quiet(stop_at))
            while loop(model, model.env, callback, model.rollout_buffer, N_STEPS):
                pass
            collect(model, loop)
            filled.append(contents(model))
        for key, array in filled[1].items():
            np.testing.assert_allclose(filled[0][key], array, rtol=1e-5, atol=1e-5, err_msg=key)

    def test_gsde_noise_is_sampled_anew_as_asked(self):
        model = make_model("gsde", sde_sample_freq=3)
        matrices = []
        forward = model.policy.forward

        def spy(*args: Any) -> Any:
            matrices.append(model.policy.action_dist.exploration_mat.clone())
            return forward(*args)

        model.policy.forward = spy
        collect(model)
        changed = [not th.equal(one, other) for one, other in zip(matrices[1:], matrices[:-1], strict=True)]
        assert changed == [(step + 1) % 3 == 0 for step in range(N_STEPS - 1)]

    def test_values_are_scaled_with_return_scaling(self):
        model = make_model("box", return_scaling=True)
        model.return_moments.update(np.array([0.0, 8.0]))
        assert model._value_scale == pytest.approx(4.0)
        collect(model)
        outputs = Steps(model).values().detach().numpy()
        np.testing.assert_allclose(model.rollout_buffer.values, 4.0 * outputs, rtol=1e-4, atol=1e-5)

    def test_a_buffer_of_the_users_own_is_filled_by_its_own_methods(self):
        added = []

        class Own(RecurrentRolloutBuffer):
            def add(self, *args: Any, **kwargs: Any) -> None:
                added.append(self.pos)
                super().add(*args, **kwargs)

        model = make_model("box", rollout_buffer_class=Own)
        model.learn(2 * N_STATES)
        assert added == 2 * list(range(N_STEPS))
        with pytest.raises(ValueError, match="return_scaling=True is not allowed"):
            make_model("box", rollout_buffer_class=Own, return_scaling=True)


class Seen(BaseCallback):
    """Rewards and infos of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[np.ndarray, list[dict[str, Any]]]] = []

    def _on_step(self) -> bool:
        self.steps.append((self.locals["rewards"].copy(), self.locals["infos"]))
        return True


class Watched(RecurrentTRPO):
    """Computes the joint KL of every update anew, step by step, and keeps what the update logged."""

    def train(self) -> None:
        steps = Steps(self)
        with th.no_grad():
            old = steps.distributions()
        super().train()
        with th.no_grad():
            self.kls.append(float(steps.mean_kl(old)))
        self.logs.append(dict(self.logger.name_to_value))


def watch(name: str, **changes: Any) -> Watched:
    model = make_model(name, **changes)
    model.__class__ = Watched
    model.kls, model.logs = [], []
    return model


class TestUpdate:
    @pytest.mark.parametrize("name", sorted(set(CASES) - {"gsde"}))
    def test_the_logged_kl_is_the_joint_kl_and_at_most_target_kl(self, name):
        model = watch(name)
        model.learn(3 * N_STATES)
        assert len(model.kls) == 3
        for kl, log in zip(model.kls, model.logs, strict=True):
            assert log["train/kl_divergence_loss"] == pytest.approx(kl, rel=2e-3, abs=2e-6)
            assert log["train/kl_divergence_loss"] <= model.target_kl
            assert np.isfinite(log["train/value_loss"])
        assert max(model.kls) > 0.0
        assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())

    @pytest.mark.parametrize(
        "arguments",
        [
            {"max_batch_size": 2 * N_STEPS},
            {"critic_method": "minibatch"},
            {"cg_preconditioner": None},
            {"sub_sampling_factor": 3},
            {"policy_batch_size": 12, "n_policy_updates": 2},
            {"return_scaling": True, "ent_coef": 0.01},
            {"use_sde": True},
        ],
        ids=str,
    )
    def test_every_way_to_compute_the_step_stays_inside_the_trust_region(self, arguments):
        model = make_model("box", **arguments)
        for _ in range(3):
            model.learn(N_STATES, reset_num_timesteps=False)
            log = model.logger.name_to_value
            assert 0.0 <= log["train/kl_divergence_loss"] <= 0.05
        assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())

    @pytest.mark.parametrize("method", ["gauss_newton", "minibatch"])
    def test_chunks_of_whole_sequences_change_nothing_but_rounding(self, method, monkeypatch):
        read = RecurrentAdapter.read
        monkeypatch.setattr(RecurrentAdapter, "read", lambda adapter: as_double(read(adapter)))
        results = []
        for max_batch_size in (None, 2 * N_STEPS):
            model = Case("box", critic_method=method, max_batch_size=max_batch_size).model
            model._setup_learn(10**6, None)
            th.manual_seed(0)
            model.train()
            assert model.last_update.kl_divergence_loss.last > 0.0
            results.append(flatten(model.policy.parameters()).detach())
        assert_close(*results, 1e-8)

    def test_the_lstm_is_trained(self):
        model = make_model("discrete")
        before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
        model.learn(N_STATES)
        for name, parameter in model.policy.named_parameters():
            if name.startswith(("lstm_actor.", "lstm_critic.")):
                assert not th.equal(parameter, before[name]), name


class Recall(gym.Env):
    """The first observation says which action pays for the rest of the episode; those after it say nothing."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.steps = int(self.np_random.integers(2)), 0
        return np.array([2.0 * self.cue - 1.0], dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(1, dtype=np.float32), float(action == self.cue), self.steps == 5, False, {}


class TestAlgorithm:
    def test_it_learns_to_remember(self):
        env = DummyVecEnv([lambda: Monitor(Recall())] * 8)
        kwargs = {"lstm_hidden_size": 16, "net_arch": [16]}
        model = RecurrentTRPO("MlpLstmPolicy", env, n_steps=32, seed=0, device="cpu", policy_kwargs=kwargs)
        model.learn(6_000)
        mean, _ = evaluate_policy(model, DummyVecEnv([lambda: Monitor(Recall())]), 20)
        assert mean > 4.5  # 3 without a memory

    def test_predictions_carry_the_state_and_forget_it_at_episode_starts(self):
        model = collect(make_model("box"))
        steps = Steps(model)
        with th.no_grad():
            expected = [parts[0].loc.numpy() for parts, _ in steps.distributions()]
        state = tuple(tensor.numpy() for tensor in steps.pi)
        for (_, observations, _, starts), mean in zip(steps, expected, strict=True):
            actions, state = model.predict(observations.numpy(), state, starts.numpy().astype(bool), deterministic=True)
            np.testing.assert_allclose(actions, np.clip(mean, -0.5, 0.5), atol=1e-5)
        alone, state = model.predict(np.zeros(2, dtype=np.float32), deterministic=True)
        assert alone.shape == (2,)
        assert state[0].shape == (1, 1, 3)

    @pytest.mark.parametrize("name", ["box", "dict", "shared_lstm"])
    def test_saved_and_loaded_it_predicts_the_same_and_goes_on(self, name, tmp_path):
        model = make_model(name, target_kl=0.02).learn(N_STATES)
        model.save(tmp_path / "model")
        again = RecurrentTRPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
        assert again.target_kl == 0.02
        observation = model.observation_space.sample()
        np.testing.assert_array_equal(
            again.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
        )
        again.learn(N_STATES, reset_num_timesteps=False)
        assert again.num_timesteps == 2 * N_STATES
        without_env = RecurrentTRPO.load(tmp_path / "model", device="cpu")
        without_env.predict(observation)

    def test_eval_callback(self):
        model = make_model("box")
        eval_env = DummyVecEnv([lambda: Monitor(Wander(VECTOR, BOX))])
        callback = EvalCallback(eval_env, eval_freq=5, n_eval_episodes=2, verbose=0)
        model.learn(N_STATES, callback)
        assert np.isfinite(callback.last_mean_reward)

    def test_run_name_and_defaults(self, tmp_path):
        model = make_model("box", tensorboard_log=str(tmp_path)).learn(1)
        assert [path.name for path in tmp_path.iterdir()] == ["RecurrentTRPO_1"]
        assert "train/kl_divergence_loss" in model.logger.name_to_value
        assert RecurrentTRPO("MlpLstmPolicy", "CartPole-v1").n_steps == 128

    def test_extractors_are_shared_with_the_lstm_alone(self):
        assert not make_model("dict").policy.share_features_extractor
        assert make_model("dict_shared_lstm").policy.share_features_extractor
        assert not make_model("image").policy.share_features_extractor

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"action_bound": "tanh"}, "action_bound='tanh' is not allowed"),
            (
                {"policy": ActorCriticPolicy},
                "policy=ActorCriticPolicy is not allowed: it must derive from sb3-contrib's Recurrent",
            ),
            (
                {"rollout_buffer_class": RecurrentDictRolloutBuffer},
                "rollout_buffer_class=RecurrentDictRolloutBuffer is not allowed: .* RecurrentRolloutBuffer",
            ),
            ({"n_steps": 0}, "n_steps=0 is not allowed"),
        ],
    )
    def test_what_is_not_allowed_is_refused_in_words(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            make_model("box", **arguments)


class TestWithoutCudnn:
    def test_only_these_modules_are_kept_from_it(self):
        seen = []
        inside, outside = nn.Linear(2, 2), nn.Linear(2, 2)
        for module in (inside, outside):
            module.register_forward_pre_hook(lambda *_: seen.append(th.backends.cudnn.enabled))
        before = th.backends.cudnn.enabled
        with without_cudnn([inside]):
            outside(inside(th.zeros(1, 2)))
            assert th.backends.cudnn.enabled == before
        inside(th.zeros(1, 2))
        assert seen[-2:] == [before, before]

    def test_an_error_leaves_it_as_it_was(self):
        before = th.backends.cudnn.enabled
        with pytest.raises(RuntimeError), without_cudnn([module := nn.Linear(2, 2)]):
            module(th.zeros(1, 3))
        assert th.backends.cudnn.enabled == before

    @pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("name", ["box", "image", "no_critic_lstm"])
    def test_updates_run_on_a_gpu(self, name):
        observation_space, action_space, arguments, more = CASES[name]
        model = RecurrentTRPO(
            arguments.get("policy", "MlpLstmPolicy"),
            make_env(observation_space, action_space),
            n_steps=N_STEPS,
            batch_size=N_ENVS,
            device="cuda",
            policy_kwargs=more,
        )
        model.learn(3 * N_STATES)
        assert 0.0 < model.last_update.kl_divergence_loss.last <= 0.05
        assert th.backends.cudnn.enabled


def test_read_sequences_keeps_types() -> None:
    buffer = make_model("dict").rollout_buffer
    rollout = read_sequences(buffer, BOX)
    assert rollout.actions.dtype == rollout.weights.dtype == th.float32
    assert set(rollout.inputs["observations"]) == {"place", "gear"}
