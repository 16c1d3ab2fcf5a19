"""Writing a rollout into SB3's buffer: its steps, its truncated episodes, its advantages."""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_trpo.rollouts.fast_step import Observations


class Truncation(NamedTuple):
    """
    An episode that a time limit has cut off.

    :param step: step of the rollout at which it ended
    :param env: index of the environment
    :param observation: its last observation
    """

    step: int
    env: int
    observation: Any


def widen_observations(buffer: RolloutBuffer, observations: Observations) -> None:
    """
    Make room in an empty buffer for observations that are not of their space's type, as those of ``VecNormalize``.

    SB3 acts on such observations, and then stores and trains on what is left of them in a float16 or an integer.

    :param buffer: the buffer
    :param observations: observations of the kind that is to be stored
    """
    if isinstance(buffer, DictRolloutBuffer):
        for key, stored in buffer.observations.items():
            buffer.observations[key] = _widened(stored, observations[key])
    else:
        buffer.observations = _widened(buffer.observations, observations)  # type: ignore[arg-type]


def _widened(stored: np.ndarray, values: np.ndarray) -> np.ndarray:
    is_narrow = values.dtype.kind == "f" and not np.can_cast(values.dtype, stored.dtype)
    return stored.astype(np.float32) if is_narrow and stored.dtype not in (np.float32, np.float64) else stored


def write_decisions(buffer: RolloutBuffer, step: int, observations: Observations, actions: np.ndarray) -> None:
    """
    Write what was decided at a step into the buffer.

    :param buffer: the buffer
    :param step: its row
    :param observations: observations that were acted on
    :param actions: actions taken, before clipping
    """
    if isinstance(buffer, DictRolloutBuffer):
        for key, stored in buffer.observations.items():
            stored[step] = observations[key].reshape(stored[step].shape)
    else:
        stored = buffer.observations
        stored[step] = observations.reshape(stored.shape[1:])  # type: ignore[union-attr]
    buffer.actions[step] = actions.reshape(buffer.actions.shape[1:])


def write_step(buffer: RolloutBuffer, step: int, observations: Observations, actions: np.ndarray, rewards: np.ndarray) -> None:
    """
    Write a step of all environments into the buffer, except episode starts, values and log-probabilities.

    :param buffer: the buffer
    :param step: its row
    :param observations: observations that were acted on
    :param actions: actions taken, before clipping
    :param rewards: rewards received
    """
    write_decisions(buffer, step, observations, actions)
    buffer.rewards[step] = rewards
    buffer.pos = step + 1


def find_truncations(step: int, dones: np.ndarray, infos: list[dict[str, Any]]) -> list[Truncation]:
    """
    The episodes that a time limit cut off at this step.

    :param step: step of the rollout
    :param dones: whether each environment's episode ended
    :param infos: what the environments said of the step
    :return: the truncated ones, with copies of their last observations
    """
    return [
        Truncation(step, int(env), copy.deepcopy(infos[env]["terminal_observation"]))
        for env in np.flatnonzero(dones)
        if infos[env].get("TimeLimit.truncated", False) and infos[env].get("terminal_observation") is not None
    ]


def bootstrap(
    buffer: RolloutBuffer,
    bootstraps: list[tuple[Truncation, float]],
    last_values: th.Tensor,
    last_dones: np.ndarray,
) -> None:
    """
    Fill in bootstrapped rewards, advantages and returns.

    A truncated episode's last reward is increased by γV of its last observation, as in SB3.

    :param buffer: the buffer with all steps and their values written
    :param bootstraps: episodes that a time limit cut off, and V of the last observation of each
    :param last_values: V of the observations after the last step, shape ``(n_envs, 1)``
    :param last_dones: whether the last step ended an episode
    """
    buffer.full = True
    for truncation, value in bootstraps:
        buffer.rewards[truncation.step, truncation.env] += buffer.gamma * value
    buffer.advantages = generalized_advantages(
        buffer.rewards,
        buffer.values,
        buffer.episode_starts,
        last_values.flatten().cpu().numpy(),
        last_dones,
        buffer.gamma,
        buffer.gae_lambda,
    )
    buffer.returns = buffer.advantages + buffer.values


def generalized_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    last_dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """
    Â_t = δ_t + γλ Â_{t+1} with δ_t = r_t + γ V(s_{t+1}) − V(s_t), both cut off where an episode ends.

    Source: Schulman et al. 2016, equation 16.

    :param rewards: r, shape ``(n_steps, n_envs)``
    :param values: V of the observations, shape ``(n_steps, n_envs)``
    :param episode_starts: 1 where an observation begins an episode, shape ``(n_steps, n_envs)``
    :param last_values: V of the observations after the last step, shape ``(n_envs,)``
    :param last_dones: whether the last step ended an episode, shape ``(n_envs,)``
    :param gamma: discount γ
    :param gae_lambda: λ
    :return: advantages, shape ``(n_steps, n_envs)``
    """
    goes_on = 1.0 - np.concatenate([episode_starts[1:], last_dones[None].astype(np.float32)])
    next_values = np.concatenate([values[1:], last_values[None]])
    advantages = rewards + gamma * next_values * goes_on - values
    decay = gamma * gae_lambda * goes_on
    for step in range(len(rewards) - 2, -1, -1):
        advantages[step] += decay[step] * advantages[step + 1]
    return advantages


def stack_observations(observations: list[Any]) -> Observations:
    """
    Make a batch of single observations.

    :param observations: arrays or dictionaries of them, at least one
    :return: the batch
    """
    if isinstance(observations[0], dict):
        return {key: np.stack([single[key] for single in observations]) for key in observations[0]}
    return np.stack(observations)
