"""The rollout as tensors: what the policy saw, what it did, and how good that turned out to be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_trpo.distributed.moments import moments
from sb3_trpo.distributed.process_group import SINGLE_PROCESS, ProcessGroup

#: What a policy sees. Dictionaries hold Dict observations, or an algorithm's further inputs beside the observations.
Inputs = th.Tensor | dict[str, Any]

#: Buffers whose arrays may be read and written directly.
ARRAY_BUFFERS = (RolloutBuffer, DictRolloutBuffer, MaskableRolloutBuffer, MaskableDictRolloutBuffer)


def map_inputs(function: Callable[[th.Tensor], th.Tensor], inputs: Inputs) -> Inputs:
    """
    Apply a function to every tensor of an observation.

    :param function: tensor ↦ tensor
    :param inputs: observations, one tensor or a dictionary of them, nested at will
    :return: the results, in the same structure
    """
    if isinstance(inputs, dict):
        return {key: map_inputs(function, value) for key, value in inputs.items()}
    return function(inputs)


@dataclass(frozen=True)
class RolloutBatch:
    """
    States of a rollout, or some of them. The first dimension of every tensor counts the states.

    A mean over the rollout is the sum weighted by ``weights``, so that the sums over its chunks add up to it, and so do those
    over the shares that several processes have in it.

    States are selected in units: single states, or, for a policy with a memory, whole sequences of consecutive ones, padded
    to one length. Padding has weight 0. Tensors among the inputs that belong to sequences have one row for each of them.

    :param inputs: observations
    :param actions: in the form ``Distribution.log_prob`` takes, shape ``(n_states, ...)``
    :param advantages: Â, shape ``(n_states,)``
    :param returns: R̂, the critic's targets, shape ``(n_states,)``
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :param length: states of a unit
    :param ratios: π(a|s) / π_collecting(a|s), shape ``(n_states,)``, where another policy π looks at it; None for all 1
    :param ids: number of each state in the whole rollout, shape ``(n_states,)``; None for 0, 1, 2, …
    :param ranks: the processes that have shares in the rollout
    """

    inputs: Inputs
    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    weights: th.Tensor
    length: int = 1
    ratios: th.Tensor | None = None
    ids: th.Tensor | None = None
    ranks: ProcessGroup = SINGLE_PROCESS

    def select(self, index: slice | th.Tensor) -> "RolloutBatch":
        """
        Some of the units, weights unchanged.

        :param index: which
        :return: their states; views where the index is a slice
        """

        def part(tensor: th.Tensor) -> th.Tensor:
            if self.length == 1:
                return tensor[index]
            return tensor.unflatten(0, (self.n_units, -1))[index].flatten(end_dim=1)

        return replace(
            self,
            inputs=map_inputs(part, self.inputs),
            actions=part(self.actions),
            advantages=part(self.advantages),
            returns=part(self.returns),
            weights=part(self.weights),
            ratios=None if self.ratios is None else part(self.ratios),
            ids=part(self.state_ids),
        )

    @property
    def state_ids(self) -> th.Tensor:
        """Number of each state in the whole rollout, shape ``(n_states,)``."""
        return th.arange(self.n_states, device=self.weights.device) if self.ids is None else self.ids

    def shared(self, ranks: ProcessGroup) -> "RolloutBatch":
        """
        The same states as this process' share in the rollout of all processes.

        :param ranks: the processes; all take the same number of steps
        :return: the share, with weights that add up to 1 over all processes, and numbers as if one process had all
            environments, those of the first process first
        """
        if ranks.size == 1:
            return self
        here, total, before = ranks.n_envs[ranks.rank], sum(ranks.n_envs), sum(ranks.n_envs[: ranks.rank])
        step, env = self.state_ids // here, self.state_ids % here
        return replace(self, weights=self.weights * (here / total), ids=step * total + before + env, ranks=ranks)

    @property
    def n_states(self) -> int:
        """Number of states, padding included."""
        return len(self.actions)

    @property
    def n_units(self) -> int:
        """Number of units that can be selected."""
        return self.n_states // self.length

    def units_in(self, n_states: int) -> int:
        """
        How many units have so many states in all.

        :param n_states: number of states, at least 1
        :return: number of units, at least 1
        """
        return int(max(n_states // self.length, 1))

    @property
    def is_real(self) -> th.Tensor:
        """Which states are no padding, shape ``(n_states,)``."""
        return self.weights > 0.0

    def sample(self, index: th.Tensor) -> "RolloutBatch":
        """
        Some of the units, weighted to stand for all of them.

        :param index: which, shape ``(n,)``
        :return: the sample
        """
        sample = self.select(index)
        return replace(sample, weights=sample.weights * (self.weights.sum() / sample.weights.sum()))

    def thin(self, factor: int) -> "RolloutBatch":
        """
        A random 1/``factor`` of the units, weighted to stand for all of them.

        A regular stride would pick the same environments every time wherever the factor divides their number. The
        choice depends on the number of units alone.

        :param factor: 1 keeps all
        :return: the thinned rollout
        """
        shuffled = th.randperm(self.n_units, generator=th.Generator().manual_seed(0))
        return self.sample(shuffled[: -(-self.n_units // factor)].sort().values.to(self.actions.device))

    def minibatches(self, size: int, equal: bool = False) -> Sequence[th.Tensor]:
        """
        Shuffle the units and cut them into pieces, as many in every process that has a share.

        :param size: most states in a piece, which has one unit in any case
        :param equal: make the pieces as equal as can be, instead of the last one smaller
        :return: the units of each piece
        """
        order = th.randperm(self.n_units, device=self.actions.device)
        pieces = order.split(self.units_in(size))
        count = int(self.ranks.max(th.tensor(len(pieces), device=order.device)))
        if not equal and len(pieces) == count:
            return pieces
        return order.repeat(-(-count // len(order))).tensor_split(count)  # a small share is gone through more than once

    def chunks(self, max_size: int | None) -> list["RolloutBatch"]:
        """
        Cut into consecutive pieces.

        :param max_size: most states in a piece, which has one unit in any case; None for one piece
        :return: the pieces, in order
        """
        size = self.n_units if max_size is None else self.units_in(max_size)
        return [self.select(slice(start, start + size)) for start in range(0, self.n_units, size)]

    @th.no_grad()
    def encoded(self, encode: Callable[[Inputs], th.Tensor], max_size: int | None) -> "RolloutBatch":
        """
        The same states with features in place of their observations.

        :param encode: observations ↦ features
        :param max_size: most states to encode at once
        :return: the rollout with encoded observations
        """
        return replace(self, inputs=th.cat([encode(chunk.inputs) for chunk in self.chunks(max_size)]))


def read_rollout(buffer: RolloutBuffer, action_space: spaces.Space[Any]) -> RolloutBatch:
    """
    The whole buffer as tensors on its device, without shuffling it and, on the CPU, without copying the observations.

    A buffer class of the user's own is asked for its samples instead, in whatever order it gives them. Where the buffer has
    action masks, the inputs are ``{"observations": ..., "action_masks": ...}``.

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
    actions = as_taken(actions, action_space)
    advantages, returns = advantages.flatten(), returns.flatten()
    weights = th.full_like(advantages, 1.0 / len(advantages))
    return RolloutBatch(inputs, actions, advantages, returns, weights)


