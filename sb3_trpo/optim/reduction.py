"""Sums over the processes that hold shards of a rollout, as the numerics see them."""

from collections.abc import Sequence
from typing import Protocol

import torch as th


class Reduction(Protocol):
    """
    The processes that hold shards of a rollout. All of them must call every method.

    :param rank: number of this process
    :param size: number of processes
    :param n_envs: number of environments of each process
    """

    rank: int
    size: int
    n_envs: list[int]

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """Sum over the processes."""

    def sum_each(self, tensors: Sequence[th.Tensor]) -> Sequence[th.Tensor]:
        """Sum several tensors over the processes."""

    def max(self, tensor: th.Tensor) -> th.Tensor:
        """Largest over the processes, element by element."""

    def gather(self, tensor: th.Tensor) -> th.Tensor:
        """Stack the tensors of all processes, shape ``(size, ...)``."""


class SingleProcess:
    """One process with the whole rollout: every sum is the number itself."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.n_envs = [1]

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """Return the tensor."""
        return tensor

    def sum_each(self, tensors: Sequence[th.Tensor]) -> Sequence[th.Tensor]:
        """Return the tensors."""
        return tensors

    def max(self, tensor: th.Tensor) -> th.Tensor:
        """Return the tensor."""
        return tensor

    def gather(self, tensor: th.Tensor) -> th.Tensor:
        """Return the tensor with a first dimension of size 1."""
        return tensor.unsqueeze(0)


SINGLE_PROCESS = SingleProcess()
