"""On every space SB3 supports, updates end with finite parameters, inside the trust region, and log the KL they have."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import Beta, Categorical, Normal

from sb3_trpo import TRPO


class RandomEnv(gym.Env):
    """Random observations, episodes of seven steps, a reward that is large where the action is large."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(np.mean(action) + self.np_random.normal())
        return self.observation_space.sample(), reward, False, self.steps == 7, {}


class WatchedTRPO(TRPO):
    """Computes the joint KL of every update anew, and keeps what the update logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kls: list[float] = []
        self.logs: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        old = distribution_parameters(self)
        super().train()
        self.kls.append(kl_by_hand(old, distribution_parameters(self)))
        self.logs.append(dict(self.logger.name_to_value))


def distribution_parameters(model: TRPO) -> list[tuple[str, Any, Any]]:
    """Family and parameters of π in every state of the rollout, in float64."""
    model.policy.set_training_mode(False)
    with th.no_grad():
        distribution = model.policy.get_distribution(rollout_observations(model)).distribution
    found = []
    for part in distribution if isinstance(distribution, list) else [distribution]:
        if isinstance(part, Normal):
            found.append(("normal", part.loc.double().numpy(), part.scale.double().numpy()))
        elif isinstance(part, Categorical):
            found.append(("categorical", part.logits.double().softmax(dim=1).numpy(), None))
        else:
            found.append(("bernoulli", part.logits.double().sigmoid().numpy(), None))
    return found


def rollout_observations(model: TRPO) -> Any:
    buffer = model.rollout_buffer
    if isinstance(buffer, DictRolloutBuffer):
        return {key: as_states(array, buffer) for key, array in buffer.observations.items()}
    return as_states(buffer.observations, buffer)


def as_states(array: np.ndarray, buffer: RolloutBuffer) -> th.Tensor:
    return th.as_tensor(array if buffer.generator_ready else array.reshape(-1, *array.shape[2:]))


def kl_by_hand(old: list[tuple[str, Any, Any]], new: list[tuple[str, Any, Any]]) -> float:
    """KL(old‖new), summed over components and action dimensions, averaged over states."""
    total = 0.0
    for (family, p, p_scale), (_, q, q_scale) in zip(old, new, strict=True):
        if family == "normal":
            kl = np.log(q_scale / p_scale) + (p_scale**2 + (p - q) ** 2) / (2 * q_scale**2) - 0.5
        elif family == "categorical":
            kl = p * np.log(p / q)
        else:
            kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        total += kl.sum(axis=1).mean()
    return float(total)


def assert_inside_trust_region(model: WatchedTRPO, target_kl: float) -> None:
    assert model.kls
    for kl, log in zip(model.kls, model.logs, strict=True):
        assert log["train/kl_divergence_loss"] == pytest.approx(kl, rel=2e-3, abs=2e-6)
        assert log["train/kl_divergence_loss"] <= target_kl
        assert (kl > 0.0) == (log["train/is_line_search_success"] == 1.0)
        assert math.isfinite(log["train/value_loss"])
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


VECTOR = spaces.Box(-2.0, 2.0, (3,))
BOX = spaces.Box(-1.0, 1.0, (3,))
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 8}}

#: Name ↦ action space, arguments of the model, arguments of the policy.
ACTIONS: dict[str, tuple[spaces.Space, dict[str, Any], dict[str, Any]]] = {
    "box": (BOX, {}, {}),
    "box_float64": (spaces.Box(-3.0, 1.0, (2,), dtype=np.float64), {}, {}),
    "gsde": (BOX, {"use_sde": True, "sde_sample_freq": 4}, {}),
    "gsde_squashed": (BOX, {"use_sde": True}, {"squash_output": True, "full_std": False, "use_expln": True}),
    "discrete": (spaces.Discrete(4), {}, {}),
    "discrete_1": (spaces.Discrete(1), {}, {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3, 4]), {}, {}),
    "multi_binary": (spaces.MultiBinary(3), {}, {}),
}

#: Name ↦ observation space, policy, arguments of the policy.
OBSERVATIONS: dict[str, tuple[spaces.Space, str, dict[str, Any]]] = {
    "float32": (VECTOR, "MlpPolicy", {}),
    "float64": (spaces.Box(-2.0, 2.0, (3,), dtype=np.float64), "MlpPolicy", {}),
    "matrix": (spaces.Box(-2.0, 2.0, (2, 2)), "MlpPolicy", {}),
    "uint8": (spaces.Box(0, 255, (3,), dtype=np.uint8), "MlpPolicy", {}),
    "int32": (spaces.Box(-5, 5, (3,), dtype=np.int32), "MlpPolicy", {}),
    "int64": (spaces.Box(-5, 5, (3,), dtype=np.int64), "MlpPolicy", {}),
    "discrete": (spaces.Discrete(5), "MlpPolicy", {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), "MlpPolicy", {}),
    "multi_binary": (spaces.MultiBinary(4), "MlpPolicy", {}),
    "image": (spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8), "CnnPolicy", SMALL_CNN),
    "image_channels_first": (spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8), "CnnPolicy", SMALL_CNN),
    "dict": (
        spaces.Dict(
            {
                "vector": VECTOR,
                "image": spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8),
                "gear": spaces.Discrete(3),
                "dials": spaces.MultiDiscrete([2, 3]),
                "switches": spaces.MultiBinary(2),
            }
        ),
        "MultiInputPolicy",
        {"features_extractor_kwargs": {"cnn_output_dim": 8}},
    ),
}


def train(observation: str, action: str, **kwargs: Any) -> WatchedTRPO:
    """Two updates on random observations."""
    action_space, action_kwargs, policy_kwargs = ACTIONS[action]
    observation_space, policy, more_policy_kwargs = OBSERVATIONS[observation]
    arguments: dict[str, Any] = {"n_steps": 8, "seed": 0, "device": "cpu"}
    arguments |= action_kwargs | kwargs
    arguments["policy_kwargs"] = {"net_arch": [8]} | policy_kwargs | more_policy_kwargs
    model = WatchedTRPO(policy, RandomEnv(observation_space, action_space), **arguments)
    return model.learn(2 * arguments["n_steps"])


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (observation, action)
        for observation in OBSERVATIONS
        for action in ACTIONS
        if observation != "image_channels_first" or action == "box"  # images take the time, and SB3 transposes them first
    ],
)
def test_every_combination_of_spaces_trains_inside_the_trust_region(observation: str, action: str) -> None:
    model = train(observation, action)

    assert len(model.kls) == 2
    assert_inside_trust_region(model, target_kl=0.05)
    if action == "discrete_1":
        assert model.kls == [0.0, 0.0]
    elif "gsde" not in action:  # gSDE's σ depends on features that SB3 detaches: on images a step may be rejected
        assert max(model.kls) > 0.0


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"discrete_1"}))
def test_accepted_steps_use_the_trust_region_up(action: str) -> None:
    # For a small δ and little damping the quadratic model of the KL is nearly exact, so that the full step ends near δ.
    model = train("float32", action, target_kl=1e-3, cg_damping=1e-3, n_steps=64)

    assert_inside_trust_region(model, target_kl=1e-3)
    assert all(log["train/is_line_search_success"] == 1.0 for log in model.logs)
    assert all(kl > 0.5e-3 for kl in model.kls)


@pytest.mark.parametrize("target_kl", [1e-4, 0.05, 0.5])
@pytest.mark.parametrize("action", ["box", "gsde", "discrete", "multi_discrete", "multi_binary"])
def test_logged_kl_is_the_joint_kl_and_at_most_target_kl(action: str, target_kl: float) -> None:
    model = train("float32", action, target_kl=target_kl, n_steps=64, line_search_max_iter=30)

    assert_inside_trust_region(model, target_kl)
    assert max(model.kls) > 0.0


@pytest.mark.parametrize(
    "kwargs", [{"cg_preconditioner": None}, {"max_batch_size": 3}, {"critic_method": "minibatch", "batch_size": 4}]
)
@pytest.mark.parametrize(
    ("observation", "action"),
    [("float32", "box"), ("float32", "gsde"), ("float32", "multi_discrete"), ("dict", "multi_binary"), ("image", "discrete")],
)
def test_every_way_to_compute_the_step_stays_inside_the_trust_region(
    observation: str, action: str, kwargs: dict[str, Any]
) -> None:
    assert_inside_trust_region(train(observation, action, **kwargs), target_kl=0.05)


@pytest.mark.parametrize("observation", ["float32", "dict"])
def test_a_sub_sampled_fisher_matrix_keeps_the_kl_of_all_states_inside_the_trust_region(observation: str) -> None:
    assert_inside_trust_region(train(observation, "box", sub_sampling_factor=5), target_kl=0.05)


class NoisyExtractor(FlattenExtractor):
    """Dropout and batch norm in front of actor and critic."""

    def __init__(self, observation_space: spaces.Box, dropout: float) -> None:
        super().__init__(observation_space)
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.BatchNorm1d(self.features_dim))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(super().forward(observations))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("target_kl", [0.05, 1e6])
def test_batch_norm_statistics_move_inside_the_trust_region_or_not_at_all(
    dropout: float, share: bool, target_kl: float
) -> None:
    kwargs = {"features_extractor_class": NoisyExtractor, "features_extractor_kwargs": {"dropout": dropout}}
    kwargs |= {"share_features_extractor": share}
    statistics: list[dict[str, bool]] = []

    class KeepsStatistics(WatchedTRPO):
        def train(self) -> None:
            before = {name: buffer.clone() for name, buffer in self.policy.named_buffers()}
            super().train()
            statistics.append({name: not th.equal(now, before[name]) for name, now in self.policy.named_buffers()})

    env = RandomEnv(VECTOR, BOX)
    model = KeepsStatistics(
        "MlpPolicy",
        env,
        n_steps=32,
        target_kl=target_kl,
        line_search_max_iter=1 if target_kl == 1e6 else 10,
        policy_kwargs=kwargs,
        seed=0,
        device="cpu",
    )
    model.learn(64)

    assert_inside_trust_region(model, target_kl)
    for name, moved in [item for moves in statistics for item in moves.items()]:
        assert moved == (target_kl < 1e6 or (name.startswith("vf_features_extractor") and not share))
    if target_kl == 1e6:
        assert model.kls == [0.0, 0.0]
        assert all(log["train/is_line_search_success"] == 0.0 for log in model.logs)


def test_kl_of_normalised_observations() -> None:
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(VECTOR, BOX)] * 2))
    model = WatchedTRPO("MlpPolicy", env, n_steps=16, seed=0, device="cpu").learn(64)

    assert_inside_trust_region(model, target_kl=0.05)
    assert max(model.kls) > 0.0
    assert env.obs_rms.count > 64


class BetaDistribution(DiagGaussianDistribution):
    """A family whose Fisher matrix the package does not know, though torch knows its KL."""

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "BetaDistribution":
        self.distribution = Beta(mean_actions.exp() + 1.0, log_std.exp() + mean_actions.square() + 1.0)
        return self


class BetaByMethod(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> BetaDistribution:
        return BetaDistribution(self.action_space.shape[0]).proba_distribution(self.action_net(latent_pi), self.log_std)


class BetaByDistribution(ActorCriticPolicy):
    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        self.action_dist = BetaDistribution(self.action_space.shape[0])
        super()._build(lr_schedule)


@pytest.mark.parametrize("policy", [BetaByMethod, BetaByDistribution])
def test_a_distribution_of_the_users_own_trains_inside_the_trust_region(policy: type[ActorCriticPolicy]) -> None:
    env = RandomEnv(VECTOR, spaces.Box(0.0, 1.0, (2,)))
    model = TRPO(policy, env, n_steps=64, seed=0, device="cpu").learn(64)

    log = model.logger.name_to_value
    assert log["train/is_line_search_success"] == 1.0
    assert 0.0 < log["train/kl_divergence_loss"] <= 0.05


@pytest.mark.parametrize("action", ["box", "gsde", "discrete", "multi_binary"])
@pytest.mark.parametrize(
    "critic", [{}, {"critic_method": "minibatch", "batch_size": 2}, {"critic_method": "minibatch", "batch_size": 1}]
)
def test_the_smallest_rollouts_train(action: str, critic: dict[str, Any]) -> None:
    assert_inside_trust_region(train("float32", action, n_steps=2, **critic), target_kl=0.05)


def test_a_rollout_of_one_state_trains_without_normalised_advantages() -> None:
    model = train("float32", "box", n_steps=1, normalize_advantage=False)

    assert_inside_trust_region(model, target_kl=0.05)


def test_predicted_actions_lie_in_the_action_space() -> None:
    for action, (action_space, _, _) in ACTIONS.items():
        prediction, _ = train("float32", action).predict(np.zeros(3, dtype=np.float32))
        assert action_space.contains(prediction[()]), action
