"""The statistics of ``VecNormalize``: saved beside the model, compared at load, read without running code."""

import io
import json
import pickle
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_trpo.errors import CorruptCheckpointError, Source, UntrustedFileError, short, warn_user
from sb3_trpo.saving.archive import METADATA, Archive, read_bytes
from sb3_trpo.saving.atomic import atomic_write
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads

STATISTICS = "vec_normalize.npz"
SETTINGS = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")
FLAGS = ("training", "norm_obs", "norm_reward")
#: Settings and arrays, by name.
Statistics = tuple[dict[str, Any], dict[str, np.ndarray]]
MOMENTS = ("mean", "var", "count")


def running_moments(normalizer: VecNormalize) -> dict[str, RunningMeanStd]:
    """
    Every pair of running mean and variance.

    :param normalizer: the wrapper
    :return: the pairs, by a name for each
    """
    moments = {"reward": normalizer.ret_rms}
    if normalizer.norm_obs:
        observation = normalizer.obs_rms
        keyed = observation.items() if isinstance(observation, dict) else [("", observation)]
        moments.update({f"observation:{key}": rms for key, rms in keyed})
    return moments


def _statistics(normalizer: VecNormalize) -> dict[str, np.ndarray]:
    return {
        f"{name}/{moment}": np.asarray(getattr(rms, moment))
        for name, rms in running_moments(normalizer).items()
        for moment in MOMENTS
    }


def pack_statistics(normalizer: VecNormalize) -> bytes:
    """
    Settings and statistics as a NumPy ``.npz`` file, which holds no pickle.

    :param normalizer: the wrapper
    :return: the file's bytes
    """
    arrays = _statistics(normalizer)
    settings = json.dumps({name: getattr(normalizer, name) for name in SETTINGS})
    file = io.BytesIO()
    np.savez(file, settings=np.array(settings), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def read_statistics(archive: Archive, path: Source) -> Statistics | None:
    """
    Settings and statistics in a model's file.

    :param archive: the file
    :param path: what to call it
    :return: settings and arrays, by name; None if the model was trained without ``VecNormalize``
    :raises CorruptCheckpointError: they are damaged
    """
    if not archive.read_json(METADATA).get("vec_normalize"):
        return None
    arrays = archive.read_arrays(STATISTICS)
    try:
        settings = json.loads(str(arrays.pop("settings")))
        _check_statistics(settings, arrays)
    except Exception as error:
        raise CorruptCheckpointError(path, STATISTICS, error) from error
    return settings, arrays


def _check_statistics(settings: Any, arrays: dict[str, np.ndarray]) -> None:
    if not isinstance(settings, dict) or settings.keys() != set(SETTINGS):
        raise ValueError("the settings are not those of VecNormalize")
    for name, value in settings.items():
        kind = (list, type(None)) if name == "norm_obs_keys" else bool if name in FLAGS else (int, float)
        if not isinstance(value, kind) or (kind == (int, float) and isinstance(value, bool)):
            raise ValueError(f"the setting {name} is not allowed")
    for name, value in arrays.items():
        if value.dtype.kind != "f":
            raise ValueError(f"the statistics {short(name)} are no numbers")


def set_statistics(normalizer: VecNormalize, arrays: dict[str, np.ndarray]) -> None:
    """
    Put statistics into a wrapper.

    :param normalizer: the wrapper
    :param arrays: the statistics, by name
    :raises ValueError: they are of another shape
    """
    for name, rms in running_moments(normalizer).items():
        for moment in MOMENTS:
            value = arrays[f"{name}/{moment}"]
            if value.shape != np.shape(getattr(rms, moment)):
                raise ValueError(f"the statistics of {name} have shape {value.shape}, not {np.shape(getattr(rms, moment))}")
            setattr(rms, moment, value if value.shape else value[()])


def warn_of_mismatch(saved: dict[str, np.ndarray] | None, env: VecEnv | None, normalizer: VecNormalize | None) -> None:
    """
    Warn of an environment that is not normalized as the one in which the model was trained.

    :param saved: the statistics in the model's file; None if it was trained without
    :param env: the new environment; None if there is none
    :param normalizer: its wrapper; None if it has none
    """
    if saved is None and normalizer is None:
        return
    if saved is None:
        difference = "the model was trained without VecNormalize, and the environment has it"
    elif env is None:
        difference = "the model was trained with VecNormalize, and is loaded without: predict takes normalized observations"
    elif normalizer is None:
        difference = "the model was trained with VecNormalize, and the environment does not have it"
    else:
        present = _statistics(normalizer)
        if saved.keys() == present.keys() and all(np.array_equal(saved[name], present[name]) for name in saved):
            return
        difference = "the statistics of the environment's VecNormalize are not those that were saved with the model"
    warn_user(
        f"{difference}: it will act differently. sb3_trpo.load_vec_normalize(path, env) wraps an environment "
        "with the statistics in a model's file"
    )


def save_vec_normalize(normalizer: VecNormalize, path: str) -> None:
    """
    Save statistics in SB3's format, for ``VecNormalize.load`` as well; an older file is there until the new one is whole.

    :param normalizer: the wrapper
    :param path: the file
    """
    contents = pickle.dumps(normalizer)
    with atomic_write(path) as file:
        file.write(contents)


def load_vec_normalize(path: Source, venv: VecEnv, trust: bool = False) -> VecNormalize:
    """
    Wrap an environment in the ``VecNormalize`` that a model was trained with.

    :param path: a model saved by this package, or a file of ``VecNormalize.save``
    :param venv: the environment
    :param trust: unpickle whatever a file of ``VecNormalize.save`` holds, which may run code
    :return: the wrapper
    :raises CorruptCheckpointError: the file is damaged, or has no statistics
    :raises UntrustedFileError: the file asks for something that may run code
    """
    contents = read_bytes(path)
    if contents.startswith(b"PK"):
        return _from_model(Archive(contents, path), path, venv)
    try:
        normalizer = pickle.loads(contents) if trust else restricted_loads(contents)
        if not isinstance(normalizer, VecNormalize):
            raise TypeError(f"it holds a {type(normalizer).__name__}")
        normalizer.set_venv(venv)
    except RefusedError as error:
        raise UntrustedFileError(path, "VecNormalize", error.what, "trust=True loads it as SB3 does.") from None
    except Exception as error:
        raise CorruptCheckpointError(
            path, None, f"it is no saved VecNormalize ({type(error).__name__}: {short(error)})"
        ) from error
    return normalizer


def _from_model(archive: Archive, path: Source, venv: VecEnv) -> VecNormalize:
    statistics = read_statistics(archive, path)
    if statistics is None:
        raise CorruptCheckpointError(path, STATISTICS, "the model was trained without VecNormalize")
    try:
        normalizer = VecNormalize(venv, **statistics[0])
        set_statistics(normalizer, statistics[1])
    except Exception as error:
        raise CorruptCheckpointError(path, STATISTICS, error) from error
    return normalizer
