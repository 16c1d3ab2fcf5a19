import math
from functools import partial

import pytest
import torch as th

from sb3_trpo.optim.line_search import (
    Evaluation,
    LineSearchResult,
    LineSearchStatus,
    backtracking_line_search,
    first_fraction,
    max_step_length,
    search_along,
    take_step,
    undamped_curvature,
    updated_kl_ratio,
)

NAN, INF = float("nan"), float("inf")
START = Evaluation(objective=1.0, kl=0.0)
GOOD = Evaluation(objective=2.0, kl=0.05)
TARGET_KL = 0.1


def search(points, max_iter=10):
    """Search over given points; also the fractions tried."""
    fractions = []

    def evaluate(fraction):
        fractions.append(fraction)
        return points[len(fractions) - 1]

    return backtracking_line_search(evaluate, START, target_kl=TARGET_KL, shrink=0.5, max_iter=max_iter), fractions


@pytest.mark.parametrize(("curvature", "target_kl", "length"), [(2.0, 0.25, 0.5), (0.5, 0.01, 0.2), (1e-8, 0.02, 2000.0)])
def test_step_length_by_hand(curvature, target_kl, length):
    assert max_step_length(curvature, target_kl) == pytest.approx(length)
    assert 0.5 * length**2 * curvature == pytest.approx(target_kl)


def test_smallest_curvatures_give_no_endless_step():
    assert max_step_length(5e-324, 0.05) == 0.0


def test_damping_is_no_part_of_the_steps_curvature():
    F, s, damping = 3.0, 2.0, 0.5
    assert undamped_curvature(s * (F + damping) * s, damping, s * s) == pytest.approx(s * F * s)


@pytest.mark.parametrize("F", [0.0, -1e-6, 1e-4], ids=["none", "rounding", "little"])
def test_direction_that_the_fisher_matrix_hardly_knows_has_a_hundredth_of_the_damped_curvature(F):
    assert undamped_curvature(F + 0.5, 0.5, 1.0) == pytest.approx(0.01 * (F + 0.5))


@pytest.mark.parametrize("curvature", [0.0, -0.0, -1.0, NAN, INF, -INF])
def test_no_step_without_a_finite_positive_curvature(curvature):
    assert max_step_length(curvature, 0.1) == 0.0


def test_full_step_is_taken_where_it_is_good():
    result, fractions = search([GOOD])
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, 1.0, 0, GOOD)
    assert fractions == [1.0]


OUTSIDE = Evaluation(2.0, 4 * TARGET_KL)
REFUSED = {
    "kl_nan": Evaluation(2.0, NAN),
    "kl_inf": Evaluation(2.0, INF),
    "objective_worse": Evaluation(0.5, 0.05),
    "objective_equal": Evaluation(1.0, 0.05),
    "objective_nan": Evaluation(NAN, 0.05),
    "objective_inf": Evaluation(INF, 0.05),
    "objective_minus_inf": Evaluation(-INF, 0.05),
    "all_nan": Evaluation(NAN, NAN, NAN),
    "state_kl_nan": Evaluation(2.0, 0.05, NAN),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_backtracks_past_a_point_that_will_not_do(refused):
    result, fractions = search([refused, refused, GOOD])
    factor = 0.5 if math.isfinite(refused.kl) and math.isfinite(refused.max_state_kl) else 0.1
    assert fractions == pytest.approx([1.0, factor, factor**2])
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, fractions[-1], 2, GOOD)


def test_chord_of_a_kl_that_does_not_start_at_its_minimum():
    """A convex KL stays below its chord: near the bound from the start, the square root would miss again and again."""
    start, kls = Evaluation(1.0, 0.999 * TARGET_KL), []

    def evaluate(fraction):
        kls.append(start.kl + fraction + fraction**2)
        return Evaluation(1.0 + fraction, kls[-1])

    result = backtracking_line_search(evaluate, start, target_kl=TARGET_KL, shrink=0.5, max_iter=10)
    assert result.outcome is LineSearchStatus.ACCEPTED
    assert len(kls) == 9


def test_last_point_is_the_maximum_of_the_parabola():
    """f(t) = at − bt² rises by at most a²/4b at t = a/2b, far below what backtracking reaches."""
    a, b = 1e-3, 1.0
    tried = []

    def evaluate(fraction):
        tried.append(fraction)
        return Evaluation(1.0 + a * fraction - b * fraction**2, 0.0)

    result = backtracking_line_search(evaluate, START, target_kl=TARGET_KL, shrink=0.8, max_iter=5, slope=a)
    assert result.outcome is LineSearchStatus.ACCEPTED
    assert tried == pytest.approx([1.0, 0.8, 0.64, 0.512, a / (2 * b)])
    tried.clear()
    result = backtracking_line_search(evaluate, START, target_kl=TARGET_KL, shrink=0.8, max_iter=5)
    assert (result.outcome, tried[-1]) == (LineSearchStatus.REJECTED, pytest.approx(0.8**4))


