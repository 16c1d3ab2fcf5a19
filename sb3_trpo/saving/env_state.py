"""The inner state of environments, to be put into others of the same make so that they go on as these would.

An environment and its wrappers are Python objects. Their state is taken to be their attributes, but for those that do not
change (:data:`CONSTANTS`, functions) and for MuJoCo's data, of which every array is copied. An environment with a state
elsewhere, as in a library of its own, or with one that cannot be pickled, can say itself what its state is, by a pair of
methods ``get_state()`` and ``set_state(state)``; such a pair speaks for everything inside as well.
"""

import functools
import io
import pickle
import types
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_trpo.errors import MismatchError
from sb3_trpo.saving.unpickling import RefusedError, RestrictedUnpickler

#: Attributes that hold no state: what is inside, what the environment was made from, what it is shown and logged with.
CONSTANTS = {
    *("env", "venv", "spec", "_cached_spec", "metadata", "_metadata", "class_attributes", "render_mode"),
    *("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "reset_infos", "_seeds", "_options"),
    *("mujoco_renderer", "screen", "clock", "surf", "results_writer", "t_start"),
}
CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, functools.partial, type)


class StateUnavailableError(Exception):
    """The state of an environment cannot be had; the message says why."""


def capture(env: Any) -> bytes:
    """
    Take the state of an environment.

    :param env: the environment, with all its wrappers
    :return: the state
    :raises StateUnavailableError: it cannot be had
    """
    return _capture(_layers(env))


def restore(env: Any, state: bytes, trust: bool = False) -> None:
    """
    Put a state into an environment.

    :param env: an environment of the same make, which has been reset
    :param state: as :func:`capture` gives it
    :param trust: unpickle objects of any class, which may run code
    :raises RefusedError: the state needs a class that is not known to be harmless, and ``trust`` is False
    :raises MismatchError: the environment is of another make
    """
    _restore(_layers(env), state, trust)


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Gives an environment ``get_state`` and ``set_state``, so that its state can be had from another process.

    For SB3's ``SubprocVecEnv``: ``make_vec_env(..., vec_env_cls=SubprocVecEnv, wrapper_class=ResumableEnv)``.

    :param env: the environment
    """

    def get_state(self) -> bytes:
        """
        Take the state of what is inside.

        :return: the state
        """
        return capture(self.env)

    def set_state(self, state: bytes, trust: bool = False) -> None:
        """
        Put a state into what is inside.

        :param state: as :meth:`get_state` gives it
        :param trust: as for :func:`restore`
        """
        restore(self.env, state, trust)


def capture_all(venv: VecEnv) -> list[bytes]:
    """
    Take the states of the environments in a vectorised one.

    :param venv: the vectorised environment
    :return: one state for each environment
    :raises StateUnavailableError: they cannot be had
    """
    innermost = venv.unwrapped
    if isinstance(innermost, DummyVecEnv):
        return [capture(env) for env in innermost.envs]
    if not _has_pair(innermost):
        raise StateUnavailableError(
            f"the environments in {type(innermost).__name__} are out of reach: wrap each in sb3_trpo.ResumableEnv"
        )
    states = innermost.env_method("get_state")
    return [pickle.dumps(state) for state in states]


def restore_all(venv: VecEnv, states: Sequence[bytes], trust: bool = False) -> None:
    """
    Put states into the environments in a vectorised one.

    :param venv: the vectorised environment, which has been reset
    :param states: as :func:`capture_all` gives them
    :param trust: as for :func:`restore`
    :raises RefusedError: as for :func:`restore`
    :raises MismatchError: the environments are of another make
    """
    innermost = venv.unwrapped
    if isinstance(innermost, DummyVecEnv):
        for env, state in zip(innermost.envs, states, strict=True):
            restore(env, state, trust)
        return
    resumable = all(innermost.env_is_wrapped(ResumableEnv))
    for index, state in enumerate(states):
        value = pickle.loads(state) if trust else RestrictedUnpickler(state).load()
        arguments = (value, trust) if resumable else (value,)
        innermost.env_method("set_state", *arguments, indices=index)


def capture_wrappers(venv: VecEnv) -> dict[str, bytes]:
    """
    Take the states of the wrappers around a vectorised environment, ``VecNormalize`` among them.

    :param venv: the vectorised environment
    :return: state of each wrapper, by its class and its depth
    :raises StateUnavailableError: one of them cannot be had
    """
    return {name: _capture([layer]) for name, layer in _wrappers(venv).items()}


def restore_wrappers(venv: VecEnv, states: dict[str, bytes], trust: bool = False) -> None:
    """
    Put states into the wrappers around a vectorised environment.

    :param venv: the vectorised environment
    :param states: as :func:`capture_wrappers` gives them
    :param trust: as for :func:`restore`
    :raises RefusedError: as for :func:`restore`
    :raises MismatchError: the wrappers are others
    """
    wrappers = _wrappers(venv)
    if wrappers.keys() != states.keys():
        raise MismatchError(f"the wrappers of the environment are {list(wrappers)}, those of the checkpoint {list(states)}")
    for name, layer in wrappers.items():
        _restore([layer], states[name], trust)


def _wrappers(venv: VecEnv) -> dict[str, VecEnvWrapper]:
    wrappers: dict[str, VecEnvWrapper] = {}
    while isinstance(venv, VecEnvWrapper):
        wrappers[f"{len(wrappers)}:{type(venv).__name__}"] = venv
        venv = venv.venv
    return wrappers


def _has_pair(venv: VecEnv) -> bool:
    try:
        return venv.has_attr("get_state") and venv.has_attr("set_state")
    except (AttributeError, NotImplementedError):
        return False


def _layers(env: Any) -> list[Any]:
    """Find the wrappers and the environment, from the outermost to the one that speaks for what is inside it."""
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper) and not _has_state_methods(layers[-1]):
        layers.append(layers[-1].env)
    return layers


def _has_state_methods(layer: Any) -> bool:
    return hasattr(type(layer), "get_state") and hasattr(type(layer), "set_state")


def _is_physics(value: Any) -> bool:
    return type(value).__module__.startswith("mujoco") and type(value).__name__ in ("MjData", "MjModel")


def _capture(layers: list[Any]) -> bytes:
    states = []
    for layer in layers:
        if _has_state_methods(layer):
            states.append({"class": _class_name(layer), "state": layer.get_state()})
            continue
        values, physics = {}, {}
        for name, value in vars(layer).items():
            if _is_physics(value):
                physics[name] = _arrays(value) if type(value).__name__ == "MjData" else {}
            elif name not in CONSTANTS and not isinstance(value, CODE):
                values[name] = value
        states.append({"class": _class_name(layer), "values": values, "physics": physics})
    file = io.BytesIO()
    try:
        _LayerPickler(file, layers).dump(states)
    except StateUnavailableError:
        raise
    except Exception as error:
        raise StateUnavailableError(f"{_unpicklable_attribute(states, layers)} cannot be pickled ({error})") from error
    return file.getvalue()


def _class_name(layer: Any) -> str:
    """Name of a layer's class; RL Zoo puts a subclass of its own in the place of ``TimeLimit``."""
    return "TimeLimit" if isinstance(layer, gym.wrappers.TimeLimit) else type(layer).__name__


