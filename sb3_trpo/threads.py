"""The number of threads that torch uses while a model trains."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch as th
from torch import nn

#: Environment variables with which a user, or ``torchrun``, sets the number.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_threads(current: int, n_cpus: int) -> int | None:
    """
    Recognize torch's default, the number of logical or physical cores.

    :param current: current number of threads
    :param n_cpus: logical cores that this process may use
    :return: ``current``, or None if the user must have set it
    """
    return current if current in (n_cpus, (n_cpus + 1) // 2) else None


_N_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
#: Torch's default; None if ``torch.set_num_threads`` was called before this import.
_DEFAULT = default_threads(th.get_num_threads(), _N_CPUS)


class ThreadChoice(NamedTuple):
    """
    A number of threads.

    :param number: the number
    :param reason: why, for the log
    """

    number: int
    reason: str

    def __str__(self) -> str:
        """Return the line for the log."""
        return f"Using {self.number} torch thread{'' if self.number == 1 else 's'}: {self.reason}"


def choose_threads(policy: nn.Module) -> ThreadChoice:
    """
    Choose the number of threads for training a policy.

    With small layers, threads spend more time waiting for one another than computing; on a busy machine two threads were four
    to ten times slower than one (``benchmarks/threads.py``). Policies with convolutions use torch's number. A number that the
    user has set, by an environment variable or ``torch.set_num_threads``, is kept.

    :param policy: the policy to train
    :return: the choice
    """
    current = th.get_num_threads()
    for name in VARIABLES:
        if os.environ.get(name):
            return ThreadChoice(current, f"{name}={os.environ[name]}")
    if current != _DEFAULT:
        return ThreadChoice(current, "set by torch.set_num_threads")
    if any(parameter.device.type != "cpu" for parameter in policy.parameters()):
        return ThreadChoice(current, "the networks are not on the CPU")
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in policy.modules()):
        return ThreadChoice(current, "the policy has convolutions")
    return ThreadChoice(1, "the networks are small (set OMP_NUM_THREADS for another number)")


@contextmanager
def training_threads(policy: nn.Module) -> Iterator[ThreadChoice]:
    """
    Use the chosen number of threads inside the block, and the caller's afterwards.

    :param policy: the policy to train
    :return: context manager that gives the choice
    """
    before = th.get_num_threads()
    choice = choose_threads(policy)
    if choice.number != before:
        th.set_num_threads(choice.number)
    try:
        yield choice
    finally:
        if choice.number != before:
            th.set_num_threads(before)
