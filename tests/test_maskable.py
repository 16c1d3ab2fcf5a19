"""MaskableTRPO: masks in the distributions and in the Fisher matrix, valid actions only, and all the rest."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from support.models import policy_model
from torch import nn

from sb3_trpo import MaskableTRPO
from sb3_trpo.adapters.models import actor_mlp, actor_parameters, components, critic_mlp
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.distributions import has_closed_form
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner, kfac_layers
from sb3_trpo.optim.mlp import MLP
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.rollouts.samplers import make_numpy_sampler

N_STEPS, N_ENVS, N_STATES = 11, 3, 12
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
DICT = spaces.Dict({"place": VECTOR, "gear": spaces.Discrete(4)})
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)

#: Name ↦ action space, and the number of choices in each of its parts.
ACTIONS: dict[str, tuple[spaces.Space, list[int]]] = {
    "discrete": (spaces.Discrete(5), [5]),
    "multi_discrete": (spaces.MultiDiscrete([2, 4, 3]), [2, 4, 3]),
    "multi_binary": (spaces.MultiBinary(3), [2, 2, 2]),
}


def draw_masks(random: np.random.Generator, choices: list[int], n_states: int) -> np.ndarray:
    """At least one choice of each part is allowed."""
    parts = [random.random((n_states, n)) < 0.5 for n in choices]
    for part in parts:
        part[np.arange(n_states), random.integers(part.shape[1], size=n_states)] = True
    return np.concatenate(parts, axis=1)


class Maze(gym.Env):
    """Random observations and masks. An invalid action is an error."""

    def __init__(self, observation_space: spaces.Space, action: str) -> None:
        self.observation_space = observation_space
        self.action_space, self.choices = ACTIONS[action]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self._observe(), {}

    def _observe(self) -> Any:
        self.masks = draw_masks(self.np_random, self.choices, 1)[0]
        return self.observation_space.sample()

    def action_masks(self) -> np.ndarray:
        return self.masks

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = np.atleast_1d(action).astype(int)
        places = np.cumsum([0, *self.choices[:-1]]) + chosen
        assert self.masks[places].all(), (action, self.masks)
        draw = self.np_random.random()
        return self._observe(), float(np.sum(chosen)) + draw, draw < 0.1, False, {}


def make_env(action: str, observation_space: spaces.Space = VECTOR, limit: int = 5) -> DummyVecEnv:
    def make() -> gym.Env:
        return Monitor(gym.wrappers.TimeLimit(Maze(observation_space, action), limit))

    return DummyVecEnv([make] * N_ENVS)


class Double(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


class LearnedDouble(Double):
    """No chain: the products go the general way."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.layer = nn.Linear(self.features_dim, self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(super().forward(observations)))


