"""Load a model from a file."""

from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv

from sb3_trpo.errors import CorruptCheckpointError, Source, UntrustedFileError, short
from sb3_trpo.saving.archive import Archive, print_versions, read_bytes
from sb3_trpo.saving.model_building import build_model
from sb3_trpo.saving.model_file import (
    check_algorithm,
    check_keywords,
    check_parameters,
    check_spaces,
    check_values,
    read_model_file,
)
from sb3_trpo.saving.random_state import unchanged_random_state
from sb3_trpo.saving.vec_normalize import read_statistics, warn_of_mismatch

if TYPE_CHECKING:
    from sb3_trpo.base import ResumableAlgorithm

AnyModel = TypeVar("AnyModel", bound="ResumableAlgorithm")


def load_model(
    cls: type[AnyModel],
    path: Source,
    env: GymEnv | str | None,
    device: th.device | str,
    replaced: dict[str, Any],
    kwargs: dict[str, Any],
    *,
    print_system_info: bool,
    force_reset: bool,
    trust: bool,
    allow_non_finite: bool,
) -> AnyModel:
    """
    Load a model; see :meth:`ResumableAlgorithm.load`.

    :param cls: its class
    :param path: the file
    :param env: environment, or its registered name
    :param device: device of the networks
    :param replaced: ``custom_objects``
    :param kwargs: attributes to change, by name
    :param print_system_info: print the versions that saved the file, and the present ones
    :param force_reset: reset the environment
    :param trust: read entries of any class
    :param allow_non_finite: load parameters that are not finite
    :return: the model
    """
    archive = Archive(read_bytes(path), path)
    file = read_model_file(archive, path, cls.__name__, replaced, kwargs, trust)
    check_algorithm(file, cls.algorithm())
    check_keywords(cls, kwargs, file.names)
    check_values(file, cls.argument_rules)
    if not allow_non_finite:
        check_parameters(file)
    if print_system_info:
        print_versions(archive)
    if env is not None:
        env = cls._wrap_env(maybe_make_env(env, 0))
        check_spaces(env, file.values)
    with unchanged_random_state():
        try:
            model = build_model(cls, file, env, device, force_reset, kwargs)
        except (CorruptCheckpointError, UntrustedFileError):
            raise
        except Exception as error:
            if trust or kwargs or replaced:
                raise
            what = f"it does not make a model ({type(error).__name__}: {short(error)})"
            raise CorruptCheckpointError(path, "data", what) from error
    model._loaded(file.names, keep=file.given)
    if file.about:
        statistics = read_statistics(archive, path)
        warn_of_mismatch(statistics and statistics[1], env, model.get_vec_normalize_env())
    return model
