"""Products of the damped Fisher information matrix with vectors.

With z(θ) the parameters of the action distribution and J = ∂z/∂θ, the Fisher matrix, which is the Hessian of the KL at
θ_old, is F = E[Jᵀ M J] (Schraudolph 2002; Martens 2014, section 6). M is known in closed form for the families behind
SB3's distributions. For any other family the Hessian of the KL is taken by differentiating twice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch as th

from sb3_trpo.errors import warn_user
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.conjugate_gradient import LinearMap
from sb3_trpo.optim.distributions import fisher_metric, has_closed_form, joint_kl, outputs
from sb3_trpo.optim.layerwise import Layerwise
from sb3_trpo.optim.objective import Model, ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import flatten, shifted, unflatten

JVP = Callable[[th.Tensor], Sequence[th.Tensor]]

#: A damping from here on is far above rounding errors.
USUAL_DAMPING = 1e-4
#: Relative difference between uᵀ(J v) and (Jᵀu)ᵀv below which they are equal up to rounding.
SYMMETRY_TOLERANCE = 1e-3


class FisherOperator:
    """
    v ↦ (F + λI) v at θ_old.

    A rollout of one chunk is linearized once for all products; a larger one in every product, chunk by chunk.

    :param objective: the model on the states over which F is the mean
    :param damping: λ
    """

    def __init__(self, objective: RolloutObjective, damping: float) -> None:
        self.damping = damping
        self._objective = objective
        self._kept = list(self._products()) if objective.is_one_graph else None

    def keep_definite(self, v: th.Tensor) -> None:
        """
        Raise a λ near 0 to what rounding errors of the products need; a usual λ is far above that.

        Eigenvalues of F below ε of the largest are noise, which such a λ would turn into enormous steps.

        :param v: the gradient, whose Rayleigh quotient estimates the size of F
        """
        if self.damping < USUAL_DAMPING and bool(v.any()):
            size = float(v.dot(self(v)) / v.dot(v)) - self.damping
            if 0.0 < size < math.inf:
                self.damping = max(self.damping, th.finfo(v.dtype).eps ** 0.5 * size)

    def _products(self) -> Iterator[LinearMap]:
        for chunk, old, new in self._objective.linearized():
            yield fisher_product(self._objective, chunk, old, new)

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: (F + λI) v
        """
        total = reduce(th.add, (product(v) for product in self._kept or self._products()))
        return self.damping * v + self._objective.ranks.sum(total)


def fisher_product(objective: RolloutObjective, chunk: RolloutBatch, old: ModelOutput, new: ModelOutput) -> LinearMap:
    """
    v ↦ F v of some states, by the fastest method that the model allows.

    :param objective: the model on the rollout
    :param chunk: some of its states
    :param old: π_old on them, detached
    :param new: π_θ on them with its graph, θ = θ_old
    :return: the product, for flat vectors
    """
    fast = layerwise_fisher_product(objective.model, new, chunk.weights, objective.layerwise(new))
    if fast is not None:
        return fast
    if has_closed_form(new.components):
        return GGNProduct(objective, chunk, new)
    return KLHessianProduct(objective, chunk, old, new)


def layerwise_fisher_product(
    model: Model, new: ModelOutput, weights: th.Tensor, layers: Layerwise | None = None
) -> LinearMap | None:
    """
    v ↦ E[Jᵀ M J v] for a network of successive layers whose output is the distribution's location or logits.

    The only other parameter may be the state-independent ``log_std`` of a Gaussian, whose Fisher block is 2I.

    :param model: the policy
    :param new: the policy on the states, with the calls of the network's modules
    :param weights: weight of each state in the mean, shape ``(n_states,)``
    :param layers: their linearization, if there is one already
    :return: the product, for flat vectors; None if θ is not the layers' parameters and ``log_std``
    """
    found = layers or Layerwise.of(model, new)
    if found is None:
        return None
    column, total = weights.unsqueeze(1), 2.0 * weights.sum()
    gaussian: Any = new.components[0] if found.is_gaussian else None
    precision = None if gaussian is None else gaussian.scale.detach().square().reciprocal()

    def metric(moved: th.Tensor) -> th.Tensor:
        if precision is not None:
            return moved * precision
        return th.cat(fisher_metric(new.components, moved.split(found.widths, dim=1)), dim=1)

    def product(v: th.Tensor) -> th.Tensor:
        tangents = unflatten(v, model.parameters)
        moved = found.jacobian.jvp([tangents[i] for i in found.positions])
        pulled = found.jacobian.vjp(metric(moved) * column)
        return found.join(pulled, [total * tangents[i] for i in found.rest])

    return product


