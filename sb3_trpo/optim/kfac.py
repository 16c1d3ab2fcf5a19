"""An approximate inverse of the damped Fisher matrix, for conjugate gradients: Kronecker factors (K-FAC).

The Fisher block of a layer with input a and output o = W a + b is E[(ā āᵀ) ⊗ (g gᵀ)], where ā = (a, 1) and g is the
gradient of log π(a|s), with actions drawn from π, with respect to o. K-FAC takes the factors' means apart,
F ≈ A ⊗ G with A = E[ā āᵀ] and G = E[g gᵀ] (Martens & Grosse 2015). Parameters of other layers get the diagonal. Networks with
convolutions have no factors: conjugate gradients converge faster without them (docs/pixels.md).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.distributions import fisher_root, outputs
from sb3_trpo.optim.fisher import GGNProduct
from sb3_trpo.optim.layerwise import Layerwise
from sb3_trpo.optim.mlp import LayerCall, MLPJacobian
from sb3_trpo.optim.objective import ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import flatten


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
    The layers whose Fisher block is a Kronecker product: Linear ones with all parameters in θ; none beside convolutions.

    Subclasses, parametrized, pruned and patched layers compute something else, and have the diagonal instead.

    :param module: the policy
    :param actor: θ
    :return: the layers
    """
    theta = {id(parameter) for parameter in actor}
    layers = list(module.modules())
    holders = Counter(id(parameter) for layer in layers for parameter in layer._parameters.values())
    convolutions = [layer for layer in layers if isinstance(layer, _ConvNd)]
    if any(id(parameter) in theta for layer in convolutions for parameter in layer.parameters()):
        return []
    return [
        layer
        for layer in layers
        if _has_kronecker_form(layer) and all(id(p) in theta and holders[id(p)] == 1 for p in _parameters(layer))
    ]


