"""Targets of the critic in units of the returns' standard deviation, so that networks predict numbers of order one."""

import math
from dataclasses import replace
from typing import Any, Protocol

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.moments import moments
from sb3_trpo.optim.parameters import all_finite


class RunningMoments(Protocol):
    """Mean and variance of all returns so far, as SB3's ``RunningMeanStd`` keeps them."""

    var: Any

    def update_from_moments(self, batch_mean: Any, batch_var: Any, batch_count: float) -> None:
        """Add numbers, by their moments."""


def value_scale(running: RunningMoments) -> float:
    """
    Return the factor from the critic's outputs to values: the standard deviation of all returns so far.

    :param running: their moments
    """
    return math.sqrt(running.var + 1e-8)


def scale_returns(batch: RolloutBatch, running: RunningMoments) -> RolloutBatch:
    """
    Divide returns by the standard deviation of those before them, then count them in.

    :param batch: a rollout, or this process's shard of it
    :param running: moments of the returns so far; they stay as they are if a return is not finite
    :return: the rollout with scaled returns
    """
    scaled = replace(batch, returns=batch.returns / value_scale(running))
    seen = moments(batch.returns[batch.mask].cpu().double(), batch.ranks)
    if all_finite([seen.variance]):
        running.update_from_moments(seen.mean.numpy(), seen.variance.numpy(), seen.n_values)
    return scaled
