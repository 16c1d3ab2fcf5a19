"""The conjugate gradient method for A x = b, with A symmetric positive definite and known by its products alone."""

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch as th

LinearMap = Callable[[th.Tensor], th.Tensor]


class CGStatus(str, Enum):
    """Why the solver stopped."""

    CONVERGED = "converged"
    ITERATION_BOUND = "iteration bound"
    ROUNDING = "rounding"
    NONPOSITIVE_CURVATURE = "non-positive curvature"
    NOT_FINITE = "not finite"


class CGResult(NamedTuple):
    """
    What the solver found.

    :param x: the last iterate for which every quantity was finite; that of the least residual if rounding spoilt later ones
    :param status: why the solver stopped
    :param iterations: number of products with A that went into ``x``
    :param residual: ‖b − A x‖ / ‖b‖ by the recurrence, in the norm of M (0 when b is 0)
    :param curvature: xᵀAx, from the residual
    """

    x: th.Tensor
    status: CGStatus
    iterations: int
    residual: float
    curvature: float


class _Iterate(NamedTuple):
    x: th.Tensor
    r: th.Tensor
    iterations: int
    residual: float


def conjugate_gradient(
    A: LinearMap, b: th.Tensor, *, max_iter: int, rtol: float = 0.0, min_growth: float = 0.0, M: LinearMap | None = None
) -> CGResult:
    """
    Solve A x = b by (preconditioned) conjugate gradients, from x = 0.

    Stops as soon as ‖r‖_M ≤ rtol·‖b‖_M, where r = b − A x and ‖r‖_M = √(rᵀ M r). The iterates grow the quadratic gain
    bᵀx − ½xᵀAx monotonically from 0, so every one of them is an ascent direction of bᵀx. Source: Nocedal & Wright,
    Numerical Optimization, algorithm 5.3.

    Stops as well once an iteration has added less than a share of the gain (Martens 2010, section 4.4).

    Also stops where rounding allows no more: at a residual below the machine epsilon ε, or at one 1/√ε times above the
    least, and then returns to the iterate of the least. An ``M`` that is not positive and finite at b or at the first
    residual, or not finite later, is replaced by the identity: one that is not symmetric may be so.

    :param A: v ↦ A v, symmetric positive definite
    :param b: right-hand side, shape ``(n,)``
    :param max_iter: bound on the number of products with A
    :param rtol: relative tolerance on the residual
    :param min_growth: the share of the gain that an iteration must add for another one to follow
    :param M: v ↦ M v with M ≈ A⁻¹, symmetric positive definite; None for the identity
    :return: the solution, with the reason for stopping
    """
    start = _Iterate(th.zeros_like(b), b.clone(), 0, 1.0)
    if not bool(b.any()):
        return CGResult(start.x, CGStatus.CONVERGED, 0, 0.0, 0.0)
    z = b if M is None else M(b)
    rz = float(b.dot(z))
    if M is not None and not 0.0 < rz < math.inf:
        M, z = None, b
        rz = float(b.dot(z))
    if not 0.0 < rz < math.inf:
        status = CGStatus.NONPOSITIVE_CURVATURE if rz <= 0.0 else CGStatus.NOT_FINITE
        return CGResult(start.x, status, 0, 1.0, 0.0)
    status, end = _iterate(A, M, start, z, max_iter, rtol, min_growth)
    return CGResult(end.x, status, end.iterations, end.residual, float(end.x.dot(b - end.r)))


def _iterate(
    A: LinearMap, M: LinearMap | None, start: _Iterate, z: th.Tensor, max_iter: int, rtol: float, min_growth: float
) -> tuple[CGStatus, _Iterate]:
    now, best = start, start._replace(residual=math.inf)
    eps = th.finfo(z.dtype).eps
    p, rz = z, start.r.dot(z)
    rz_start = rz_before = float(rz)
    gain, growth = 0.0, math.inf
    while now.residual > rtol and growth >= min_growth * gain:
        if now.residual <= eps:
            return CGStatus.ROUNDING, now
        if now.residual > best.residual / math.sqrt(eps):
            return CGStatus.ROUNDING, best
        if now.iterations >= max_iter:
            return CGStatus.ITERATION_BOUND, now
        Ap = A(p)
        curvature = p.dot(Ap)
        length = rz / curvature
        r = now.r - length * Ap
        z = r if M is None else M(r)
        rz_new = r.dot(z)
        # The stopping rule needs two numbers, read together: on a GPU this is the iteration's only wait for the device.
        curvature_read, rz_read = th.stack([curvature, rz_new]).tolist()
        is_useless = not math.isfinite(rz_read) or (rz_read < 0.0 and now.iterations == 0)
        if M is not None and is_useless and 0.0 < curvature_read < math.inf:
            return _iterate(A, None, start, start.r, max_iter, rtol, min_growth)
        if curvature_read <= 0.0 or rz_read < 0.0:
            return CGStatus.NONPOSITIVE_CURVATURE, now
        if not (math.isfinite(curvature_read) and math.isfinite(rz_read)):
            return CGStatus.NOT_FINITE, now
        now = _Iterate(now.x + length * p, r, now.iterations + 1, math.sqrt(rz_read / rz_start))
        growth, rz_before = 0.5 * rz_before**2 / curvature_read, rz_read
        gain += growth
        best = now if now.residual < best.residual else best
        p = z + (rz_new / rz) * p
        rz = rz_new
    return CGStatus.CONVERGED, now
