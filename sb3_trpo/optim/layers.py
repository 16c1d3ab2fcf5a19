"""What flows in and out of a network's layers during a forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from torch import nn


class LayerCall(NamedTuple):
    """
    One call of a layer.

    :param layer: the module
    :param input: what went in, shape ``(n_states, ...)``
    :param output: what came out, connected to the graph
    """

    layer: nn.Module
    input: th.Tensor
    output: th.Tensor


@contextmanager
def recorded_calls(layers: Sequence[nn.Module]) -> Iterator[list[LayerCall]]:
    """
    Record the calls of some layers while the context lasts.

    :param layers: modules that take one tensor and return one
    :return: context manager of the list that the calls go to, in order
    """
    calls: list[LayerCall] = []

    def record(layer: nn.Module, arguments: tuple[Any, ...], output: th.Tensor) -> None:
        calls.append(LayerCall(layer, arguments[0].detach(), output))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
