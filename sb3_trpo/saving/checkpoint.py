"""Save models and checkpoints, and resume from a checkpoint exactly."""

import io
import json
import pathlib
import pickle
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.save_util import data_to_json
from stable_baselines3.common.type_aliases import GymEnv

from sb3_trpo.errors import (
    CorruptCheckpointError,
    MismatchError,
    NamedBytes,
    Source,
    UntrustedFileError,
    UsageError,
    WorkerError,
    name_of,
    warn_user,
)
from sb3_trpo.saving.archive import METADATA, Archive, read_bytes
from sb3_trpo.saving.atomic import atomic_write
from sb3_trpo.saving.env_state import StateUnavailableError
from sb3_trpo.saving.layout import strides_of, with_strides
from sb3_trpo.saving.random_state import set_random_state
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads
from sb3_trpo.saving.vec_env_state import capture_all, capture_wrappers, restore_all, restore_wrappers
from sb3_trpo.saving.vec_normalize import STATISTICS, Statistics, pack_statistics, read_statistics, set_statistics

if TYPE_CHECKING:
    from sb3_trpo.base import ResumableAlgorithm

RESUME = "sb3_trpo_resume.pkl"
#: Attributes that each process has of its own: the present step of its environments.
PER_RANK_ATTRIBUTES = ("_last_obs", "_last_original_obs", "_last_episode_starts")
AnyModel = TypeVar("AnyModel", bound="ResumableAlgorithm")
#: SB3's ``save`` of a model: file object, attributes to leave out, attributes to save nevertheless.
SB3Save = Callable[[io.BytesIO, set[str], set[str]], None]

# ---- saving


