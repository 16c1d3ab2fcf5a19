"""What flows in and out of a network's layers during a forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


class LayerCall(NamedTuple):
    """
    One call of a layer.

    :param layer: the module
    :param input: its input, of any batch shape
    :param output: its output
    :param edge: where the graph leaves the layer; the output itself moves on if it is changed in place
    """

    layer: nn.Module
    input: th.Tensor
    output: th.Tensor
    edge: GradientEdge


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
            calls.append(LayerCall(layer, inputs.detach(), output, get_gradient_edge(output)))

    # Before the user's own hooks, which may change the output.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
