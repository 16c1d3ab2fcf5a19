"""The damped Fisher information matrix of the policy, by its products with vectors.

With z(θ) the parameters of the action distribution and J = ∂z/∂θ, the Fisher matrix, which is the Hessian of the KL at
θ_old, is F = E[Jᵀ M J] (Schraudolph 2002; Martens 2014, section 6). M is known in closed form for the families behind
SB3's distributions. For any other family the Hessian of the KL is taken by differentiating twice.
"""

from collections.abc import Iterator, Sequence

import torch as th

from sb3_trpo.conjugate_gradient import LinearMap
from sb3_trpo.distributions import Components, fisher_metric, has_closed_form, joint_kl, outputs
from sb3_trpo.parameters import flatten, unflatten
from sb3_trpo.surrogate import Surrogate


def gauss_newton_product(parts: Components, weights: th.Tensor, actor: Sequence[th.Tensor]) -> LinearMap:
    """
    v ↦ E[Jᵀ M J v], by reverse-mode differentiation alone, which every torch module supports.

    u ↦ Jᵀu is linear, so differentiating it once more with respect to u gives v ↦ J v. The graph of both is built once
    and serves every product.

    :param parts: components of π_θ with their graph
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :param actor: the parameters θ
    :return: the product, for flat vectors
    """
    z = outputs(parts)
    moving = [index for index, tensor in enumerate(z) if tensor.requires_grad]
    z_moving = [z[index] for index in moving]
    cotangents = [th.zeros_like(tensor, requires_grad=True) for tensor in z_moving]
    pulled_back = th.autograd.grad(z_moving, actor, cotangents, create_graph=True, materialize_grads=True)

    def product(v: th.Tensor) -> th.Tensor:
        tangents = [th.zeros_like(tensor) for tensor in z]
        pushed = th.autograd.grad(pulled_back, cotangents, unflatten(v, actor), retain_graph=True, materialize_grads=True)
        for index, tangent in zip(moving, pushed, strict=True):
            tangents[index] = tangent
        metric = fisher_metric(parts, tangents)
        weighted = [metric[i] * weights.view(-1, *[1] * (metric[i].ndim - 1)) for i in moving]
        return flatten(th.autograd.grad(z_moving, actor, weighted, retain_graph=True, materialize_grads=True))

    return product


def kl_hessian_product(old: Components, new: Components, weights: th.Tensor, actor: Sequence[th.Tensor]) -> LinearMap:
    """
    v ↦ ∇²D̄_KL v at θ_old, by differentiating the KL twice: exact for any distribution with a KL in torch.

    :param old: components of π_old, detached
    :param new: components of π_θ with their graph, θ = θ_old
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :param actor: the parameters θ
    :return: the product, for flat vectors
    """
    kl = weights.dot(joint_kl(old, new))
    slope = flatten(th.autograd.grad(kl, actor, create_graph=True, materialize_grads=True))

    def product(v: th.Tensor) -> th.Tensor:
        return flatten(th.autograd.grad(slope.dot(v), actor, retain_graph=True, materialize_grads=True))

    return product


class FisherOperator:
    """
    v ↦ (F + λI) v at θ_old.

    A rollout that fits one chunk is linearised once for all products; a larger one anew, chunk by chunk, in each.

    :param surrogate: the states over which F is the mean
    :param actor: the parameters θ
    :param damping: λ
    """

    def __init__(self, surrogate: Surrogate, actor: Sequence[th.Tensor], damping: float) -> None:
        self.damping = damping
        self._surrogate = surrogate
        self._actor = actor
        self._kept = list(self._products()) if surrogate.is_one_graph else None

    def _products(self) -> Iterator[LinearMap]:
        for chunk, old, new in self._surrogate.graphs():
            if has_closed_form(new.parts):
                yield gauss_newton_product(new.parts, chunk.weights, self._actor)
            else:
                yield kl_hessian_product(old.parts, new.parts, chunk.weights, self._actor)

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: (F + λI) v
        """
        total = self.damping * v
        for product in self._kept or self._products():
            total = total + product(v)
        return total
