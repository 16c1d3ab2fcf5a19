"""The value regression: V(s) ≈ R̂ by minibatch steps of the policy's own optimizer."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_trpo.parameters import Snapshot, all_finite
from sb3_trpo.rollout import Inputs, map_inputs


class CriticFit(NamedTuple):
    """
    What the regression did.

    :param value_loss: mean squared error, averaged over the minibatches (NaN if there was nothing to train)
    :param succeeded: False if it met a number that is not finite and the critic is as it was before
    """

    value_loss: float
    succeeded: bool


def fit_minibatches(
    values: Callable[[Inputs], th.Tensor],
    inputs: Inputs,
    returns: th.Tensor,
    *,
    critic: Sequence[nn.Parameter],
    optimizer: th.optim.Optimizer,
    batch_size: int,
    n_epochs: int,
) -> CriticFit:
    """
    Minimise E[(V(s) − R̂)²] in the critic's parameters, by shuffled minibatches.

    Either every parameter and the optimizer's state end finite, or both are put back.

    :param values: observations ↦ V(s), shape ``(n_states,)``
    :param inputs: observations
    :param returns: R̂, shape ``(n_states,)``
    :param critic: the parameters to train
    :param optimizer: optimizer that holds them, possibly among others, which stay untouched
    :param batch_size: states in a minibatch
    :param n_epochs: passes over the rollout
    :return: the mean loss, and whether the fit stands
    """
    if not critic:
        return CriticFit(float("nan"), True)
    critic_before = Snapshot(critic)
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    losses = []
    for _ in range(n_epochs):
        for index in th.randperm(len(returns), device=returns.device).split(batch_size):
            predicted = values(map_inputs(lambda tensor, index=index: tensor[index], inputs))  # type: ignore[misc]
            loss = F.mse_loss(predicted, returns[index])
            for parameter, slope in zip(critic, th.autograd.grad(loss, critic), strict=True):
                parameter.grad = slope
            optimizer.step()
            losses.append(loss.detach())
    optimizer.zero_grad()

    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, th.Tensor)]
    if not all_finite([th.stack(losses), *critic, *state]):
        critic_before.restore()
        optimizer.load_state_dict(optimizer_before)
        return CriticFit(float("nan"), False)
    return CriticFit(float(th.stack(losses).mean()), True)
