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
    A: LinearMap, b: th.Tensor, *, max_iter: int, rtol: float = 0.0, M: LinearMap | None = None
) -> CGResult:
    """
    Solve A x = b by (preconditioned) conjugate gradients, from x = 0.

    Stops as soon as ‖r‖_M ≤ rtol·‖b‖_M, where r = b − A x and ‖r‖_M = √(rᵀ M r). The iterates grow the quadratic gain
    bᵀx − ½xᵀAx monotonically from 0, so that every one of them is an ascent
    direction of bᵀx. Source: Nocedal & Wright, Numerical Optimization, algorithm 5.3.

    Stops as well where rounding allows no more: at a residual below the machine epsilon ε, or 1/√ε times above the least
    one, to whose iterate it returns then. An ``M`` that is not positive or not finite at b gives way to the identity.

    :param A: v ↦ A v, symmetric positive definite
    :param b: right-hand side, shape ``(n,)``
    :param max_iter: bound on the number of products with A
    :param rtol: relative tolerance on the residual
    :param M: v ↦ M v with M ≈ A⁻¹, symmetric positive definite; None for the identity
    :return: the solution, with the reason for stopping
    """
    M = M or _identity
    if not bool(b.any()):
        return CGResult(th.zeros_like(b), CGStatus.CONVERGED, 0, 0.0, 0.0)
    z = M(b)
    rz_start = float(b.dot(z))
    if M is not _identity and not 0.0 < rz_start < math.inf:
        return conjugate_gradient(A, b, max_iter=max_iter, rtol=rtol)
    if not rz_start < math.inf:
        return CGResult(th.zeros_like(b), CGStatus.NOT_FINITE, 0, 1.0, 0.0)
    status, end = _iterate(A, M, b, z, max_iter, rtol)
    return CGResult(end.x, status, end.iterations, end.residual, float(end.x.dot(b - end.r)))


def _identity(v: th.Tensor) -> th.Tensor:
    return v


def _iterate(A: LinearMap, M: LinearMap, b: th.Tensor, z: th.Tensor, max_iter: int, rtol: float) -> tuple[CGStatus, _Iterate]:
    """Run the iteration from x = 0, where z = M b."""
    x, r, iterations, residual = now = _Iterate(th.zeros_like(b), b.clone(), 0, 1.0)
    eps = th.finfo(r.dtype).eps
    best = now._replace(residual=math.inf)
    p, rz = z, r.dot(z)
    rz_start = float(rz)
    while residual > rtol:
        if residual <= eps:
            return CGStatus.ROUNDING, now
        if residual > best.residual / math.sqrt(eps):
            return CGStatus.ROUNDING, best
        if iterations >= max_iter:
            return CGStatus.ITERATION_BOUND, now
        Ap = A(p)
        curvature = p.dot(Ap)
        length = rz / curvature
        r_new = r - length * Ap
        z = M(r_new)
        rz_new = r_new.dot(z)
        # The stopping rule needs two numbers, read together: on a GPU this is the iteration's only wait for the device.
        curvature_read, rz_read = th.stack([curvature, rz_new]).tolist()
        if curvature_read <= 0.0 or rz_read < 0.0:
            return CGStatus.NONPOSITIVE_CURVATURE, now
        if not (math.isfinite(curvature_read) and math.isfinite(rz_read)):
            return CGStatus.NOT_FINITE, now
        x, r = x + length * p, r_new
        iterations += 1
        residual = math.sqrt(rz_read / rz_start)
        now = _Iterate(x, r, iterations, residual)
        best = now if residual < best.residual else best
        p = z + (rz_new / rz) * p
        rz = rz_new
    return CGStatus.CONVERGED, now
