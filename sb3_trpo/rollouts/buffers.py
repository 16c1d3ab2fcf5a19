"""Rollout buffers of SB3 and sb3-contrib, read as tensors."""

from typing import Any

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_trpo.optim.batch import RolloutBatch, map_inputs

#: Buffers whose arrays may be read and written directly.
ARRAY_BUFFERS = (RolloutBuffer, DictRolloutBuffer, MaskableRolloutBuffer, MaskableDictRolloutBuffer)


def read_rollout(buffer: RolloutBuffer, action_space: spaces.Space[Any]) -> RolloutBatch:
    """
    Read a whole buffer as tensors on its device, unshuffled and, on the CPU, without copying the observations.

    A custom buffer class is asked for its samples instead, in any order. If the buffer has action masks, the inputs are
    ``{"observations": ..., "action_masks": ...}``.

    :param buffer: a full rollout buffer
    :param action_space: the environment's action space
    :return: the rollout, advantages as the buffer holds them
    """
    action_masks: th.Tensor | None = None
    if type(buffer) in ARRAY_BUFFERS:
        n_states = buffer.buffer_size * buffer.n_envs

        def as_tensor(array: th.Tensor) -> th.Tensor:
            # SB3 stores (step, env, ...) and turns that into (state, ...) at the first `get`; both fit here.
            tail = array.shape[1:] if buffer.generator_ready else array.shape[2:]
            return th.as_tensor(array, device=buffer.device).reshape(n_states, *tail)

        inputs = map_inputs(as_tensor, buffer.observations)  # type: ignore[arg-type]
        actions, advantages, returns = map(as_tensor, (buffer.actions, buffer.advantages, buffer.returns))  # type: ignore[arg-type]
        if isinstance(buffer, (MaskableRolloutBuffer, MaskableDictRolloutBuffer)):
            action_masks = as_tensor(buffer.action_masks)  # type: ignore[arg-type]
    else:
        samples = next(buffer.get(batch_size=None))
        inputs, actions = samples.observations, samples.actions
        advantages, returns = samples.advantages, samples.returns
        action_masks = getattr(samples, "action_masks", None)
    if action_masks is not None:
        inputs = {"observations": inputs, "action_masks": action_masks > 0.5}
    actions = action_tensor(actions, action_space)
    advantages, returns = advantages.flatten(), returns.flatten()
    weights = th.full_like(advantages, 1.0 / len(advantages))
    return RolloutBatch(inputs, actions, advantages, returns, weights)


def action_tensor(actions: th.Tensor, action_space: spaces.Space[Any]) -> th.Tensor:
    """
    Convert actions to the form that ``Distribution.log_prob`` takes.

    :param actions: as a buffer holds them, shape ``(n_states, ...)``
    :param action_space: the environment's action space
    :return: integers for Discrete, shape ``(n_states,)``; else numbers, shape ``(n_states, ...)``
    """
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions.float()
