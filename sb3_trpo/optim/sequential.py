"""The Jacobian of a network that applies its modules one after another, convolutions among them.

J v and Jᵀu are computed module by module, from the inputs that a forward pass has recorded and without an autograd graph.
Gradients that nobody asked for, as that of the first convolution with respect to the images, are not computed. The results
equal those of autograd.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_trpo.optim.mlp import ELEMENTWISE, LayerCall, slope

LINEAR_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MODULES = (nn.Linear, nn.Conv2d, nn.Flatten, nn.MaxPool2d, *LINEAR_POOLS, *ELEMENTWISE)


class Sequential(NamedTuple):
    """
    What is known of a network that may apply modules one after another.

    :param modules: the modules it may consist of, in any order
    :param output: the last of them
    :param channels_last: whether images may be given to it in channels-last layout, in which convolutions are faster
    """

    modules: list[nn.Module]
    output: nn.Module
    channels_last: bool


def as_sequential(module: nn.Module, output: nn.Module, channels_last: bool) -> Sequential:
    """
    Collect the modules of a network that may be applied one after another; its forward passes show whether they are.

    :param module: holds all modules
    :param output: the last of the network
    :param channels_last: see :class:`Sequential`
    :return: the network
    """
    return Sequential([part for part in module.modules() if type(part) in MODULES], output, channels_last)


def to_channels_last(tensor: th.Tensor) -> th.Tensor:
    """
    Put images, filters and the like into channels-last layout.

    :param tensor: any tensor
    :return: the tensor, with another layout if it has four dimensions
    """
    return tensor.contiguous(memory_format=th.channels_last) if tensor.ndim == 4 else tensor


class SequentialJacobian:
    """
    Jacobian J of the output of modules that were applied one after another, with respect to their parameters.

    :param calls: their calls, for which :func:`are_sequential` holds
    """

    def __init__(self, calls: Sequence[LayerCall]) -> None:
        self._steps = [_step(call) for call in calls]
        #: The parameters, in the order of the modules.
        self.parameters = [parameter for step in self._steps for parameter in step.parameters]

    def jvp(self, tangents: Sequence[th.Tensor]) -> th.Tensor:
        """
        Multiply J with a vector.

        :param tangents: one for each parameter
        :return: J v, shaped as the output
        """
        rest = iter(tangents)
        hidden: th.Tensor | None = None
        for step in self._steps:
            hidden = step.jvp([next(rest) for _ in step.parameters], hidden)
        assert hidden is not None
        return hidden

    def vjp(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """
        Multiply Jᵀ with a vector.

        :param cotangent: u, shaped as the output
        :return: Jᵀu, one tensor for each parameter
        """
        gradients: list[th.Tensor] = []
        for index in range(len(self._steps) - 1, -1, -1):
            found, cotangent = self._steps[index].vjp(cotangent, index > 0)
            gradients = [*found, *gradients]
        return gradients


def are_sequential(calls: Sequence[LayerCall], output: nn.Module) -> bool:
    """
    Return True if recorded calls are one chain of supported modules, each applied once, with no operation in between.

    :param calls: all calls of modules that depend on parameters, in order
    :param output: the module that the chain must end with
    """
    return (
        len(calls) > 0
        and calls[-1].layer is output
        and len({id(call.layer) for call in calls}) == len(calls)
        and calls[0].source is None
        and all(_is_supported(call) for call in calls)
        and all(
            call.source is not None and call.source.node is before.edge.node and call.source.output_nr == before.edge.output_nr
            for before, call in pairwise(calls)
        )
    )


def _is_supported(call: LayerCall) -> bool:
    layer = call.layer
    if isinstance(layer, nn.Conv2d):
        return call.input.ndim == 4 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Linear):
        return call.input.ndim == 2
    return type(layer) in MODULES and not getattr(layer, "return_indices", False)


class _Step:
    """
    Derivative of one module; this class serves those that are linear: Flatten and average pooling.

    :param call: its call
    """

    def __init__(self, call: LayerCall) -> None:
        self.parameters = [parameter for parameter in call.layer.parameters() if parameter is not None]
        self._layer = call.layer
        self._input = to_channels_last(call.input)

    def jvp(self, tangents: Sequence[th.Tensor], hidden: th.Tensor | None) -> th.Tensor:
        """Tangent of the output, from those of the parameters and of the input; None for 0."""
        with th.no_grad():
            return self._layer(hidden)

    def vjp(self, cotangent: th.Tensor, needs_input: bool) -> tuple[Sequence[th.Tensor], th.Tensor]:
        """Gradients of the parameters, and of the input if it is needed."""
        if isinstance(self._layer, nn.Flatten):
            return [], to_channels_last(cotangent.reshape(self._input.shape))
        with th.enable_grad():
            inputs = self._input.detach().requires_grad_()
            return [], th.autograd.grad(self._layer(inputs), inputs, cotangent)[0]


class _Elementwise(_Step):
    def __init__(self, call: LayerCall) -> None:
        super().__init__(call)
        self._slope = to_channels_last(slope(call.layer, call.input, call.output.detach()))

    def jvp(self, tangents: Sequence[th.Tensor], hidden: th.Tensor | None) -> th.Tensor:
        assert hidden is not None
        return hidden.mul_(self._slope)

    def vjp(self, cotangent: th.Tensor, needs_input: bool) -> tuple[Sequence[th.Tensor], th.Tensor]:
        return [], cotangent.mul_(self._slope)


class _MaxPool(_Step):
    def __init__(self, call: LayerCall) -> None:
        super().__init__(call)
        pool = call.layer
        assert isinstance(pool, nn.MaxPool2d)
        options = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        self._index = F.max_pool2d(call.input, *options, return_indices=True)[1]

    def jvp(self, tangents: Sequence[th.Tensor], hidden: th.Tensor | None) -> th.Tensor:
        assert hidden is not None
        return to_channels_last(hidden.flatten(-2).gather(-1, self._index.flatten(-2)).view(self._index.shape))

    def vjp(self, cotangent: th.Tensor, needs_input: bool) -> tuple[Sequence[th.Tensor], th.Tensor]:
        total = cotangent.new_zeros(self._input.shape).flatten(-2)
        total.scatter_add_(-1, self._index.flatten(-2), cotangent.flatten(-2))
        return [], to_channels_last(total.view(self._input.shape))


class _Linear(_Step):
    def __init__(self, call: LayerCall) -> None:
        super().__init__(call)
        self._weight = to_channels_last(self.parameters[0].detach())

    def jvp(self, tangents: Sequence[th.Tensor], hidden: th.Tensor | None) -> th.Tensor:
        moved = self._apply(self._input, to_channels_last(tangents[0]), tangents[1] if len(tangents) > 1 else None)
        return moved if hidden is None else moved.add_(self._apply(hidden, self._weight, None))

    def vjp(self, cotangent: th.Tensor, needs_input: bool) -> tuple[Sequence[th.Tensor], th.Tensor]:
        gradients = [cotangent.t() @ self._input, cotangent.sum(dim=0)]
        return gradients[: len(self.parameters)], cotangent @ self._weight if needs_input else cotangent

    def _apply(self, inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return F.linear(inputs, weight, bias)


class _Conv2d(_Linear):
    def __init__(self, call: LayerCall) -> None:
        super().__init__(call)
        layer = call.layer
        assert isinstance(layer, nn.Conv2d)
        self._options = layer.stride, layer.padding, layer.dilation, layer.groups

    def vjp(self, cotangent: th.Tensor, needs_input: bool) -> tuple[Sequence[th.Tensor], th.Tensor]:
        stride, padding, dilation, groups = self._options
        inputs, *gradients = th.ops.aten.convolution_backward.default(
            cotangent,
            self._input,
            self._weight,
            [cotangent.shape[1]],
            stride,
            padding,
            dilation,
            False,  # not transposed
            [0, 0],
            groups,
            [needs_input, True, len(self.parameters) > 1],
        )
        return gradients[: len(self.parameters)], inputs if needs_input else cotangent

    def _apply(self, inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return F.conv2d(inputs, weight, bias, *self._options)  # type: ignore[arg-type]


def _step(call: LayerCall) -> _Step:
    kinds = {nn.Conv2d: _Conv2d, nn.Linear: _Linear, nn.MaxPool2d: _MaxPool, **dict.fromkeys(ELEMENTWISE, _Elementwise)}
    return kinds.get(type(call.layer), _Step)(call)