def test_point_outside_is_followed_by_the_boundary_of_a_quadratic_kl():
    result, fractions = search([OUTSIDE, OUTSIDE, GOOD])
    assert fractions == pytest.approx([1.0, 0.99 / 2, (0.99 / 2) ** 2])
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, fractions[-1], 2, GOOD)


def test_boundary_is_reached_to_two_percent_where_the_kl_is_quadratic():
    kls = []

    def evaluate(fraction):
        kls.append(1.7 * TARGET_KL * fraction**2)
        return Evaluation(2.0, kls[-1])

    backtracking_line_search(evaluate, START, target_kl=TARGET_KL, shrink=0.5, max_iter=5)
    assert len(kls) == 2
    assert 0.98 * TARGET_KL <= kls[-1] <= TARGET_KL


def test_point_with_too_large_a_kl_in_one_state_is_followed_by_the_boundary_of_that_kl():
    """The mean KL would allow √(0.1/0.16) of the step, the largest KL in a state a quarter."""
    point = Evaluation(2.0, 0.16, max_state_kl=16.0)
    result, fractions = search_from(START, [point, GOOD], max_state_kl=1.0)
    assert fractions == pytest.approx([1.0, 0.99 * 0.25])
    assert result.outcome is LineSearchStatus.ACCEPTED
    _, fractions = search_from(START, [point, GOOD])
    assert fractions == pytest.approx([1.0, 0.99 * math.sqrt(TARGET_KL / 0.16)])


def test_kl_in_one_state_may_equal_its_bound():
    at_bound, above = Evaluation(2.0, 0.05, 1.0), Evaluation(2.0, 0.05, math.nextafter(1.0, 2.0))
    assert search_from(START, [at_bound], max_state_kl=1.0)[0].backtracks == 0
    assert search_from(START, [above, GOOD], max_state_kl=1.0)[0].backtracks == 1


def test_first_point_that_will_do_is_taken_not_the_best():
    better = Evaluation(5.0, 0.05)
    assert search([GOOD, better])[0].point == GOOD


def test_kl_may_equal_its_bound():
    at_bound, above = Evaluation(2.0, TARGET_KL), Evaluation(2.0, math.nextafter(TARGET_KL, 1.0))
    assert search([at_bound])[0].outcome is LineSearchStatus.ACCEPTED
    assert search([above, GOOD])[0].backtracks == 1


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_rejects_after_the_last_try_with_the_start_point(refused):
    result, fractions = search([refused] * 3, max_iter=3)
    assert result == LineSearchResult(LineSearchStatus.REJECTED, 0.0, 3, START)
    factor = 0.5 if math.isfinite(refused.kl) and math.isfinite(refused.max_state_kl) else 0.1
    assert fractions == pytest.approx([1.0, factor, factor**2])


def test_good_point_at_the_last_try_counts():
    result, _ = search([REFUSED["kl_inf"]] * 2 + [GOOD], max_iter=3)
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, pytest.approx(0.01), 2, GOOD)


@pytest.mark.parametrize("start", [Evaluation(NAN, 0.0), Evaluation(INF, 0.0)], ids=["nan", "inf"])
def test_nothing_improves_on_a_start_that_is_not_finite(start):
    result = backtracking_line_search(lambda _: GOOD, start, target_kl=TARGET_KL, shrink=0.5, max_iter=2)
    assert result.outcome is LineSearchStatus.REJECTED


# ---- least improvement


def search_from(start, points, *, max_iter=10, **kwargs):
    remaining = iter(points)
    fractions = []

    def evaluate(fraction):
        fractions.append(fraction)
        return next(remaining)

    return backtracking_line_search(evaluate, start, target_kl=TARGET_KL, shrink=0.5, max_iter=max_iter, **kwargs), fractions


def test_improvement_must_reach_its_least_in_proportion_to_the_fraction():
    """Of 1 at the full step, that is 0.5 at half of it, and 0.25 at a quarter; equality is enough."""
    points = [Evaluation(1.9, 0.05), Evaluation(1.49, 0.05), Evaluation(1.25, 0.05)]
    result, fractions = search_from(START, points, min_improvement=1.0)
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, 0.25, 2, points[-1])
    assert fractions == [1.0, 0.5, 0.25]
    assert search_from(START, [Evaluation(2.0, 0.05)], min_improvement=1.0)[0].backtracks == 0
    assert search_from(START, [Evaluation(1.9, 0.05)], min_improvement=0.0)[0].backtracks == 0


@pytest.mark.parametrize("min_improvement", [0.0, -1.0, -math.inf])
def test_improvement_is_above_zero_whatever_its_least(min_improvement):
    result, _ = search_from(START, [Evaluation(1.0, 0.05), Evaluation(0.9, 0.05), GOOD], min_improvement=min_improvement)
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, 0.25, 2, GOOD)


@pytest.mark.parametrize("min_improvement", [NAN, INF])
def test_nothing_reaches_a_least_improvement_that_is_not_finite(min_improvement):
    assert search_from(START, [GOOD] * 3, max_iter=3, min_improvement=min_improvement)[0].outcome is LineSearchStatus.REJECTED


# ---- starts inside the trust region


