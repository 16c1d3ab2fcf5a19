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
    NONPOSITIVE_CURVATURE = "non-positive curvature"
    NOT_FINITE = "not finite"


class CGResult(NamedTuple):
    """
    What the solver found.

    :param x: the last iterate for which every quantity was finite
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


def conjugate_gradient(
    A: LinearMap, b: th.Tensor, *, max_iter: int, rtol: float = 0.0, M: LinearMap | None = None
) -> CGResult:
    """
    Solve A x = b by (preconditioned) conjugate gradients, from x = 0.

    Stops as soon as ‖r‖_M ≤ rtol·‖b‖_M, where r = b − A x and ‖r‖_M = √(rᵀ M r). The iterates grow the quadratic gain
    bᵀx − ½xᵀAx monotonically from 0, so that every one of them is an ascent
    direction of bᵀx. Source: Nocedal & Wright, Numerical Optimization, algorithm 5.3.

    :param A: v ↦ A v, symmetric positive definite
    :param b: right-hand side, shape ``(n,)``
    :param max_iter: bound on the number of products with A
    :param rtol: relative tolerance on the residual
    :param M: v ↦ M v with M ≈ A⁻¹, symmetric positive definite; None for the identity
    :return: the solution, with the reason for stopping
    """
    x, r, iterations = th.zeros_like(b), b.clone(), 0
    if not bool(b.any()):
        return CGResult(x, CGStatus.CONVERGED, 0, 0.0, 0.0)
    z = r if M is None else M(r)
    rz = r.dot(z)
    rz_start = float(rz)
    if not rz_start > 0.0 or rz_start == math.inf:
        status = CGStatus.NONPOSITIVE_CURVATURE if rz_start <= 0.0 else CGStatus.NOT_FINITE
        return CGResult(x, status, 0, 1.0, 0.0)

    p = z
    status, residual = CGStatus.CONVERGED, math.sqrt(max(float(rz), 0.0) / rz_start)
    while residual > rtol:
        if iterations >= max_iter:
            status = CGStatus.ITERATION_BOUND
            break
        Ap = A(p)
        curvature = p.dot(Ap)
        length = rz / curvature
        r_new = r - length * Ap
        z = r_new if M is None else M(r_new)
        rz_new = r_new.dot(z)
        # The stopping rule needs two numbers, read together: on a GPU this is the iteration's only wait for the device.
        curvature_read, rz_read = th.stack([curvature, rz_new]).tolist()
        if curvature_read <= 0.0 or rz_read < 0.0:
            status = CGStatus.NONPOSITIVE_CURVATURE
            break
        if not (math.isfinite(curvature_read) and math.isfinite(rz_read)):
            status = CGStatus.NOT_FINITE
            break
        x, r = x + length * p, r_new
        iterations += 1
        residual = math.sqrt(rz_read / rz_start)
        p = z + (rz_new / rz) * p
        rz = rz_new
    return CGResult(x, status, iterations, residual, float(x.dot(b - r)))
