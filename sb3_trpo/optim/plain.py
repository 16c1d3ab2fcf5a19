"""The rule by which a fast path may stand in for a module: it must do what its class says, and nothing else.

Fast paths recognize networks by the classes of their modules. Hooks, pruning, parametrizations, methods patched on an
instance or a class, compiled calls and autocast change what a module computes, and leave its class as it is.
"""

import functools
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch as th
from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}") for name in HOOKS]

TENSORS = {th.Tensor, nn.Parameter}
LIBRARIES = ("torch", "stable_baselines3", "sb3_contrib", "sb3_trpo")

#: Functions of the known classes, as they were when this package was imported.
_FUNCTIONS: dict[type, dict[str, Any]] = {}


def remember(*classes: type) -> None:
    """
    Record the functions of some classes, so that :func:`are_original` notices later patches.

    :param classes: classes as their libraries define them
    """
    for cls in classes:
        functions = {name: item for name, item in vars(cls).items() if isinstance(item, FunctionType)}
        # Constructors and the like are left out: torch.compile itself patches those of nn.Module.
        calls = {name: item for name, item in functions.items() if name == "__call__" or not name.startswith("__")}
        _FUNCTIONS.setdefault(cls, calls)


def is_of_library(cls: type) -> bool:
    """
    Return True if a class comes from torch, SB3, sb3-contrib or this package.

    :param cls: any class
    """
    return cls.__module__.partition(".")[0] in LIBRARIES


remember(nn.Module, *{item for item in vars(nn).values() if isinstance(item, type) and issubclass(item, nn.Module)})


def are_original(*classes: type) -> bool:
    """
    Return True if no function of some classes or their bases was patched since they were remembered.

    :param classes: any classes; bases that were not remembered are taken as they are
    """
    bases = {base for cls in classes for base in cls.__mro__ if base in _FUNCTIONS}
    return all(_FUNCTIONS[base].items() <= vars(base).items() for base in bases)


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def has_patched_methods(instance: object) -> bool:
    """
    Return True if attributes of an instance hide methods of its class.

    :param instance: any object with a ``__dict__``
    """
    return not _methods(type(instance)).isdisjoint(vars(instance))  # type: ignore[arg-type]


def has_hooks(module: nn.Module) -> bool:
    """
    Return True if a call of the module, or of one inside it, runs hooks; pruning and the old norms are hooks.

    :param module: any module
    """
    return _have_hooks(module.modules())


def _have_hooks(parts: Iterable[nn.Module]) -> bool:
    return any(GLOBAL_HOOKS) or any(getattr(part, name) for part in parts for name in HOOKS)


def is_plain(module: nn.Module) -> bool:
    """
    Return True if the module and all inside it compute what their classes define, from their own parameters.

    The caller checks the classes themselves. A subclass counts as a class of its own.

    :param module: any module
    """
    parts = list(module.modules())  # torch takes long to find them
    parameter = next(module.parameters(), None)
    return (
        not _have_hooks(parts)
        and all(map(_is_untouched, parts))
        and are_original(*set(map(type, parts)))
        and not _is_autocast("cpu" if parameter is None else parameter.device)
    )


def _is_untouched(module: nn.Module) -> bool:
    """Whether the instance has its class's methods and keeps its tensors as parameters and buffers."""
    attributes = vars(module)
    return (
        attributes.get("_compiled_call_impl") is None
        and "parametrizations" not in attributes["_modules"]
        and not has_patched_methods(module)
        and TENSORS.isdisjoint(map(type, attributes.values()))
        and {nn.Parameter, type(None)}.issuperset(map(type, attributes["_parameters"].values()))
    )


def _is_autocast(device: th.device | str) -> bool:
    """Whether products of float32 matrices come out in another type; older versions of torch have no function to ask."""
    one = th.ones(1, 1, dtype=th.float32, device=device)
    return (one @ one).dtype is not th.float32
