"""The damped Fisher information matrix of the policy, by its products with vectors.

With z(θ) the parameters of the action distribution and J = ∂z/∂θ, the Fisher matrix, which is the Hessian of the KL at
θ_old, is F = E[Jᵀ M J] (Schraudolph 2002; Martens 2014, section 6). M is known in closed form for the families behind
SB3's distributions. For any other family the Hessian of the KL is taken by differentiating twice.
"""

from collections.abc import Iterator, Sequence

import torch as th
from torch.distributions import Normal

from sb3_trpo.optim.conjugate_gradient import LinearMap
from sb3_trpo.optim.distributions import Components, fisher_metric, has_closed_form, joint_kl, outputs
from sb3_trpo.optim.mlp import MLP, MLPJacobian
from sb3_trpo.optim.objective import ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import flatten, unflatten


def ggn_vector_product(parts: Components, weights: th.Tensor, actor: Sequence[th.Tensor]) -> LinearMap:
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

    def _products(self) -> Iterator[LinearMap]:
        for chunk, old, new in self._forwards.graphs():
            fast = mlp_fisher_product(new, chunk.weights, self._actor, self._chain) if self._chain else None
            if fast is not None:
                yield fast
            elif has_closed_form(new.parts):
                yield ggn_vector_product(new.parts, chunk.weights, self._actor)
            else:
                yield kl_hessian_product(old.parts, new.parts, chunk.weights, self._actor)

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
