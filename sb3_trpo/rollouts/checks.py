"""Checks for NaN and infinity in environment outputs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_trpo.errors import NonFiniteError
from sb3_trpo.rollouts.collect import Truncation

FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_finite(array: np.ndarray) -> bool:
    """
    Return True if an array holds no NaN and no infinity, and would not if it were cast to float32.

    :param array: array of any type and shape
    """
    if array.dtype.kind != "f":
        return True
    # The square sum costs a quarter of `isfinite(...).all()`. Large finite numbers may overflow it, hence the second look.
    return float(np.vdot(array, array)) < FLOAT32_MAX or bool(_are_finite(array).all())


def _are_finite(array: np.ndarray) -> np.ndarray:
    """Which elements are finite in float32, the type in which SB3 keeps rewards and hands observations to networks."""
    return np.abs(array) <= np.float64(FLOAT32_MAX)  # False for NaN


class EnvOutputCheck:
    """
    Checks what the environments return, step by step, before ``VecNormalize`` scales it.

    :param env: the vectorized environment
    :param num_timesteps: environment steps before the rollout
    :param check_observations: whether observations are checked, or only rewards and what the policy computes
    """

    def __init__(self, env: VecEnv, num_timesteps: int, check_observations: bool = True) -> None:
        self._normalizer = unwrap_vec_normalize(env)
        self._num_timesteps = num_timesteps
        self._checks_observations = check_observations
        self.step = -1

    def __call__(self, observations: Any, rewards: np.ndarray) -> None:
        """
        Check the next step.

        :param observations: one for each environment
        :param rewards: shape ``(n_envs,)``
        :raises NonFiniteError: one of them is not finite; names the environment and the step
        """
        self.step += 1
        raw_observations, raw_rewards = observations, rewards
        if self._normalizer is not None:
            raw_observations, raw_rewards = self._normalizer.old_obs, self._normalizer.old_reward
        if not is_finite(raw_rewards):
            self._check("reward", raw_rewards, rewards)
        if self._checks_observations and not (isinstance(raw_observations, np.ndarray) and is_finite(raw_observations)):
            self._check("observation", raw_observations, observations)

    def check_actions(self, actions: np.ndarray) -> None:
        """
        Check the next actions, if observations that are not finite may have reached the policy.

        :param actions: one for each environment
        :raises NonFiniteError: one of them is not finite; names the environment and the step
        """
        if not is_finite(actions):
            self.step += 1
            self._check("action", actions, actions)

    def check_evaluation(self, buffer: RolloutBuffer) -> None:
        """
        Check values and log-probabilities, if observations that are not finite may have reached the policy.

        :param buffer: the full buffer
        :raises NonFiniteError: one of them is not finite; names the environment and the step
        """
        if self._checks_observations:
            return
        for name in ("values", "log_probs", "returns"):
            array = getattr(buffer, name)
            if not is_finite(array):
                self.step = int(np.argwhere(~_are_finite(array))[0][0])
                self._check(name.rstrip("s").replace("_", " "), array[self.step], array[self.step])

    def check_start(self, observations: Any) -> None:
        """
        Check the observations that the rollout begins with.

        :param observations: one for each environment
        :raises NonFiniteError: one of them is not finite; names the environment
        """
        if self._checks_observations:
            raw = observations if self._normalizer is None else self._normalizer.old_obs
            self._check("observation", raw, observations)

    def check_truncations(self, truncations: list[Truncation]) -> None:
        """
        Check the last observations of truncated episodes, whose values take the place of the rewards to come.

        :param truncations: the truncated episodes
        :raises NonFiniteError: an observation is not finite; names the environment and the step
        """
        if not self._checks_observations:
            return
        for self.step, env, observation in truncations:
            self._check("last observation", observation, observation, env)

    def _check(self, what: str, raw: Any, values: Any, env: int | None = None) -> None:
        """Raise an error if a raw number is not finite, or a number that ``VecNormalize`` makes of it not so in float32."""
        for numbers, find in ((raw, np.isfinite), (values, _are_finite)):
            for key, value in numbers.items() if isinstance(numbers, dict) else [(None, numbers)]:
                array = np.asarray(value)
                if array.dtype.kind == "f" and not find(array).all():
                    self._raise(what, key, array, np.argwhere(~find(array))[0].tolist(), env)

    def _raise(self, what: str, key: str | None, array: np.ndarray, where: list[int], env: int | None) -> None:
        number = array[tuple(where)]
        env = where.pop(0) if env is None else env
        label = f"{what}{'' if key is None else f' {key!r}'}{f' (element {where})' if where else ''}"
        too_large = ", which is infinite in float32," if np.isfinite(number) else ""
        step = "before the first step" if self.step < 0 else f"at step {self.step}"
        raise NonFiniteError(
            f"{label} of environment {env} is {number}{too_large} {step} of the rollout that began at num_timesteps="
            f"{self._num_timesteps}; no update was made from it"
        )


@contextmanager
def checked_steps(env: VecEnv, check: EnvOutputCheck) -> Iterator[None]:
    """
    Check an environment's steps inside, for SB3's loop, whose callbacks must find the environment itself.

    :param env: the vectorized environment
    :param check: the checks
    :return: context manager
    """
    own, wait = vars(env).get("step_wait"), env.step_wait

    def checked_wait() -> VecEnvStepReturn:
        observations, rewards, dones, infos = wait()
        check(observations, rewards)
        last = [(int(index), infos[index].get("terminal_observation")) for index in np.flatnonzero(dones)]
        check.check_truncations([Truncation(check.step, index, obs) for index, obs in last if obs is not None])
        return observations, rewards, dones, infos

    env.step_wait = checked_wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        del env.step_wait
        if own is not None:
            env.step_wait = own  # type: ignore[method-assign]


@contextmanager
def kept_statistics(env: VecEnv | None) -> Iterator[None]:
    """
    Restore the statistics of ``VecNormalize`` if a number inside turns out not to be finite, and the rollout is discarded.

    :param env: the vectorized environment
    :return: context manager
    """
    normalizer = None if env is None else unwrap_vec_normalize(env)
    names = [name for name in ("obs_rms", "ret_rms", "returns") if hasattr(normalizer, name)]
    before = copy.deepcopy({name: getattr(normalizer, name) for name in names})
    try:
        yield
    except NonFiniteError:
        if normalizer is not None:
            vars(normalizer).update(before)
        raise
