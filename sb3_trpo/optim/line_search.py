"""How far to go along the direction: the longest step the trust region allows, then backtracking."""

import math
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch as th

from sb3_trpo.optim.parameters import Snapshot, assign, flatten, is_step

#: Share of the trust region at which the first point aims; the rest leaves room for the error of the prediction.
AIM = 0.97
#: Weight of the latest update in the ratio of true to quadratic KL.
NEWEST = 0.2


class LineSearchStatus(str, Enum):
    """How the search for a step ended."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    SKIPPED = "skipped"


class Evaluation(NamedTuple):
    """
    The functions of the constrained problem, at one θ.

    :param objective: L(θ), the surrogate objective
    :param kl: D̄_KL(θ_old, θ), the mean joint KL in nats
    :param max_state_kl: the largest joint KL in one state of the rollout, in nats
    """

    objective: float
    kl: float
    max_state_kl: float = 0.0


class LineSearchResult(NamedTuple):
    """
    What the line search found.

    :param outcome: accepted, rejected, or skipped since there is no step
    :param fraction: the share of the full step that was taken (0 if rejected)
    :param backtracks: j, how often the step was shortened
    :param point: objective and KL at the accepted point (those of θ_old if rejected)
    """

    outcome: LineSearchStatus
    fraction: float
    backtracks: int
    point: Evaluation


def max_step_length(curvature: float, target_kl: float) -> float:
    """
    β = √(2δ / sᵀFs): where the quadratic model ½β²sᵀFs of the KL along s reaches δ.

    Source: Schulman et al. 2015, appendix C.

    :param curvature: sᵀFs, with F the Fisher matrix
    :param target_kl: δ in nats
    :return: β, or 0 where the model gives no finite positive length
    """
    if not (0.0 < curvature < math.inf):
        return 0.0
    square = 2.0 * target_kl / curvature
    return math.sqrt(square) if square < math.inf else 0.0


def undamped_curvature(damped: float, damping: float, square_norm: float) -> float:
    """
    sᵀFs = sᵀ(F + λI)s − λsᵀs, kept above a hundredth of the damped curvature.

    The damping belongs to the direction: it says how far to trust F. Measuring the step's length with it as well leaves
    a good part of the trust region unused. The bound keeps a direction that F hardly knows from an endless step.

    :param damped: sᵀ(F + λI)s
    :param damping: λ
    :param square_norm: sᵀs
    :return: the curvature that the step's length is measured with
    """
    return max(damped - damping * square_norm, 0.01 * damped)


def first_fraction(kl_ratio: float) -> float:
    """
    Fraction of the full step at which the KL is expected just inside the trust region.

    :param kl_ratio: true over quadratic KL of a step, as recent updates measured it
    :return: √(0.97 / ``kl_ratio``), at most 1
    """
    return min(1.0, math.sqrt(AIM / kl_ratio))


def updated_kl_ratio(kl_ratio: float, result: "LineSearchResult", target_kl: float) -> float:
    """
    Moving average of the ratio of true to quadratic KL, by which :func:`first_fraction` predicts the next update's.

    Points far inside the region say little of the KL at its boundary and do not count. A measured ratio counts as at most 2
    and at least ½.

    :param kl_ratio: the average so far
    :param result: a line search from θ_old along a step whose quadratic KL is δ
    :param target_kl: δ in nats
    :return: the new average
    """
    if result.outcome is not LineSearchStatus.ACCEPTED or result.fraction < 0.5:
        return kl_ratio
    measured = result.point.kl / (result.fraction**2 * target_kl)
    return kl_ratio + NEWEST * (min(max(measured, 0.5), 2.0) - kl_ratio)


def backtracking_line_search(
    evaluate: Callable[[float], Evaluation],
    start: Evaluation,
    *,
    target_kl: float,
    max_state_kl: float | None = None,
    shrink: float,
    max_iter: int,
    min_improvement: float = 0.0,
    slope: float = 0.0,
    first: float = 1.0,
) -> LineSearchResult:
    """
    The first of ever smaller fractions whose point improves the objective inside the trust region.

    A point that does not improve enough is followed by one α times as far. A point outside the trust region is followed by
    the one where a quadratic KL through it would meet the bound, less 1 %: backtracking by α, as in Schulman et al. 2015,
    appendix C, would leave up to a share 1 − α² of the region unused. A KL that is not finite is far outside: a tenth of
    the fraction is next. The last points are to find a step at all: where the chord of the KL meets the bound, if the KL
    starts above 0 (a convex one is inside there), and where the parabola of start, slope and last point has its maximum.

    :param evaluate: fraction ↦ objective and KL at θ + fraction·βs (it leaves the parameters there)
    :param start: the point at θ, inside the trust region
    :param target_kl: δ in nats; the bound holds with equality allowed
    :param max_state_kl: bound on the KL in any one state, in nats; it holds in the same way. None for none
    :param shrink: α, in (0, 1)
    :param max_iter: bound on the number of points tried
    :param min_improvement: least improvement of the objective by the full step, and by a fraction of it in proportion; it
        must be above 0 in any case
    :param slope: improvement by the full step if the objective were linear; 0 if unknown
    :param first: fraction of the first point
    :return: the accepted point, or a rejection; the caller restores θ then
    """
    fraction = first
    state_bound = math.inf if max_state_kl is None else max_state_kl
    for backtracks in range(max_iter):
        point = evaluate(fraction)
        improvement = point.objective - start.objective
        # A NaN fails every comparison, an infinite objective is no improvement that can be trusted.
        kls = ((start.kl, point.kl, target_kl), (start.max_state_kl, point.max_state_kl, state_bound))
        is_inside = all(kl <= bound for _, kl, bound in kls)
        if is_inside and 0.0 < improvement < math.inf and improvement >= fraction * min_improvement:
            return LineSearchResult(LineSearchStatus.ACCEPTED, fraction, backtracks, point)
        if not is_inside and math.isfinite(point.kl) and math.isfinite(point.max_state_kl):
            chord = min((bound - first) / (kl - first) for first, kl, bound in kls if kl > bound)
            fraction *= 0.99 * (chord if backtracks >= max_iter - 3 and start.kl > 0.0 else math.sqrt(chord))
        elif not is_inside:
            fraction *= min(shrink, 0.1)
        else:
            missing = fraction * slope - improvement
            is_last = backtracks == max_iter - 2 and 0.0 < fraction * slope < missing < math.inf
            fraction *= 0.5 * fraction * slope / missing if is_last else shrink
    return LineSearchResult(LineSearchStatus.REJECTED, 0.0, max_iter, start)


def search_along(
    step: th.Tensor,
    parameters: Sequence[th.Tensor],
    evaluate: Callable[[], Evaluation],
    start: Evaluation,
    *,
    buffers: Iterable[th.Tensor] = (),
    **options: Any,
) -> LineSearchResult:
    """
    Move parameters along a step as far as :func:`backtracking_line_search` allows, or not at all.

    :param step: the full step βs, flat; a zero step, or one that is not finite, is skipped
    :param parameters: θ
    :param evaluate: objective and KL at the present θ
    :param start: objective and KL at the θ before
    :param buffers: tensors that evaluating may change; restored together with θ
    :param options: further arguments of :func:`backtracking_line_search`
    :return: the accepted point, or ``start``
    """
    if not is_step(step):
        return LineSearchResult(LineSearchStatus.SKIPPED, 0.0, 0, start)
    before = Snapshot([*parameters, *buffers])
    theta = flatten(parameters).detach()

    def evaluate_at(fraction: float) -> Evaluation:
        assign(parameters, theta + fraction * step)
        return evaluate()

    search = backtracking_line_search(evaluate_at, start, **options)
    if search.outcome is LineSearchStatus.REJECTED:
        before.restore()
    return search


def take_step(
    step: th.Tensor,
    parameters: Sequence[th.Tensor],
    evaluate: Callable[[], Evaluation],
    start: Evaluation,
    *,
    buffers: Iterable[th.Tensor] = (),
) -> LineSearchResult:
    """
    Move parameters by a whole step without a search, unless objective or KL is not finite there.

    :param step: the step, flat; a zero step, or one that is not finite, is skipped
    :param parameters: θ
    :param evaluate: objective and KL at the present θ
    :param start: objective and KL at the θ before
    :param buffers: tensors that evaluating may change; restored together with θ
    :return: the point after the step, or ``start``
    """
    if not is_step(step):
        return LineSearchResult(LineSearchStatus.SKIPPED, 0.0, 0, start)
    before = Snapshot([*parameters, *buffers])
    assign(parameters, flatten(parameters).detach() + step)
    point = evaluate()
    if math.isfinite(point.objective) and math.isfinite(point.kl):
        return LineSearchResult(LineSearchStatus.ACCEPTED, 1.0, 0, point)
    before.restore()
    return LineSearchResult(LineSearchStatus.REJECTED, 0.0, 0, start)
