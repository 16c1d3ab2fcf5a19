"""The rollout as tensors: what the policy saw, what it did, and how good that turned out to be."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

Inputs = th.Tensor | dict[str, th.Tensor]


def map_inputs(function: Callable[[th.Tensor], th.Tensor], inputs: Inputs) -> Inputs:
    """
    Apply a function to every tensor of an observation.

    :param function: tensor ↦ tensor
    :param inputs: observations, one tensor or a dictionary of them
    :return: the results, in the same structure
    """
    if isinstance(inputs, dict):
        return {key: function(tensor) for key, tensor in inputs.items()}
    return function(inputs)


@dataclass(frozen=True)
class Rollout:
    """
    States of a rollout, or some of them. The first dimension of every tensor counts the states.

    A mean over the rollout is the sum weighted by ``weights``, so that the sums over its chunks add up to it.

    :param inputs: observations
    :param actions: in the form ``Distribution.log_prob`` takes, shape ``(n_states, ...)``
    :param advantages: Â, shape ``(n_states,)``
    :param returns: R̂, the critic's targets, shape ``(n_states,)``
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :param ratios: π(a|s) / π_collecting(a|s), shape ``(n_states,)``, where another policy π looks at it; None for all 1
    """

    inputs: Inputs
    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    weights: th.Tensor
    ratios: th.Tensor | None = None

    def select(self, index: slice | th.Tensor) -> "Rollout":
        """
        Some of the states, weights unchanged.

        :param index: which
        :return: views of them
        """
        inputs = map_inputs(lambda tensor: tensor[index], self.inputs)
        ratios = None if self.ratios is None else self.ratios[index]
        return Rollout(inputs, self.actions[index], self.advantages[index], self.returns[index], self.weights[index], ratios)

    @property
    def n_states(self) -> int:
        """Number of states."""
        return len(self.actions)

    def sample(self, index: th.Tensor) -> "Rollout":
        """
        Some of the states, weighted to stand for all of them.

        :param index: which, shape ``(n,)``
        :return: the sample
        """
        sample = self.select(index)
        return replace(sample, weights=sample.weights / sample.weights.sum())

    def thin(self, factor: int) -> "Rollout":
        """
        A random 1/``factor`` of the states, weighted to stand for all of them.

        A regular stride would pick the same environments every time wherever the factor divides their number. The
        choice depends on the number of states alone.

        :param factor: 1 keeps all
        :return: the thinned rollout
        """
        shuffled = th.randperm(self.n_states, generator=th.Generator().manual_seed(0))
        return self.sample(shuffled[: -(-self.n_states // factor)].sort().values.to(self.actions.device))

    def chunks(self, max_size: int | None) -> list["Rollout"]:
        """
        Cut into consecutive pieces.

        :param max_size: most states in a piece; None for one piece
        :return: the pieces, in order
        """
        size = self.n_states if max_size is None else max_size
        return [self.select(slice(start, start + size)) for start in range(0, self.n_states, size)]

    @th.no_grad()
    def encoded(self, encode: Callable[[Inputs], th.Tensor], max_size: int | None) -> "Rollout":
        """
        The same states with features in place of their observations.

        :param encode: observations ↦ features
        :param max_size: most states to encode at once
        :return: the rollout with encoded observations
        """
        return replace(self, inputs=th.cat([encode(chunk.inputs) for chunk in self.chunks(max_size)]))


def read_rollout(buffer: RolloutBuffer, action_space: spaces.Space) -> Rollout:  # type: ignore[type-arg]
    """
    The whole buffer as tensors on its device, without shuffling it and, on the CPU, without copying the observations.

    A buffer class of the user's own is asked for its samples instead, in whatever order it gives them.

    :param buffer: a full rollout buffer
    :param action_space: the environment's action space
    :return: the rollout, advantages as the buffer holds them
    """
    if type(buffer) in (RolloutBuffer, DictRolloutBuffer):
        n_states = buffer.buffer_size * buffer.n_envs

        def as_tensor(array: th.Tensor) -> th.Tensor:
            # SB3 stores (step, env, ...) and turns that into (state, ...) at the first `get`; both fit here.
            tail = array.shape[1:] if buffer.generator_ready else array.shape[2:]
            return th.as_tensor(array, device=buffer.device).reshape(n_states, *tail)

        inputs = map_inputs(as_tensor, buffer.observations)  # type: ignore[arg-type]
        actions, advantages, returns = map(as_tensor, (buffer.actions, buffer.advantages, buffer.returns))  # type: ignore[arg-type]
    else:
        samples = next(buffer.get(batch_size=None))
        inputs, actions = samples.observations, samples.actions
        advantages, returns = samples.advantages, samples.returns
    actions = actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions.float()
    advantages, returns = advantages.flatten(), returns.flatten()
    weights = th.full_like(advantages, 1.0 / len(advantages))
    return Rollout(inputs, actions, advantages, returns, weights)


def normalize_advantages(rollout: Rollout) -> Rollout:
    """
    Advantages with mean 0 and standard deviation 1.

    Advantages are differences of returns. A spread below the rounding error of the returns carries no information; such
    advantages become exactly 0 instead of amplified noise.

    :param rollout: the rollout
    :return: the same rollout with normalised advantages
    """
    advantages = rollout.advantages
    centred = advantages - advantages.mean()
    spread = centred.square().mean().sqrt() if len(advantages) < 2 else centred.std()
    rounding = th.finfo(advantages.dtype).eps * rollout.returns.abs().max()
    return replace(rollout, advantages=th.where(spread <= rounding, th.zeros_like(centred), centred / (spread + 1e-8)))
