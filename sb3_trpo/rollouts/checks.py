"""Checks for NaN and infinity in environment outputs."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_trpo.errors import NonFiniteError
from sb3_trpo.rollouts.collect import Truncation

Collect = TypeVar("Collect", bound=Callable[..., bool])


def is_finite(array: np.ndarray) -> bool:
    """
    Whether an array holds neither a NaN nor an infinity.

    :param array: array of any type and shape
    :return: True if every element is finite
    """
    if array.dtype.kind != "f":
        return True
    # The square sum costs a quarter of `isfinite(...).all()`. Large finite numbers may overflow it, hence the second look.
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


class EnvOutputCheck:
    """
    Checks what the environments return, step by step, before ``VecNormalize`` scales it.

    :param env: the vectorised environment
    :param num_timesteps: environment steps before the rollout
    """

    def __init__(self, env: VecEnv, num_timesteps: int) -> None:
        self._normalizer = unwrap_vec_normalize(env)
        self._num_timesteps = num_timesteps
        self.step = -1

    def __call__(self, observations: Any, rewards: np.ndarray) -> None:
        """
        Check the next step.

        :param observations: one for each environment
        :param rewards: shape ``(n_envs,)``
        :raises NonFiniteError: one of them is not finite; names the environment and the step
        """
        self.step += 1
        if self._normalizer is not None:
            observations, rewards = self._normalizer.old_obs, self._normalizer.old_reward
        if not is_finite(rewards):
            self._check("reward", rewards)
        if not (isinstance(observations, np.ndarray) and is_finite(observations)):
            self._check("observation", observations)

    def check_start(self, observations: Any) -> None:
        """
        Check the observations that the rollout begins with.

        :param observations: one for each environment
        :raises NonFiniteError: one of them is not finite; names the environment
        """
        self._check("observation", observations if self._normalizer is None else self._normalizer.old_obs)

    def check_truncations(self, truncations: list[Truncation]) -> None:
        """
        Check the last observations of truncated episodes, whose values take the place of the rewards to come.

        :param truncations: the truncated episodes
        :raises NonFiniteError: an observation is not finite; names the environment and the step
        """
        for self.step, env, observation in truncations:
            self._check("last observation", observation, env)

    def _check(self, what: str, values: Any, env: int | None = None) -> None:
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            array = np.asarray(value)
            if is_finite(array):
                continue
            where = np.argwhere(~np.isfinite(array))[0].tolist()
            number = array[tuple(where)]
            env = where.pop(0) if env is None else env
            label = f"{what}{'' if key is None else f' {key!r}'}{f' (element {where})' if where else ''}"
            step = "before the first step" if self.step < 0 else f"at step {self.step}"
            raise NonFiniteError(
                f"{label} of environment {env} is {number} {step} of the rollout that began at num_timesteps="
                f"{self._num_timesteps}; no update was made from it"
            )


@contextmanager
def checked_steps(env: VecEnv, check: EnvOutputCheck) -> Iterator[None]:
    """
    Check an environment's steps inside, for SB3's own loop, whose callbacks are to find the environment itself.

    :param env: the vectorised environment
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
    Should a number turn out not to be finite inside, give ``VecNormalize`` the statistics back that it has had before.

    :param env: the vectorised environment
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


def keeps_statistics(collect: Collect) -> Collect:
    """
    Make a method that collects a rollout take the statistics of ``VecNormalize`` back where the rollout cannot be used.

    :param collect: the method, whose first argument is the vectorised environment
    :return: the method
    """

    @functools.wraps(collect)
    def method(algorithm: Any, env: VecEnv, *args: Any, **kwargs: Any) -> bool:
        with kept_statistics(env):
            return collect(algorithm, env, *args, **kwargs)

    return cast("Collect", method)
