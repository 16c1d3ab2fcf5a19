"""An approximate inverse of the damped Fisher matrix, for conjugate gradients: Kronecker factors (K-FAC).

The Fisher block of a layer with input a and output o = W a + b is E[(ā āᵀ) ⊗ (g gᵀ)], where ā = (a, 1) and g is the
gradient of log π(a|s), with actions drawn from π, with respect to o. K-FAC takes the factors' means apart,
F ≈ A ⊗ G with A = E[ā āᵀ] and G = E[g gᵀ] (Martens & Grosse 2015). A convolution sums over positions: A over patches, G
averaged over the positions (Grosse & Martens 2016). Parameters of other layers get the diagonal.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.distributions import fisher_root, outputs
from sb3_trpo.optim.fisher import ggn_vector_product
from sb3_trpo.optim.layers import LayerCall
from sb3_trpo.optim.objective import ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import flatten, unflatten


class Factors(NamedTuple):
    """
    Kronecker factors of one layer.

    :param A: mean of ā āᵀ, shape ``(n_inputs (+ 1), n_inputs (+ 1))``
    :param G: mean of g gᵀ, shape ``(n_outputs, n_outputs)``
    """

    A: th.Tensor
    G: th.Tensor


def kfac_layers(module: nn.Module, actor: Sequence[nn.Parameter]) -> list[nn.Module]:
    """
    The layers whose Fisher block is a Kronecker product: Linear and (ungrouped) Conv2d with all parameters in θ.

    :param module: the policy
    :param actor: θ
    :return: the layers
    """
    theta = {id(parameter) for parameter in actor}
    holders = Counter(id(parameter) for layer in module.modules() for parameter in layer.parameters(recurse=False))
    return [
        layer
        for layer in module.modules()
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        and all(id(p) in theta and holders[id(p)] == 1 for p in layer.parameters(recurse=False))
    ]


def _rows(call: LayerCall) -> th.Tensor:
    """ā of every state and position, shape ``(n_states, n_positions, n_inputs (+ 1))``."""
    layer, inputs = call.layer, call.input
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            inputs = F.pad(inputs, layer._reversed_padding_repeated_twice)
        padding = 0 if isinstance(layer.padding, str) else layer.padding
        rows = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
    else:
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def call_factors(call: LayerCall, slope: th.Tensor, weights: th.Tensor) -> Factors:
    """
    Share of one call in its layer's factors.

    :param call: the call
    :param slope: g, shaped as the call's output
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :return: weighted sums of ā āᵀ and g gᵀ
    """
    a = _rows(call)
    g = slope.flatten(start_dim=2).transpose(1, 2) if isinstance(call.layer, nn.Conv2d) else slope.reshape(*a.shape[:2], -1)
    states = weights.view(-1, 1, 1)
    A = (a * states).flatten(end_dim=1).t() @ a.flatten(end_dim=1)
    G = (g * states).flatten(end_dim=1).t() @ g.flatten(end_dim=1)
    return Factors(A, G / a.shape[1])


def damped_inverses(factors: Factors, damping: float) -> Factors:
    """
    (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹: the Kronecker product of the two approximates (A ⊗ G + λI)⁻¹.

    π² is the ratio of the factors' mean eigenvalues (Martens & Grosse 2015, section 6.3).

    :param factors: A and G
    :param damping: λ; a share of the factors' size that rounding needs is added in any case
    :return: the inverses, positive definite
    """
    sizes = [factor.diagonal().mean() for factor in factors]
    pi = th.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], th.ones_like(sizes[0])).sqrt()
    inverses = []
    for factor, size, shift in zip(factors, sizes, (pi * damping**0.5, damping**0.5 / pi), strict=True):
        shift = shift + 100.0 * th.finfo(factor.dtype).eps * size
        shift = th.where(shift == 0, th.ones_like(shift), shift)
        root, _ = th.linalg.cholesky_ex(factor + shift * th.eye(len(factor), dtype=factor.dtype, device=factor.device))
        inverses.append(th.cholesky_inverse(root))
    return Factors(*inverses)


class KFACPreconditioner:
    """
    v ↦ M v with M ≈ (F + λI)⁻¹, symmetric and positive definite, one block for each layer.

    One backward pass gives all factors: its cotangents are random signs times a root of the Fisher metric.
    Parameters outside the layers get the diagonal of their row sums in F, which is exact for a state-independent ``log_std``.

    :param forwards: the model on the rollout, made with ``layers`` to record; its family has a closed-form metric
    :param layers: the layers with Kronecker-factored blocks
    :param actor: θ
    :param damping: λ
    """

    def __init__(
        self, forwards: RolloutObjective, layers: Sequence[nn.Module], actor: Sequence[nn.Parameter], damping: float
    ) -> None:
        self._actor = actor
        self._index = {id(parameter): position for position, parameter in enumerate(actor)}
        factored = {self._index[id(parameter)] for layer in layers for parameter in layer.parameters(recurse=False)}
        self._rest = [position for position in range(len(actor)) if position not in factored]
        rest = [actor[position] for position in self._rest]

        sums: dict[nn.Module, Factors] = {}
        row_sums = actor[0].new_zeros(sum(parameter.numel() for parameter in rest))
        for chunk, _, new in forwards.graphs():
            for layer, factors in _chunk_factors(chunk, new):
                sums[layer] = Factors(*map(th.add, sums[layer], factors)) if layer in sums else factors
            if rest:
                row_sums += ggn_vector_product(new.parts, chunk.weights, rest)(th.ones_like(row_sums))
        row_sums, *means = forwards.ranks.sum_each([row_sums, *(factor for factors in sums.values() for factor in factors)])
        pairs = zip(sums, means[::2], means[1::2], strict=True)
        self._inverses = [(layer, damped_inverses(Factors(A, G), damping)) for layer, A, G in pairs]
        self._diagonal = (row_sums.clamp(min=0.0) + max(damping, th.finfo(row_sums.dtype).eps)).reciprocal()

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: M v
        """
        parts = unflatten(v, self._actor)
        for position, scaled in zip(
            self._rest,
            unflatten(self._diagonal, [self._actor[position] for position in self._rest]),
            strict=True,
        ):
            parts[position] = parts[position] * scaled
        for layer, (A_inverse, G_inverse) in self._inverses:
            positions = [self._index[id(parameter)] for parameter in layer.parameters(recurse=False)]
            block = th.cat([parts[position].reshape(len(G_inverse), -1) for position in positions], dim=1)
            product = G_inverse @ block @ A_inverse
            widths = [parts[position][0].numel() for position in positions]
            for position, columns in zip(positions, product.split(widths, dim=1), strict=True):
                parts[position] = columns.reshape(parts[position].shape)
        return flatten(parts)


def random_signs(ids: th.Tensor, width: int) -> th.Tensor:
    """
    A hash of state and column as a random sign: the same for a state in whatever chunk or process it is.

    The hash is the finaliser of SplitMix64 (Steele, Lea & Flood 2014), on signed integers.

    :param ids: number of each state, shape ``(n_states,)``
    :param width: number of columns
    :return: −1 or 1, shape ``(n_states, width)``
    """
    bits = (ids.unsqueeze(1) * width + th.arange(1, width + 1, device=ids.device)) * -0x61C8864680B583EB
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return 1 - 2 * ((bits ^ (bits >> 31)) & 1)


def _chunk_factors(chunk: RolloutBatch, new: ModelOutput) -> Iterator[tuple[nn.Module, Factors]]:
    if not new.calls:
        return
    z = outputs(new.parts)
    widths = [tensor[0].numel() for tensor in z]
    # What comes after a state in its sequence, padding too, reaches the layers below a memory.
    signs = random_signs(chunk.state_ids, sum(widths)) * chunk.is_real.unsqueeze(1)
    noise = [part.to(like.dtype).view_as(like) for part, like in zip(signs.split(widths, dim=1), z, strict=True)]
    cotangents = fisher_root(new.parts, noise)
    moving = [position for position, tensor in enumerate(z) if tensor.requires_grad]
    slopes = th.autograd.grad(
        [z[position] for position in moving],
        [call.output for call in new.calls],
        [cotangents[position] for position in moving],
        retain_graph=True,
        allow_unused=True,
    )
    for call, slope in zip(new.calls, slopes, strict=True):
        if slope is not None:
            yield call.layer, call_factors(call, slope, chunk.weights)