class GGNProduct:
    """
    v ↦ E[Jᵀ M J v], the generalized Gauss-Newton product.

    J v comes from reverse mode alone, which every torch module supports: u ↦ Jᵀu is linear, so its derivative with respect
    to u gives v ↦ J v. The graph of both is built once and serves every product. Operations without a second derivative
    raise, or drop out silently, which the identity vᵀ(JᵀMJv) = (Jv)ᵀM(Jv) reveals. J v is then a difference of forward
    passes.

    :param objective: the model on the rollout
    :param chunk: some of its states
    :param new: the model on them, with its graph
    :param parameters: those to differentiate by; None for θ
    """

    def __init__(
        self,
        objective: RolloutObjective,
        chunk: RolloutBatch,
        new: ModelOutput,
        parameters: Sequence[th.Tensor] | None = None,
    ) -> None:
        self._objective, self._chunk, self._components = objective, chunk, new.components
        self._actor = objective.model.parameters if parameters is None else parameters
        self._z = outputs(new.components)
        self._variable = [index for index, tensor in enumerate(self._z) if tensor.requires_grad]
        self._z_variable = [self._z[index] for index in self._variable]
        self._jvp: JVP | None = None

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: E[Jᵀ M J v]
        """
        if self._jvp is None:
            self._jvp, product = self._choose(v)
            return product
        return self._vjp(self._metric(self._jvp(v)))

    def _choose(self, v: th.Tensor) -> tuple[JVP, th.Tensor]:
        """Differentiate twice if the first product of the objective proves it right; else take differences."""
        by_differences = difference_jvp(self._outputs_now, self._actor)
        if self._objective.is_twice_differentiable is not False:
            try:
                reverse = reverse_jvp(self._z_variable, self._actor)
                if self._objective.is_twice_differentiable:
                    return reverse, self._vjp(self._metric(reverse(v)))
                product, asymmetry = self._checked(v, reverse)
                if asymmetry < SYMMETRY_TOLERANCE:
                    self._objective.is_twice_differentiable = True
                    return reverse, product
                _, other = self._checked(v, by_differences)
                if math.isnan(other):  # products are not finite either way, which proves nothing about derivatives
                    return reverse, product
                if asymmetry <= other:  # in half precision neither is accurate: the better one serves
                    self._objective.is_twice_differentiable = True
                    return reverse, product
                reason = "the second derivative is not finite" if math.isnan(asymmetry) else "a backward pass has no graph"
            except RuntimeError as error:
                reason = derivative_error(error)
            self._objective.is_twice_differentiable = False
            warn_of_differences(reason)
        return by_differences, self._vjp(self._metric(by_differences(v)))

    def _metric(self, tangents: Sequence[th.Tensor]) -> list[th.Tensor]:
        """Weighted M u, where only some of the outputs are variable."""
        u = [th.zeros_like(tensor) for tensor in self._z]
        for index, tangent in zip(self._variable, tangents, strict=True):
            u[index] = tangent
        metric = fisher_metric(self._components, u)
        weights = self._chunk.weights
        return [metric[i] * weights.view(-1, *[1] * (metric[i].ndim - 1)) for i in self._variable]

    def _vjp(self, cotangents: Sequence[th.Tensor]) -> th.Tensor:
        return flatten(th.autograd.grad(self._z_variable, self._actor, cotangents, retain_graph=True, materialize_grads=True))

    def _checked(self, v: th.Tensor, jvp: JVP) -> tuple[th.Tensor, float]:
        """Return the product, and the relative difference between uᵀ(J v) and (Jᵀu)ᵀv, with u = M J v unless that is 0."""
        tangents = jvp(v)
        cotangents = self._metric(tangents)
        product = pulled = self._vjp(cotangents)
        if not any(bool(cotangent.any()) for cotangent in cotangents):
            cotangents = [th.arange(t.numel(), dtype=t.dtype, device=t.device).cos().view_as(t) for t in tangents]
            pulled = self._vjp(cotangents)
        outer = float(v.dot(pulled))
        inner = sum(float((u * t).sum()) for u, t in zip(cotangents, tangents, strict=True))
        return product, abs(outer - inner) / max(abs(outer), abs(inner), th.finfo(v.dtype).tiny)

    def _outputs_now(self) -> list[th.Tensor]:
        with th.no_grad():
            z = outputs(self._objective.forward(self._chunk).components)
        return [z[index] for index in self._variable]


class KLHessianProduct:
    """
    v ↦ ∇²D̄_KL v at θ_old, by differentiating the KL twice: exact for any distribution with a KL in torch.

    The product is a difference of gradients of the KL if an operation has no second derivative.

    :param objective: the model on the rollout
    :param chunk: some of its states
    :param old: π_old on them, detached
    :param new: π_θ on them with its graph, θ = θ_old
    """

    def __init__(self, objective: RolloutObjective, chunk: RolloutBatch, old: ModelOutput, new: ModelOutput) -> None:
        self._objective, self._chunk, self._old, self._new = objective, chunk, old, new
        self._actor = objective.model.parameters
        self._gradient: th.Tensor | None = None

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: ∇²D̄_KL v
        """
        if self._objective.is_twice_differentiable is not False:
            try:
                if self._gradient is None:
                    self._gradient = self._kl_gradient(self._new, create_graph=True)
                return flatten(th.autograd.grad(self._gradient.dot(v), self._actor, retain_graph=True, materialize_grads=True))
            except RuntimeError as error:
                warn_of_differences(derivative_error(error))
            self._objective.is_twice_differentiable = False
        length = difference_length(v, self._actor)
        with shifted(self._actor, length * v):
            ahead = self._kl_gradient(self._objective.forward(self._chunk))
        with shifted(self._actor, -length * v):
            behind = self._kl_gradient(self._objective.forward(self._chunk))
        return (ahead - behind) / (2.0 * length)

    def _kl_gradient(self, new: ModelOutput, create_graph: bool = False) -> th.Tensor:
        kl = self._chunk.weights.dot(joint_kl(self._old.components, new.components))
        return flatten(th.autograd.grad(kl, self._actor, create_graph=create_graph, materialize_grads=True))


