"""The policy that began a rollout: noticing that it was changed since, and having it back for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from torch import nn

#: Elements of a tensor that are compared at every step; of larger ones, so many at regular distances.
COMPARED_ELEMENTS = 2**14


class PolicyState:
    """
    Modules, attributes, hooks and tensors of a policy, at the moment of construction.

    :param policy: the policy
    """

    def __init__(self, policy: nn.Module) -> None:
        modules = list(policy.modules())
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        registries = [value for module in modules for value in vars(module).values() if isinstance(value, dict)]
        self._filled = [(registry, dict(registry)) for registry in registries if registry]
        self._empty = [registry for registry in registries if not registry]
        self._tensors = list({id(tensor): tensor for tensor in [*policy.parameters(), *policy.buffers()]}.values())
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._places = self._find_places()
        self._samples = [_sample(tensor) for tensor in self._tensors]
        self._contents = self._read_contents()

    def _find_places(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]

    def _read_contents(self) -> list[Any]:
        return [sample().tobytes() for sample in self._samples]

    def has_changed(self) -> bool:
        """
        Return True if something was changed.

        Changes through ``tensor.data`` leave no trace but in the numbers, hence the comparison of these.
        """
        return (
            any(self._empty)
            or not all(_are_same(now, before) for now, before in self._filled)
            or not all(_are_same(now, before) for now, before in self._attributes)
            or self._places != self._find_places()
            or self._contents != self._read_contents()
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """
        Let the policy be what it was for a while, and what it is now afterwards.

        :return: context manager
        """
        registries = [*self._attributes, *self._filled, *((registry, {}) for registry in self._empty)]
        present = [(registry, dict(registry)) for registry, _ in registries]
        data = [tensor.data for tensor in self._tensors]
        _fill(registries)
        _point(self._tensors, self._copies)
        try:
            yield
        finally:
            _point(self._tensors, data)
            _fill(present)


def _sample(tensor: th.Tensor) -> Callable[[], np.ndarray]:
    """Read a tensor, or some of its elements, as an array; a view of its numbers where there can be one."""
    stride = -(-tensor.numel() // COMPARED_ELEMENTS)
    values = tensor.detach()
    if stride > 1 and values.is_contiguous():
        values = values.view(-1)[::stride]
    if values.device.type == "cpu" and values.dtype is not th.bfloat16:
        array = values.numpy()
        return lambda: array
    return lambda: values.double().cpu().numpy()


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same objects, or equal numbers and strings."""
    try:
        return now == before
    except (RuntimeError, ValueError):  # arrays and tensors, which are other objects, cannot tell
        return False


def _fill(registries: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for registry, items in registries:
        registry.clear()
        registry.update(items)


def _point(tensors: list[th.Tensor], data: list[th.Tensor]) -> None:
    for tensor, values in zip(tensors, data, strict=True):
        tensor.data = values
