"""Recorded calls of layers, and the Jacobian of a multilayer perceptron by matrix products.

In an MLP of linear layers and element-wise activations, J v and Jᵀu are a few matrix products of the inputs that a forward
pass has recorded, without an autograd graph. The results equal those of autograd.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

ELEMENTWISE = (nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.Identity)


class LayerCall(NamedTuple):
    """
    One call of a layer.

    :param layer: the module
    :param input: its input, of any batch shape, detached
    :param output: its output
    :param edge: edge of the graph at the output, unchanged by later in-place operations
    :param source: edge at the input; None if the input depends on no parameter
    """

    layer: nn.Module
    input: th.Tensor
    output: th.Tensor
    edge: GradientEdge
    source: GradientEdge | None = None


@contextmanager
def recorded_calls(layers: Sequence[nn.Module]) -> Iterator[list[LayerCall]]:
    """
    Record the differentiable calls of some layers while the context lasts.

    :param layers: modules that take one tensor, ``input``, and return one
    :return: context manager of the list of the calls, in order
    """
    calls: list[LayerCall] = []

    def record(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: th.Tensor) -> None:
        if output.requires_grad:
            inputs = arguments[0] if arguments else keywords["input"]
            source = get_gradient_edge(inputs) if inputs.requires_grad else None
            calls.append(LayerCall(layer, inputs.detach(), output, get_gradient_edge(output), source))

    # Before the user's own hooks, which may change the output.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class MLP(NamedTuple):
    """
    A network W_L φ(… φ(W_1 x + b_1) …) + b_L.

    :param layers: the linear layers, all with biases
    :param activations: φ after each layer but the last
    """

    layers: list[nn.Linear]
    activations: list[nn.Module]

    @property
    def parameters(self) -> list[th.Tensor]:
        """Weight and bias of each layer, alternating."""
        return [parameter for layer in self.layers for parameter in (layer.weight, layer.bias)]


def as_mlp(modules: Sequence[nn.Module]) -> MLP | None:
    """
    Return the layers if the modules form a plain MLP.

    :param modules: modules in order of application
    :return: the MLP, or None unless Linear layers with biases and element-wise activations alternate
    """
    layers, activations = list(modules[0::2]), list(modules[1::2])
    is_mlp = (
        len(layers) == len(activations) + 1
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and all(type(activation) in ELEMENTWISE for activation in activations)
        and not any(getattr(activation, "inplace", False) for activation in activations)
    )
    return MLP(layers, activations) if is_mlp else None  # type: ignore[arg-type]


class MLPJacobian:
    """
    Jacobian J of an MLP's output with respect to its weights and biases, at a recorded forward pass.

    :param calls: calls of the layers, in order
    :param activations: activations after each layer but the last
    """

    def __init__(self, calls: Sequence[LayerCall], activations: Sequence[nn.Module]) -> None:
        #: Weight and bias of each layer, alternating.
        self.parameters = [parameter for call in calls for parameter in (call.layer.weight, call.layer.bias)]
        self._inputs = [call.input.flatten(start_dim=1) for call in calls]
        self._weights = [call.layer.weight.detach() for call in calls]  # type: ignore[operator]
        self._slopes = [
            slope(activation, call.output, after)
            for activation, call, after in zip(activations, calls[:-1], self._inputs[1:], strict=True)
        ]

    def jvp(self, tangents: Sequence[th.Tensor]) -> th.Tensor:
        """
        Multiply J with a vector.

        :param tangents: one for each layer's weight and bias, alternating
        :return: J v, shape ``(n_states, n_outputs)``
        """
        hidden: th.Tensor | None = None
        last = len(self._weights) - 1
        for i, (inputs, weight) in enumerate(zip(self._inputs, self._weights, strict=True)):
            slopes, bias = tangents[2 * i], tangents[2 * i + 1]
            if i == last and len(bias) < len(inputs.t()):
                # BLAS takes half as long for few outputs if their factor is the first.
                moved = th.addmm(bias.unsqueeze(1), slopes, inputs.t())
                moved = (moved if hidden is None else moved.addmm_(weight, hidden.t())).t()
            else:
                moved = th.addmm(bias, inputs, slopes.t())
                moved = moved if hidden is None else moved.addmm_(hidden, weight.t())
            hidden = moved if i == last else moved.mul_(self._slopes[i])
        assert hidden is not None
        return hidden

    def vjp(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """
        Multiply Jᵀ with a vector.

        :param cotangent: u, shape ``(n_states, n_outputs)``
        :return: Jᵀ u, one tensor for each layer's weight and bias, alternating
        """
        gradients: list[th.Tensor] = []
        for part, inputs in zip(self.cotangents(cotangent), self._inputs, strict=True):
            gradients += [_outer(part, inputs), part.sum(dim=0)]
        return gradients

    def cotangents(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """
        Pull a cotangent of the output back to the outputs of all layers.

        :param cotangent: u, shape ``(n_states, n_outputs)``
        :return: one for each layer
        """
        parts = [cotangent]
        for weight, slopes in zip(self._weights[:0:-1], self._slopes[::-1], strict=True):
            parts.append((parts[-1] @ weight).mul_(slopes))
        return parts[::-1]


def _outer(left: th.Tensor, right: th.Tensor) -> th.Tensor:
    """LᵀR of two matrices with a row for each state. BLAS takes up to six times as long if the first factor is the wider."""
    return left.t() @ right if left.shape[1] <= right.shape[1] else (right.t() @ left).t()


def slope(activation: nn.Module, before: th.Tensor, after: th.Tensor) -> th.Tensor:
    """
    Differentiate an element-wise activation.

    :param activation: φ
    :param before: its input
    :param after: its output, detached
    :return: φ', shaped as the input
    """
    if isinstance(activation, nn.Tanh):  # the default, and the one whose derivative is cheap to read off its value
        return 1.0 - after.square()
    if isinstance(activation, nn.ReLU):
        return (after > 0).to(after.dtype)
    with th.enable_grad():
        before = before.detach().requires_grad_()
        (slopes,) = th.autograd.grad(activation(before).sum(), before)
    return slopes