def save_model(
    model: "ResumableAlgorithm",
    save: SB3Save,
    path: Source,
    exclude: Iterable[str] | None = None,
    include: Iterable[str] | None = None,
    members: dict[str, bytes] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """
    Write a model's file; processes other than the first write to file objects alone.

    :param model: the model
    :param save: SB3's ``save`` of the model
    :param path: file or file object
    :param exclude: further attributes to leave out
    :param include: attributes to save although they usually are not
    :param members: further members of the file
    :param about: further metadata
    :raises PicklingError: an attribute cannot be saved; names it
    :raises OSError: the file cannot be written
    """
    if model._place.rank > 0 and not hasattr(path, "write"):
        return
    contents = _sb3_contents(model, save, set(exclude or ()), set(include or ()))
    normalizer = model.get_vec_normalize_env()
    metadata = {"algorithm": model.algorithm(), "vec_normalize": normalizer is not None, **(about or {})}
    with zipfile.ZipFile(contents, "a") as archive:
        archive.writestr(METADATA, json.dumps(metadata))
        if normalizer is not None:
            archive.writestr(STATISTICS, pack_statistics(normalizer))
        for name, member in (members or {}).items():
            archive.writestr(name, member)
    if not isinstance(path, (str, pathlib.Path)):
        path.write(contents.getvalue())
        return
    with atomic_write(_destination(pathlib.Path(path))) as file:
        file.write(contents.getvalue())


def _sb3_contents(model: "ResumableAlgorithm", save: SB3Save, exclude: set[str], include: set[str]) -> io.BytesIO:
    contents = io.BytesIO()
    try:
        save(contents, exclude, include)
    except Exception as error:
        for name, value in vars(model).items():
            if name not in (exclude | set(model._excluded_save_params())) - include:
                _check_picklable(name, value)
        raise error
    return contents


def _check_picklable(name: str, value: Any) -> None:
    try:
        data_to_json({name: value})
    except Exception as error:
        raise pickle.PicklingError(f"attribute {name!r} cannot be saved: {error}; exclude=[{name!r}] leaves it out") from error


def _destination(path: pathlib.Path) -> pathlib.Path:
    """Return the file that SB3 writes for ``path``."""
    if path.suffix == "":
        path = path.with_name(f"{path.name}.zip")
    if path.is_dir():
        warn_user(f"{path} is a folder: saved as {path}_2 instead")
        path = path.with_name(f"{path.name}_2")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_checkpoint(model: "ResumableAlgorithm", save: SB3Save, path: str | pathlib.Path) -> None:
    """
    Write a model's file with the state of its training, which all processes contribute to.

    :param model: the model
    :param save: SB3's ``save`` of the model
    :param path: the file
    :raises PicklingError: an attribute cannot be saved; names it
    :raises OSError: the file cannot be written
    """
    states = model._ranks.gather_objects(model.get_extra_state())
    about = {"run": model.run_id, "written": time.time_ns()}
    save_model(model, save, path, members={RESUME: pickle.dumps(states)}, about=about)


def capture_state(model: "ResumableAlgorithm") -> dict[str, Any]:
    """
    Return what a checkpoint holds in addition to a saved model.

    :param model: the model
    :return: plain data and NumPy arrays, by name
    """
    log = model._pending_log if model._resumed else None
    if log is None and hasattr(model, "_logger"):
        log = [dict(values) for values in logger_state(model)]
    random, callbacks_random = model._callback_stream.states()
    place = {name: getattr(model, name) for name in PER_RANK_ATTRIBUTES}
    return {
        "random": random,
        "callbacks_random": callbacks_random,
        "action_space": model.action_space,  # with its generator, which loading a model seeds anew
        "place": place,
        "strides": {name: strides_of(value) for name, value in place.items()},
        "iteration": model._iteration,
        "run": model.run_id,
        "log": log,
        **_environment_state(model),
    }


def _environment_state(model: "ResumableAlgorithm") -> dict[str, Any]:
    if model.env is None:
        return {"wrappers": {}, "envs": None, "reason": "the model has no environment"}
    wrappers = capture_wrappers(model.env)
    lost = [name for name, state in wrappers.items() if state is None]
    if lost:
        return {"wrappers": wrappers, "envs": None, "reason": f"the wrapper {lost[0]} cannot be pickled"}
    try:
        return {"wrappers": wrappers, "envs": capture_all(model.env)}
    except StateUnavailableError as error:
        return {"wrappers": wrappers, "envs": None, "reason": str(error)}


def logger_state(model: "ResumableAlgorithm") -> list[dict[str, Any]]:
    """
    Return what the next write of the log will hold.

    :param model: the model
    :return: values, how many are averaged, and which outputs exclude them
    """
    return [model.logger.name_to_value, model.logger.name_to_count, model.logger.name_to_excluded]


def read_run(path: pathlib.Path) -> tuple[str, int]:
    """
    Find out which run a checkpoint is of, and when it was written.

    :param path: the file
    :return: :attr:`ResumableAlgorithm.run_id`, empty if it is not known, and nanoseconds since 1970
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(METADATA) as member:
            about = json.loads(member.read(2**16))
        return str(about["run"]), int(about["written"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # damaged, or of an earlier version
        return "", path.stat().st_mtime_ns


# ---- resuming


def resume_model(
    cls: type[AnyModel],
    path: Source,
    env: GymEnv | str,
    device: th.device | str,
    custom_objects: dict[str, Any] | None,
    trust: bool,
) -> AnyModel:
    """
    Load a model with the state of its training; see :meth:`ResumableAlgorithm.resume`.

    :param cls: its class
    :param path: the file
    :param env: environment made as the first one was, or its registered name
    :param device: device of the networks
    :param custom_objects: attribute name ↦ object to use instead of the saved one
    :param trust: read entries of any class
    :return: the model
    """
    archive = Archive(read_bytes(path), path)
    states = _read_states(archive, path, cls.__name__)
    venv = cls._wrap_env(maybe_make_env(env, 0))
    with warnings.catch_warnings():
        # The statistics are about to be restored.
        warnings.filterwarnings("ignore", message=".*VecNormalize")
        contents = NamedBytes(archive.contents, path)
        model = cls.load(contents, venv, device, custom_objects, force_reset=False, trust=trust)
    venv.reset()
    try:
        _restore_rank(model, states, read_statistics(archive, path), trust)
    except (MismatchError, WorkerError):
        raise
    except RefusedError as error:
        remedy = "trust=True resumes from a file of your own."
        raise UntrustedFileError(path, f"{RESUME} (environments)", error.what, remedy) from error
    except Exception as error:
        raise CorruptCheckpointError(path, RESUME, f"its state does not fit ({error!r})") from error
    return model


def _read_states(archive: Archive, path: Source, algorithm: str) -> list[dict[str, Any]]:
    if RESUME not in archive.names and "data" in archive.names:
        raise UsageError(
            f"{name_of(path)} is a model without the state of its training, as save() writes it. To continue it from new "
            f"episodes, call {algorithm}.load({name_of(path)!r}, env=env).learn(steps, reset_num_timesteps=False). "
            "Only files of save_checkpoint() and CheckpointCallback can be resumed"
        )
    try:
        states: list[dict[str, Any]] = restricted_loads(archive.read(RESUME))
    except RefusedError as error:
        raise UntrustedFileError(path, RESUME, error.what) from error
    except CorruptCheckpointError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(path, RESUME, error) from error
    return states


def _restore_rank(
    model: "ResumableAlgorithm", states: list[dict[str, Any]], statistics: Statistics | None, trust: bool
) -> None:
    """Restore the state of this process, one of those that train together."""
    normalizer, place = model.get_vec_normalize_env(), model._place
    if (normalizer is None) != (statistics is None):
        raise MismatchError("the wrappers differ: either env or the checkpoint has VecNormalize, and the other does not")
    if normalizer is not None and statistics is not None:
        set_statistics(normalizer, statistics[1])
    if len(states) == place.size:
        model.set_extra_state(states[place.rank], trust)
        return
    _restore_counters(model, states[0])
    model._last_obs = None
    warn_user(
        f"the checkpoint of {len(states)} processes is resumed in {place.size}: parameters and statistics are restored, "
        "environments start new episodes, and random generators new sequences"
    )
    if model.seed is not None:
        model.set_random_seed(model.seed + model.num_timesteps)


def _restore_counters(model: "ResumableAlgorithm", state: dict[str, Any]) -> None:
    model._resumed, model._iteration, model._pending_log = True, state["iteration"], state["log"]
    model._run_id = state.get("run", "")


def restore_state(model: "ResumableAlgorithm", state: dict[str, Any], trust: bool) -> None:
    """
    Restore what :func:`capture_state` returned.

    :param model: the model
    :param state: the state
    :param trust: read entries of any class
    :raises MismatchError: the environment differs from the one of the checkpoint
    """
    assert model.env is not None
    _restore_counters(model, state)
    if state["action_space"] != model.action_space:
        raise MismatchError("the checkpoint has another action space than its own model")
    model.action_space = state["action_space"]
    for name in PER_RANK_ATTRIBUTES:
        setattr(model, name, with_strides(state["place"][name], state.get("strides", {}).get(name)))
    if model._last_obs is None or len(model._last_episode_starts) != model.env.num_envs:  # type: ignore[arg-type]
        saved = "none" if model._last_obs is None else len(model._last_episode_starts)  # type: ignore[arg-type]
        raise MismatchError(f"env has {model.env.num_envs} environments, the checkpoint {saved}")
    if "wrappers" in state:
        restore_wrappers(model.env, state["wrappers"], trust)
    if state["envs"] is None:
        model._last_obs = None
        warn_user(f"the environments start new episodes, because their state could not be captured: {state['reason']}")
    else:
        restore_all(model.env, state["envs"], trust)
    model._callback_stream.reset(state.get("callbacks_random"))
    set_random_state(state["random"])
