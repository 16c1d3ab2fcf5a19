"""Unpickling what SB3 puts into its files, and nothing else.

Reading has two steps. :mod:`sb3_trpo.saving.pickle_records` turns a pickle into plain data and records of the calls that it
asks for. Here every record is looked up in :data:`~sb3_trpo.saving.constructors.CONSTRUCTORS`, and the function found there
makes the object, from arguments of which it has checked types, ranges and lengths. No function, class or method that the
file names is called, and no object fills itself in (``__setstate__``, ``__reduce__``, attributes of any name). A class of
SB3, sb3-contrib, torch.nn or torch.optim may be named as a value.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import BaseBuffer
from torch import nn
from torch.optim import Optimizer

from sb3_trpo.saving.constructors import CONSTRUCTORS, NESTED_GLOBALS
from sb3_trpo.saving.pickle_records import (
    UNSET,
    Budget,
    FrozenMembers,
    Global,
    Mapping,
    Members,
    Record,
    Reference,
    RefusedError,
    label,
    read_records,
)

__all__ = ["RefusedError", "RestrictedUnpickler", "restricted_loads"]

#: Modules whose classes a pickle may name as values, if they are already imported and of these kinds.
VALUE_MODULES = ("stable_baselines3.", "sb3_contrib.", "sb3_trpo.", "torch.nn.modules.", "torch.optim.", "numpy.")
VALUE_KINDS = (nn.Module, Optimizer, BaseBuffer, np.number, np.bool_)
MAX_DEPTH = 100
#: How large an object may be with everything counted as often as it is referred to: this, and so many times the pickle.
MAX_EXPANDED, MAX_REPETITION = 4_000_000, 16
#: Keys and members are of these types: their hashes cannot be made to take long.
HASHABLE = (str, int, bytes, bool)
MAX_KEY_BITS = 64


class RestrictedUnpickler:
    """
    Make the objects in a pickle.

    :param data: the pickle
    :param constructors: name ↦ function that makes an object from a record
    :param budget: bound of the memory; None for one of its own
    """

    def __init__(
        self,
        data: bytes,
        constructors: dict[str, Callable[[Record], Any]] = CONSTRUCTORS,
        budget: Budget | None = None,
    ) -> None:
        self._data, self._constructors = data, constructors
        self._budget = budget or Budget(len(data))
        self._limit = MAX_EXPANDED + MAX_REPETITION * len(data)
        self._made: dict[int, tuple[Any, int]] = {}  # identity of what was read ↦ object, expanded size
        self._open: set[int] = set()

    def load(self) -> Any:
        """
        Read the pickle.

        :return: the object
        :raises RefusedError: the pickle asks for something that is not allowed
        """
        self._records = read_records(self._data, self._budget)  # kept: identities must not be used anew
        return self._make(self._records)[0]

    def persistent_load(self, pid: Any) -> Any:
        """
        Look up an object outside the file; there is none, except in subclasses.

        :param pid: its name, checked like every other value
        :return: the object
        :raises RefusedError: there is none
        """
        raise RefusedError("an object outside the file")

    def find_value(self, name: str) -> Any:
        """
        Look up a class that a pickle may name as a value.

        :param name: module and name
        :return: the class
        :raises RefusedError: it is of no kind that is allowed, or its module is not imported
        """
        module, _, attribute = name.rpartition(".")
        if name.startswith(VALUE_MODULES) and module in sys.modules:
            value = vars(sys.modules[module]).get(attribute)
            if isinstance(value, type) and issubclass(value, VALUE_KINDS):
                return value
        raise RefusedError(f"the global {name[:200]}")

    def _make(self, node: Any) -> tuple[Any, int]:
        if node is None or isinstance(node, (bool, int, float)):
            return node, 1
        if isinstance(node, (str, bytes, bytearray)):
            return node, 1 + len(node)
        key = id(node)
        if key in self._made:
            return self._made[key]
        if key in self._open:
            raise RefusedError("an object that contains itself")
        if len(self._open) >= MAX_DEPTH:
            raise RefusedError(f"objects nested more than {MAX_DEPTH} deep")
        self._open.add(key)
        made = self._make_object(node)
        self._open.remove(key)
        if made[1] > self._limit:
            raise RefusedError("an object far larger than the file")
        self._made[key] = made
        return made

    def _make_object(self, node: Any) -> tuple[Any, int]:
        if isinstance(node, Global):
            return self.find_value(node.name), 1
        if isinstance(node, Reference):
            key, size = self._make(node.key)
            return self.persistent_load(key), size
        if isinstance(node, Record):
            return self._call(node)
        if isinstance(node, Mapping):
            keys, size = self._make_all([key for key, _ in node])
            values, more = self._make_all([value for _, value in node])
            return dict(zip(map(_checked_key, keys), values, strict=True)), size + more
        values, size = self._make_all(node)
        if isinstance(node, (Members, FrozenMembers)):
            kind = set if isinstance(node, Members) else frozenset
            return kind(map(_checked_key, values)), size
        return (tuple(values) if isinstance(node, tuple) else values), size

    def _make_all(self, nodes: Any) -> tuple[list[Any], int]:
        values, size = [], 1
        for node in nodes:
            value, more = self._make(node)
            values.append(value)
            size += more
        return values, size

    def _call(self, node: Record) -> tuple[Any, int]:
        constructor = self._constructors.get(node.name)
        if constructor is None:
            # A class that may be named as a value may not be called for all that.
            raise RefusedError(f"a call of the global {node.name[:200]}")
        arguments, size = [], 1
        for argument in node.args:
            if isinstance(argument, Global) and argument.name in NESTED_GLOBALS:
                arguments.append(argument)
                continue
            value, more = self._make(argument)
            arguments.append(value)
            size += more
        state, more = (UNSET, 0) if node.state is UNSET else self._make(node.state)
        items, most = self._make_all(node.items)
        keys, extra = self._make_all([key for key, _ in node.pairs])
        values, further = self._make_all([value for _, value in node.pairs])
        pairs = list(zip(map(_checked_key, keys), values, strict=True))
        made = constructor(Record(node.name, tuple(arguments), state, items, pairs))
        return made, size + more + most + extra + further


def _checked_key(key: Any) -> Any:
    if type(key) not in HASHABLE or (isinstance(key, int) and key.bit_length() > MAX_KEY_BITS):
        raise RefusedError(f"{label(key)} as the key of a dictionary, or as the member of a set")
    return key


def restricted_loads(data: bytes, budget: Budget | None = None) -> Any:
    """
    Unpickle what the lists of this package allow.

    :param data: the pickle
    :param budget: bound of the memory; None for one of its own
    :return: the object
    :raises RefusedError: the pickle asks for something else; nothing of it was run
    """
    return RestrictedUnpickler(data, budget=budget).load()
