"""Collecting a rollout: act first, evaluate afterwards.

The policy's parameters do not change during a rollout, so values and log-probabilities need not be computed step by step:
only acting happens then. Afterwards the whole rollout, the observation after it and the last observations of truncated
episodes are evaluated in large batches. The buffer ends with the numbers that SB3's loop would have put there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_trpo.actions import BoundedActionPolicy
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.rollouts.advantages import generalized_advantages
from sb3_trpo.rollouts.buffers import ARRAY_BUFFERS
from sb3_trpo.rollouts.samplers import Observations


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


def supports_deferred_evaluation(policy: BasePolicy, buffer: RolloutBuffer) -> bool:
    """
    Whether a rollout can be evaluated after it was collected.

    :param policy: the policy; one with a ``forward`` of its own must be asked at every step
    :param buffer: the buffer; a class of the user's own must be filled by its own methods
    :return: True for SB3's policies and buffers, and policies that change nothing but networks or distributions
    """
    usual = (ActorCriticPolicy.forward, BoundedActionPolicy.forward, MaskableActorCriticPolicy.forward)
    own_forward = "forward" in vars(policy) or type(policy).forward not in usual
    return type(buffer) in ARRAY_BUFFERS and not own_forward


def write_step(
    buffer: RolloutBuffer,
    step: int,
    observations: Observations,
    actions: np.ndarray,
    rewards: np.ndarray,
    episode_starts: np.ndarray,
) -> None:
    """
    Put one step of all environments into the buffer, but for what is evaluated later.

    :param buffer: the buffer
    :param step: its row
    :param observations: observations that were acted on
    :param actions: actions taken, before clipping
    :param rewards: rewards received
    :param episode_starts: whether each observation began an episode
    """
    if isinstance(buffer, DictRolloutBuffer):
        for key, stored in buffer.observations.items():
            stored[step] = observations[key].reshape(stored[step].shape)
    else:
        stored = buffer.observations
        stored[step] = observations.reshape(stored.shape[1:])  # type: ignore[union-attr]
    buffer.actions[step] = actions.reshape(buffer.actions.shape[1:])
    buffer.rewards[step] = rewards
    buffer.episode_starts[step] = episode_starts
    buffer.pos = step + 1


def find_truncations(step: int, dones: np.ndarray, infos: list[dict[str, Any]]) -> list[Truncation]:
    """
    The episodes that a time limit cut off at this step.

    :param step: step of the rollout
    :param dones: whether each environment's episode ended
    :param infos: what the environments said of the step
    :return: the truncated ones, with their last observations
    """
    return [
        Truncation(step, int(env), infos[env]["terminal_observation"])
        for env in np.flatnonzero(dones)
        if infos[env].get("TimeLimit.truncated", False) and infos[env].get("terminal_observation") is not None
    ]


@th.no_grad()
def evaluate_rollout(
    buffer: RolloutBuffer,
    rollout: RolloutBatch,
    evaluate: Callable[[RolloutBatch], tuple[th.Tensor, th.Tensor]],
    predict_values: Callable[[Any], th.Tensor],
    truncations: list[Truncation],
    last_observations: Observations,
    last_dones: np.ndarray,
    max_batch_size: int | None,
    value_scale: float,
) -> th.Tensor:
    """
    Fill in values, log-probabilities, bootstrapped rewards, advantages and returns.

    :param buffer: the buffer with all steps written
    :param rollout: what is in it
    :param evaluate: states and actions ↦ the critic's outputs and log π(a|s), by the policy that acted
    :param predict_values: observations ↦ the critic's outputs
    :param truncations: episodes that a time limit cut off
    :param last_observations: observations after the last step
    :param last_dones: whether the last step ended an episode
    :param max_batch_size: most states to evaluate at once; None for no bound
    :param value_scale: what the critic's outputs are multiplied with to give V
    :return: V of the observations after the last step, shape ``(n_envs, 1)``
    """
    shape = buffer.rewards.shape
    evaluated = [evaluate(chunk) for chunk in rollout.chunks(max_batch_size)]
    buffer.values[:] = value_scale * th.cat([values.flatten() for values, _ in evaluated]).cpu().numpy().reshape(shape)
    buffer.log_probs[:] = th.cat([log_probs for _, log_probs in evaluated]).cpu().numpy().reshape(shape)

    final_values: list[float] = []
    size = max_batch_size or max(len(truncations), 1)
    for start in range(0, len(truncations), size):
        batch = stack_observations([truncation.observation for truncation in truncations[start : start + size]])
        final_values += (value_scale * predict_values(obs_as_tensor(batch, buffer.device))).flatten().tolist()
    last_values = value_scale * predict_values(obs_as_tensor(last_observations, buffer.device))
    bootstrap(buffer, truncations, final_values, last_values, last_dones)
    return last_values


def bootstrap(
    buffer: RolloutBuffer,
    truncations: list[Truncation],
    final_values: list[float],
    last_values: th.Tensor,
    last_dones: np.ndarray,
) -> None:
    """
    Fill in bootstrapped rewards, advantages and returns.

    A truncated episode's last reward is increased by γV of its last observation, as in SB3.

    :param buffer: the buffer with all steps and their values written
    :param truncations: episodes that a time limit cut off
    :param final_values: V of the last observation of each of them
    :param last_values: V of the observations after the last step, shape ``(n_envs, 1)``
    :param last_dones: whether the last step ended an episode
    """
    buffer.full = True
    for truncation, value in zip(truncations, final_values, strict=True):
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


def stack_observations(observations: list[Any]) -> Observations:
    """
    Make a batch of single observations.

    :param observations: arrays or dictionaries of them, at least one
    :return: the batch
    """
    if isinstance(observations[0], dict):
        return {key: np.stack([single[key] for single in observations]) for key in observations[0]}
    return np.stack(observations)