def _unpicklable_attribute(states: list[dict[str, Any]], layers: list[Any]) -> str:
    for state in states:
        for name, value in state.get("values", {}).items():
            try:
                _LayerPickler(io.BytesIO(), layers).dump(value)
            except Exception:  # noqa: BLE001 - a class decides itself how it fails to be pickled
                return f"attribute {name!r} of {state['class']}"
    return "its state"


def _restore(layers: list[Any], contents: bytes, trust: bool) -> None:
    unpickler = (_TrustingUnpickler if trust else _LayerUnpickler)(contents)
    unpickler.layers = layers
    states = unpickler.load()
    saved, present = [state["class"] for state in states], [_class_name(layer) for layer in layers]
    if saved != present:
        raise MismatchError(f"the environment is made of {present}, that of the checkpoint of {saved}")
    for layer, state in zip(layers, states, strict=True):
        if "state" in state:
            layer.set_state(state["state"])
            continue
        if not trust:
            _check_names(layer, state["values"])
        vars(layer).update(state["values"])
        for name, arrays in state["physics"].items():
            _set_arrays(vars(layer)[name], arrays)


def _check_names(layer: Any, values: dict[str, Any]) -> None:
    """Refuse to set what is a method or property of the class, or private to Python."""
    for name in values:
        hidden = isinstance(getattr(type(layer), name, None), (*CODE, property)) and name not in vars(layer)
        if hidden or not name.isidentifier() or (name.startswith("__") and name.endswith("__")):
            raise RefusedError(f"the attribute {name[:100]!r} of {_class_name(layer)}")


def _arrays(data: Any) -> dict[str, Any]:
    """Every array of MuJoCo's data: `mj_getState` leaves out the quantities that some tasks' rewards still look at."""
    fields = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    arrays: dict[str, Any] = {name: value.copy() for name, value in fields.items() if isinstance(value, np.ndarray)}
    return {**arrays, "time": data.time}


def _set_arrays(data: Any, arrays: dict[str, Any]) -> None:
    for name, value in arrays.items():
        if name == "time":
            data.time = value
        elif getattr(data, name).shape == value.shape:  # others are scratch space, as large as there are contacts
            getattr(data, name)[...] = value


class _LayerPickler(pickle.Pickler):
    """Pickles attributes; where one refers to a layer, that layer's number is written in its place."""

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
