"""One update after another: what moves, what stays, what is logged, and what SB3's users may rely on."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from support.arguments import effective
from torch import nn

import sb3_trpo.trpo
from sb3_trpo import TRPO

VECTOR = spaces.Box(-2.0, 2.0, (3,))
BOX = spaces.Box(-1.0, 1.0, (2,))
DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
N_STEPS = 32
CRITIC_METHODS = ("gauss_newton", "minibatch")


class ScriptedEnv(gym.Env):
    """Random observations, episodes of ten steps, a reward that is a function of the steps taken so far and the action."""

    def __init__(
        self,
        reward: Callable[[int, Any], float] = lambda step, action: float(np.mean(action)),
        observation_space: spaces.Space = VECTOR,
        action_space: spaces.Space = BOX,
    ) -> None:
        self.reward, self.observation_space, self.action_space = reward, observation_space, action_space
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return self.observation_space.sample(), self.reward(self.n_steps, action), False, self.n_steps % 10 == 0, {}


class HookedTRPO(TRPO):
    """Lets a test look at the model, or spoil its rollout, before each update; keeps the log of every update."""

    before_train: Callable[["HookedTRPO"], None] = staticmethod(lambda model: None)

    def train(self) -> None:
        self.before_train(self)
        self.actor_before, self.critic_before = actor_of(self), critic_of(self)
        super().train()
        log = {key: value for key, value in self.logger.name_to_value.items() if not key.startswith("time/")}
        self.logs = [*getattr(self, "logs", []), log]


def make(
    env: Any = None, policy: Any = "MlpPolicy", *, before_train: Callable[[HookedTRPO], None] | None = None, **kwargs: Any
) -> HookedTRPO:
    defaults = {"n_steps": N_STEPS, "batch_size": 16, "n_critic_updates": 2, "seed": 0, "device": "cpu"}
    model = HookedTRPO(policy, ScriptedEnv() if env is None else env, **effective(defaults | kwargs))
    if before_train is not None:
        model.before_train = before_train
    return model


def is_critics(name: str) -> bool:
    """Whether a parameter of SB3's own policies belongs to the critic alone."""
    return name.startswith(("value_net", "mlp_extractor.value_net", "vf_features_extractor"))


def actor_of(model: TRPO) -> dict[str, th.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.policy.named_parameters() if not is_critics(name)}


def critic_of(model: TRPO) -> dict[str, th.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.policy.named_parameters() if is_critics(name)}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """Bit for bit, names included."""
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


def all_finite(model: TRPO) -> bool:
    states = [value for state in model.policy.optimizer.state.values() for value in state.values() if th.is_tensor(value)]
    return all(bool(th.isfinite(tensor).all()) for tensor in [*model.policy.parameters(), *states])


# ---- the log


def test_every_key_of_sb3_contrib_and_our_own_are_logged() -> None:
    theirs = sb3_contrib.TRPO("MlpPolicy", ScriptedEnv(), n_steps=N_STEPS, batch_size=16, device="cpu").learn(N_STEPS)
    ours = make().learn(N_STEPS)

    own = "backtracks step_length expected_improvement actual_improvement gradient_norm cg_iterations cg_residual cg_status"
    own += " line_search entropy target_kl is_critic_fit_success"
    assert {f"train/{key}" for key in own.split()} | set(theirs.logger.name_to_value) <= {
        *ours.logger.name_to_value,
        "train/learning_rate",
    }


def test_logged_numbers_describe_the_update() -> None:
    model = make(n_steps=256)
    model.learn(2 * 256)

    for n_updates, log in enumerate(model.logs, start=1):
        assert log["train/n_updates"] == n_updates
        assert log["train/is_line_search_success"] == 1.0
        assert log["train/line_search"] == "accepted"
        assert log["train/cg_status"] in {"converged", "iteration bound"}
        assert 1 <= log["train/cg_iterations"] <= model.cg_max_steps
        assert 0.0 <= log["train/cg_residual"] < 1.0
        assert 0 <= log["train/backtracks"] < model.line_search_max_iter
        # Normalised advantages have mean 0, so that L(θ_old) = 0 and its growth is L(θ) itself.
        assert log["train/policy_objective"] == pytest.approx(log["train/actual_improvement"], abs=1e-6)
        assert log["train/actual_improvement"] == pytest.approx(log["train/expected_improvement"], rel=0.3)
        assert log["train/gradient_norm"] > 0.0
        assert log["train/step_length"] > 0.0
    # log σ = -0.5 at the start; the entropy of a Gaussian is ½ log(2πe σ²) a dimension.
    assert model.logs[0]["train/entropy"] == pytest.approx(math.log(2 * math.pi * math.e) - 2 * 0.5, rel=1e-5)
    assert model.logs[1]["train/std"] == pytest.approx(model.policy.log_std.exp().mean().item())


