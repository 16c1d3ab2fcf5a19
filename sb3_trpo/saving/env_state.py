"""
The inner state of environments: captured in one, restored into another that was made in the same way.

An environment and its wrappers are Python objects. Their state is their attributes, except those that never change
(:data:`CONSTANTS`, functions) and MuJoCo's data, of which every array is copied. An environment whose state is elsewhere (in
a library of its own) or cannot be pickled can define it with two methods, ``get_state()`` and ``set_state(state)``. They
speak for everything inside that environment or wrapper as well.
"""

import functools
import io
import pickle
import types
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

from sb3_trpo.errors import MismatchError
from sb3_trpo.saving.unpickling import RefusedError, RestrictedUnpickler

#: Attributes without state: wrapped environments, constructor arguments, rendering and logging.
CONSTANTS = {
    *("env", "venv", "spec", "_cached_spec", "metadata", "_metadata", "class_attributes", "render_mode"),
    *("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "reset_infos", "_seeds", "_options"),
    *("mujoco_renderer", "screen", "clock", "surf", "results_writer", "t_start"),
}
CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, functools.partial, type)
#: Class name of an environment that a worker of SB3's own ``SubprocVecEnv`` holds, where it cannot be asked for.
IN_WORKER = "an environment in a worker"


class StateUnavailableError(Exception):
    """The state of an environment cannot be captured; the message says why."""


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Give an environment ``get_state`` and ``set_state``, so that its state can be captured from another process.

    For SB3's ``SubprocVecEnv``: ``make_vec_env(..., vec_env_cls=SubprocVecEnv, wrapper_class=ResumableEnv)``. It adds nothing
    to the state: a checkpoint of environments with it resumes in environments without it, and the other way round.

    :param env: the environment
    """

    def get_state(self) -> bytes:
        """
        Capture the state of the wrapped environment.

        :return: the state
        :raises StateUnavailableError: it cannot be captured
        """
        return capture(self.env)

    def set_state(self, state: bytes, trust: bool = False) -> None:
        """
        Restore the state of the wrapped environment.

        :param state: as :meth:`get_state` returns it
        :param trust: as for :func:`restore`
        :raises RefusedError: as for :func:`restore`
        :raises MismatchError: as for :func:`restore`
        """
        restore(self.env, state, trust)

    def try_get_state(self) -> "bytes | Failure":
        """
        Capture the state in a worker, which an exception would end.

        :return: the state, or why it cannot be captured
        """
        try:
            return self.get_state()
        except Exception as error:  # noqa: BLE001 - the main process decides what follows
            return Failure(type(error).__name__, str(error))

    def try_set_state(self, state: bytes, trust: bool) -> "Failure | None":
        """
        Restore the state in a worker, which an exception would end.

        :param state: as :meth:`get_state` returns it
        :param trust: as for :func:`restore`
        :return: why it cannot be restored; None if it is
        """
        try:
            self.set_state(state, trust)
        except Exception as error:  # noqa: BLE001 - the main process decides what follows
            return Failure(type(error).__name__, error.what if isinstance(error, RefusedError) else str(error))
        return None


class Failure(NamedTuple):
    """
    An exception in a worker, as a value.

    :param kind: name of its class
    :param message: its message; of a ``RefusedError``, what was refused
    """

    kind: str
    message: str

    def exception(self) -> Exception:
        """
        Make the exception to raise in the main process.

        :return: one of the same class where :func:`capture` and :func:`restore` raise it
        """
        known = {kind.__name__: kind for kind in (StateUnavailableError, RefusedError, MismatchError)}
        return known.get(self.kind, pickle.UnpicklingError)(self.message)


def capture(env: Any) -> bytes:
    """
    Capture the state of an environment.

    :param env: the environment, with all its wrappers
    :return: the state
    :raises StateUnavailableError: it cannot be captured
    """
    return capture_layers(_wrapper_stack(env))


def restore(env: Any, state: bytes, trust: bool = False) -> None:
    """
    Restore the state of an environment.

    :param env: an environment made in the same way, which has been reset
    :param state: as :func:`capture` returns it
    :param trust: unpickle objects of any class, which may run code
    :raises RefusedError: the state needs a class that is not known to be harmless, and ``trust`` is False
    :raises MismatchError: the environment was made in another way
    """
    restore_layers(_wrapper_stack(env), state, trust)


def _wrapper_stack(env: Any) -> list[Any]:
    """Return the wrappers and the environment, from the outermost to the one that speaks for what is inside it."""
    layers: list[Any] = []
    while isinstance(env, gym.Wrapper):
        if type(env) is not ResumableEnv:
            layers.append(env)
            if _has_state_methods(env):
                return layers
        env = env.env
    return [*layers, env]


def _has_state_methods(layer: Any) -> bool:
    return hasattr(type(layer), "get_state") and hasattr(type(layer), "set_state")


def _is_mujoco(value: Any) -> bool:
    return type(value).__module__.startswith("mujoco") and type(value).__name__ in ("MjData", "MjModel")


def capture_layers(layers: list[Any]) -> bytes:
    """
    Capture the state of wrappers and an environment.

    :param layers: the objects, from the outermost to the innermost
    :return: the state
    :raises StateUnavailableError: it cannot be captured
    """
    states = [_layer_state(layer) for layer in layers]
    file = io.BytesIO()
    try:
        _LayerPickler(file, layers).dump(states)
    except StateUnavailableError:
        raise
    except Exception as error:
        raise StateUnavailableError(f"{_unpicklable_attribute(states, layers)} cannot be pickled ({error})") from error
    return file.getvalue()


def _layer_state(layer: Any) -> dict[str, Any]:
    if _has_state_methods(layer):
        try:
            return {"class": _class_name(layer), "state": layer.get_state()}
        except Exception as error:
            raise StateUnavailableError(f"get_state() of {_class_name(layer)} raised {error!r}") from error
    values, physics = {}, {}
    for name, value in vars(layer).items():
        if _is_mujoco(value):
            physics[name] = _arrays(value) if type(value).__name__ == "MjData" else {}
        elif name not in CONSTANTS and not isinstance(value, CODE):
            values[name] = value
    return {"class": _class_name(layer), "values": values, "physics": physics}


def _class_name(layer: Any) -> str:
    """Return the name of a layer's class; RL Zoo replaces ``TimeLimit`` by a subclass of its own."""
    return "TimeLimit" if isinstance(layer, gym.wrappers.TimeLimit) else type(layer).__name__


