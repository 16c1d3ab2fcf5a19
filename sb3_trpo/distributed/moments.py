"""Mean and variance of what several processes have seen, as if one had seen it all."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_trpo.distributed.process_group import ProcessGroup


@contextmanager
def merged(running: Sequence[RunningMeanStd], ranks: ProcessGroup) -> Iterator[None]:
    """
    Add to running moments, which are the same in all processes, what all of them see inside.

    Inside, each process goes on with what it has seen itself. Sums about the common old mean lose no digits.

    :param running: the running moments, changed in place
    :param ranks: the processes
    :return: context manager
    """
    before = copy.deepcopy(list(running))
    yield
    if ranks.size == 1 or not running:
        return
    own = [_sums_since(new, old) for new, old in zip(running, before, strict=True)]
    total = ranks.sum(th.from_numpy(np.concatenate([sums.ravel() for sums in own]))).numpy()
    places = np.cumsum([sums.size for sums in own])[:-1]
    for new, old, sums, like in zip(running, before, np.split(total, places), own, strict=True):
        _add(new, old, sums.reshape(like.shape))


def _sums_since(new: RunningMeanStd, old: RunningMeanStd) -> np.ndarray:
    """Number, sum and sum of squares of the deviations from the old mean, of what came since; shape ``(3, ...)``."""
    shift = new.mean - old.mean
    count = np.full_like(shift, new.count - old.count)
    return np.stack([count, new.count * shift, new.count * (new.var + shift**2) - old.count * old.var])


def _add(new: RunningMeanStd, old: RunningMeanStd, sums: np.ndarray) -> None:
    added, total, squares = sums
    if not added.any():
        new.mean, new.var, new.count = old.mean, old.var, old.count
        return
    new.count = old.count + float(added.max())
    shift = total / new.count
    new.mean = old.mean + shift
    new.var = np.maximum((old.count * old.var + squares) / new.count - shift**2, 0.0)