def test_a_step_that_leaves_the_trust_region_comes_back_into_it() -> None:
    model = make(ScriptedEnv(lambda step, action: math.sin(step)), target_kl=1.0, cg_damping=1e-3)
    log = model.learn(N_STEPS).logs[0]
    assert log["train/backtracks"] >= 1
    assert 0.0 < log["train/kl_divergence_loss"] <= 1.0


@pytest.mark.parametrize("action_space", [BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_actions_that_paid_become_likelier(action_space: spaces.Space) -> None:
    model = make(ScriptedEnv(action_space=action_space), gamma=0.0, n_steps=128)
    likelihoods = []

    def log_prob_of_good_actions() -> float:
        rollout = next(model.rollout_buffer.get(None))
        actions = rollout.actions.flatten() if isinstance(action_space, spaces.Discrete) else rollout.actions
        with th.no_grad():
            _, log_prob, _ = model.policy.evaluate_actions(rollout.observations, actions)
        order = rollout.returns.argsort(descending=True)
        return log_prob[order[:32]].mean().item()

    model.before_train = lambda _: likelihoods.append(log_prob_of_good_actions())
    model.learn(128)
    likelihoods.append(log_prob_of_good_actions())

    assert likelihoods[1] > likelihoods[0] + 0.01


# ---- the rollout


@pytest.mark.parametrize(
    ("action_space", "kwargs"),
    [
        (BOX, {}),
        (BOX, {"use_sde": True, "sde_sample_freq": 1}),
        (spaces.Discrete(4), {}),
        (spaces.MultiDiscrete([2, 3]), {}),
        (spaces.MultiBinary(3), {}),
        (BOX, {"policy_kwargs": {"activation_fn": nn.ELU}}),
    ],
    ids=["box", "gsde", "discrete", "multi_discrete", "multi_binary", "another_activation"],
)
def test_actions_are_drawn_from_the_policy(action_space: spaces.Space, kwargs: dict[str, Any]) -> None:
    def check(model: HookedTRPO) -> None:
        buffer = model.rollout_buffer
        surprise = -buffer.log_probs.flatten().astype(float)
        states = th.as_tensor(buffer.observations.reshape(-1, 3))
        with th.no_grad():
            entropy = model.policy.get_distribution(states).entropy().mean().item()
        # E[-log π(a|s)] is the entropy: 4 standard errors.
        assert surprise.mean() == pytest.approx(entropy, abs=4.0 * float(surprise.std()) / len(surprise) ** 0.5)

    model = make(ScriptedEnv(action_space=action_space), n_steps=1024, before_train=check, **kwargs)
    with th.no_grad():
        model.policy.action_net.weight *= 100.0  # far from uniform
        if isinstance(action_space, spaces.Box):
            model.policy.log_std -= 1.0
    model.learn(1024)


class RemembersObservations(ScriptedEnv):
    """Keeps the last observation of every episode."""

    def __init__(self) -> None:
        super().__init__(lambda step, action: 1.0)
        self.last_observations: list[np.ndarray] = []

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if truncated:
            self.last_observations.append(observation)
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("max_batch_size", [None, 7])
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_rollout_holds_the_numbers_of_sb3(max_batch_size: int | None, use_sde: bool) -> None:
    env = RemembersObservations()

    def check(model: HookedTRPO) -> None:
        ours, theirs = model.rollout_buffer, copy.deepcopy(model.rollout_buffer)
        states, actions = th.as_tensor(ours.observations.reshape(-1, 3)), th.as_tensor(ours.actions.reshape(-1, 2))
        with th.no_grad():
            values, log_probs, _ = model.policy.evaluate_actions(states, actions)
            last_values = model.policy.predict_values(th.as_tensor(model._last_obs))
            final_values = model.policy.predict_values(th.as_tensor(np.stack(env.last_observations))).flatten().numpy()
        assert ours.values.flatten() == pytest.approx(values.flatten().numpy(), abs=1e-5)
        assert ours.log_probs.flatten() == pytest.approx(log_probs.numpy(), abs=1e-4)

        truncated = np.zeros(N_STEPS, dtype=bool)
        truncated[9::10] = True
        assert (ours.rewards.flatten()[~truncated] == 1.0).all()
        assert ours.rewards.flatten()[truncated] == pytest.approx(1.0 + 0.9 * final_values, abs=1e-5)
        theirs.compute_returns_and_advantage(last_values, model._last_episode_starts)
        assert ours.advantages == pytest.approx(theirs.advantages, abs=1e-5)
        assert ours.returns == pytest.approx(theirs.returns, abs=1e-5)

    make(env, before_train=check, gamma=0.9, max_batch_size=max_batch_size, use_sde=use_sde).learn(N_STEPS)


# ---- what must not move


@pytest.mark.parametrize(
    ("action_space", "kwargs"),
    [(BOX, {}), (BOX, {"use_sde": True}), (spaces.Discrete(4), {}), (spaces.MultiBinary(3), {})],
    ids=["box", "gsde", "discrete", "multi_binary"],
)
def test_a_failed_line_search_restores_the_policy_bit_for_bit(action_space: spaces.Space, kwargs: dict[str, Any]) -> None:
    env = ScriptedEnv(lambda step, action: math.sin(step), action_space=action_space)
    model = make(env, target_kl=1e9, line_search_max_iter=1, **kwargs).learn(N_STEPS)

    log = model.logs[0]
    assert log["train/is_line_search_success"] == 0.0
    assert log["train/line_search"] == "rejected"
    assert log["train/backtracks"] == 1
    assert (log["train/kl_divergence_loss"], log["train/actual_improvement"], log["train/step_length"]) == (0.0, 0.0, 0.0)
    assert same(actor_of(model), model.actor_before)
    assert not same(critic_of(model), model.critic_before)


class LinearExtractor(FlattenExtractor):
    """A features extractor with parameters."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.layer = nn.Linear(self.features_dim, self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(super().forward(observations))


EXTRACTOR = {"features_extractor_class": LinearExtractor}
HEAVY_SGD = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9, "weight_decay": 0.1}}
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 8}}


@pytest.mark.parametrize(
    ("policy", "policy_kwargs"),
    [
        ("MlpPolicy", {}),
        ("MlpPolicy", {**EXTRACTOR, "share_features_extractor": True}),
        ("MlpPolicy", {**EXTRACTOR, "share_features_extractor": False}),
        ("MlpPolicy", {**EXTRACTOR, **HEAVY_SGD}),
        ("CnnPolicy", SMALL_CNN),
        ("CnnPolicy", {**SMALL_CNN, "share_features_extractor": True}),
    ],
    ids=["mlp", "shared_extractor", "separate_extractors", "weight_decay", "cnn", "shared_cnn"],
)
def test_the_critic_learns_and_never_moves_the_policy(policy: str, policy_kwargs: dict[str, Any]) -> None:
    def update(**kwargs: Any) -> HookedTRPO:
        env = ScriptedEnv(observation_space=VECTOR if policy == "MlpPolicy" else IMAGE)
        minibatch_only = () if kwargs["critic_method"] == "minibatch" else HEAVY_SGD
        own = {name: value for name, value in policy_kwargs.items() if name not in minibatch_only}
        return make(env, policy, policy_kwargs=own, **kwargs).learn(N_STEPS)

    unfitted = update(critic_method="minibatch", learning_rate=0.0)
    assert same(critic_of(unfitted), unfitted.critic_before)
    assert not same(actor_of(unfitted), unfitted.actor_before)
    for method in CRITIC_METHODS:
        fitted = update(critic_method=method, learning_rate=1e-2)
        assert not same(critic_of(fitted), fitted.critic_before), method
        assert same(actor_of(fitted), actor_of(unfitted)), method


@pytest.mark.parametrize(("policy", "space"), [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_the_critic_gets_an_extractor_of_its_own_unless_told_otherwise(policy: str, space: spaces.Space) -> None:
    for shared, kwargs in ((False, {}), (True, {"policy_kwargs": {"share_features_extractor": True}})):
        networks = make(ScriptedEnv(observation_space=space), policy, **kwargs).policy
        assert (networks.vf_features_extractor is networks.pi_features_extractor) == shared


@pytest.mark.parametrize("method", CRITIC_METHODS)
def test_a_critic_on_shared_features_still_fits_the_returns(method: str) -> None:
    kwargs = {"critic_method": method, "learning_rate": 1e-2, "n_critic_updates": 10, "gamma": 0.0}
    model = make(ScriptedEnv(lambda step, action: 1.0), policy_kwargs=EXTRACTOR, **kwargs).learn(10 * N_STEPS)

    assert model.logs[-1]["train/value_loss"] < 0.01  # of returns that are all 1


def zero_value_net(model: TRPO) -> None:
    for parameter in model.policy.value_net.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize(("reward", "normalize_advantage"), [(0.0, True), (0.0, False), (0.1, True), (1e6, True)])
def test_rewards_that_carry_no_information_leave_the_actor_alone(reward: float, normalize_advantage: bool) -> None:
    model = make(ScriptedEnv(lambda step, action: reward), gamma=0.0, normalize_advantage=normalize_advantage)
    zero_value_net(model)
    model.learn(N_STEPS)

    assert same(actor_of(model), model.actor_before)
    assert model.logs[0]["train/line_search"] == "skipped"
    assert model.logs[0]["train/is_line_search_success"] == 0.0
    assert model.logs[0]["train/kl_divergence_loss"] == 0.0
    assert same(critic_of(model), model.critic_before) == (reward == 0.0)


def test_a_single_action_leaves_the_actor_alone() -> None:
    env = ScriptedEnv(lambda step, action: math.sin(step), action_space=spaces.Discrete(1))
    model = make(env).learn(N_STEPS)

    assert same(actor_of(model), model.actor_before)
    assert model.logs[0]["train/line_search"] == "skipped"


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_advantages_that_are_not_finite_leave_the_actor_alone(
    rubbish: float, where: int | slice, normalize_advantage: bool
) -> None:
    def spoil(model: HookedTRPO) -> None:
        model.rollout_buffer.advantages[where] = rubbish

    model = make(before_train=spoil, normalize_advantage=normalize_advantage).learn(N_STEPS)

    assert same(actor_of(model), model.actor_before)
    assert all_finite(model)
    assert model.logs[0]["train/is_line_search_success"] == 0.0
    assert model.logs[0]["train/kl_divergence_loss"] == 0.0


@pytest.mark.parametrize("method", CRITIC_METHODS)
def test_returns_that_are_not_finite_leave_critic_and_optimizer_alone(method: str) -> None:
    states = []

    def spoil(model: HookedTRPO) -> None:
        states.append(copy.deepcopy(model.policy.optimizer.state_dict()["state"]))
        if len(states) == 2:
            model.rollout_buffer.returns[3] = np.nan

    model = make(before_train=spoil, critic_method=method).learn(2 * N_STEPS)

    assert [log["train/is_critic_fit_success"] for log in model.logs] == [1.0, 0.0]
    assert same(critic_of(model), model.critic_before)
    assert all_finite(model)
    before, after = states[1], model.policy.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:stable_baselines3", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("method", CRITIC_METHODS)
@pytest.mark.parametrize("at", [1, N_STEPS // 2, N_STEPS])
def test_after_one_gigantic_reward_the_critic_goes_on_learning(at: int, method: str) -> None:
    env = ScriptedEnv(lambda step, action: 1e30 if step == at else 1.0)
    model = make(env, critic_method=method)
    finite = []
    model.before_train = lambda model: finite.append(all_finite(model))
    model.learn(2 * N_STEPS)

    assert finite == [True, True]
    assert all_finite(model)
    assert [log["train/is_critic_fit_success"] for log in model.logs] == [0.0, 1.0]
    assert not same(critic_of(model), model.critic_before)


# ---- arguments at work


@pytest.mark.parametrize("observation_space", [VECTOR, DICT], ids=["box", "dict"])
def test_sub_sampling_changes_the_fisher_matrix_and_nothing_else(observation_space: spaces.Space) -> None:
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    full, thin = (
        make(ScriptedEnv(observation_space=observation_space), policy, sub_sampling_factor=factor).learn(N_STEPS)
        for factor in (1, 5)
    )

    for key in ("gradient_norm", "entropy", "value_loss", "explained_variance"):
        assert full.logs[0][f"train/{key}"] == thin.logs[0][f"train/{key}"], key
    assert same(full.actor_before, thin.actor_before)
    assert full.logs[0]["train/step_length"] != thin.logs[0]["train/step_length"]
    assert not same(actor_of(full), actor_of(thin))


@pytest.mark.parametrize("factor", [1, 2])
def test_curvature_of_a_sample_changes_directions_and_lengths_and_nothing_else(factor: int) -> None:
    full, sampled, again = (
        make(curvature_batch_size=size, sub_sampling_factor=factor, **{"cg_max_steps": 3}).learn(N_STEPS)
        for size in (None, 12, 12)
    )

    for key in ("gradient_norm", "entropy", "explained_variance"):
        assert full.logs[0][f"train/{key}"] == sampled.logs[0][f"train/{key}"], key
    for key in ("step_length", "value_loss"):  # the critic's curvature is from a sample too
        assert full.logs[0][f"train/{key}"] != sampled.logs[0][f"train/{key}"], key
        assert again.logs[0][f"train/{key}"] == sampled.logs[0][f"train/{key}"], key
    assert sampled.logs[0]["train/kl_divergence_loss"] <= sampled.target_kl
    assert same(actor_of(again), actor_of(sampled))


@pytest.mark.parametrize(
    ("space", "given", "sampled"), [(VECTOR, None, None), (VECTOR, 9, 9), (IMAGE, None, 256), (IMAGE, 9, 9)]
)
def test_curvature_is_from_all_states_unless_given_or_images(
    space: spaces.Space, given: int | None, sampled: int | None
) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": SMALL_CNN} if space is IMAGE else {}
    model = make(ScriptedEnv(observation_space=space), "CnnPolicy" if space is IMAGE else "MlpPolicy", **kwargs)
    model.curvature_batch_size = given
    assert model._curvature_size == sampled


def test_update_draws_no_random_numbers_unless_it_samples() -> None:
    for size, draws in ((None, False), (N_STEPS, False), (9, True)):
        model = make(curvature_batch_size=size).learn(N_STEPS)
        state = th.get_rng_state()
        model.train()
        assert th.equal(th.get_rng_state(), state) is not draws, size


@pytest.mark.parametrize("observation_space", [VECTOR, IMAGE, DICT], ids=["box", "image", "dict"])
@pytest.mark.parametrize("factor", [1, 3])
def test_the_size_of_batches_changes_nothing_but_rounding(observation_space: spaces.Space, factor: int) -> None:
    policy = "MultiInputPolicy" if observation_space is DICT else "CnnPolicy" if observation_space is IMAGE else "MlpPolicy"
    # Solvers amplify rounding from iteration to iteration, so let them do few.
    kwargs = {"policy_kwargs": SMALL_CNN if observation_space is IMAGE else {}, "sub_sampling_factor": factor}
    kwargs |= {"cg_max_steps": 3, "cg_residual_tol": 0.0}
    whole, cut = (
        make(ScriptedEnv(observation_space=observation_space), policy, max_batch_size=size, **kwargs).learn(N_STEPS)
        for size in (N_STEPS, 12)
    )

    for key, value in whole.logs[0].items():
        if not isinstance(value, str):
            assert cut.logs[0][key] == pytest.approx(value, rel=1e-2, abs=1e-5), key
    for name, parameter in whole.policy.named_parameters():
        assert th.allclose(dict(cut.policy.named_parameters())[name], parameter, atol=1e-4), name


def test_schedules_set_the_trust_region_and_the_learning_rate_of_every_update() -> None:
    model = make(
        target_kl=lambda progress: 0.02 * progress, learning_rate=lambda progress: 1e-2 * progress, critic_method="minibatch"
    )
    rates = []

    def note_rate(model: HookedTRPO) -> None:
        rates.append(model.policy.optimizer.param_groups[0]["lr"])

    model.before_train = note_rate
    model.learn(4 * N_STEPS)

    assert [log["train/target_kl"] for log in model.logs] == pytest.approx([0.015, 0.01, 0.005, 0.0])
    assert [log["train/learning_rate"] for log in model.logs] == pytest.approx([0.0075, 0.005, 0.0025, 0.0])
    assert rates[1:] == pytest.approx([0.0075, 0.005, 0.0025])
    for log in model.logs[:3]:
        assert 0.0 < log["train/kl_divergence_loss"] <= log["train/target_kl"]
    assert model.logs[3]["train/line_search"] == "skipped"
    assert same(actor_of(model), model.actor_before)
    assert same(critic_of(model), model.critic_before)


def test_a_number_as_target_kl_is_logged() -> None:
    assert make(target_kl=0.03).learn(N_STEPS).logs[0]["train/target_kl"] == 0.03


# ---- networks of the user's own


class CrossNamedNetworks(nn.Module):
    """Actor and critic with each other's names."""

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.value_trunk = nn.Sequential(nn.Linear(features_dim, 6), nn.Tanh())
        self.policy_net = nn.Sequential(nn.Linear(features_dim, 5), nn.ReLU())
        self.latent_dim_pi, self.latent_dim_vf = 6, 5

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.value_trunk(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.policy_net(features)

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)


class CrossNamedPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = CrossNamedNetworks(self.features_dim)


@pytest.mark.parametrize("optimizer_class", [th.optim.SGD, th.optim.RMSprop, th.optim.AdamW, None])
def test_modules_may_have_any_name_and_the_critic_any_optimizer(optimizer_class: type[th.optim.Optimizer] | None) -> None:
    policy_kwargs = EXTRACTOR | ({"optimizer_class": optimizer_class} if optimizer_class else {})

    def moved(**kwargs: Any) -> set[str]:
        model = make(policy=CrossNamedPolicy, policy_kwargs=policy_kwargs, **kwargs)
        before = {name: tensor.detach().clone() for name, tensor in model.policy.named_parameters()}
        model.learn(N_STEPS)
        assert type(model.policy.optimizer) is (optimizer_class or th.optim.Adam)
        after = dict(model.policy.named_parameters())
        return {name.rsplit(".", 1)[0] for name in before if not th.equal(before[name], after[name])}

    actor = moved(critic_method="minibatch", learning_rate=0.0)
    critic = moved(critic_method="minibatch" if optimizer_class else "gauss_newton", target_kl=lambda progress: 0.0)

    assert actor == {"log_std", "action_net", "mlp_extractor.value_trunk.0", "features_extractor.layer"}
    assert critic == {"value_net", "mlp_extractor.policy_net.0"}


# ---- SB3's tools


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, {"critic_method": "minibatch"}], ids=["box", "gsde", "minibatch"])
def test_the_same_seed_gives_the_same_run(kwargs: dict[str, Any]) -> None:
    first, again = (make("Pendulum-v1", **kwargs).learn(3 * N_STEPS) for _ in range(2))
    other = make("Pendulum-v1", seed=1, **kwargs).learn(3 * N_STEPS)

    assert same(first.policy.state_dict(), again.policy.state_dict())
    assert first.logs == again.logs
    assert not same(first.policy.state_dict(), other.policy.state_dict())


