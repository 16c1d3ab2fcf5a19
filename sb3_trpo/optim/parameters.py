"""Parameters as one flat vector, and the only way the update writes to them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch as th


def flatten(tensors: Iterable[th.Tensor]) -> th.Tensor:
    """
    Concatenate tensors into one vector.

    :param tensors: tensors of any shape
    :return: vector of all their elements, in order
    """
    return th.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: th.Tensor, like: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    Views of a vector in the shapes of some tensors.

    :param vector: as many elements as ``like`` has in all
    :param like: tensors that give the shapes
    :return: views of ``vector``
    """
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


@th.no_grad()
def assign(parameters: Sequence[th.Tensor], vector: th.Tensor) -> None:
    """
    Copy a vector's values into parameters, in place and without aliasing.

    :param parameters: tensors to overwrite
    :param vector: their new values, flat
    """
    for parameter, value in zip(parameters, unflatten(vector, parameters), strict=True):
        parameter.copy_(value)


def all_finite(tensors: Iterable[th.Tensor]) -> bool:
    """
    Whether no tensor holds a NaN or an infinity.

    :param tensors: tensors of any shape
    :return: True if every element is finite
    """
    kinds: dict[tuple[th.dtype, th.device], list[th.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return all(bool(th.isfinite(flatten(group)).all()) for group in kinds.values())  # few calls: most tensors are small


@contextmanager
def shifted(parameters: Sequence[th.Tensor], step: th.Tensor) -> Iterator[None]:
    """
    Give parameters other values while the context lasts. Graphs made before stay usable after it.

    :param parameters: tensors to shift
    :param step: what to add to them, flat
    :return: context manager
    """
    values = [parameter.data for parameter in parameters]
    try:
        for parameter, change in zip(parameters, unflatten(step, parameters), strict=True):
            # Not `assign`: writing in place would tell autograd that what its graphs have saved is lost.
            parameter.data = parameter.data + change.to(parameter.dtype)
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


def is_step(step: th.Tensor) -> bool:
    """
    Return True if a step is finite and nonzero.

    :param step: change of θ, flat
    :return: whether to take it
    """
    return bool(th.isfinite(step).all()) and bool(step.any())


class Snapshot:
    """
    The values of some tensors at one moment, to be put back bit for bit.

    :param tensors: parameters or buffers
    """

    def __init__(self, tensors: Iterable[th.Tensor]) -> None:
        self._tensors = list(tensors)
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    @th.no_grad()
    def restore(self) -> None:
        """Put the values back."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
