"""The states of all environments in a vectorized one, in this process or in workers, and of the wrappers around it."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_trpo.errors import MismatchError, WorkerError
from sb3_trpo.saving.env_state import (
    IN_WORKER,
    Failure,
    ResumableEnv,
    StateUnavailableError,
    capture,
    capture_layers,
    read_layers,
    restore,
    restore_layers,
)


def capture_all(venv: VecEnv) -> list[bytes]:
    """
    Capture the states of the environments in a vectorized one.

    :param venv: the vectorized environment
    :return: one state for each environment
    :raises StateUnavailableError: they cannot be captured
    :raises WorkerError: a ``get_state`` method has ended a worker
    """
    innermost = venv.unwrapped
    if isinstance(innermost, DummyVecEnv):
        return [capture(env) for env in innermost.envs]
    if _is_resumable(innermost):
        outcomes = innermost.env_method("try_get_state")
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure):
                raise StateUnavailableError(f"environment {index}: {outcome.message}")
        return outcomes
    if not _has_attributes(innermost, "get_state", "set_state"):
        raise StateUnavailableError(
            f"the environments in {type(innermost).__name__} are out of reach: wrap each in sb3_trpo.ResumableEnv"
        )
    states = _call_workers(innermost, "get_state")
    try:
        return [pickle.dumps([{"class": IN_WORKER, "state": state}]) for state in states]
    except Exception as error:
        raise StateUnavailableError(f"what get_state() returned cannot be pickled ({error})") from error


def restore_all(venv: VecEnv, states: Sequence[bytes], trust: bool = False) -> None:
    """
    Restore the states of the environments in a vectorized one.

    :param venv: the vectorized environment, which has been reset
    :param states: as :func:`capture_all` returns them
    :param trust: as for :func:`restore`
    :raises RefusedError: as for :func:`restore`
    :raises MismatchError: the environments were made in another way
    :raises WorkerError: a ``set_state`` method has ended a worker
    """
    innermost = venv.unwrapped
    if isinstance(innermost, DummyVecEnv):
        for env, state in zip(innermost.envs, states, strict=True):
            restore(env, state, trust)
        return
    if _is_resumable(innermost):
        for index, state in enumerate(states):
            (failure,) = innermost.env_method("try_set_state", state, trust, indices=index)
            if isinstance(failure, Failure):
                raise failure.exception()
        return
    if not _has_attributes(innermost, "get_state", "set_state"):
        raise MismatchError(
            f"the environments in {type(innermost).__name__} are out of reach, and the checkpoint holds their state: "
            "wrap each in sb3_trpo.ResumableEnv"
        )
    values = [_own_state(state, trust) for state in states]  # all of them are read before the first is restored
    for index, value in enumerate(values):
        _call_workers(innermost, "set_state", value, indices=index)


def _is_resumable(venv: VecEnv) -> bool:
    return all(_ask(venv, [False], venv.env_is_wrapped, ResumableEnv)) and _has_attributes(venv, "try_get_state")


def _has_attributes(venv: VecEnv, *names: str) -> bool:
    return all(_ask(venv, False, venv.has_attr, name) for name in names)


def _ask(venv: VecEnv, default: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Call a method of a vectorized environment, which may be the user's own and lack it; what it lacks is ``default``."""
    try:
        return function(*args)
    except WorkerError:
        raise
    except (EOFError, ConnectionError) as error:
        raise WorkerError(range(venv.num_envs), "ended when asked for its state") from error
    except Exception:  # noqa: BLE001 - it may raise anything
        return default


def _call_workers(venv: VecEnv, method: str, *args: Any, indices: int | None = None) -> list[Any]:
    try:
        return venv.env_method(method, *args, indices=indices)
    except WorkerError:
        raise
    except (EOFError, ConnectionError) as error:
        broken = range(venv.num_envs) if indices is None else [indices]
        raise WorkerError(broken, f"ended in {method}(); wrapped in sb3_trpo.ResumableEnv, it says why") from error
    except Exception as error:
        kind = StateUnavailableError if method == "get_state" else MismatchError
        raise kind(f"{method}() of the environments in {type(venv).__name__} raised {error!r}") from error


def _own_state(contents: bytes, trust: bool) -> Any:
    """Find what an environment's own ``get_state`` returned."""
    layers = read_layers(contents, [], trust)
    if not (isinstance(layers, list) and all(isinstance(layer, dict) and "class" in layer for layer in layers)):
        return layers  # as earlier versions wrote it
    if len(layers) != 1 or "state" not in layers[0]:
        saved = [layer["class"] for layer in layers]
        raise MismatchError(
            f"the environments of the checkpoint are made of {saved}, and those in workers have get_state and set_state of "
            "their own: wrap each in sb3_trpo.ResumableEnv"
        )
    return layers[0]["state"]


def capture_wrappers(venv: VecEnv) -> dict[str, bytes | None]:
    """
    Capture the states of the wrappers around a vectorized environment, ``VecNormalize`` among them.

    :param venv: the vectorized environment
    :return: state of each wrapper, by its depth and class; None where it cannot be captured
    """
    states: dict[str, bytes | None] = {}
    for name, layer in _wrappers(venv).items():
        try:
            states[name] = capture_layers([layer])
        except StateUnavailableError:
            states[name] = None
    return states


def restore_wrappers(venv: VecEnv, states: dict[str, bytes | None], trust: bool = False) -> None:
    """
    Restore the states of the wrappers around a vectorized environment.

    :param venv: the vectorized environment
    :param states: as :func:`capture_wrappers` returns them
    :param trust: as for :func:`restore`
    :raises RefusedError: as for :func:`restore`
    :raises MismatchError: the wrappers are others
    """
    wrappers = _wrappers(venv)
    if wrappers.keys() != states.keys():
        raise MismatchError(f"the wrappers of the environment are {list(wrappers)}, those of the checkpoint {list(states)}")
    for name, layer in wrappers.items():
        state = states[name]
        if state is not None:
            restore_layers([layer], state, trust)


def _wrappers(venv: VecEnv) -> dict[str, VecEnvWrapper]:
    wrappers: dict[str, VecEnvWrapper] = {}
    while isinstance(venv, VecEnvWrapper):
        wrappers[f"{len(wrappers)}:{type(venv).__name__}"] = venv
        venv = venv.venv
    return wrappers
