"""The damped Fisher information matrix of the policy, by its products with vectors.

With z(θ) the parameters of the action distribution and J = ∂z/∂θ, the Fisher matrix, which is the Hessian of the KL at
θ_old, is F = E[Jᵀ M J] (Schraudolph 2002; Martens 2014, section 6). M is known in closed form for the families behind
SB3's distributions. For any other family the Hessian of the KL is taken by differentiating twice.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch as th
from torch.distributions import Normal

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.conjugate_gradient import LinearMap
from sb3_trpo.optim.distributions import fisher_metric, has_closed_form, joint_kl, outputs
from sb3_trpo.optim.mlp import MLP, MLPJacobian
from sb3_trpo.optim.objective import ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import flatten, shifted, unflatten


class GGNProduct:
    """
    v ↦ E[Jᵀ M J v].

    J v comes from reverse-mode differentiation alone, which every torch module supports: u ↦ Jᵀu is linear, so
    differentiating it once more with respect to u gives v ↦ J v. The graph of both is built once and serves every product.
    Operations that can be differentiated only once raise, or drop out in silence, which vᵀ(JᵀMJv) = (Jv)ᵀM(Jv) tells: J v
    is a difference of forward passes then.

    :param objective: the model on the rollout
    :param chunk: some of its states
    :param new: the model on them, with its graph
    :param actor: the parameters θ
    """

    def __init__(self, objective: RolloutObjective, chunk: RolloutBatch, new: ModelOutput, actor: Sequence[th.Tensor]) -> None:
        self._objective, self._chunk, self._parts, self._actor = objective, chunk, new.parts, actor
        self._z = outputs(new.parts)
        self._moving = [index for index, tensor in enumerate(self._z) if tensor.requires_grad]
        self._z_moving = [self._z[index] for index in self._moving]
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
        return self._pull(self._metric(self._jvp(v)))

    def _choose(self, v: th.Tensor) -> tuple["JVP", th.Tensor]:
        """Differentiate twice, once it has been seen to work for the model; take differences otherwise."""
        by_differences = difference_jvp(self._moved_outputs, self._actor)
        if self._objective.is_twice_differentiable is not False:
            try:
                reverse = reverse_jvp(self._z_moving, self._actor)
                if self._objective.is_twice_differentiable:
                    return reverse, self._pull(self._metric(reverse(v)))
                product, asymmetry = self._checked(v, reverse)
                # In half precision neither is near: the better one serves.
                if asymmetry < 1e-3 or asymmetry <= self._checked(v, by_differences)[1]:
                    self._objective.is_twice_differentiable = True
                    return reverse, product
                reason = "the backward pass of some operation has no graph"
            except RuntimeError as error:
                reason = once_differentiable(error)
            self._objective.is_twice_differentiable = False
            warn_of_differences(reason)
        return by_differences, self._pull(self._metric(by_differences(v)))

    def _metric(self, moved: Sequence[th.Tensor]) -> list[th.Tensor]:
        """Weighted M u, where only some of the outputs move."""
        tangents = [th.zeros_like(tensor) for tensor in self._z]
        for index, tangent in zip(self._moving, moved, strict=True):
            tangents[index] = tangent
        metric = fisher_metric(self._parts, tangents)
        weights = self._chunk.weights
        return [metric[i] * weights.view(-1, *[1] * (metric[i].ndim - 1)) for i in self._moving]

    def _pull(self, cotangents: Sequence[th.Tensor]) -> th.Tensor:
        """Jᵀu."""
        return flatten(th.autograd.grad(self._z_moving, self._actor, cotangents, retain_graph=True, materialize_grads=True))

    def _checked(self, v: th.Tensor, jvp: "JVP") -> tuple[th.Tensor, float]:
        """The product, and the relative difference between uᵀ(J v) and (Jᵀu)ᵀv, for u = M J v if that is not 0."""
        moved = jvp(v)
        cotangents = self._metric(moved)
        product = pulled = self._pull(cotangents)
        if not any(bool(cotangent.any()) for cotangent in cotangents):
            cotangents = [th.arange(t.numel(), dtype=t.dtype, device=t.device).cos().view_as(t) for t in moved]
            pulled = self._pull(cotangents)
        outer = float(v.dot(pulled))
        inner = sum(float((u * t).sum()) for u, t in zip(cotangents, moved, strict=True))
        return product, abs(outer - inner) / max(abs(outer), abs(inner), th.finfo(v.dtype).tiny)

    def _moved_outputs(self) -> list[th.Tensor]:
        with th.no_grad():
            z = outputs(self._objective.forward(self._chunk).parts)
        return [z[index] for index in self._moving]


JVP = Callable[[th.Tensor], Sequence[th.Tensor]]


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


def difference_jvp(outputs_at: Callable[[], Sequence[th.Tensor]], actor: Sequence[th.Tensor]) -> JVP:
    """
    v ↦ J v by central differences.

    :param outputs_at: outputs at the parameters' present values
    :param actor: the parameters θ
    :return: flat v ↦ one tangent for each output
    """

    def jvp(v: th.Tensor) -> Sequence[th.Tensor]:
        length = difference_length(v, actor)
        with shifted(actor, length * v):
            ahead = outputs_at()
        with shifted(actor, -length * v):
            behind = outputs_at()
        return [(p - q) / (2.0 * length) for p, q in zip(ahead, behind, strict=True)]

    return jvp


def difference_length(v: th.Tensor, actor: Sequence[th.Tensor]) -> th.Tensor:
    """
    What to multiply a direction with for a central difference: rounding and curvature disturb it about equally.

    :param v: flat direction
    :param actor: the parameters θ
    :return: ∛ε / ‖v‖ with ε that of the parameters' coarsest type
    """
    eps = max(th.finfo(parameter.dtype).eps for parameter in actor)
    return 2.0 * eps ** (1 / 3) / v.norm().clamp(min=th.finfo(v.dtype).tiny)


def once_differentiable(error: RuntimeError) -> str:
    """
    What to say of an error in differentiating twice.

    :param error: what torch has raised
    :return: its first line
    :raises RuntimeError: memory ran out, which is no matter of derivatives
    """
    if isinstance(error, th.cuda.OutOfMemoryError):
        raise error
    return str(error).split("\n")[0].rstrip(".")


def warn_of_differences(reason: str) -> None:
    """
    Say that Fisher products are not exact.

    :param reason: what cannot be differentiated
    """
    warnings.warn(
        f"the policy or value network cannot be differentiated twice ({reason}): "
        "products with its Fisher matrix are computed by finite differences",
        stacklevel=2,
    )


def mlp_fisher_product(new: ModelOutput, weights: th.Tensor, actor: Sequence[th.Tensor], chain: MLP) -> LinearMap | None:
    """
    v ↦ E[Jᵀ M J v] for a chain of layers whose output is the distribution's location or logits.

    The only other parameter may be the state-independent ``log_std`` of a Gaussian, whose Fisher block is 2I.

    :param new: the policy on the states, with the calls of the chain's layers
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :param actor: the parameters θ
    :param chain: the layers
    :return: the product, for flat vectors; None if θ is not the chain's parameters and ``log_std``
    """
    position = {id(parameter): i for i, parameter in enumerate(actor)}
    in_chain = [position.get(id(parameter), -1) for parameter in chain.parameters]
    rest = [i for i in range(len(actor)) if i not in in_chain]
    is_gaussian = isinstance(new.parts[0], Normal)
    has_log_std = is_gaussian and outputs(new.parts)[1].requires_grad
    widths = [z.shape[1] for z in outputs(new.parts)][: 1 if is_gaussian else None]
    rest_fits = [actor[i].shape for i in rest] == ([th.Size(widths)] if has_log_std else [])
    if (
        -1 in in_chain
        or len(set(in_chain)) < len(in_chain)
        or not rest_fits
        or [call.layer for call in new.calls] != chain.layers
        or any(call.output.dtype != actor[0].dtype for call in new.calls)  # autocast
    ):
        return None
    jacobian = MLPJacobian(new.calls, chain.activations)
    column = weights.unsqueeze(1)

    def product(v: th.Tensor) -> th.Tensor:
        tangents = unflatten(v, actor)
        moved = jacobian.push([tangents[i] for i in in_chain]).split(widths, dim=1)
        metric = fisher_metric(new.parts, [*moved, th.zeros_like(moved[0])] if is_gaussian else moved)
        pulled = jacobian.pull(th.cat(metric[: len(widths)], dim=1) * column)
        products = [2.0 * weights.sum() * tangent for tangent in tangents]
        for i, part in zip(in_chain, pulled, strict=True):
            products[i] = part
        return flatten(products)

    return product


class KLHessianProduct:
    """
    v ↦ ∇²D̄_KL v at θ_old, by differentiating the KL twice: exact for any distribution with a KL in torch.

    By differences of its gradient where it cannot be differentiated twice.

    :param objective: the model on the rollout
    :param chunk: some of its states
    :param old: π_old on them, detached
    :param new: π_θ on them with its graph, θ = θ_old
    :param actor: the parameters θ
    """

    def __init__(
        self,
        objective: RolloutObjective,
        chunk: RolloutBatch,
        old: ModelOutput,
        new: ModelOutput,
        actor: Sequence[th.Tensor],
    ) -> None:
        self._objective, self._chunk, self._old, self._new, self._actor = objective, chunk, old, new, actor
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
                warn_of_differences(once_differentiable(error))
            self._objective.is_twice_differentiable = False
        length = difference_length(v, self._actor)
        with shifted(self._actor, length * v):
            ahead = self._kl_gradient(self._objective.forward(self._chunk))
        with shifted(self._actor, -length * v):
            behind = self._kl_gradient(self._objective.forward(self._chunk))
        return (ahead - behind) / (2.0 * length)

    def _kl_gradient(self, new: ModelOutput, create_graph: bool = False) -> th.Tensor:
        kl = self._chunk.weights.dot(joint_kl(self._old.parts, new.parts))
        return flatten(th.autograd.grad(kl, self._actor, create_graph=create_graph, materialize_grads=True))


def fisher_product(
    objective: RolloutObjective,
    chunk: RolloutBatch,
    old: ModelOutput,
    new: ModelOutput,
    actor: Sequence[th.Tensor],
    mlp: MLP | None = None,
) -> LinearMap:
    """
    v ↦ F v of some states, in the fastest way that the model allows.

    :param objective: the model on the rollout
    :param chunk: some of its states
    :param old: π_old on them, detached
    :param new: π_θ on them with its graph, θ = θ_old
    :param actor: the parameters θ
    :param mlp: the layers between observation and distribution, if they are a plain MLP
    :return: the product, for flat vectors
    """
    fast = None if mlp is None else mlp_fisher_product(new, chunk.weights, actor, mlp)
    if fast is not None:
        return fast
    if has_closed_form(new.parts):
        return GGNProduct(objective, chunk, new, actor)
    return KLHessianProduct(objective, chunk, old, new, actor)


USUAL_DAMPING = 1e-4  # from here on, the size of F is not asked for


class FisherOperator:
    """
    v ↦ (F + λI) v at θ_old.

    A rollout that fits one chunk is linearised once for all products; a larger one anew, chunk by chunk, in each.

    :param forwards: the model on the states over which F is the mean
    :param actor: the parameters θ
    :param damping: λ
    :param chain: the layers between observation and distribution, if they are a chain; ``forwards`` records them
    """

    def __init__(
        self, forwards: RolloutObjective, actor: Sequence[th.Tensor], damping: float, chain: MLP | None = None
    ) -> None:
        self.damping = damping
        self._chain = chain
        self._forwards = forwards
        self._actor = actor
        self._kept = list(self._products()) if forwards.is_one_graph else None

    def keep_definite(self, v: th.Tensor) -> None:
        """
        Raise λ to what rounding errors of the products ask for; a usual λ is far above that, and is left alone.

        Eigenvalues of F below ε of the largest are noise, which a λ near 0 would turn into enormous steps.

        :param v: the gradient: its Rayleigh quotient tells the size of F
        """
        if self.damping < USUAL_DAMPING and bool(v.any()):
            size = float(v.dot(self(v)) / v.dot(v)) - self.damping
            if 0.0 < size < math.inf:
                self.damping = max(self.damping, th.finfo(v.dtype).eps ** 0.5 * size)

    def _products(self) -> Iterator[LinearMap]:
        for chunk, old, new in self._forwards.graphs():
            yield fisher_product(self._forwards, chunk, old, new, self._actor, self._chain)

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: (F + λI) v
        """
        total = th.zeros_like(v)
        for product in self._kept or self._products():
            total = total + product(v)
        return self.damping * v + self._forwards.ranks.sum(total)
