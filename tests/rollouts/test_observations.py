"""Observations that are not finite, or not of their space's type."""

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from torch import nn
from torch.distributions import Distribution

from sb3_trpo import TRPO
from sb3_trpo.errors import NonFiniteError
from sb3_trpo.optim.distributions import without_validation

N_STEPS, N_ENVS = 8, 2


class Given(gym.Env):
    """
    Observations of a constant, but for one step.

    :param space: observation space
    :param odd: the observation of that step
    :param at: the step
    """

    def __init__(self, space: spaces.Box, odd: float, at: int = 3) -> None:
        self.observation_space, self.action_space = space, spaces.Box(-1.0, 1.0, (1,))
        self.odd, self.at, self.n_steps = odd, at, 0
        self.actions: list[np.ndarray] = []

    def _observe(self) -> np.ndarray:
        observation = 0.5 * np.ones(self.observation_space.shape)
        if self.n_steps == self.at:
            observation[1] = self.odd
        return observation.astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        self.actions.append(action)
        return self._observe(), float(action.sum()), False, False, {}


class Masking(FlattenExtractor):
    """Handles missing numbers."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(th.where(observations.isfinite(), observations, 0.0))


def make(odd: float, dtype: Any = np.float64, normalize: bool = False, **arguments: Any) -> TRPO:
    low, high = (0, 255) if dtype is np.uint8 else (-np.inf, np.inf)
    space = spaces.Box(low, high, (3,), dtype)
    env: VecEnv = DummyVecEnv([lambda: Given(space, odd)] * N_ENVS)
    env = VecNormalize(env) if normalize else env
    return TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu", **arguments)


def test_observations_that_are_infinite_in_float32_are_refused():
    message = r"observation \(element \[1\]\) of environment 0 is 1e\+39, which is infinite in float32, at step 2"
    with pytest.raises(NonFiniteError, match=message):
        make(1e39).learn(N_STEPS)


def test_large_observations_that_are_normalized_are_accepted():
    make(1e39, normalize=True).learn(N_STEPS)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU])
def test_missing_numbers_are_left_to_a_policy_that_handles_them(activation):
    policy_kwargs = {"features_extractor_class": Masking, "activation_fn": activation}
    with pytest.raises(NonFiniteError, match="observation"):
        make(np.nan, policy_kwargs=policy_kwargs).learn(N_STEPS)
    model = make(np.nan, policy_kwargs=policy_kwargs, check_observations=False)
    model.learn(2 * N_STEPS * N_ENVS)
    assert np.isnan(model.env.envs[0].observation_space.low).sum() == 0
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_missing_numbers_may_be_in_the_first_observation():
    space = spaces.Box(-np.inf, np.inf, (3,))
    env = DummyVecEnv([lambda: Given(space, np.nan, at=0)] * N_ENVS)
    arguments = {"n_steps": N_STEPS, "device": "cpu", "policy_kwargs": {"features_extractor_class": Masking}}
    with pytest.raises(NonFiniteError, match="observation"):
        TRPO("MlpPolicy", env, **arguments).learn(N_STEPS)
    TRPO("MlpPolicy", env, check_observations=False, **arguments).learn(N_STEPS)


def test_no_action_that_is_not_finite_reaches_the_environment():
    model = make(np.nan, check_observations=False)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    with pytest.raises(NonFiniteError, match=r"action .*of environment 0 is nan at step 3"):
        model.learn(N_STEPS)
    assert all(np.isfinite(model.env.envs[0].unwrapped.actions).ravel())
    assert all(th.equal(one, other) for one, other in zip(model.policy.parameters(), before, strict=True))


class CriticSpoiler(nn.Module):
    def forward(self, latent: th.Tensor) -> th.Tensor:
        return latent.sum(dim=1, keepdim=True) * th.nan


def test_values_that_are_not_finite_are_refused_without_checked_observations():
    model = make(0.5, check_observations=False)
    model.policy.value_net = CriticSpoiler()
    with pytest.raises(NonFiniteError, match=r"value of environment 0 is nan at step 0"):
        model.learn(N_STEPS)


@pytest.mark.parametrize("value", ["no", 2, None])
def test_check_observations_is_a_truth_value(value):
    with pytest.raises(ValueError, match="check_observations"):
        make(0.5, check_observations=value)


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_normalized_observations_are_stored_as_they_were_acted_on(dtype):
    """SB3 stores them in the type of the space, which would leave 0 and 1 of them for integers."""
    model = make(1.0, dtype, normalize=True)
    seen = []

    def keep(variables: dict[str, Any], _: Any) -> bool:
        seen.append(variables["obs_tensor"].numpy().copy())
        return True

    model.learn(N_STEPS * N_ENVS, callback=keep)
    np.testing.assert_array_equal(model.rollout_buffer.observations.reshape(N_STEPS, N_ENVS, 3), seen)


class OneArray(VecEnvWrapper):
    """A vectorized environment that writes all observations into one array."""

    def reset(self) -> np.ndarray:
        self.array = self.venv.reset()
        return self.array

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.array[...] = observations
        return self.array, rewards, dones, infos


def test_observations_of_one_array_are_stored_before_they_are_overwritten():
    def observations(wrap: Any) -> np.ndarray:
        env = wrap(make_vec_env("Pendulum-v1", 2, seed=0))
        model = TRPO("MlpPolicy", env, n_steps=20, seed=0, device="cpu")
        model.learn(40)
        return model.rollout_buffer.observations

    np.testing.assert_array_equal(observations(OneArray), observations(lambda env: env))


def test_validation_is_restored_when_the_last_of_several_threads_has_left():
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()
    before = Distribution._validate_args

    def first() -> None:
        with without_validation():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(10)
        with without_validation():
            second_is_in.set()
            first_is_out.wait(10)
            assert not Distribution._validate_args

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert Distribution._validate_args == before


def test_several_trainings_in_threads_are_those_of_one_after_the_other():
    def train() -> None:
        make(0.5, policy_kwargs={"net_arch": [4]}).learn(3 * N_STEPS * N_ENVS)

    before = Distribution._validate_args
    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Distribution._validate_args == before
