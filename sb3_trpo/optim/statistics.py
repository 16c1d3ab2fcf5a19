"""Statistics of one update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from sb3_trpo.optim.conjugate_gradient import CGResult
from sb3_trpo.optim.line_search import Evaluation, LineSearchResult

#: Statistics of a summary that are logged beside its value.
SPREAD = ("std", "min", "max")


class PolicyStep(NamedTuple):
    """
    One step of the policy.

    :param start: objective and KL before it
    :param gradient_norm: ‖g‖
    :param solution: direction s, with the solver's status
    :param length: β, largest multiple of the direction
    :param expected: βgᵀs
    :param search: result of the line search
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
    One statistic over the steps, or the minibatches, of an update.

    :param mean: mean
    :param std: standard deviation
    :param min: smallest value
    :param max: largest value
    :param last: last value
    :param count: number of values
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
        Summarize values.

        :param values: one value per step, at least one
        :return: the summary
        """
        if len(values) == 1 and math.isfinite(values[0]):  # as of nearly every update, and NumPy takes its time
            value = float(values[0])
            return cls(mean=value, std=0.0, min=value, max=value, last=value, count=1)
        array = np.asarray(values, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # of infinite values: NaN
            mean, std = float(array.mean()), float(array.std())
        return cls(
            mean=mean,
            std=std,
            min=float(array.min()),
            max=float(array.max()),
            last=float(array[-1]),
            count=len(array),
        )


#: Statistics of the whole update, however many steps it takes: the last value counts, not the mean.
OF_UPDATE = frozenset({"policy_objective", "kl_divergence_loss", "max_state_kl"})


@dataclass(frozen=True, repr=False)
class UpdateStats:
    """
    Statistics of an update, under their names in the log.

    All but the value loss summarize the policy steps: one step, unless ``n_policy_updates`` or ``policy_batch_size`` asks for
    more.

    :param policy_objective: L(θ) on the whole rollout after the step
    :param kl_divergence_loss: mean joint KL(π_old ‖ π_θ) on the whole rollout after the step, in nats
    :param max_state_kl: the largest joint KL(π_old ‖ π_θ) in one state of the rollout after the step, in nats
    :param step_length: αʲβ, multiple of the direction s
    :param expected_improvement: αʲβgᵀs
    :param actual_improvement: increase of L(θ) by the step
    :param gradient_norm: ‖g‖
    :param backtracks: points that the line search rejected
    :param cg_iterations: conjugate gradient iterations
    :param cg_residual: relative residual of conjugate gradients
    :param value_loss: squared error of the critic, in its minibatches or after its Gauss-Newton steps
    :param train_seconds: wall-clock time of the update
    """

    policy_objective: Summary
    kl_divergence_loss: Summary
    max_state_kl: Summary
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
        Summarize an update.

        :param steps: policy steps, at least one
        :param value_losses: losses of the critic, at least one
        :param train_seconds: wall-clock time of the update
        :return: the statistics
        """
        return cls(
            policy_objective=Summary.of([step.search.point.objective for step in steps]),
            kl_divergence_loss=Summary.of([step.search.point.kl for step in steps]),
            max_state_kl=Summary.of([step.search.point.max_state_kl for step in steps]),
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
        """All statistics but the time, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Summary)}

    @property
    def logged(self) -> dict[str, float]:
        """The value of each statistic in the log: its last value if it is one of the whole update, else its mean."""
        return {name: summary.last if name in OF_UPDATE else summary.mean for name, summary in self.summaries.items()}

    def __repr__(self) -> str:
        """Return a table: the logged values, and the spread of those that summarize several."""
        several = any(summary.count > 1 for summary in self.summaries.values())
        header = "".join(f"{title:>11}" for title in ("value", *SPREAD)) + f"{'count':>7}"
        lines = [f"{type(self).__name__:<20}{header if several else ''}".rstrip()]
        for (name, summary), value in zip(self.summaries.items(), self.logged.values(), strict=True):
            line = f"  {name:<20}{value:>9.3g}"
            if summary.count > 1:
                line += "".join(f"{getattr(summary, statistic):>11.3g}" for statistic in SPREAD) + f"{summary.count:>7}"
            lines.append(line)
        return "\n".join([*lines, f"  {'train_seconds':<20}{self.train_seconds:>9.3g}"])