def _has_kronecker_form(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and {name for name, parameter in layer._parameters.items() if parameter is not None} <= {"weight", "bias"}
        and "weight" in layer._parameters
        and "forward" not in vars(layer)
    )


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Weight and bias, in this order, whatever order they were registered in."""
    weight, bias = layer.weight, layer.bias
    return [weight] if bias is None else [weight, bias]  # type: ignore[list-item]


def _inputs(call: LayerCall) -> th.Tensor:
    """a of every input and position, shape ``(n, n_positions, n_inputs)``."""
    inputs = call.input.to(_factor_dtype(call.layer))
    inputs = inputs if inputs.ndim > 1 else inputs.unsqueeze(0)
    return inputs.reshape(len(inputs), -1, inputs.shape[-1])


def _rows(inputs: th.Tensor, scale: th.Tensor, has_bias: bool) -> th.Tensor:
    """ā times a factor for each input, shape ``(n · n_positions, n_inputs (+ 1))``."""
    if not has_bias:
        return (inputs * scale).flatten(end_dim=1)
    *shape, width = inputs.shape
    rows = inputs.new_empty(*shape, width + 1)
    th.mul(inputs, scale, out=rows[..., :width])
    rows[..., width:] = scale
    return rows.flatten(end_dim=1)


def _factor_dtype(layer: nn.Module) -> th.dtype:
    """Factors are never in half precision, which has no Cholesky decomposition."""
    return th.promote_types(_parameters(layer)[0].dtype, th.float32)


def call_factors(call: LayerCall, gradient: th.Tensor, weights: th.Tensor, A: th.Tensor | None = None) -> Factors:
    """
    Share of one call in its layer's factors.

    Inputs that are not one for each state (objects or frames folded into the batch, sequences first, a table of
    embeddings) all have the mean weight, and count as positions.

    :param call: the call
    :param gradient: g, shaped as the call's output
    :param weights: share of each state in the mean, shape ``(n_states,)``
    :param A: the sum of ā āᵀ, if it is known
    :return: weighted sums of ā āᵀ and g gᵀ
    """
    inputs = _inputs(call)
    n_inputs, n_positions, _ = inputs.shape
    n_states = weights.shape[0]
    root = (weights.view(-1, 1, 1) if n_inputs == n_states else weights.mean()).to(inputs.dtype).sqrt()
    g = (gradient.to(inputs.dtype).reshape(n_inputs, n_positions, -1) * root).flatten(end_dim=1)
    G = g.t() @ g
    if A is None:
        rows = _rows(inputs, root, call.layer.bias is not None)
        A = rows.t() @ rows
    return Factors(A, G / (max(n_inputs * n_positions, 1) / n_states))


def damped_inverses(factors: Factors, damping: float) -> Factors:
    """
    (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹: the Kronecker product of the two approximates (A ⊗ G + λI)⁻¹.

    π² is the ratio of the factors' mean eigenvalues (Martens & Grosse 2015, section 6.3).

    :param factors: A and G
    :param damping: λ; a share of the factors' size that rounding needs is added in any case
    :return: the inverses, positive definite; not finite where a factor is not
    """
    sizes = [factor.diagonal().mean() for factor in factors]
    ratio = sizes[0] / sizes[1]
    pi = th.where((ratio > 0) & ratio.isfinite(), ratio, th.ones_like(ratio)).sqrt()
    shifts = (pi * damping**0.5, damping**0.5 / pi)
    return Factors(*map(_shifted_inverse, factors, sizes, shifts))


def _shifted_inverse(factor: th.Tensor, size: th.Tensor, shift: th.Tensor) -> th.Tensor:
    """(factor + shift I)⁻¹, with the smallest further shift that makes it positive definite in spite of rounding."""
    for rounding in (100.0 * th.finfo(factor.dtype).eps, 0.01, 1.0):
        total = shift + rounding * size
        total = th.where(total == 0, th.ones_like(total), total) + (total - total)  # not a number if infinite
        damped = factor.clone()
        damped.diagonal().add_(total)
        root, info = th.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return th.cholesky_inverse(root)
    return th.diag(damped.diagonal().reciprocal())


def make_preconditioner(objective: RolloutObjective, damping: float) -> "KFACPreconditioner | None":
    """
    Make the preconditioner where it :func:`pays`.

    :param objective: the model on the rollout
    :param damping: λ
    :return: v ↦ M v with M ≈ (F + λI)⁻¹, or None
    """
    return KFACPreconditioner(objective, damping) if pays(objective) else None


def default_stopping(inverse: "KFACPreconditioner | None") -> dict[str, float]:
    """
    Return when conjugate gradients stop; without Kronecker factors, a residual says less and the gain grows slowly.

    :param inverse: the preconditioner, or None
    :return: arguments of :func:`~sb3_trpo.optim.conjugate_gradient.conjugate_gradient`
    """
    return {"rtol": 0.01} if inverse is None else {"rtol": 0.05, "min_growth": 0.005}


def pays(objective: RolloutObjective) -> bool:
    """
    Return True if the preconditioner is known for a model, and saves more than it costs.

    :param objective: the model on the rollout
    """
    return objective.has_closed_form and bool(objective.model.layers)


class KFACPreconditioner:
    """
    v ↦ M v with M ≈ (F + λI)⁻¹, symmetric and positive definite, one block for each layer.

    One backward pass gives all factors: its cotangents are random signs times a root of the Fisher metric.
    Parameters outside the layers get the diagonal of their row sums in F, which is exact for a state-independent ``log_std``.

    :param objective: the model on the rollout; its family has a closed-form metric
    :param damping: λ
    """

    def __init__(self, objective: RolloutObjective, damping: float) -> None:
        actor = objective.model.parameters
        index = {id(parameter): position for position, parameter in enumerate(actor)}
        layers = set(objective.model.layers)
        sums: dict[nn.Module, Factors] = {}
        row_sums: th.Tensor | None = None
        for chunk, _, new in objective.linearized():
            calls = [call for call in new.calls if call.layer in layers]
            layerwise = objective.layerwise(new)
            for layer, factors in _chunk_factors(chunk, new, calls, layerwise):
                sums[layer] = Factors(*map(th.add, sums[layer], factors)) if layer in sums else factors
            if row_sums is None:  # parameters without factors in the first chunk have the diagonal
                self._positions = {layer: [index[id(p)] for p in _parameters(layer)] for layer in sums}
                factored = {position for positions in self._positions.values() for position in positions}
                self._rest = [position for position in range(len(actor)) if position not in factored]
                rest = [actor[position] for position in self._rest]
                row_sums = flatten([actor[0].new_zeros(0), *(th.zeros_like(p, requires_grad=False) for p in rest)])
            if rest and layerwise is not None:
                row_sums += 2.0 * chunk.weights.sum()  # log_std
            elif rest:
                row_sums += GGNProduct(objective, chunk, new, rest)(th.ones_like(row_sums))
        assert row_sums is not None, "a rollout has at least one chunk"
        factors_of = [sums[layer] for layer in self._positions]
        row_sums, *means = objective.ranks.sum_each([row_sums, *(factor for factors in factors_of for factor in factors)])
        pairs = zip(self._positions, means[::2], means[1::2], strict=True)
        self._sizes = [parameter.numel() for parameter in actor]
        self._inverses = [(layer, damped_inverses(Factors(A, G), damping)) for layer, A, G in pairs]
        diagonal = (row_sums.clamp(min=0.0) + max(damping, th.finfo(row_sums.dtype).eps)).reciprocal()
        self._diagonal = list(zip(self._rest, diagonal.split([self._sizes[position] for position in self._rest]), strict=True))

    def __call__(self, v: th.Tensor) -> th.Tensor:
        """
        Multiply.

        :param v: flat vector, shape ``(n_parameters,)``
        :return: M v
        """
        parts = list(v.split(self._sizes))
        for position, scale in self._diagonal:
            parts[position] = parts[position] * scale
        for layer, (A_inverse, G_inverse) in self._inverses:
            positions, n_outputs = self._positions[layer], G_inverse.shape[0]
            columns = [parts[position].view(n_outputs, -1) for position in positions]
            block = (th.cat(columns, dim=1) if len(columns) > 1 else columns[0]).to(A_inverse.dtype)
            product = (G_inverse @ block @ A_inverse).split([part.shape[1] for part in columns], dim=1)
            for position, part in zip(positions, product, strict=True):
                parts[position] = part
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


def _chunk_factors(
    chunk: RolloutBatch, new: ModelOutput, calls: Sequence[LayerCall], layers: Layerwise | None
) -> Iterator[tuple[nn.Module, Factors]]:
    if not calls:
        return
    for call, gradient in zip(calls, _output_gradients(chunk, new, calls, layers), strict=True):
        if gradient is not None:
            yield call.layer, _share_factors(call, gradient, chunk)


def _share_factors(call: LayerCall, gradient: th.Tensor, chunk: RolloutBatch) -> Factors:
    """Factors of a call, whose A is computed once for all layers that see the observations themselves."""
    inputs, observations, weights = call.input, chunk.inputs, chunk.weights
    if not (isinstance(observations, th.Tensor) and inputs.data_ptr() == observations.data_ptr()):
        return call_factors(call, gradient, weights)
    memory = [(tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype) for tensor in (inputs, weights)]
    key = (type(call.layer), call.layer.bias is None, *memory)
    A = chunk.shared[key][0] if key in chunk.shared else None
    factors = call_factors(call, gradient, weights, A)
    chunk.shared[key] = factors.A, inputs, weights  # nothing else may take their place in memory
    return factors


def _output_gradients(
    chunk: RolloutBatch, new: ModelOutput, calls: Sequence[LayerCall], layers: Layerwise | None
) -> Sequence[th.Tensor | None]:
    """g of each call, for one draw of the actions; None for a call that the distribution does not depend on."""
    z = outputs(new.components)
    widths = [tensor[0].numel() for tensor in z]
    # What comes after a state in its sequence, padding too, reaches the layers below a memory.
    signs = random_signs(chunk.state_ids, sum(widths)) * chunk.mask.unsqueeze(1)
    noise = [part.to(like.dtype).view_as(like) for part, like in zip(signs.split(widths, dim=1), z, strict=True)]
    cotangents = fisher_root(new.components, noise)
    if layers is not None and isinstance(layers.jacobian, MLPJacobian):
        return layers.jacobian.cotangents(th.cat(cotangents[: len(layers.widths)], dim=1))
    variable = [position for position, tensor in enumerate(z) if tensor.requires_grad]
    return th.autograd.grad(
        [z[position] for position in variable],
        [call.edge for call in calls],
        [cotangents[position] for position in variable],
        retain_graph=True,
        allow_unused=True,
    )
