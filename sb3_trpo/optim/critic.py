"""The value regression, V(s) ≈ R̂: by Gauss-Newton steps, or by minibatch steps of the policy's own optimizer."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner
from sb3_trpo.optim.layers import recorded_calls
from sb3_trpo.optim.line_search import Evaluation, LineSearchStatus, backtracking_line_search
from sb3_trpo.optim.mlp import MLP
from sb3_trpo.optim.objective import ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import Snapshot, all_finite, assign, flatten

ValueFunction = Callable[[Inputs], th.Tensor]

#: Conjugate gradient iterations of a Gauss-Newton step, and their relative tolerance.
CG_MAX_STEPS = 8
CG_RESIDUAL_TOL = 0.1


class CriticFit(NamedTuple):
    """
    What the regression did.

    :param losses: mean squared error: at the end (Gauss-Newton), or of each minibatch; NaN if unknown
    :param succeeded: False if no step was good, or a number was not finite, and the critic is as it was before
    """

    losses: list[float]
    succeeded: bool

    @property
    def value_loss(self) -> float:
        """Mean of the losses."""
        return sum(self.losses) / len(self.losses)


def fit_minibatches(
    values: ValueFunction,
    rollout: RolloutBatch,
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
    :param rollout: states and their returns R̂
    :param critic: the parameters to train
    :param optimizer: optimizer that holds them, possibly among others, which stay untouched
    :param batch_size: states in a minibatch, which has one sequence in any case
    :param n_epochs: passes over the rollout
    :return: the losses, and whether the fit stands
    """
    if not critic:
        return CriticFit([math.nan], True)
    critic_before = Snapshot(critic)
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    losses = []
    for _ in range(n_epochs):
        for index in rollout.minibatches(batch_size):
            batch = rollout.sample(index)
            loss = batch.weights.dot((values(batch.inputs) - batch.returns).square())
            slopes = rollout.ranks.sum_each(th.autograd.grad(loss, critic))
            for parameter, slope in zip(critic, slopes, strict=True):
                parameter.grad = slope
            optimizer.step()
            losses.append(loss.detach())
    optimizer.zero_grad()

    total = rollout.ranks.sum(th.stack(losses))
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, th.Tensor)]
    if not all_finite([total, *critic, *state]):
        critic_before.restore()
        optimizer.load_state_dict(optimizer_before)
        return CriticFit([math.nan], False)
    return CriticFit(total.tolist(), True)


class ValueRegression(RolloutObjective):
    """
    The value function as the mean of a Gaussian with standard deviation 1 over returns.

    Its log-likelihood is −½(V(s) − R̂)² up to a constant and its Fisher matrix E[Jᵀ J] is the Gauss-Newton matrix of
    that loss, so everything made for the policy step serves the regression too.

    :param values: observations ↦ V(s), shape ``(n_states,)``
    :param chunks: the rollout, cut into pieces
    :param layers: layers whose calls the forward passes with graphs record
    """

    def __init__(self, values: ValueFunction, chunks: Sequence[RolloutBatch], layers: Sequence[nn.Module]) -> None:
        super().__init__(partial(_regression_forward, values), chunks, layers)
        self._values = values

    def anew(self) -> "ValueRegression":
        """Make the same regression at the parameters that the model has now."""
        return ValueRegression(self._values, self._chunks, self._layers)

    @cached_property
    def loss(self) -> float:
        """E[(V(s) − R̂)²] at the parameters that the regression was made with."""
        log_likelihoods = [c.weights.dot(old.log_prob) for c, old in zip(self._chunks, self._old, strict=True)]
        return -2.0 * float(self.ranks.sum(th.stack(log_likelihoods).sum()))

    def gradient(self, critic: Sequence[th.Tensor]) -> th.Tensor:
        """
        −∇ E[½(V(s) − R̂)²].

        :param critic: the parameters
        :return: flat gradient of the log-likelihood, shape ``(n_parameters,)``
        """
        return self._gradient(lambda chunk, _, new: chunk.weights.dot(new.log_prob), critic)


def _regression_forward(values: ValueFunction, rollout: RolloutBatch, layers: Sequence[nn.Module]) -> ModelOutput:
    with recorded_calls(layers) as calls:
        predicted = values(rollout.inputs)
    log_prob = -0.5 * (predicted - rollout.returns).square()
    parts = (Normal(predicted.unsqueeze(1), th.ones_like(predicted).unsqueeze(1)),)
    return ModelOutput(parts, log_prob, None, calls)


def fit_gauss_newton(
    values: ValueFunction,
    chunks: Sequence[RolloutBatch],
    *,
    critic: Sequence[nn.Parameter],
    layers: Sequence[nn.Module],
    chain: MLP | None,
    damping: float,
    n_steps: int,
    cg_max_steps: int = CG_MAX_STEPS,
    cg_residual_tol: float = CG_RESIDUAL_TOL,
) -> CriticFit:
    """
    Minimise E[(V(s) − R̂)²] by damped Gauss-Newton steps, each solved by conjugate gradients and shortened until it helps.

    Source: Schulman et al. 2016 (GAE), section 5, where a trust region takes the place of the damping.

    :param values: observations ↦ V(s), shape ``(n_states,)``
    :param chunks: the rollout, cut into pieces
    :param critic: the parameters to train
    :param layers: those of its layers with Kronecker-factored blocks
    :param chain: the layers between observation and value, if they are a chain
    :param damping: added to the diagonal of the Gauss-Newton matrix; larger is smoother
    :param n_steps: bound on the number of steps
    :param cg_max_steps: bound on conjugate gradient iterations in each
    :param cg_residual_tol: relative tolerance of conjugate gradients
    :return: the loss at the end, and whether the first step helped
    """
    regression = ValueRegression(values, chunks, layers)
    # Two steps apart, the curvature is much the same: one preconditioner serves them all.
    inverse: KFACPreconditioner | None = None
    for taken in range(n_steps if critic else 0):
        gradient = regression.gradient(critic)
        fisher = FisherOperator(regression, critic, damping, chain)
        fisher.keep_definite(gradient)
        inverse = inverse or KFACPreconditioner(regression, layers, critic, fisher.damping)
        solution = conjugate_gradient(
            fisher,
            gradient,
            max_iter=cg_max_steps,
            rtol=cg_residual_tol,
            M=inverse,
        )
        improved = _improve(regression, solution.x, critic)
        if improved is None:
            return CriticFit([regression.loss], taken > 0)
        regression = improved
    return CriticFit([regression.loss], True)


def _improve(regression: ValueRegression, step: th.Tensor, critic: Sequence[nn.Parameter]) -> ValueRegression | None:
    """Take the step, or the first of its halves that lowers the loss; else put the critic back."""
    before = Snapshot(critic)
    start = flatten(critic).detach()
    candidate = regression

    def evaluate(fraction: float) -> Evaluation:
        nonlocal candidate
        assign(critic, start + fraction * step)
        candidate = regression.anew()
        return Evaluation(objective=-candidate.loss, kl=0.0)

    search = backtracking_line_search(evaluate, Evaluation(-regression.loss, 0.0), target_kl=0.0, shrink=0.5, max_iter=6)
    if search.outcome is LineSearchStatus.ACCEPTED:
        return candidate
    before.restore()
    return None