class Case:
    """A model in float64, a rollout with masks, and π computed over the valid choices alone."""

    def __init__(self, action: str, extractor: type[FlattenExtractor]) -> None:
        kwargs = {"net_arch": [5], "features_extractor_class": extractor, "share_features_extractor": False}
        self.model = make_model(action, policy_kwargs=kwargs)
        self.choices = ACTIONS[action][1]
        self.policy = self.model.policy.double()
        with th.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(0.3 * th.randn_like(parameter))
        self.masks = th.as_tensor(draw_masks(np.random.default_rng(0), self.choices, N_STATES))
        inputs = {"observations": th.randn(N_STATES, 3), "action_masks": self.masks}
        with th.no_grad():
            actions = self.model.adapter.distribution(inputs).sample()
        advantages, returns = th.randn(2, N_STATES, dtype=th.float64)
        weights = th.full((N_STATES,), 1.0 / N_STATES, dtype=th.float64)
        self.rollout = RolloutBatch(inputs, actions, advantages, returns, weights)
        self.actor = actor_parameters(self.policy, self.model.adapter.distribution, inputs)

    def surrogate(self, chunk_size: int | None = None, mlp: MLP | None = None) -> Surrogate:
        layers = kfac_layers(self.policy, self.actor)
        return Surrogate(policy_model(self.model.adapter.distribution, self.actor, layers, mlp), self.rollout, chunk_size)

    def by_hand(self) -> list[list[th.Tensor]]:
        """Log-probabilities of the valid choices, for each state and part."""
        policy = self.policy
        features = policy.pi_features_extractor(self.rollout.inputs["observations"])
        logits = policy.action_net(policy.mlp_extractor.forward_actor(features))
        return [
            [
                part[mask].log_softmax(dim=0)
                for part, mask in zip(row.split(self.choices), masks.split(self.choices), strict=True)
            ]
            for row, masks in zip(logits, self.masks, strict=True)
        ]

    def mean_kl(self, old: list[list[th.Tensor]]) -> th.Tensor:
        pairs = [(p, q) for ps, qs in zip(old, self.by_hand(), strict=True) for p, q in zip(ps, qs, strict=True)]
        return sum((p.exp() * (p - q)).sum() for p, q in pairs) / N_STATES

    def log_probs(self) -> th.Tensor:
        found = []
        for state, parts in enumerate(self.by_hand()):
            taken = self.rollout.actions[state].flatten().long()
            allowed = self.masks[state].split(self.choices)
            found.append(sum(p[m[:a].sum()] for p, m, a in zip(parts, allowed, taken, strict=True)))
        return th.stack(found)

    def old(self) -> list[list[th.Tensor]]:
        return [[part.detach() for part in parts] for parts in self.by_hand()]

    def move(self) -> None:
        with th.no_grad():
            for parameter in self.actor:
                parameter.add_(0.2 * th.randn_like(parameter))


@pytest.fixture(params=[Double, LearnedDouble], ids=["chain", "general"])
def extractor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[FlattenExtractor]:
    if request.param is Double:  # else only SB3's own extractor, which is of float32, is known to be flat
        monkeypatch.setattr("sb3_trpo.adapters.models.FlattenExtractor", Double)
    return request.param


@pytest.fixture(params=ACTIONS)
def case(request: pytest.FixtureRequest, extractor: type[FlattenExtractor]) -> Case:
    return Case(request.param, extractor)


def make_model(action: str, observation_space: spaces.Space = VECTOR, **changes: Any) -> MaskableTRPO:
    policy = "MultiInputPolicy" if observation_space is DICT else "CnnPolicy" if observation_space is IMAGE else "MlpPolicy"
    env = changes.pop("env", None) or make_env(action, observation_space)
    arguments = {
        "policy": policy,
        "n_steps": N_STEPS,
        "batch_size": N_ENVS,
        "gamma": 0.9,
        "seed": 0,
        "device": "cpu",
        **changes,
    }
    return MaskableTRPO(env=env, **arguments)


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float = 1e-10) -> None:
    th.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