def _unpicklable_attribute(states: list[dict[str, Any]], layers: list[Any]) -> str:
    for state in states:
        for name, value in state.get("values", {}).items():
            try:
                _LayerPickler(io.BytesIO(), layers).dump(value)
            except Exception:  # noqa: BLE001 - a class decides itself how it fails to be pickled
                return f"attribute {name!r} of {state['class']}"
    return "its state"


def read_layers(contents: bytes, layers: list[Any], trust: bool) -> Any:
    """
    Unpickle a state. Earlier versions pickled the states of workers twice.

    :param contents: as :func:`capture_layers` returns it
    :param layers: the objects that it may refer to
    :param trust: as for :func:`restore`
    :return: class and attributes of each layer
    :raises RefusedError: as for :func:`restore`
    """
    value: Any = contents
    while isinstance(value, bytes):
        unpickler = (_TrustingUnpickler if trust else _LayerUnpickler)(value)
        unpickler.layers = layers
        value = unpickler.load()
    return value


def restore_layers(layers: list[Any], contents: bytes, trust: bool) -> None:
    """
    Restore the state of wrappers and an environment.

    :param layers: as for :func:`capture_layers`
    :param contents: as :func:`capture_layers` returns it
    :param trust: as for :func:`restore`
    :raises RefusedError: as for :func:`restore`
    :raises MismatchError: the objects are of other classes
    """
    states = read_layers(contents, layers, trust)
    saved, present = [state["class"] for state in states], [_class_name(layer) for layer in layers]
    alone_in_worker = saved == [IN_WORKER] and len(layers) == 1 and _has_state_methods(layers[0])
    if saved != present and not alone_in_worker:
        raise MismatchError(f"the environment is made of {present}, that of the checkpoint of {saved}")
    for layer, state in zip(layers, states, strict=True):
        if "state" in state:
            _call_set_state(layer, state["state"])
            continue
        if not trust:
            _check_names(layer, state["values"])
        vars(layer).update(state["values"])
        for name, arrays in state["physics"].items():
            _set_arrays(vars(layer)[name], arrays)


def _call_set_state(layer: Any, state: Any) -> None:
    try:
        layer.set_state(state)
    except Exception as error:
        raise MismatchError(f"set_state() of {_class_name(layer)} raised {error!r} for the state in the checkpoint") from error


def _check_names(layer: Any, values: dict[str, Any]) -> None:
    """Refuse to set what is a method or property of the class, private to Python, or wrapped."""
    for name in values:
        hidden = isinstance(getattr(type(layer), name, None), (*CODE, property)) and name not in vars(layer)
        if hidden or name in CONSTANTS or not name.isidentifier() or (name.startswith("__") and name.endswith("__")):
            raise RefusedError(f"the attribute {name[:100]!r} of {_class_name(layer)}")


def _arrays(data: Any) -> dict[str, Any]:
    """Return every array of MuJoCo's data: `mj_getState` leaves out quantities that the rewards of some tasks read."""
    fields = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    arrays: dict[str, Any] = {name: value.copy() for name, value in fields.items() if isinstance(value, np.ndarray)}
    return {**arrays, "time": data.time}


def _set_arrays(data: Any, arrays: dict[str, Any]) -> None:
    for name, value in arrays.items():
        if name == "time":
            data.time = value
        elif getattr(data, name).shape == value.shape:  # others are scratch space, sized by the number of contacts
            getattr(data, name)[...] = value


class _LayerPickler(pickle.Pickler):
    """Pickle attributes; a reference to a layer is written as the layer's number."""

    def __init__(self, file: io.BytesIO, layers: list[Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}

    def persistent_id(self, obj: Any) -> int | None:
        """See :class:`pickle.Pickler`."""
        number = self._numbers.get(id(obj))
        if number is None and isinstance(obj, (gym.Env, EzPickle)):
            raise StateUnavailableError(f"a further environment inside, {type(obj).__name__}, would lose its state")
        return number


class _LayerUnpickler(RestrictedUnpickler):
    layers: list[Any]

    def persistent_load(self, pid: Any) -> Any:
        """See :class:`pickle.Unpickler`."""
        return self.layers[pid]


class _TrustingUnpickler(pickle.Unpickler):
    layers: list[Any]

    def __init__(self, contents: bytes) -> None:
        super().__init__(io.BytesIO(contents))

    def persistent_load(self, pid: Any) -> Any:
        """See :class:`pickle.Unpickler`."""
        return self.layers[pid]
