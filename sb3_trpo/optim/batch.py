"""A rollout as tensors: observations, actions, advantages and returns."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch as th

from sb3_trpo.optim.moments import moments
from sb3_trpo.optim.reduction import SINGLE_PROCESS, Reduction

#: Inputs of a policy. Dictionaries hold Dict observations, or observations and further inputs.
Inputs = th.Tensor | dict[str, Any]


def map_inputs(function: Callable[[th.Tensor], th.Tensor], inputs: Inputs) -> Inputs:
    """
    Apply a function to every tensor of an observation.

    :param function: tensor ↦ tensor
    :param inputs: observations, a tensor or a nested dictionary of tensors
    :return: the results, in the same structure
    """
    if isinstance(inputs, dict):
        return {key: map_inputs(function, value) for key, value in inputs.items()}
    return function(inputs)


@dataclass(frozen=True)
class RolloutBatch:
    """
    States of a rollout, or some of them. The first dimension of every tensor is over states.

    A mean over the rollout is the sum weighted by ``weights``, so that the sums over chunks, and over the shards of several
    processes, add up to it.

    States are selected by sequences: single states, or, for a recurrent policy, consecutive states padded to one length.
    Padding has weight 0. Inputs that belong to sequences have one row for each of them.

    :param inputs: observations
    :param actions: in the form ``Distribution.log_prob`` takes, shape ``(n_states, ...)``
    :param advantages: Â, shape ``(n_states,)``
    :param returns: R̂, the critic's targets, shape ``(n_states,)``
    :param weights: weight of each state in the mean, shape ``(n_states,)``
    :param sequence_length: states of a sequence
    :param ratios: π(a|s) / π_collecting(a|s) where another policy π is the old one, shape ``(n_states,)``; None for all 1
    :param ids: index of each state in the whole rollout, shape ``(n_states,)``; None for 0, 1, 2, …
    :param ranks: the processes that hold shards of the rollout
    :param shared: what was computed from the observations, for whoever sees the same ones
    """

    inputs: Inputs
    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    weights: th.Tensor
    sequence_length: int = 1
    ratios: th.Tensor | None = None
    ids: th.Tensor | None = None
    ranks: Reduction = SINGLE_PROCESS
    shared: dict[Hashable, tuple[th.Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    def select(self, index: slice | th.Tensor) -> "RolloutBatch":
        """
        Select sequences, with their weights unchanged.

        :param index: which
        :return: their states; views if the index is a slice
        """

        def part(tensor: th.Tensor) -> th.Tensor:
            if self.sequence_length == 1:
                return tensor[index]
            return tensor.unflatten(0, (self.n_sequences, -1))[index].flatten(end_dim=1)

        return replace(
            self,
            inputs=map_inputs(part, self.inputs),
            actions=part(self.actions),
            advantages=part(self.advantages),
            returns=part(self.returns),
            weights=part(self.weights),
            ratios=None if self.ratios is None else part(self.ratios),
            ids=part(self.state_ids),
            shared=self.shared if isinstance(index, slice) else {},
        )

    @property
    def state_ids(self) -> th.Tensor:
        """Index of each state in the whole rollout, shape ``(n_states,)``."""
        return th.arange(self.n_states, device=self.weights.device) if self.ids is None else self.ids

    def shard(self, ranks: Reduction) -> "RolloutBatch":
        """
        Make this process's states its shard of the rollout of all processes.

        :param ranks: the processes; all take the same number of steps
        :return: the shard, with weights that sum to 1 over all processes, and indices as if one process had all
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
    def n_sequences(self) -> int:
        """Number of sequences."""
        return self.n_states // self.sequence_length

    def sequences_in(self, n_states: int) -> int:
        """
        Number of sequences with at most so many states.

        :param n_states: number of states, at least 1
        :return: number of sequences, at least 1
        """
        return int(max(n_states // self.sequence_length, 1))

    @property
    def mask(self) -> th.Tensor:
        """True for states that are not padding, shape ``(n_states,)``."""
        return self.weights > 0.0

    def sample(self, index: th.Tensor) -> "RolloutBatch":
        """
        Select sequences, weighted to represent all of them.

        :param index: which, shape ``(n,)``
        :return: the sample
        """
        sample = self.select(index)
        return replace(sample, weights=sample.weights * (self.weights.sum() / sample.weights.sum()))

    def subsample(self, factor: int) -> "RolloutBatch":
        """
        Select a random 1/``factor`` of the sequences, weighted to represent all of them.

        A regular stride would pick the same environments whenever the factor divides their number. The choice depends on
        the number of sequences only.

        :param factor: 1 keeps all
        :return: the sample
        """
        shuffled = th.randperm(self.n_sequences, generator=th.Generator().manual_seed(0))
        return self.sample(shuffled[: -(-self.n_sequences // factor)].sort().values.to(self.actions.device))

    def random_sample(self, size: int | None) -> "RolloutBatch":
        """
        Draw random sequences by torch's generator, weighted to represent all of them.

        :param size: most states, of all processes together; at least one sequence in each process. None for all
        :return: the sample; the batch itself, with nothing drawn, if it is no larger
        """
        if size is None:
            return self
        n_envs = self.ranks.n_envs
        count = self.sequences_in(size * n_envs[self.ranks.rank] // sum(n_envs))
        if count >= self.n_sequences:
            return self
        return self.sample(th.randperm(self.n_sequences)[:count].sort().values.to(self.actions.device))

    def minibatches(self, size: int, equal: bool = False) -> Sequence[th.Tensor]:
        """
        Shuffle the sequences and split them into minibatches, the same number in every process.

        :param size: most states in a minibatch, which has at least one sequence
        :param equal: make the minibatches equally large, instead of the last one smaller
        :return: the sequences of each minibatch
        """
        order = th.randperm(self.n_sequences, device=self.actions.device)
        pieces = order.split(self.sequences_in(size))
        count = int(self.ranks.max(th.tensor(len(pieces), device=order.device)))
        if not equal and len(pieces) == count:
            return pieces
        return order.repeat(-(-count // len(order))).tensor_split(count)  # a small shard is used more than once

    def chunks(self, max_size: int | None) -> list["RolloutBatch"]:
        """
        Split into consecutive chunks.

        :param max_size: most states in a chunk, which has at least one sequence; None for one chunk
        :return: the chunks, in order
        """
        size = self.n_sequences if max_size is None else self.sequences_in(max_size)
        return [self.select(slice(start, start + size)) for start in range(0, self.n_sequences, size)]

    @th.no_grad()
    def encoded(self, encode: Callable[[Inputs], th.Tensor], max_size: int | None) -> "RolloutBatch":
        """
        Replace the observations by features.

        :param encode: observations ↦ features
        :param max_size: most states to encode at once
        :return: the batch of features
        """
        features = [encode(chunk.inputs) for chunk in self.chunks(max_size)]
        if len(features) > 1:
            return replace(self, inputs=th.cat(features), shared={})
        return replace(self, inputs=features[0])


def normalize_advantages(batch: RolloutBatch) -> RolloutBatch:
    """
    Scale advantages to mean 0 and standard deviation 1.

    Advantages are differences of returns. A spread below the rounding error of the returns carries no information; such
    advantages become exactly 0 instead of amplified noise.

    :param batch: the rollout
    :return: the batch with normalized advantages
    """
    mask = batch.mask
    seen = moments(th.stack([batch.advantages[mask], batch.returns[mask]], dim=1), batch.ranks)
    (mean, mean_return), (variance, return_variance) = seen.mean, seen.variance
    spread = (variance * (seen.n_values / max(seen.n_values - 1, 1))).sqrt()
    rounding = th.finfo(spread.dtype).eps * (mean_return.square() + return_variance).sqrt()
    centered = batch.advantages - mean
    return replace(batch, advantages=th.where(spread <= rounding, th.zeros_like(centered), centered / (spread + 1e-8)))