class TestDerivatives:
    @pytest.mark.parametrize("chunk_size", [None, 5])
    def test_fisher_matrix_is_the_dense_hessian_of_the_kl(self, case, chunk_size):
        kl = case.mean_kl(case.old())
        slope = flatten(th.autograd.grad(kl, case.actor, create_graph=True))
        expected = th.stack([flatten(th.autograd.grad(entry, case.actor, retain_graph=True)) for entry in slope])
        assert case.surrogate(chunk_size).has_closed_form
        for mlp in (None, actor_mlp(case.policy)):
            fisher = FisherOperator(case.surrogate(chunk_size, mlp), 0.0)
            assert_close(th.stack([fisher(row) for row in th.eye(len(expected), dtype=th.float64)]), expected)

    def test_gradient_objective_and_kl_are_those_of_the_valid_choices(self, case):
        old, old_log_probs = case.old(), case.log_probs().detach()
        surrogate = case.surrogate()
        objective = (th.exp(case.log_probs() - old_log_probs) * case.rollout.advantages).mean()
        assert_close(surrogate.gradient(), flatten(th.autograd.grad(objective, case.actor)))
        entropy = -sum((part.exp() * part).sum() for parts in old for part in parts) / N_STATES
        assert surrogate.entropy == pytest.approx(float(entropy))
        case.move()
        with th.no_grad():
            ratios = th.exp(case.log_probs() - old_log_probs)
            assert_close(surrogate.ratios(), ratios)
            point = surrogate.evaluate()
            assert point.objective == pytest.approx(float((ratios * case.rollout.advantages).mean()))
            assert point.kl == pytest.approx(float(case.mean_kl(old)))

    def test_invalid_actions_have_no_curvature(self, extractor):
        """An action that is never valid might as well not be there."""
        case = Case("discrete", extractor)
        case.rollout.inputs["action_masks"][:, 2] = False
        case.rollout.inputs["action_masks"][:, 3] = True
        case.rollout.actions[:] = 3
        surrogate = case.surrogate()
        vector = flatten(
            th.randn_like(p) * (th.arange(5) == 2).view(-1, *[1] * (p.ndim - 1))
            if any(p is q for q in case.policy.action_net.parameters())
            else th.zeros_like(p)
            for p in case.actor
        )
        assert vector.any()
        for mlp in (None, actor_mlp(case.policy)):
            assert float(FisherOperator(case.surrogate(mlp=mlp), 0.0)(vector).abs().max()) < 1e-15
        assert abs(float(surrogate.gradient().dot(vector))) < 1e-15

    def test_preconditioner_is_positive_definite_and_finite(self, case):
        inverse = KFACPreconditioner(case.surrogate(), 0.1)
        size = sum(parameter.numel() for parameter in case.actor)
        dense = th.stack([inverse(row) for row in th.eye(size, dtype=th.float64)])
        assert_close(dense, dense.T)
        assert float(th.linalg.eigvalsh(dense)[0]) > 0.0

    def test_components_of_a_maskable_distribution(self, case):
        parts = components(case.model.adapter.distribution(case.rollout.inputs))
        assert len(parts) == len(case.choices)
        assert has_closed_form(parts)
        for part, mask in zip(parts, case.masks.split(case.choices, dim=1), strict=True):
            assert not part.probs[~mask].any()

    def test_the_standard_policy_is_a_chain(self, extractor):
        case = Case("multi_binary", extractor)
        assert (
            (actor_mlp(case.policy) is not None) == (critic_mlp(case.policy) is not None) == (extractor is not LearnedDouble)
        )


class Recorder(BaseCallback):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.actions: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.actions.append(self.locals["actions"].copy())
        return self.n_calls != self.stop_at


def contents(model: MaskableTRPO) -> dict[str, np.ndarray]:
    buffer = model.rollout_buffer
    names = ["actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns", "action_masks"]
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"all": buffer.observations}
    return {name: getattr(buffer, name).copy() for name in names} | {f"observations {k}": v for k, v in observations.items()}


