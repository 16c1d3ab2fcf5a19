"""Agents learn: each of these tasks is solved, or nearly so, within seconds."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from support.arguments import effective

from sb3_trpo import TRPO

pytestmark = pytest.mark.slow


class ShiftEnv(gym.Env):
    """Ten times: the right action is the number on the dial, moved on by one where the switch is on. Return: at most 10."""

    observation_space = spaces.Dict({"dial": spaces.Discrete(3), "switch": spaces.Box(0.0, 1.0, (1,))})
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(action == (self.dial + self.switch) % 3)
        return self.draw(), reward, self.steps == 10, False, {}

    def draw(self) -> dict[str, Any]:
        self.dial, self.switch = (int(self.np_random.integers(n)) for n in (3, 2))
        return {"dial": self.dial, "switch": np.array([self.switch], dtype=np.float32)}


class ReachEnv(gym.Env):
    """One step: act as near as possible to the target that is shown. Return: at most 0, about -1.3 at random."""

    observation_space = action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-0.9, 0.9, 2).astype(np.float32)
        return self.target, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.target, -float(np.square(action - self.target).sum()), True, False, {}


def mean_return_after_learning(env: Any, timesteps: int, policy: str = "MlpPolicy", **kwargs: Any) -> float:
    arguments = {"n_steps": 128, "batch_size": 64, "learning_rate": 3e-3, "seed": 0, "device": "cpu"} | kwargs
    model = TRPO(policy, make_vec_env(env, n_envs=4, seed=0), **effective(arguments)).learn(timesteps)
    mean, _ = evaluate_policy(model, make_vec_env(env, n_envs=10, seed=100), n_eval_episodes=20)
    return float(mean)


def test_cart_pole() -> None:
    """The median of three seeds; one in four ends below 400 after so few steps."""
    assert np.median([mean_return_after_learning("CartPole-v1", 32_768, target_kl=0.02, seed=i) for i in range(3)]) >= 450.0


def test_multi_discrete_actions() -> None:
    assert mean_return_after_learning(lambda: IdentityEnvMultiDiscrete(3), 4096, gamma=0.0) >= 95.0  # of 100


def test_multi_binary_actions() -> None:
    assert mean_return_after_learning(lambda: IdentityEnvMultiBinary(3), 4096, gamma=0.0) >= 95.0  # of 100


def test_dict_observations() -> None:
    assert mean_return_after_learning(ShiftEnv, 6144, "MultiInputPolicy", gamma=0.0) >= 9.5


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True, "policy_kwargs": {"log_std_init": -2.0}}], ids=["gaussian", "gsde"])
def test_box_actions(kwargs: dict[str, Any]) -> None:
    assert mean_return_after_learning(ReachEnv, 6144, target_kl=0.1, **kwargs) >= -0.15
