import numpy as np
import pytest
import torch as th
from scipy.sparse.linalg import cg as scipy_cg

from sb3_trpo.optim.conjugate_gradient import CGStatus, conjugate_gradient


def spd(eigenvalues, seed=0):
    """A symmetric positive definite matrix with these eigenvalues."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return q @ np.diag(eigenvalues) @ q.T


MATRICES = {
    "identity": np.eye(8),
    "diagonal": np.diag(np.arange(1.0, 9.0)),
    "dense": spd(np.linspace(0.5, 5.0, 8)),
    "ill_conditioned": spd(np.logspace(-3, 1, 8)),
    "one_by_one": np.array([[3.0]]),
}
by_matrix = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)


def right_hand_side(n, seed=1):
    return np.random.default_rng(seed).normal(size=n)


def as_map(matrix):
    matrix = th.as_tensor(matrix)
    return lambda v: matrix @ v


def solve(matrix, b, *, preconditioner=None, **kwargs):
    M = None if preconditioner is None else as_map(preconditioner)
    return conjugate_gradient(as_map(matrix), th.as_tensor(b), M=M, **kwargs)


def jacobi(matrix):
    return np.diag(1.0 / np.diag(matrix))


@by_matrix
@pytest.mark.parametrize("make_preconditioner", [lambda _: None, jacobi], ids=["plain", "jacobi"])
def test_solution_is_the_direct_solvers(matrix, make_preconditioner):
    b = right_hand_side(len(matrix))
    solution = solve(matrix, b, preconditioner=make_preconditioner(matrix), max_iter=100, rtol=1e-13)
    assert solution.status is CGStatus.CONVERGED
    assert solution.residual <= 1e-13
    np.testing.assert_allclose(solution.x, np.linalg.solve(matrix, b), rtol=1e-8)


@by_matrix
@pytest.mark.parametrize("make_preconditioner", [lambda _: None, jacobi], ids=["plain", "jacobi"])
@pytest.mark.parametrize("max_iter", [1, 2, 4])
def test_every_iterate_is_scipys(matrix, make_preconditioner, max_iter):
    b, preconditioner = right_hand_side(len(matrix)), make_preconditioner(matrix)
    expected, _ = scipy_cg(matrix, b, maxiter=max_iter, rtol=1e-14, atol=0.0, M=preconditioner)
    solution = solve(matrix, b, preconditioner=preconditioner, max_iter=max_iter, rtol=1e-14)
    np.testing.assert_allclose(solution.x, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preconditioner", [None, jacobi(MATRICES["ill_conditioned"])], ids=["plain", "jacobi"])
def test_stops_at_the_first_iterate_within_the_tolerance(preconditioner):
    """The residual is ‖b − A x‖_M / ‖b‖_M, and the solver stops as soon as it is small enough."""
    matrix = MATRICES["ill_conditioned"]
    b = right_hand_side(len(matrix))
    norm = np.eye(len(b)) if preconditioner is None else preconditioner

    def relative_residual(x):
        r = b - matrix @ x.numpy()
        return np.sqrt(r @ norm @ r / (b @ norm @ b))

    every = [solve(matrix, b, preconditioner=preconditioner, max_iter=k) for k in range(1, 13)]
    residuals = [relative_residual(solution.x) for solution in every]
    np.testing.assert_allclose([solution.residual for solution in every[:6]], residuals[:6], rtol=1e-6)
    for rtol in (0.5, 0.2, 0.05):
        first = next(k for k, residual in enumerate(residuals, start=1) if residual <= rtol)
        solution = solve(matrix, b, preconditioner=preconditioner, max_iter=12, rtol=rtol)
        assert (solution.status, solution.iterations) == (CGStatus.CONVERGED, first)


@pytest.mark.parametrize("preconditioner", [None, jacobi(MATRICES["dense"])], ids=["plain", "jacobi"])
@pytest.mark.parametrize("max_iter", [0, 1, 3, 8])
def test_curvature_is_that_of_the_solution(preconditioner, max_iter):
    matrix = MATRICES["dense"]
    solution = solve(matrix, right_hand_side(8), preconditioner=preconditioner, max_iter=max_iter)
    x = solution.x.numpy()
    assert solution.curvature == pytest.approx(x @ matrix @ x, rel=1e-10)


def test_exact_preconditioner_needs_one_iteration():
    matrix = MATRICES["ill_conditioned"]
    solution = solve(matrix, right_hand_side(8), preconditioner=np.linalg.inv(matrix), max_iter=8, rtol=1e-9)
    assert (solution.status, solution.iterations) == (CGStatus.CONVERGED, 1)


def test_quadratic_gain_grows_and_every_iterate_ascends():
    matrix = MATRICES["ill_conditioned"]
    b = right_hand_side(8)
    iterates = [solve(matrix, b, max_iter=k).x.numpy() for k in range(1, 8)]
    gains = [b @ x - 0.5 * x @ matrix @ x for x in iterates]
    assert gains[0] > 0.0
    assert np.all(np.diff(gains) > 0.0)
    assert all(b @ x > 0.0 for x in iterates)


@pytest.mark.parametrize("preconditioner", [None, jacobi(MATRICES["dense"])], ids=["plain", "jacobi"])
@pytest.mark.parametrize("min_growth", [0.01, 0.1])
def test_stops_once_an_iteration_adds_little_to_the_quadratic_gain(min_growth, preconditioner):
    matrix = MATRICES["dense"]
    b = right_hand_side(8)
    iterates = [solve(matrix, b, preconditioner=preconditioner, max_iter=k).x.numpy() for k in range(8)]
    gains = np.array([b @ x - 0.5 * x @ matrix @ x for x in iterates])
    first = next(k for k in range(1, 8) if gains[k] - gains[k - 1] < min_growth * gains[k])
    assert first > 1
    solution = solve(matrix, b, preconditioner=preconditioner, max_iter=8, min_growth=min_growth)
    assert (solution.status, solution.iterations) == (CGStatus.CONVERGED, first)


def test_iteration_bound():
    calls = []

    def counted(v):
        calls.append(v)
        return as_map(MATRICES["dense"])(v)

    solution = conjugate_gradient(counted, th.as_tensor(right_hand_side(8)), max_iter=3)
    assert (solution.status, solution.iterations, len(calls)) == (CGStatus.ITERATION_BOUND, 3, 3)
    assert 0.0 < solution.residual < 1.0


def test_no_iterations_give_zero():
    solution = solve(np.eye(2), np.ones(2), max_iter=0)
    assert (solution.status, solution.iterations, solution.residual) == (CGStatus.ITERATION_BOUND, 0, 1.0)
    assert solution.x.tolist() == [0.0, 0.0]


def test_zero_right_hand_side_is_solved_by_zero_without_a_product():
    def never(v):
        pytest.fail("no product is needed")

    solution = conjugate_gradient(never, th.zeros(3), max_iter=5, rtol=0.1)
    assert (solution.status, solution.iterations, solution.residual) == (CGStatus.CONVERGED, 0, 0.0)
    assert solution.x.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("diagonal", "iterations"), [([-1.0, -2.0], 0), ([0.0, 0.0], 0), ([3.0, -1.0], 1)])
def test_nonpositive_curvature_keeps_the_last_iterate(diagonal, iterations):
    matrix = np.diag(diagonal)
    solution = solve(matrix, np.ones(2), max_iter=5)
    assert (solution.status, solution.iterations) == (CGStatus.NONPOSITIVE_CURVATURE, iterations)
    assert th.equal(solution.x, solve(matrix, np.ones(2), max_iter=iterations).x)


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan"), float("inf")])
def test_preconditioner_that_is_not_positive_gives_way_to_the_identity(scale):
    matrix, b = MATRICES["dense"], right_hand_side(8)
    solution = solve(matrix, b, preconditioner=np.diag(np.full(8, scale)), max_iter=3)
    plain = solve(matrix, b, max_iter=3)
    assert (solution.status, solution.iterations) == (CGStatus.ITERATION_BOUND, 3)
    assert th.equal(solution.x, plain.x)


@pytest.mark.parametrize("later", [-1.0, float("nan"), float("inf")])
def test_preconditioner_that_fails_at_a_residual_gives_way_to_the_identity(later):
    """As one that is not symmetric may."""
    matrix, b = MATRICES["dense"], th.as_tensor(right_hand_side(8))
    solution = conjugate_gradient(as_map(matrix), b, max_iter=3, M=lambda v: v if v is b else later * v)
    assert (solution.status, solution.iterations) == (CGStatus.ITERATION_BOUND, 3)
    assert th.equal(solution.x, solve(matrix, b, max_iter=3).x)


def test_preconditioner_that_is_not_finite_after_some_iterations_gives_way_to_the_identity():
    matrix, b = MATRICES["dense"], th.as_tensor(right_hand_side(8))
    calls = iter([1.0, 1.0, 1.0, float("nan")])
    solution = conjugate_gradient(as_map(matrix), b, max_iter=5, M=lambda v: next(calls) * v)
    assert (solution.status, solution.iterations) == (CGStatus.ITERATION_BOUND, 5)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_iterations_beyond_attainable_accuracy_do_no_harm(name, dtype):
    """With no tolerance and far more iterations than unknowns, the true residual stays near the best one."""
    matrix = th.as_tensor(MATRICES[name]).to(dtype)
    b = th.as_tensor(right_hand_side(len(matrix))).to(dtype)
    solution = conjugate_gradient(lambda v: matrix @ v, b, max_iter=400)
    assert solution.status in (CGStatus.ROUNDING, CGStatus.CONVERGED)
    condition = np.linalg.cond(MATRICES[name])
    assert float((b - matrix @ solution.x).norm() / b.norm()) < 100.0 * th.finfo(dtype).eps * condition


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_outside_of_the_range_of_a_singular_matrix_is_not_pursued(seed, scale):
    """After convergence the iterates would run away along the null space, without bound."""
    generator = th.Generator().manual_seed(seed)
    J = th.randn(10, 60, generator=generator)
    b = J.T @ th.randn(10, generator=generator) + 1e-4 * th.randn(60, generator=generator)
    M = th.where(th.arange(60) % 2 == 0, scale, 1.0)
    solution = conjugate_gradient(lambda v: J.T @ (J @ v), b, max_iter=400, M=lambda v: M * v)
    assert solution.status is CGStatus.ROUNDING
    assert float(solution.x.norm()) < 2.0
    assert float((J @ (b - J.T @ (J @ solution.x))).norm()) < 1e-4 * float((J @ b).norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_right_hand_side_that_is_not_finite(bad):
    solution = solve(np.eye(2), np.array([1.0, bad]), max_iter=5)
    assert (solution.status, solution.iterations) == (CGStatus.NOT_FINITE, 0)
    assert solution.x.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("preconditioner", [None, lambda v: v], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("at", [1, 3])
def test_product_that_is_not_finite_keeps_the_last_iterate(bad, preconditioner, at):
    matrix, b = th.as_tensor(MATRICES["dense"]), th.as_tensor(right_hand_side(8))
    calls = 0

    def product(v):
        nonlocal calls
        calls += 1
        return th.full_like(v, bad) if calls == at else matrix @ v

    solution = conjugate_gradient(product, b, max_iter=8, M=preconditioner)
    assert (solution.status, solution.iterations) == (CGStatus.NOT_FINITE, at - 1)
    assert solution.curvature == pytest.approx(float(solution.x.dot(matrix @ solution.x)), rel=1e-10)
    th.testing.assert_close(solution.x, solve(matrix, b, max_iter=at - 1).x)


def test_right_hand_side_is_left_alone():
    b = th.as_tensor(right_hand_side(8))
    before = b.clone()
    solve(MATRICES["dense"], b, max_iter=8)
    assert th.equal(b, before)