def as_taken(actions: th.Tensor, action_space: spaces.Space[Any]) -> th.Tensor:
    """
    Actions in the form that ``Distribution.log_prob`` takes.

    :param actions: as a buffer holds them, shape ``(n_states, ...)``
    :param action_space: the environment's action space
    :return: integers for Discrete, shape ``(n_states,)``; else numbers, shape ``(n_states, ...)``
    """
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions.float()


def normalize_advantages(rollout: RolloutBatch) -> RolloutBatch:
    """
    Advantages with mean 0 and standard deviation 1.

    Advantages are differences of returns. A spread below the rounding error of the returns carries no information; such
    advantages become exactly 0 instead of amplified noise.

    :param rollout: the rollout
    :return: the same rollout with normalised advantages
    """
    real = rollout.is_real
    seen = moments(th.stack([rollout.advantages[real], rollout.returns[real]], dim=1), rollout.ranks)
    (mean, mean_return), (variance, return_variance) = seen.mean, seen.variance
    spread = (variance * (seen.n_values / max(seen.n_values - 1, 1))).sqrt()
    rounding = th.finfo(spread.dtype).eps * (mean_return.square() + return_variance).sqrt()
    centred = rollout.advantages - mean
    return replace(rollout, advantages=th.where(spread <= rounding, th.zeros_like(centred), centred / (spread + 1e-8)))
