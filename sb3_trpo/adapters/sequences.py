"""The recurrent rollout as tensors: sequences that begin with an episode or with the rollout, padded to one length."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from torch import nn

from sb3_trpo.optim.batch import RolloutBatch, map_inputs
from sb3_trpo.rollouts.buffers import action_tensor

LstmStates = tuple[th.Tensor, th.Tensor]


def read_sequences(
    buffer: RecurrentRolloutBuffer | RecurrentDictRolloutBuffer, action_space: spaces.Space[Any]
) -> RolloutBatch:
    """
    The whole buffer as padded sequences on its device.

    An episode that goes on from the rollout before begins with the hidden and cell states that were stored; any other
    begins with zeros. No sequence has an episode start beyond its first state, so that an LSTM runs through it in one call.
    Padding repeats the last state, which is a valid observation with a valid action, and has weight 0.

    :param buffer: a full recurrent rollout buffer
    :param action_space: the environment's action space
    :return: the rollout. Its inputs are ``"observations"``, and for each sequence the first states of the LSTMs,
        ``"actor_states"`` and ``"critic_states"``, shape ``(n_sequences, 2, n_layers, hidden_size)``, hidden before cell
    """
    n_steps, n_envs = buffer.buffer_size, buffer.n_envs
    ready = buffer.generator_ready  # what `get` does at first: the states of one environment after those of another

    def by_env(array: np.ndarray) -> np.ndarray:
        return array if ready else array.swapaxes(0, 1).reshape(n_steps * n_envs, *array.shape[2:])

    def states_by_env(array: np.ndarray) -> np.ndarray:
        return array if ready else by_env(array.swapaxes(1, 2))

    episode_starts = by_env(buffer.episode_starts).flatten().astype(bool)
    begins = episode_starts.copy()
    begins[::n_steps] = True
    first = np.flatnonzero(begins)
    ends = np.append(first[1:], n_steps * n_envs)
    places = first[:, None] + np.arange((ends - first).max())
    is_state = places < ends[:, None]
    index = np.minimum(places, ends[:, None] - 1).flatten()

    def padded(array: np.ndarray) -> th.Tensor:
        return th.as_tensor(by_env(array)[index], device=buffer.device)

    def first_states(hidden: np.ndarray, cell: np.ndarray) -> th.Tensor:
        states = np.stack([states_by_env(hidden)[first], states_by_env(cell)[first]], axis=1)
        states[episode_starts[first]] = 0.0
        return th.as_tensor(states, device=buffer.device)

    inputs = {
        "observations": map_inputs(padded, buffer.observations),  # type: ignore[arg-type]
        "actor_states": first_states(buffer.hidden_states_pi, buffer.cell_states_pi),
        "critic_states": first_states(buffer.hidden_states_vf, buffer.cell_states_vf),
    }
    advantages = padded(buffer.advantages).flatten()
    weights = th.as_tensor(is_state.flatten(), device=buffer.device).to(advantages) / (n_steps * n_envs)
    actions = action_tensor(padded(buffer.actions), action_space)
    ids = np.arange(n_steps * n_envs).reshape(n_steps, n_envs).T.flatten()  # as if the states were in the order of the steps
    return RolloutBatch(
        inputs,
        actions,
        advantages,
        padded(buffer.returns).flatten(),
        weights,
        sequence_length=places.shape[1],
        ids=th.as_tensor(ids[index], device=buffer.device),
    )


def lstm_states(stored: th.Tensor) -> LstmStates:
    """
    States of an LSTM in the form that it takes.

    :param stored: shape ``(n_sequences, 2, n_layers, hidden_size)``
    :return: hidden and cell states, each of shape ``(n_layers, n_sequences, hidden_size)``
    """
    hidden, cell = stored.permute(1, 2, 0, 3).contiguous()
    return hidden, cell


@contextmanager
def without_cudnn(modules: Sequence[nn.Module]) -> Iterator[None]:
    """
    Keep some modules' forward passes from cuDNN while the context lasts.

    :param modules: the modules; all others are left alone
    :return: context manager
    """
    enabled = th.backends.cudnn.enabled

    def switch_off(*_: Any) -> None:
        th.backends.cudnn.enabled = False

    def switch_back(*_: Any) -> None:
        th.backends.cudnn.enabled = enabled

    handles = [module.register_forward_pre_hook(switch_off) for module in modules]
    handles += [module.register_forward_hook(switch_back, always_call=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