def test_a_continued_run_counts_on_and_a_new_run_starts_over() -> None:
    model = make().learn(N_STEPS)
    assert model.learn(N_STEPS, reset_num_timesteps=False).num_timesteps == 2 * N_STEPS
    assert model.learn(N_STEPS).num_timesteps == N_STEPS
    assert [log["train/n_updates"] for log in model.logs] == [1, 2, 3]


def test_rollouts_are_always_completed() -> None:
    model = make().learn(N_STEPS + 1)

    assert model.num_timesteps == 2 * N_STEPS
    assert len(model.logs) == 2


def test_callbacks_evaluate_save_and_stop(tmp_path: Path) -> None:
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1.0, verbose=0)
    evaluate = EvalCallback(
        Monitor(IdentityEnv(2)),
        callback_on_new_best=stop,
        eval_freq=2 * N_STEPS,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path),
        verbose=0,
    )
    checkpoint = CheckpointCallback(save_freq=N_STEPS, save_path=str(tmp_path), name_prefix="trpo")
    model = TRPO("MlpPolicy", IdentityEnv(2), n_steps=N_STEPS, seed=0, device="cpu")
    model.learn(100 * N_STEPS, callback=[checkpoint, evaluate])

    assert model.num_timesteps == 2 * N_STEPS
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [2 * N_STEPS]
    # At the time of the evaluation the second update was still to come: both files hold the policy of that time.
    best = TRPO.load(tmp_path / "best" / "best_model", device="cpu")
    saved = TRPO.load(tmp_path / f"trpo_{2 * N_STEPS}_steps", device="cpu")
    assert same(best.policy.state_dict(), saved.policy.state_dict())
    assert saved.num_timesteps == 2 * N_STEPS