def test_boundary_of_a_quadratic_kl_from_a_start_inside_the_region():
    """0.02 of 0.1 is used up: a KL that grows by fraction² from there to 0.34 has 0.08 of 0.32 left, half of the step."""
    start = Evaluation(1.0, 0.02)
    result, fractions = search_from(start, [Evaluation(2.0, 0.34), GOOD])
    assert fractions == pytest.approx([1.0, 0.99 * 0.5])
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, fractions[1], 1, GOOD)


def test_start_on_the_boundary_may_still_move_inside():
    start = Evaluation(1.0, TARGET_KL)
    assert search_from(start, [Evaluation(1.2, 0.09)])[0].outcome is LineSearchStatus.ACCEPTED
    result, fractions = search_from(start, [OUTSIDE, start, start], max_iter=3)
    assert result == LineSearchResult(LineSearchStatus.REJECTED, 0.0, 3, start)
    assert fractions == [1.0, 0.0, 0.0]


def test_rejected_search_reports_where_it_started():
    start = Evaluation(1.5, 0.03)
    assert search_from(start, [Evaluation(1.4, 0.05)] * 2, max_iter=2)[0] == LineSearchResult(
        LineSearchStatus.REJECTED, 0.0, 2, start
    )


# ---- the first point


def test_search_starts_at_the_given_fraction():
    result, fractions = search_from(START, [OUTSIDE, GOOD], first=0.8)
    assert fractions == pytest.approx([0.8, 0.8 * 0.99 / 2])
    assert result.fraction == fractions[1]


@pytest.mark.parametrize("ratio", [1.0, 1.2, 1.9])
def test_first_fraction_aims_just_inside_the_trust_region(ratio):
    assert first_fraction(ratio) ** 2 * ratio == pytest.approx(0.97)


def test_first_fraction_is_never_longer_than_the_full_step():
    assert first_fraction(0.5) == 1.0


def test_kl_ratio_learns_a_constant_one_until_one_point_is_enough():
    """KL = 1.4 · δ · fraction²: the full step is outside at first; later the first point is the last."""
    ratio, backtracks = 1.0, []
    for _ in range(20):
        result = backtracking_line_search(
            lambda fraction: Evaluation(2.0, 1.4 * TARGET_KL * fraction**2),
            START,
            target_kl=TARGET_KL,
            shrink=0.5,
            max_iter=5,
            first=first_fraction(ratio),
        )
        backtracks.append(result.backtracks)
        ratio = updated_kl_ratio(ratio, result, TARGET_KL)
    assert backtracks[0] == 1
    assert backtracks[-1] == 0
    assert ratio == pytest.approx(1.4, abs=0.01)
    assert result.point.kl == pytest.approx(0.97 * TARGET_KL, rel=0.01)


def accepted(fraction, kl):
    return LineSearchResult(LineSearchStatus.ACCEPTED, fraction, 0, Evaluation(2.0, kl))


def test_kl_ratio_is_not_told_by_steps_that_are_short_or_refused():
    rejected = LineSearchResult(LineSearchStatus.REJECTED, 0.0, 10, START)
    skipped = LineSearchResult(LineSearchStatus.SKIPPED, 0.0, 0, START)
    for result in (rejected, skipped, accepted(0.4, TARGET_KL)):
        assert updated_kl_ratio(1.1, result, TARGET_KL) == 1.1


@pytest.mark.parametrize("kl", [-1e-9, 0.0, TARGET_KL])
def test_kl_ratio_stays_bounded(kl):
    """At half the step, a KL of δ is a ratio of 4."""
    ratio = 1.0
    for _ in range(100):
        ratio = updated_kl_ratio(ratio, accepted(0.5, kl), TARGET_KL)
    assert 0.5 <= ratio <= 2.0


@pytest.mark.parametrize(
    "point", [Evaluation(math.inf, 0.1), Evaluation(math.nan, 0.1), Evaluation(1.0, math.inf), Evaluation(1.0, math.nan)]
)
def test_take_step_undoes_a_step_without_a_finite_objective_and_kl(point):
    theta, buffer = th.ones(3), th.zeros(2)

    def evaluate():
        buffer.add_(1.0)
        return point

    assert take_step(th.ones(3), [theta], evaluate, START, buffers=[buffer]) == refused(LineSearchStatus.REJECTED)
    assert (theta == 1.0).all()
    assert not buffer.any()


def test_take_step_asks_for_nothing_else():
    theta, point = th.ones(3), Evaluation(-7.0, 100.0)
    result = take_step(th.tensor([1.0, 2.0, 3.0]), [theta], lambda: point, START)
    assert result == LineSearchResult(LineSearchStatus.ACCEPTED, 1.0, 0, point)
    assert theta.tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("number", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("move", [take_step, partial(search_along, target_kl=TARGET_KL, shrink=0.5, max_iter=5)])
def test_step_that_leads_nowhere_is_skipped(move, number):
    theta = th.ones(3)
    assert move(th.full((3,), number), [theta], lambda: pytest.fail("evaluated"), START) == refused(LineSearchStatus.SKIPPED)
    assert (theta == 1.0).all()


def refused(outcome):
    return LineSearchResult(outcome, 0.0, 0, START)
