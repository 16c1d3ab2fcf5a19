"""Stepping SB3's vectorized environments without their overhead, with the same numbers.

``DummyVecEnv`` copies every observation and every info dictionary deeply at every step, and ``VecNormalize`` goes through
NumPy's general-purpose mean, variance and clip. For two or eight environments that costs as much as the environments
themselves. While a rollout is collected, both are stepped by the functions here. Anything else, subclasses and patched
instances included, is left alone.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_trpo.optim.plain import are_original, has_patched_methods, remember
from sb3_trpo.rollouts.half_precision import WideRunningMeanStd

Observations = np.ndarray | dict[str, np.ndarray]

#: Types of which an info dictionary needs no copy.
IMMUTABLE = {bool, int, float, complex, str, bytes, type(None), np.bool_, np.int32, np.int64, np.float32, np.float64}
SUMMED_AS_THEY_ARE = (np.float64, np.float32)

remember(DummyVecEnv, VecNormalize, RunningMeanStd, WideRunningMeanStd)
USUAL_MOMENTS = (RunningMeanStd, WideRunningMeanStd)


def fast_step_fn(env: VecEnv) -> Callable[[np.ndarray], VecEnvStepReturn]:
    """
    Return the fastest function that steps an environment.

    The observations that it returns are new arrays in C order, whatever the environment returns.

    :param env: any vectorized environment
    :return: actions ↦ what ``env.step`` returns for them
    """
    wait = _lean_wait(env)

    def step(actions: np.ndarray) -> VecEnvStepReturn:
        if wait is not None:
            env.step_async(actions)
            return wait()
        observations, rewards, dones, infos = env.step(actions)
        return copy_observations(observations), rewards, dones, infos  # type: ignore[arg-type]

    return step


def copy_observations(observations: Observations) -> Observations:
    """
    Copy observations into C order, whose strides depend on the shape alone.

    Convolutions choose their algorithm, and so their rounding, by the strides. A copy is also safe from environments that
    write every observation into the same array.

    :param observations: one for each environment
    :return: the copies
    """
    if isinstance(observations, dict):
        return {key: np.array(value, order="C") for key, value in observations.items()}
    return np.array(observations, order="C")


def _lean_wait(layer: VecEnv) -> Callable[[], VecEnvStepReturn] | None:
    """Find the lean counterpart of a layer's ``step_wait``, if its class has one and nobody has patched it."""
    if has_patched_methods(layer) or not are_original(type(layer)):
        return None
    if type(layer) is DummyVecEnv:
        return partial(step_dummy, layer)
    if type(layer) is VecNormalize and not isinstance(layer.observation_space, spaces.Dict) and _has_usual_moments(layer):
        return partial(step_normalize, layer, _lean_wait(layer.venv) or layer.venv.step_wait)
    return None


def _has_usual_moments(layer: VecNormalize) -> bool:
    moments = [layer.ret_rms, layer.obs_rms] if layer.norm_obs else [layer.ret_rms]
    return all(type(each) in USUAL_MOMENTS and are_original(type(each)) and not has_patched_methods(each) for each in moments)


def step_dummy(env: DummyVecEnv) -> VecEnvStepReturn:
    """
    Step every environment with the actions that ``step_async`` has left.

    :param env: the vectorized environment
    :return: observations, rewards, dones and infos, none of which later steps change
    """
    infos: list[dict[str, Any]] = []
    actions, rewards, dones = env.actions, env.buf_rews, env.buf_dones
    only: np.ndarray | None = env.buf_obs.get(None)  # type: ignore[call-overload]  # the key of one-array observations
    for index, single in enumerate(env.envs):
        obs, rewards[index], terminated, truncated, info = single.step(actions[index])
        done = terminated or truncated
        is_plain = not info and not done  # nothing in it that may change
        info["TimeLimit.truncated"] = truncated and not terminated
        if done:
            # SB3 copies it after the reset: too late where an environment writes all observations into one array.
            info["terminal_observation"] = copy.deepcopy(obs)
            obs, env.reset_infos[index] = single.reset()
        dones[index] = done
        env.buf_infos[index] = info
        infos.append(info.copy() if is_plain else copy_info(info))
        if only is None:
            env._save_obs(index, obs)
        else:
            only[index] = obs
    if only is not None:
        return only.copy(), rewards.copy(), dones.copy(), infos
    observations = dict_to_obs(env.observation_space, {key: stored.copy() for key, stored in env.buf_obs.items()})
    return observations, rewards.copy(), dones.copy(), infos


def copy_info(info: dict[str, Any]) -> dict[str, Any]:
    """
    Copy an info dictionary as deeply as the environment could change it later.

    :param info: the environment's own
    :return: the copy
    """
    copies = info.copy()
    if IMMUTABLE.issuperset(map(type, copies.values())):
        return copies
    for key, value in info.items():
        if type(value) in IMMUTABLE:
            continue
        is_episode = type(value) is dict and all(type(item) in IMMUTABLE for item in value.values())  # of Monitor
        if not is_episode and not (type(value) is np.ndarray and not value.dtype.hasobject):
            return copy.deepcopy(info)
        copies[key] = value.copy()
    return copies


def step_normalize(env: VecNormalize, step_inside: Callable[[], VecEnvStepReturn]) -> VecEnvStepReturn:
    """
    Step the environment inside and normalize what it returns.

    :param env: the normalizing wrapper, of one-array observations
    :param step_inside: ``step_wait`` of the environment inside, or its lean counterpart
    :return: observations, rewards, dones and infos
    """
    returned, rewards, dones, infos = step_inside()
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
    Add a batch to running moments, bit for bit as their own ``update``.

    :param moments: the running mean and variance
    :param batch: the batch, shape ``(n_envs, ...)``
    """
    if batch.dtype not in SUMMED_AS_THEY_ARE:  # NumPy's mean sums the others, such as float16, in a wider type
        moments.update(batch)
        return
    count = len(batch)
    mean = np.add.reduce(batch, axis=0) / count
    deviations = batch - mean
    moments.update_from_moments(mean, np.add.reduce(deviations * deviations, axis=0) / count, count)


def _clip(values: np.ndarray, bound: float) -> np.ndarray:
    return np.minimum(np.maximum(values, -bound), bound)