def test_tensorboard_gets_the_numbers_of_every_update(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make(tensorboard_log=str(tmp_path)).learn(3 * N_STEPS)

    events = reader.EventAccumulator(str(tmp_path / "TRPO_1")).Reload()
    assert [event.step for event in events.Scalars("train/kl_divergence_loss")] == [2 * N_STEPS, 3 * N_STEPS]
    assert {"train/value_loss", "train/policy_objective", "train/cg_iterations"} <= set(events.Tags()["scalars"])


def test_normalised_vector_environments_train() -> None:
    env = VecNormalize(make_vec_env(ScriptedEnv, n_envs=3))
    model = make(env).learn(2 * 3 * N_STEPS)

    assert len(model.logs) == 2
    assert all(0.0 < log["train/kl_divergence_loss"] <= 0.05 for log in model.logs)
    assert env.ret_rms.count > 2 * 3 * N_STEPS


def test_environments_in_processes_give_the_same_run_as_in_one() -> None:
    parameters = []
    for kwargs in ({}, {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}}):
        env = make_vec_env("Pendulum-v1", n_envs=2, **kwargs)
        parameters.append(make(env).learn(2 * 2 * N_STEPS).policy.state_dict())
        env.close()

    assert same(*parameters)


# ---- repr


def test_repr_names_algorithm_policy_and_trust_region() -> None:
    model = make(target_kl=0.02)
    assert repr(model) == "HookedTRPO(MlpPolicy, target_kl=0.02, num_timesteps=0)"
    assert repr(model.learn(N_STEPS)) == f"HookedTRPO(MlpPolicy, target_kl=0.02, num_timesteps={N_STEPS})"
    model.target_kl = LinearSchedule(0.05, 0.0, 1.0)
    assert "target_kl=LinearSchedule(start=0.05, end=0.0, end_fraction=1.0)" in repr(model)


