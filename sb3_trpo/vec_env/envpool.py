"""EnvPool's environments, which run in C++ threads, as a vectorized environment of SB3."""

import difflib
import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_trpo.arguments import NATURAL_NUMBER, POSITIVE_INTEGER, check_arguments

SEED_LIMIT = 2**31  # EnvPool's seeds are int32


def make_envpool(task_id: str, n_envs: int = 1, seed: int | None = None, num_threads: int = 0, **options: Any) -> VecEnv:
    """
    Create EnvPool environments for SB3, with the episode statistics of ``Monitor``.

    :param task_id: name of the task, one of ``envpool.list_all_envs()``
    :param n_envs: number of environments
    :param seed: seed of the first environment, the others have the next ones; None for a random seed
    :param num_threads: number of threads; 0 for EnvPool's choice
    :param options: further options of the task, for instance ``max_episode_steps``
    :return: the vectorized environment
    :raises ImportError: EnvPool is not installed
    :raises ValueError: EnvPool has no such task, or an argument is not allowed
    """
    check_arguments({"n_envs": POSITIVE_INTEGER, "num_threads": NATURAL_NUMBER}, locals())
    try:
        envpool = importlib.import_module("envpool")
    except ImportError as error:
        raise ImportError(
            "make_envpool needs EnvPool; to install it: pip install '.[envpool]' in a checkout of sb3_trpo"
        ) from error
    tasks = envpool.list_all_envs()
    if task_id not in tasks:
        close = ", ".join(difflib.get_close_matches(str(task_id), tasks, n=5)) or "none is close"
        raise ValueError(f"task_id={task_id!r} is not allowed: it must be one of EnvPool's {len(tasks)} tasks ({close})")
    if options.get("batch_size", n_envs) != n_envs:
        raise ValueError(f"batch_size={options['batch_size']!r} is not allowed: it must be n_envs, as all step together")
    make_pool = partial(envpool.make_gymnasium, task_id, num_envs=n_envs, num_threads=num_threads, **options)
    return EnvPoolVecEnv(make_pool, envpool.make_spec(task_id, num_envs=n_envs, **options), seed)


class EnvPoolVecEnv(VecEnv):
    """
    An EnvPool pool as a vectorized environment.

    After the end of an episode, EnvPool uses one step for the reset, ignores its action and gives reward 0. This class resets
    finished environments at once, as SB3 does: they return the first observation of the next episode, and
    ``terminal_observation`` in their info.

    EnvPool accepts seeds only when it creates a pool, so a reset after :meth:`seed` creates a new one. An episode that
    terminates in the step of its time limit is reported as truncated: EnvPool does not distinguish the two.

    :param make_pool: creates the pool; takes ``seed``, a list with one int32 per environment
    :param spec: the pool's ``EnvSpec``
    :param seed: as in :meth:`seed`
    """

    def __init__(self, make_pool: Callable[..., Any], spec: Any, seed: int | None = None) -> None:
        self._make_pool = make_pool
        self._pool: Any = None
        self._attributes = {**spec.config._asdict(), "render_mode": None}
        action_space = spec.action_space
        if isinstance(action_space, spaces.Box):  # as Gymnasium's, so that models fit both; the pool casts actions itself
            action_space = spaces.Box(action_space.low.astype(np.float32), action_space.high.astype(np.float32))
        super().__init__(spec.config.num_envs, spec.observation_space, action_space)
        self._start = time.time()
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=int)
        self.seed(seed)

    def reset(self) -> VecEnvObs:
        """
        Start new episodes in all environments.

        :return: first observations
        """
        if self._seeds[0] is not None:
            self._pool = None  # ends its threads
            self._pool = self._make_pool(seed=[seed % SEED_LIMIT for seed in self._seeds])  # type: ignore[operator]
            self._reset_seeds()
        observations, info = self._pool.reset()
        self.reset_infos = _rows(info)
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return dict_to_obs(self.observation_space, self._arrays(observations))

    def step_async(self, actions: np.ndarray) -> None:
        """
        Start the step in the threads.

        :param actions: one per environment
        """
        self._pool.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Wait for the threads to finish the step.

        :return: observations, rewards, dones and infos, in arrays that later steps do not change
        """
        observations, rewards, terminated, truncated, info = self._pool.recv()
        arrays = self._arrays(observations)
        dones = terminated | truncated
        infos = _rows({**info, "TimeLimit.truncated": truncated & ~terminated})
        self._returns += rewards
        self._lengths += 1
        if dones.any():
            self._begin_episodes(np.flatnonzero(dones), arrays, infos)
        return dict_to_obs(self.observation_space, arrays), rewards, dones, infos

    def _begin_episodes(self, ended: np.ndarray, arrays: dict[Any, np.ndarray], infos: list[dict[str, Any]]) -> None:
        """Replace the last observations by the first ones of new episodes, and move the last ones into the infos."""
        observations, info = self._pool.reset(ended)
        seconds = round(time.time() - self._start, 6)
        for env, reset_info in zip(ended, _rows(info), strict=True):
            last = {key: array[env].copy() for key, array in arrays.items()}
            infos[env]["terminal_observation"] = dict_to_obs(self.observation_space, last)
            infos[env]["episode"] = {"r": round(float(self._returns[env]), 6), "l": int(self._lengths[env]), "t": seconds}
            self.reset_infos[env] = reset_info
        for key, first in self._arrays(observations).items():
            arrays[key][ended] = first
        self._returns[ended] = 0.0
        self._lengths[ended] = 0

    def _arrays(self, observations: Any) -> dict[Any, np.ndarray]:
        """Return observations by key (None if there is only one), in the dtypes of the space."""
        if isinstance(self.observation_space, spaces.Dict):
            return {key: np.asarray(observations[key], space.dtype) for key, space in self.observation_space.items()}
        return {None: np.asarray(observations, self.observation_space.dtype)}

    def close(self) -> None:
        """End the pool's threads."""
        self._pool = None

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Return an option of the task.

        :param attr_name: name, for instance ``max_episode_steps``
        :param indices: environments; None for all
        :return: the value, once per environment
        :raises AttributeError: the task has no such option
        """
        if attr_name not in self._attributes:
            raise AttributeError(
                f"EnvPool's environments are no Python objects: {attr_name!r} is not there, {sorted(self._attributes)} are"
            )
        return [self._attributes[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> NoReturn:
        """
        Not supported.

        :param attr_name: name
        :param value: value
        :param indices: which environments
        :raises NotImplementedError: always
        """
        raise NotImplementedError(f"EnvPool's environments are no Python objects; give {attr_name}= to make_envpool")

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any) -> NoReturn:
        """
        Not supported.

        :param method_name: name
        :param method_args: arguments
        :param indices: which environments
        :param method_kwargs: further arguments
        :raises NotImplementedError: always
        """
        raise NotImplementedError(f"EnvPool's environments are no Python objects and have no method {method_name!r}")

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> NoReturn:
        """
        Not supported.

        :param options: for the next reset
        :raises NotImplementedError: always
        """
        raise NotImplementedError("EnvPool's environments take no options at a reset; give them to make_envpool")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """
        Return True for ``Monitor``, whose episode statistics this class provides.

        :param wrapper_class: the wrapper
        :param indices: environments; None for all
        :return: True for ``Monitor``, False for others; once per environment
        """
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def _rows(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Split arrays along their first dimension into one dictionary per environment."""
    columns = {
        key: array.tolist() if array.ndim == 1 else list(array) for key, array in info.items() if isinstance(array, np.ndarray)
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
