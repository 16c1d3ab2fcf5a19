"""What callbacks find in ``self.locals`` during a rollout: the local variables of SB3's loop.

The loop of this package leaves ``obs_tensor``, ``values`` and ``log_probs`` for the end of the rollout. A callback that reads
them in ``on_step`` gets them all the same: they are computed when they are read.
"""

from collections.abc import Callable, Iterator
from typing import Any

from stable_baselines3.common import callbacks
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, LogEveryNTimesteps

from sb3_trpo.optim.plain import are_original, has_patched_methods, is_of_library, remember

remember(*{item for item in vars(callbacks).values() if isinstance(item, type) and issubclass(item, BaseCallback)})


def all_callbacks(callback: BaseCallback) -> list[BaseCallback]:
    """
    Return a callback and those that it calls, in whatever attributes, lists or dictionaries it keeps them.

    :param callback: the outermost
    """
    found = {id(callback): callback}
    waiting = [callback]
    while waiting:
        for child in _children(waiting.pop()):
            if id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _children(callback: BaseCallback) -> Iterator[BaseCallback]:
    for name, value in vars(callback).items():
        if name in ("parent", "locals", "globals", "model"):
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else [value]
        yield from (item for item in items if isinstance(item, BaseCallback))


def are_known(callback: BaseCallback) -> bool:
    """
    Return True if a callback and all inside it are SB3's or this package's, which neither change the policy nor read values.

    :param callback: the outermost
    """
    return all(_is_known(one) for one in all_callbacks(callback))


def _is_known(callback: BaseCallback) -> bool:
    cls = type(callback)
    function = callback.callback if isinstance(callback, ConvertCallback) else None
    runs_function = function is not None and not isinstance(getattr(function, "__self__", None), LogEveryNTimesteps)
    return is_of_library(cls) and are_original(cls) and not has_patched_methods(callback) and not runs_function


class StepLocals(dict[str, Any]):
    """
    SB3's local variables, of which some are computed when they are read.

    :param variables: those that are there
    """

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__(variables)
        self._evaluate: Callable[[], dict[str, Any]] = dict
        self._names: frozenset[str] = frozenset()

    def compute(self, names: frozenset[str], evaluate: Callable[[], dict[str, Any]]) -> None:
        """
        Set what is computed when it is read, at each step again.

        :param names: names of variables that :meth:`update` may leave out
        :param evaluate: gives these variables, as they are at the present step
        """
        self._names, self._evaluate = names, evaluate

    def update(self, *variables: Any, **more: Any) -> None:
        """Take the variables of another step; those to be computed are out of date unless they are among them."""
        if not self._names.isdisjoint(super().keys()):
            for name in self._names:
                super().pop(name, None)
        super().update(*variables, **more)

    def _complete(self) -> None:
        if not super().keys() >= self._names:
            for name, value in self._evaluate().items():
                super().setdefault(name, value)

    def __missing__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        self._complete()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """See ``dict.get``."""
        return self[name] if name in self else default  # noqa: SIM401 # dict.get would call itself

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._names

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return super().__iter__()

    def __len__(self) -> int:
        self._complete()
        return super().__len__()

    def __repr__(self) -> str:
        return repr(self.copy())

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    def keys(self) -> Any:
        """See ``dict.keys``."""
        self._complete()
        return super().keys()

    def values(self) -> Any:
        """See ``dict.values``."""
        self._complete()
        return super().values()

    def items(self) -> Any:
        """See ``dict.items``."""
        self._complete()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Return a usual dictionary with all variables."""
        return dict(self.items())

    def pop(self, name: str, *default: Any) -> Any:
        """See ``dict.pop``."""
        self._complete()
        return super().pop(name, *default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """See ``dict.setdefault``."""
        self._complete()
        return super().setdefault(name, default)


def compute_locals(callback: BaseCallback, names: frozenset[str], evaluate: Callable[[], dict[str, Any]]) -> None:
    """
    Let a callback and all inside it find variables that are computed when they are read.

    Callbacks that share a dictionary go on sharing one.

    :param callback: the outermost
    :param names: see :meth:`StepLocals.compute`
    :param evaluate: see :meth:`StepLocals.compute`
    """
    made: dict[int, StepLocals] = {}
    for one in all_callbacks(callback):
        if not isinstance(one.locals, StepLocals):
            one.locals = made.setdefault(id(one.locals), StepLocals(one.locals))
        one.locals.compute(names, evaluate)
