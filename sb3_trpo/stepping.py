"""Stepping SB3's vectorised environments without their overhead, with the same numbers.

``DummyVecEnv`` copies every observation and every info dictionary deeply at every step, and ``VecNormalize`` goes through
NumPy's general-purpose mean, variance and clip. For two or eight environments that costs as much as the environments
themselves. While a rollout is collected, both are stepped by the functions here. Anything else, subclasses included, is
left alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs


@contextmanager
def lean_stepping(env: VecEnv) -> Iterator[None]:
    """
    Step the ``DummyVecEnv`` and ``VecNormalize`` layers of an environment leanly while the context lasts.

    Info dictionaries are then copied one level deep, which is enough for an environment that makes a new one each step.

    :param env: any vectorised environment
    :return: context manager
    """
    replaced: list[VecEnv] = []
    layer: VecEnv | None = env
    while layer is not None:
        lean = _lean_step(layer)
        if lean is not None:
            layer.step_wait = lean  # type: ignore[method-assign]
            replaced.append(layer)
        layer = layer.venv if isinstance(layer, VecEnvWrapper) else None
    try:
        yield
    finally:
        for layer in replaced:
            del layer.step_wait


def _lean_step(layer: VecEnv) -> Callable[[], VecEnvStepReturn] | None:
    if "step_wait" in vars(layer):  # the user has put something of their own there
        return None
    if type(layer) is DummyVecEnv:
        return partial(step_dummy, layer)
    if type(layer) is VecNormalize and isinstance(layer.obs_rms if layer.norm_obs else None, RunningMeanStd | None):
        return partial(step_normalize, layer)
    return None


def step_dummy(env: DummyVecEnv) -> VecEnvStepReturn:
    """
    Step every environment with the actions that ``step_async`` has left.

    :param env: the vectorised environment
    :return: observations, rewards, dones and infos, none of which later steps change
    """
    infos: list[dict[str, Any]] = []
    for index, single in enumerate(env.envs):
        obs, env.buf_rews[index], terminated, truncated, info = single.step(env.actions[index])
        done = terminated or truncated
        info["TimeLimit.truncated"] = truncated and not terminated
        if done:
            info["terminal_observation"] = obs
            obs, env.reset_infos[index] = single.reset()
        env.buf_dones[index] = done
        env.buf_infos[index] = info
        infos.append(info.copy())
        env._save_obs(index, obs)
    observations = dict_to_obs(env.observation_space, {key: stored.copy() for key, stored in env.buf_obs.items()})
    return observations, env.buf_rews.copy(), env.buf_dones.copy(), infos


def step_normalize(env: VecNormalize) -> VecEnvStepReturn:
    """
    Step the environment inside and normalise what it returns.

    :param env: the normalising wrapper, of one-array observations
    :return: observations, rewards, dones and infos
    """
    returned, rewards, dones, infos = env.venv.step_wait()
    obs: np.ndarray = returned  # type: ignore[assignment]
    env.old_obs, env.old_reward = obs, rewards
    if env.norm_obs:
        moments: RunningMeanStd = env.obs_rms  # type: ignore[assignment]
        if env.training:
            update_moments(moments, obs)
        obs = _clip((obs - moments.mean) / np.sqrt(moments.var + env.epsilon), env.clip_obs).astype(np.float32)
    if env.training:
        env.returns = env.returns * env.gamma + rewards
        update_moments(env.ret_rms, env.returns)
    if env.norm_reward:
        rewards = _clip(rewards / np.sqrt(env.ret_rms.var + env.epsilon), env.clip_reward)
    if dones.any():
        for index in np.flatnonzero(dones):
            if "terminal_observation" in infos[index]:
                infos[index]["terminal_observation"] = env.normalize_obs(infos[index]["terminal_observation"])
        env.returns[dones] = 0
    return obs, rewards.astype(np.float32), dones, infos


def update_moments(moments: RunningMeanStd, batch: np.ndarray) -> None:
    """
    Add a batch to running moments, bit for bit as ``RunningMeanStd.update``.

    :param moments: the running mean and variance
    :param batch: the batch, shape ``(n_envs, ...)``
    """
    count = len(batch)
    mean = np.add.reduce(batch, axis=0) / count
    deviations = batch - mean
    moments.update_from_moments(mean, np.add.reduce(deviations * deviations, axis=0) / count, count)


def _clip(values: np.ndarray, bound: float) -> np.ndarray:
    return np.minimum(np.maximum(values, -bound), bound)
