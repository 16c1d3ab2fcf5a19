"""Generalised advantage estimation over a rollout."""

import numpy as np


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