def reverse_jvp(z: Sequence[th.Tensor], actor: Sequence[th.Tensor]) -> JVP:
    """
    v ↦ J v by differentiating u ↦ Jᵀu, J = ∂z/∂θ.

    :param z: outputs with their graph
    :param actor: the parameters θ
    :return: flat v ↦ one tangent for each output
    """
    cotangents = [th.zeros_like(tensor, requires_grad=True) for tensor in z]
    pulled = th.autograd.grad(z, actor, cotangents, create_graph=True, allow_unused=True)
    reached = [index for index, tensor in enumerate(pulled) if tensor is not None and tensor.requires_grad]

    def jvp(v: th.Tensor) -> Sequence[th.Tensor]:
        parts = unflatten(v, actor)
        return th.autograd.grad(
            [pulled[index] for index in reached],
            cotangents,
            [parts[index] for index in reached],
            retain_graph=True,
            materialize_grads=True,
        )

    return jvp


def difference_jvp(outputs_now: Callable[[], Sequence[th.Tensor]], actor: Sequence[th.Tensor]) -> JVP:
    """
    v ↦ J v by central differences.

    :param outputs_now: outputs at the current parameters
    :param actor: the parameters θ
    :return: flat v ↦ one tangent for each output
    """

    def jvp(v: th.Tensor) -> Sequence[th.Tensor]:
        length = difference_length(v, actor)
        with shifted(actor, length * v):
            ahead = outputs_now()
        with shifted(actor, -length * v):
            behind = outputs_now()
        return [(p - q) / (2.0 * length) for p, q in zip(ahead, behind, strict=True)]

    return jvp


def difference_length(v: th.Tensor, actor: Sequence[th.Tensor]) -> th.Tensor:
    """
    Factor of a direction in a central difference that balances rounding and truncation errors.

    :param v: flat direction
    :param actor: the parameters θ
    :return: 2∛ε / ‖v‖, with ε the machine epsilon of the coarsest parameter
    """
    eps = max(th.finfo(parameter.dtype).eps for parameter in actor)
    return 2.0 * eps ** (1 / 3) / v.norm().clamp(min=th.finfo(v.dtype).tiny)


def derivative_error(error: RuntimeError) -> str:
    """
    Describe an error in differentiating twice.

    :param error: error of torch
    :return: its first line
    :raises RuntimeError: the error, if memory ran out
    """
    if isinstance(error, th.cuda.OutOfMemoryError):
        raise error
    return str(error).split("\n")[0].rstrip(".")


def warn_of_differences(reason: str) -> None:
    """
    Warn that Fisher products are not exact.

    :param reason: what cannot be differentiated
    """
    warn_user(
        f"the policy or value network cannot be differentiated twice ({reason}): "
        "products with its Fisher matrix are computed by finite differences"
    )