def test_repr_of_an_unfinished_model_is_possible() -> None:
    assert repr(TRPO.__new__(TRPO)) == "TRPO()"


@pytest.mark.parametrize(("preconditioner", "tolerance"), [("kfac", 0.05), (None, 0.01)])
def test_tolerance_of_conjugate_gradients_is_smaller_without_kronecker_factors(preconditioner, tolerance, monkeypatch):
    found = []
    solve = sb3_trpo.trpo.conjugate_gradient

    def spy(*args, rtol, **kwargs):
        found.append(rtol)
        return solve(*args, rtol=rtol, **kwargs)

    monkeypatch.setattr(sb3_trpo.trpo, "conjugate_gradient", spy)
    make(cg_preconditioner=preconditioner).learn(1)
    make(cg_preconditioner=preconditioner, cg_residual_tol=0.2).learn(1)
    assert found == [tolerance, 0.2]


def skew():
    return lambda v: th.cat([v[1:], -v[:1]])


def rolled():
    return lambda v: v - 2.0 * v.roll(1)


def once(afterwards):
    """Positive definite for its first vector, the gradient."""
    factors = itertools.chain([1.0], itertools.repeat(afterwards))
    return lambda v: next(factors) * v


@pytest.mark.parametrize("make", [skew, rolled, partial(once, -1.0), partial(once, math.nan)])
def test_a_preconditioner_that_is_not_symmetric_ends_no_training(make, monkeypatch):
    monkeypatch.setattr(sb3_trpo.trpo, "make_preconditioner", lambda *_: make())
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu", policy_kwargs={"net_arch": [4]})
    before = copy.deepcopy(model.policy.action_net.weight)
    model.learn(12 * 64)
    assert model._failed_updates == 0
    assert model.logger.name_to_value["train/kl_divergence_loss"] <= model.target_kl
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert not th.equal(model.policy.action_net.weight, before)
