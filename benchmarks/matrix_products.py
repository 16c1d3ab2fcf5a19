"""The floor of an update: the time that its matrix products and convolutions take by themselves."""

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry


class MatrixProducts(TorchDispatchMode):
    """
    Counts the matrix products and convolutions of what runs inside, by what they are applied to.

    :param clock: one of ``timing.CLOCKS``
    """

    OPERATIONS: ClassVar[dict[Any, Any]] = {
        getattr(th.ops.aten, name).default: getattr(th.ops.aten, counted)
        for name, counted in [
            ("mm", "mm"),
            ("addmm", "addmm"),
            ("addmm_", "addmm"),
            ("bmm", "bmm"),
            ("convolution", "convolution"),
            ("convolution_backward", "convolution_backward"),
        ]
    }

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock = clock
        self.calls: Counter[Any] = Counter()
        self.arguments: dict[Any, tuple[Any, Any, dict[str, Any]]] = {}
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.OPERATIONS:
            self.operations += flop_registry[self.OPERATIONS[function]](*args, **(kwargs or {}), out_val=result)
            described = tree_map(_describe, (args, kwargs or {}))
            key = (function, repr(described))
            self.calls[key] += 1
            self.arguments[key] = (function, *described)
        return result

    def seconds(self) -> float:
        """Time of all of them by themselves, each the best of several runs on numbers in the same layout."""
        total = 0.0
        for key, count in self.calls.items():
            function, described, options = self.arguments[key]
            arguments = tree_map(_make, described)
            options = tree_map(_make, options)
            best = float("inf")
            began = self.clock()
            for repetition in range(200):
                started = self.clock()
                function(*arguments, **options)
                best = min(best, self.clock() - started)
                if repetition >= 4 and self.clock() - began > 0.1:
                    break
            total += count * best
        return total


class _Described(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Leaf:
    """Keeps a description from being taken for a tuple of numbers."""

    def __init__(self, described: _Described) -> None:
        self.described = described

    def __repr__(self) -> str:
        return repr(self.described)


def _describe(value: Any) -> Any:
    return _Leaf(_Described(tuple(value.shape), value.stride())) if isinstance(value, th.Tensor) else value


def _make(value: Any) -> Any:
    if not isinstance(value, _Leaf):
        return value
    return th.empty_strided(value.described.shape, value.described.strides).normal_()
