"""The fast path for SB3's standard multilayer perceptrons: linear layers with element-wise activations between them.

For such a chain the products J v and Jᵀ u are a few matrix products on the numbers that the forward pass has left in the
layers, without a differentiation graph. Everything here equals what autograd gives for the same network.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_trpo.optim.layers import LayerCall

ELEMENTWISE = (nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.Identity)


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


def chain(modules: Sequence[nn.Module]) -> MLP | None:
    """
    Read modules that are applied one after the other as a chain.

    :param modules: modules in order
    :return: the chain, or None if they are anything but alternating Linear layers and element-wise activations
    """
    layers, activations = list(modules[0::2]), list(modules[1::2])
    is_chain = (
        len(layers) == len(activations) + 1
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and all(type(activation) in ELEMENTWISE for activation in activations)
        and not any(getattr(activation, "inplace", False) for activation in activations)
    )
    return MLP(layers, activations) if is_chain else None  # type: ignore[arg-type]


class MLPJacobian:
    """
    J of a chain's output with respect to its weights and biases, at a recorded forward pass.

    :param calls: calls of the chain's layers, in order
    :param activations: the chain's activations
    """

    def __init__(self, calls: Sequence[LayerCall], activations: Sequence[nn.Module]) -> None:
        self._inputs = [call.input.flatten(start_dim=1) for call in calls]
        self._weights = [call.layer.weight.detach() for call in calls]  # type: ignore[operator]
        self._slopes = [
            _slope(activation, call.output, after)
            for activation, call, after in zip(activations, calls[:-1], self._inputs[1:], strict=True)
        ]

    def push(self, tangents: Sequence[th.Tensor]) -> th.Tensor:
        """
        Multiply J with a vector.

        :param tangents: one for each layer's weight and bias, alternating
        :return: J v, shape ``(n_states, n_outputs)``
        """
        hidden: th.Tensor | None = None
        last = len(self._weights) - 1
        for i, (inputs, weight) in enumerate(zip(self._inputs, self._weights, strict=True)):
            moved = th.addmm(tangents[2 * i + 1], inputs, tangents[2 * i].t())
            if hidden is not None:
                moved.addmm_(hidden, weight.t())
            hidden = moved if i == last else moved.mul_(self._slopes[i])
        assert hidden is not None
        return hidden

    def pull(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """
        Multiply Jᵀ with a vector.

        :param cotangent: u, shape ``(n_states, n_outputs)``
        :return: Jᵀ u, one tensor for each layer's weight and bias, alternating
        """
        gradients: list[th.Tensor] = []
        for i in range(len(self._weights) - 1, -1, -1):
            gradients += [cotangent.sum(dim=0), cotangent.t() @ self._inputs[i]]
            if i > 0:
                cotangent = (cotangent @ self._weights[i]).mul_(self._slopes[i - 1])
        return gradients[::-1]


def _slope(activation: nn.Module, before: th.Tensor, after: th.Tensor) -> th.Tensor:
    """φ' where φ maps ``before`` to ``after``."""
    if isinstance(activation, nn.Tanh):  # the default, and the one whose derivative is cheap to read off its value
        return 1.0 - after.square()
    with th.enable_grad():
        before = before.detach().requires_grad_()
        (slope,) = th.autograd.grad(activation(before).sum(), before)
    return slope
