"""Mean and variance over the shards of several processes."""

from typing import NamedTuple

import torch as th

from sb3_trpo.optim.reduction import Reduction


class Moments(NamedTuple):
    """
    Moments of some numbers.

    :param mean: their mean
    :param variance: mean square of their deviations from it
    :param n_values: how many there are
    """

    mean: th.Tensor
    variance: th.Tensor
    n_values: int


def moments(values: th.Tensor, ranks: Reduction) -> Moments:
    """
    Moments of the values of all processes. Source: Chan, Golub & LeVeque 1983, equation 2.1.

    :param values: those of this process, shape ``(n, ...)``
    :param ranks: the processes
    :return: mean and variance over the first dimension, shape ``(...)``
    """
    variance, mean = th.var_mean(values, dim=0, correction=0)
    counts, means, variances = ranks.gather(th.stack([th.full_like(mean, len(values)), mean, variance])).unbind(1)
    shares = counts / counts.sum(dim=0)
    mean = means[0] + (shares * (means - means[0])).sum(dim=0)  # exact for equal means
    variance = (shares * (variances + (means - mean).square())).sum(dim=0)
    return Moments(mean, variance, int(counts.sum(dim=0).max()))
