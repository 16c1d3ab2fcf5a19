"""The policy that began a rollout: noticing that it was changed since, and having it back for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.utils.hooks import RemovableHandle

#: Elements of a tensor that are compared at every step; of larger ones, so many at regular distances.
COMPARED_ELEMENTS = 2**14

#: Attributes of a module that reading and writing its parameters call, and its networks do not.
FILES = {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}

#: Modules that compute from their parameters and modules alone, whatever other attributes say.
WITHOUT_ATTRIBUTES = (nn.Linear, nn.Tanh, nn.ReLU, nn.Flatten, nn.Sequential, nn.Identity)


class PolicyState:
    """
    Modules, attributes, hooks and tensors of a policy, at the moment of construction.

    :param policy: the policy
    """

    def __init__(self, policy: nn.Module) -> None:
        attributes = [vars(module) for module in policy.modules()]
        inner = [
            value for items in attributes for name, value in items.items() if isinstance(value, dict) and name not in FILES
        ]
        self._present = [*attributes, *(items for items in inner if items)]
        self._empty = [items for items in inner if not items]
        self._saved = [dict(items) for items in self._present]
        self._brief = [items for module, items in zip(policy.modules(), attributes, strict=True) if _is_brief(module)]
        self._lengths = list(map(len, self._brief))
        brief = set(map(id, self._brief))
        self._telling = [items for items in self._present if id(items) not in brief]
        self._told = [list(items.values()) for items in self._telling]
        self._n_hooks = RemovableHandle.next_id
        self._tensors = list({id(tensor): tensor for tensor in [*policy.parameters(), *policy.buffers()]}.values())
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._large = [tensor for tensor in self._tensors if tensor.numel() > COMPARED_ELEMENTS]
        self._samples = [_sample(tensor) for tensor in self._tensors]
        self._numbers = self._read_numbers()
        views = [sample() for tensor, sample in zip(self._tensors, self._samples, strict=True) if tensor.device.type == "cpu"]
        self._first_of = [view.item for view in views if view.size]
        self._first = [first(0) for first in self._first_of]

    def _read_numbers(self) -> list[Any]:
        places = [tensor.data_ptr() for tensor in self._tensors]
        return [places, [tensor._version for tensor in self._large], [sample().tobytes() for sample in self._samples]]

    def has_changed(self) -> bool:
        """
        Return True if something was changed.

        Changes through ``tensor.data`` leave no trace but in the numbers, hence the comparison of these.
        """
        try:
            is_same = self._present == self._saved
        except (RuntimeError, ValueError):  # an array or a tensor was replaced by another
            return True
        return not is_same or any(self._empty) or self._numbers != self._read_numbers()

    def has_changed_structure(self) -> bool:
        """
        Return True if something other than numbers was changed, or the first number of a tensor.

        It takes a fraction of the time of :meth:`has_changed`, for steps without a call of torch. Then only an array that
        shares a tensor's memory can have written into it, usually into all of it; and torch numbers the hooks.
        """
        if RemovableHandle.next_id != self._n_hooks:  # of any module
            self._n_hooks = RemovableHandle.next_id
            return self.has_changed()
        try:
            is_same = [list(items.values()) for items in self._telling] == self._told
        except (RuntimeError, ValueError):
            return True
        return (
            not is_same
            or self._lengths != list(map(len, self._brief))
            or self._first != [first(0) for first in self._first_of]
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """
        Let the policy be what it was for a while, and what it is now afterwards.

        :return: context manager
        """
        dictionaries, saved = [*self._present, *self._empty], [*self._saved, *({} for _ in self._empty)]
        items, data = [dict(items) for items in dictionaries], [tensor.data for tensor in self._tensors]
        _fill(dictionaries, saved)
        _point(self._tensors, self._copies)
        try:
            yield
        finally:
            _point(self._tensors, data)
            _fill(dictionaries, items)


def _is_brief(module: nn.Module) -> bool:
    return type(module) in WITHOUT_ATTRIBUTES


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


def _fill(dictionaries: list[dict[str, Any]], contents: list[dict[str, Any]]) -> None:
    for dictionary, items in zip(dictionaries, contents, strict=True):
        dictionary.clear()
        dictionary.update(items)


def _point(tensors: list[th.Tensor], data: list[th.Tensor]) -> None:
    for tensor, values in zip(tensors, data, strict=True):
        tensor.data = values