def given(policy: MaskableActorCriticPolicy, actions: list[np.ndarray]) -> Callable[..., Any]:
    """A forward pass that takes given actions."""
    remaining = iter(actions)

    def forward(obs: Any, deterministic: bool = False, action_masks: Any = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        chosen = th.as_tensor(next(remaining))
        values, log_probs, _ = policy.evaluate_actions(obs, chosen, action_masks)
        return chosen, values, log_probs

    return forward


class TestCollecting:
    @pytest.mark.parametrize("use_masking", [True, False])
    @pytest.mark.parametrize(
        ("action", "observation_space"),
        [
            ("discrete", VECTOR),
            ("multi_discrete", VECTOR),
            ("multi_binary", VECTOR),
            ("discrete", DICT),
            ("multi_binary", IMAGE),
        ],
    )
    def test_the_buffer_is_that_of_maskable_ppos_loop_with_the_same_actions(self, action, observation_space, use_masking):
        filled, recorder = [], Recorder()
        for loop in (MaskableTRPO.collect_rollouts, MaskablePPO.collect_rollouts):
            env = make_env(action, observation_space)
            if not use_masking:
                for single in env.envs:
                    single.unwrapped.step = lambda _, maze=single.unwrapped: Maze.step(maze, valid_action(maze))
            model = make_model(action, observation_space, env=env)
            with th.no_grad():
                model.policy.action_net.weight.mul_(50.0)
            if filled:
                model.policy.forward = given(model.policy, recorder.actions)
            _, callback = model._setup_learn(10**6, Recorder() if filled else recorder)
            for _ in range(2):
                assert loop(model, model.env, callback, model.rollout_buffer, N_STEPS, use_masking)
            filled.append(contents(model))
        for key, array in filled[1].items():
            np.testing.assert_allclose(filled[0][key], array, rtol=1e-5, atol=1e-5, err_msg=key)
        assert filled[0]["action_masks"].all() == (not use_masking)

    @pytest.mark.parametrize("is_lean", [True, False], ids=["lean", "general"])
    @pytest.mark.parametrize("action", ACTIONS)
    def test_no_action_is_invalid(self, action, is_lean):
        """The environment raises at the first, of more than 10,000 by the lean actor."""
        n_steps = 3_500 if is_lean else 300
        activation = nn.Tanh if is_lean else nn.Softplus
        model = make_model(action, n_steps=n_steps, policy_kwargs={"activation_fn": activation})
        assert (make_numpy_sampler(model.policy, actor_mlp(model.policy), 1, 1) is not None) == is_lean
        with th.no_grad():
            model.policy.action_net.weight.mul_(100.0)
        _, callback = model._setup_learn(10**6, Recorder())
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
        assert not model.rollout_buffer.action_masks.all()

    @pytest.mark.parametrize("action", ACTIONS)
    def test_the_lean_actor_samples_from_the_policys_law(self, action):
        model = make_model(action)
        with th.no_grad():
            model.policy.action_net.weight.mul_(100.0)
        n = 40_000
        observations = np.tile(np.random.default_rng(0).normal(size=3).astype(np.float32), (n, 1))
        masks = np.tile(draw_masks(np.random.default_rng(1), ACTIONS[action][1], 1), (n, 1))
        actions = make_numpy_sampler(model.policy, actor_mlp(model.policy), 1, n)(observations, 0, masks).reshape(n, -1)
        parts = components(model.policy.get_distribution(th.as_tensor(observations[:1]), masks[:1]))
        for dimension, part in enumerate(parts):
            expected = part.probs[0].detach().numpy()
            found = np.bincount(actions[:, dimension].astype(int), minlength=len(expected)) / n
            assert (np.abs(found - expected) <= 5.0 * np.sqrt(expected * (1.0 - expected) / n) + 1e-12).all()

    def test_a_policy_with_a_forward_of_its_own_is_asked_at_every_step(self):
        asked = []

        class Own(MaskableActorCriticPolicy):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                asked.append(kwargs["action_masks"].copy())
                return super().forward(*args, **kwargs)

        model = make_model("discrete", policy=Own)
        model.learn(N_STEPS * N_ENVS)
        np.testing.assert_array_equal(np.concatenate(asked), model.rollout_buffer.action_masks.reshape(-1, 5).astype(bool))
        with pytest.raises(ValueError, match="return_scaling=True is not allowed"):
            make_model("discrete", policy=Own, return_scaling=True)

    def test_a_buffer_of_the_users_own_is_asked_for_its_samples(self):
        class Own(MaskableRolloutBuffer):
            def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
                samples = super()._get_samples(*args, **kwargs)
                return samples._replace(returns=samples.returns + 100.0)

        model = make_model("multi_discrete", rollout_buffer_class=Own)
        model.learn(N_STEPS * N_ENVS)
        rollout = model.adapter.read()
        assert float(rollout.returns.min()) > 50.0
        assert rollout.inputs["action_masks"].dtype == th.bool
        assert model.last_update.kl_divergence_loss.last > 0.0

    def test_masking_without_masks_is_refused(self):
        model = MaskableTRPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
        with pytest.raises(ValueError, match=r"use_masking=True is not allowed with this environment: .* ActionMasker"):
            model.learn(8)
        assert model.learn(8, use_masking=False).num_timesteps == 8

    def test_masks_come_through_wrappers(self):
        env = VecNormalize(DummyVecEnv([make_wrapped] * 2))
        model = MaskableTRPO("MlpPolicy", env, n_steps=16, batch_size=8, seed=0, device="cpu").learn(64)
        assert not model.rollout_buffer.action_masks.all()


def make_wrapped() -> gym.Env:
    """Masks by the wrapper."""
    env = Maze(VECTOR, "discrete")
    return Monitor(ActionMasker(gym.wrappers.TimeLimit(env, 5), lambda wrapped: wrapped.unwrapped.masks))


def valid_action(maze: Maze) -> np.ndarray:
    parts = np.split(maze.masks, np.cumsum(maze.choices)[:-1])
    return np.array([part.argmax() for part in parts])


class Watched(MaskableTRPO):
    """Computes the joint KL of every update anew, over the valid choices, and keeps what the update logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kls: list[float] = []
        self.logs: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        old = self._log_probs()
        super().train()
        new = self._log_probs()
        kls = [(p.exp() * (p - q)).where(mask, 0.0).sum() for (p, mask), (q, _) in zip(old, new, strict=True)]
        self.kls.append(float(sum(kls) / (self.n_steps * self.n_envs)))
        self.logs.append(dict(self.logger.name_to_value))

    @th.no_grad()
    def _log_probs(self) -> list[tuple[th.Tensor, th.Tensor]]:
        buffer, policy = self.rollout_buffer, self.policy
        observations = th.as_tensor(buffer.observations.reshape(-1, *buffer.obs_shape))
        features = policy.extract_features(observations)
        latent = policy.mlp_extractor.forward_actor(features if policy.share_features_extractor else features[0])
        masks = th.as_tensor(buffer.action_masks.reshape(-1, buffer.mask_dims) > 0.5)
        choices = getattr(policy.action_dist, "action_dims", None) or [policy.action_dist.action_dim]
        logits = policy.action_net(latent).double().where(masks, -th.inf).split(choices, dim=1)
        return [(part.log_softmax(dim=1), mask) for part, mask in zip(logits, masks.split(choices, dim=1), strict=True)]


class TestUpdate:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"max_batch_size": 4},
            {"critic_method": "minibatch"},
            {"cg_preconditioner": None, "sub_sampling_factor": 3},
            {"policy_batch_size": 10, "n_policy_updates": 2, "ent_coef": 0.01},
            {"return_scaling": True},
            {"target_kl": 0.5, "line_search_max_iter": 30},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("action", ACTIONS)
    def test_the_logged_kl_is_that_of_the_valid_choices_and_at_most_target_kl(self, action, arguments):
        arguments = {"n_steps": N_STEPS, "batch_size": N_ENVS, "seed": 0, "device": "cpu", **arguments}
        model = Watched("MlpPolicy", make_env(action), **arguments).learn(3 * N_STEPS * N_ENVS)
        assert len(model.kls) == 3
        for kl, log in zip(model.kls, model.logs, strict=True):
            assert log["train/kl_divergence_loss"] == pytest.approx(kl, rel=2e-3, abs=2e-6)
            assert log["train/kl_divergence_loss"] <= model.target_kl
        assert max(model.kls) > 0.0
        assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())

    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("observation_space", [DICT, IMAGE], ids=["dict", "image"])
    def test_observations_of_other_kinds(self, observation_space, share):
        model = make_model("multi_binary", observation_space, policy_kwargs={"share_features_extractor": share})
        model.learn(2 * N_STEPS * N_ENVS)
        assert 0.0 < model.last_update.kl_divergence_loss.last <= 0.05
        assert not make_model("discrete", observation_space).policy.share_features_extractor

    def test_a_state_with_one_valid_action_has_no_say(self):
        model = make_model("discrete", env=DummyVecEnv([lambda: Monitor(OneWay())] * 2), n_steps=16, batch_size=16)
        before = flatten(model.policy.action_net.parameters()).detach().clone()
        model.learn(32)
        assert th.equal(flatten(model.policy.action_net.parameters()).detach(), before)
        assert model.logger.name_to_value["train/line_search"] == "skipped"


class OneWay(Maze):
    """There is always but one thing to do."""

    def __init__(self) -> None:
        super().__init__(VECTOR, "discrete")

    def _observe(self) -> Any:
        self.masks = np.arange(5) == self.np_random.integers(5)
        return self.observation_space.sample()


class TestAlgorithm:
    @pytest.mark.parametrize(
        ("make", "n_steps"),
        [
            (lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=15), 3_000),
            (lambda: InvalidActionEnvMultiDiscrete([4, 3], n_invalid_actions=3), 3_000),
            (lambda: InvalidActionEnvMultiBinary(3, n_invalid_actions=2), 3_000),
        ],
        ids=ACTIONS,
    )
    def test_it_learns(self, make, n_steps):
        np.random.seed(0)  # noqa: NPY002 (the generator that these environments draw their masks from)
        env = DummyVecEnv([lambda: Monitor(make())] * 4)
        model = MaskableTRPO("MlpPolicy", env, n_steps=128, gamma=0.4, seed=0, device="cpu").learn(n_steps)
        mean, _ = evaluate_policy(model, DummyVecEnv([lambda: Monitor(make())]), 5)
        assert mean > 90.0  # of 100

    def test_predictions_are_valid(self):
        model = make_model("multi_discrete")
        random, offsets = np.random.default_rng(0), np.array([0, 2, 6])
        for deterministic in (True, False):
            masks = draw_masks(random, [2, 4, 3], 50)
            observations = random.normal(size=(50, 3)).astype(np.float32)
            actions, _ = model.predict(observations, deterministic=deterministic, action_masks=masks)
            assert masks[np.arange(50)[:, None], actions + offsets].all()
        single, _ = model.predict(observations[0], action_masks=masks[0])
        assert single.shape == (3,)
        free, _ = model.predict(observations, deterministic=False)
        assert not masks[np.arange(50)[:, None], free + offsets].all()

    @pytest.mark.parametrize("action", ACTIONS)
    def test_saved_and_loaded_it_predicts_the_same_and_goes_on(self, action, tmp_path):
        model = make_model(action, target_kl=0.02).learn(N_STEPS * N_ENVS)
        model.save(tmp_path / "model")
        again = MaskableTRPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
        assert again.target_kl == 0.02
        masks = draw_masks(np.random.default_rng(0), ACTIONS[action][1], 1)[0]
        observation = np.ones(3, dtype=np.float32)
        actions = [m.predict(observation, deterministic=True, action_masks=masks)[0] for m in (model, again)]
        np.testing.assert_array_equal(*actions)
        again.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
        assert again.num_timesteps == 2 * N_STEPS * N_ENVS

    def test_eval_callback(self):
        callback = MaskableEvalCallback(DummyVecEnv([make_wrapped]), eval_freq=5, n_eval_episodes=2, verbose=0)
        make_model("discrete").learn(N_STEPS * N_ENVS, callback)
        assert np.isfinite(callback.last_mean_reward)

    def test_run_name(self, tmp_path):
        make_model("discrete", tensorboard_log=str(tmp_path)).learn(1)
        assert [path.name for path in tmp_path.iterdir()] == ["MaskableTRPO_1"]

    def test_callbacks_stop_it(self):
        model, recorder = make_model("discrete"), Recorder(stop_at=3)
        model.learn(10**4, recorder)
        assert model.num_timesteps == 3 * N_ENVS

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"policy": ActorCriticPolicy},
                "policy=ActorCriticPolicy is not allowed: it must derive from sb3-contrib's Maskable",
            ),
            (
                {"rollout_buffer_class": MaskableDictRolloutBuffer},
                "rollout_buffer_class=MaskableDictRolloutBuffer is not allowed: .* MaskableRolloutBuffer",
            ),
            ({"action_bound": "tanh"}, "is not allowed with action_bound='tanh'"),
            ({"use_sde": True}, "continuous actions"),
            ({"gamma": 2}, "gamma=2 is not allowed"),
        ],
    )
    def test_what_is_not_allowed_is_refused_in_words(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            make_model("discrete", **arguments)

    def test_box_actions_are_refused_in_words(self):
        with pytest.raises(ValueError, match=r"the action space Box.* is not allowed: it must be Discrete"):
            MaskableTRPO("MlpPolicy", "Pendulum-v1", device="cpu")


def test_a_rollout_keeps_masks_with_their_states() -> None:
    case = Case("discrete", Double)
    index = th.tensor([4, 1])
    part = case.rollout.select(index)
    assert th.equal(part.inputs["action_masks"], case.masks[index])
    assert replace(part, sequence_length=1).n_sequences == 2
