"""What an update did, in figures."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from sb3_trpo.optim.conjugate_gradient import CGResult
from sb3_trpo.optim.line_search import Evaluation, LineSearchResult


class PolicyStep(NamedTuple):
    """
    One step of the policy.

    :param start: objective and KL before it
    :param gradient_norm: ‖g‖
    :param solution: its direction s
    :param length: β, what the direction was multiplied with at most
    :param expected: βgᵀs
    :param search: how far it went
    """

    start: Evaluation
    gradient_norm: float
    solution: CGResult
    length: float
    expected: float
    search: LineSearchResult


@dataclass(frozen=True)
class Summary:
    """
    A figure over the steps, or the minibatches, of an update.

    :param mean: their mean
    :param std: their standard deviation
    :param min: the smallest
    :param max: the largest
    :param last: the last
    :param count: their number
    """

    mean: float
    std: float
    min: float
    max: float
    last: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """
        Summarise.

        :param values: the figure of each step, at least one
        :return: its summary
        """
        array = np.asarray(values, dtype=np.float64)
        return cls(
            mean=float(array.mean()),
            std=float(array.std()),
            min=float(array.min()),
            max=float(array.max()),
            last=float(array[-1]),
            count=len(array),
        )


@dataclass(frozen=True)
class UpdateStats:
    """
    The figures of an update, by the names that they have in the log.

    All but the value loss are over the steps of the policy, one unless ``n_policy_updates`` or ``policy_batch_size`` asks for
    more.

    :param policy_objective: L(θ) over the whole rollout, after the step
    :param kl_divergence_loss: mean joint KL from the policy that collected the rollout, in nats, after the step
    :param step_length: what the direction was multiplied with
    :param expected_improvement: gᵀ of the step
    :param actual_improvement: growth of L(θ) by the step
    :param gradient_norm: ‖g‖
    :param backtracks: points that the line search refused
    :param cg_iterations: iterations of conjugate gradients
    :param cg_residual: their relative residual
    :param value_loss: squared error of the critic, over its minibatches or at the end of its Gauss-Newton steps
    :param train_seconds: wall-clock time of the update
    """

    policy_objective: Summary
    kl_divergence_loss: Summary
    step_length: Summary
    expected_improvement: Summary
    actual_improvement: Summary
    gradient_norm: Summary
    backtracks: Summary
    cg_iterations: Summary
    cg_residual: Summary
    value_loss: Summary
    train_seconds: float

    @classmethod
    def of(cls, steps: Sequence[PolicyStep], value_losses: Sequence[float], train_seconds: float) -> "UpdateStats":
        """
        Sum up an update.

        :param steps: steps of the policy, at least one
        :param value_losses: losses of the critic, at least one
        :param train_seconds: wall-clock time
        :return: the figures
        """
        return cls(
            policy_objective=Summary.of([step.search.point.objective for step in steps]),
            kl_divergence_loss=Summary.of([step.search.point.kl for step in steps]),
            step_length=Summary.of([step.search.fraction * step.length for step in steps]),
            expected_improvement=Summary.of([step.search.fraction * step.expected for step in steps]),
            actual_improvement=Summary.of([step.search.point.objective - step.start.objective for step in steps]),
            gradient_norm=Summary.of([step.gradient_norm for step in steps]),
            backtracks=Summary.of([step.search.backtracks for step in steps]),
            cg_iterations=Summary.of([step.solution.iterations for step in steps]),
            cg_residual=Summary.of([step.solution.residual for step in steps]),
            value_loss=Summary.of(value_losses),
            train_seconds=train_seconds,
        )

    @property
    def summaries(self) -> dict[str, Summary]:
        """Every figure but the time, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Summary)}
