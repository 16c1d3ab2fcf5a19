"""The value regression, V(s) ≈ R̂, by Gauss-Newton steps or by minibatch steps of the policy's optimizer."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner, make_preconditioner
from sb3_trpo.optim.line_search import Evaluation, LineSearchStatus, search_along
from sb3_trpo.optim.mlp import recorded_calls
from sb3_trpo.optim.objective import Model, ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import Snapshot, all_finite

ValueFunction = Callable[[Inputs], th.Tensor]

#: Conjugate gradient iterations of a Gauss-Newton step, and their relative tolerance.
CG_MAX_STEPS = 8
CG_RESIDUAL_TOL = 0.1


class CriticFit(NamedTuple):
    """
    Result of the value regression.

    :param losses: mean squared error: at the end (Gauss-Newton), or of each minibatch; NaN if unknown
    :param succeeded: False if no step helped or a number was not finite, and the critic is unchanged
    """

    losses: list[float]
    succeeded: bool

    @property
    def value_loss(self) -> float:
        """Mean of the losses."""
        return sum(self.losses) / len(self.losses)


def fit_minibatches(
    values: ValueFunction,
    batch: RolloutBatch,
    *,
    critic: Sequence[nn.Parameter],
    optimizer: th.optim.Optimizer,
    batch_size: int,
    n_epochs: int,
) -> CriticFit:
    """
    Minimize E[(V(s) − R̂)²] in the critic's parameters, by shuffled minibatches.

    Parameters and optimizer state are restored unless all end finite.

    :param values: observations ↦ V(s), shape ``(n_states,)``
    :param batch: states and their returns R̂
    :param critic: the parameters to train
    :param optimizer: their optimizer; other parameters in it stay unchanged
    :param batch_size: states in a minibatch, which has at least one sequence
    :param n_epochs: passes over the rollout
    :return: the losses, and whether the fit was kept
    """
    if not critic:
        return CriticFit([math.nan], True)
    critic_before = Snapshot(critic)
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    losses = []
    for _ in range(n_epochs):
        for index in batch.minibatches(batch_size):
            minibatch = batch.sample(index)
            loss = minibatch.weights.dot((values(minibatch.inputs) - minibatch.returns).square())
            gradients = batch.ranks.sum_each(th.autograd.grad(loss, critic))
            for parameter, gradient in zip(critic, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(loss.detach())
    optimizer.zero_grad()

    total = batch.ranks.sum(th.stack(losses))
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

    :param model: the value function, by :func:`value_output`
    :param batch: the rollout
    :param chunk_size: most states in one forward pass; None for all
    """

    def relinearize(self) -> "ValueRegression":
        """Make the same regression at the current parameters."""
        return ValueRegression(self.model, self.batch, self.chunk_size)

    @cached_property
    def loss(self) -> float:
        """E[(V(s) − R̂)²] at the parameters that the regression was made with."""
        return -2.0 * float(self.ranks.sum(self._log_likelihood()))

    def gradient(self) -> th.Tensor:
        """
        −∇ E[½(V(s) − R̂)²]; one exchange between processes gives the loss as well.

        :return: flat gradient of the log-likelihood, shape ``(n_parameters,)``
        """
        own = self._own_gradient(lambda chunk, _, new: chunk.weights.dot(new.log_prob))
        gradient, log_likelihood = self.ranks.sum_each([own, self._log_likelihood()])
        self.loss = -2.0 * float(log_likelihood)
        return gradient

    def _log_likelihood(self) -> th.Tensor:
        """Log-likelihood of this process's returns."""
        return th.stack([c.weights.dot(old.log_prob) for c, old in zip(self._chunks, self._old, strict=True)]).sum()


def value_output(values: ValueFunction, batch: RolloutBatch, layers: Sequence[nn.Module] = ()) -> ModelOutput:
    """
    Evaluate a value function as a Gaussian over returns.

    :param values: observations ↦ V(s), shape ``(n_states,)``
    :param batch: states and their returns R̂
    :param layers: layers whose calls to record
    :return: N(V(s), 1) and its log-density at R̂, up to a constant
    """
    with recorded_calls(layers) as calls:
        predicted = values(batch.inputs)
    log_prob = -0.5 * (predicted - batch.returns).square()
    components = (Normal(predicted.unsqueeze(1), th.ones_like(predicted).unsqueeze(1)),)
    return ModelOutput(components, log_prob, None, calls)


def fit_gauss_newton(
    critic: Model,
    batch: RolloutBatch,
    chunk_size: int | None = None,
    *,
    damping: float,
    n_steps: int,
    curvature_size: int | None = None,
    max_iter: int = CG_MAX_STEPS,
    rtol: float = CG_RESIDUAL_TOL,
) -> CriticFit:
    """
    Minimize E[(V(s) − R̂)²] by damped Gauss-Newton steps, each solved by conjugate gradients and shortened until it helps.

    Source: Schulman et al. 2016 (GAE), section 5, where a trust region takes the place of the damping.

    :param critic: the value function, by :func:`value_output`
    :param batch: the rollout
    :param chunk_size: most states in one forward pass; None for all
    :param damping: added to the diagonal of the Gauss-Newton matrix; larger is smoother
    :param n_steps: maximum number of steps
    :param curvature_size: most states that the Gauss-Newton matrix is computed from; None for all
    :param max_iter: maximum number of conjugate gradient iterations in each
    :param rtol: relative tolerance of conjugate gradients
    :return: the loss at the end, and whether the first step helped
    """
    regression = ValueRegression(critic, batch, chunk_size)
    sample = batch.random_sample(curvature_size)
    inverse: KFACPreconditioner | None = None  # the curvature changes little between steps: one serves them all
    for n_taken in range(n_steps if critic.parameters else 0):
        gradient = regression.gradient()
        curved = regression if sample is batch else ValueRegression(critic, sample, chunk_size)
        matrix = FisherOperator(curved, damping)
        matrix.keep_definite(gradient)
        inverse = inverse or make_preconditioner(curved, matrix.damping)
        solution = conjugate_gradient(matrix, gradient, max_iter=max_iter, rtol=rtol, M=inverse)
        improved = _improve(regression, solution.x, 2.0 * float(gradient.dot(solution.x)))
        if improved is None:
            return CriticFit([regression.loss], n_taken > 0)
        regression = improved
    return CriticFit([regression.loss], True)


def _improve(regression: ValueRegression, step: th.Tensor, slope: float) -> ValueRegression | None:
    """Take the step, or the first of its halves that lowers the loss; otherwise restore the critic."""
    candidate = regression

    def evaluate() -> Evaluation:
        nonlocal candidate
        candidate = regression.relinearize()
        return Evaluation(objective=-candidate.loss, kl=0.0)

    start = Evaluation(-regression.loss, 0.0)
    critic = regression.model.parameters
    search = search_along(step, critic, evaluate, start, target_kl=0.0, shrink=0.5, max_iter=6, slope=slope)
    return candidate if search.outcome is LineSearchStatus.ACCEPTED else None
