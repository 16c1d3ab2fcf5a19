"""Hyperparameter files in RL Zoo's format: reading, checking, and the line numbers for error messages."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_trpo.arguments import check_arguments
from sb3_trpo.errors import UsageError, did_you_mean

#: Keys that RL Zoo reads itself, for any on-policy algorithm.
ZOO_KEYS = frozenset(
    {
        "callback",
        "env_kwargs",
        "env_wrapper",
        "frame_stack",
        "monitor_kwargs",
        "n_envs",
        "n_timesteps",
        "normalize",
        "vec_env_wrapper",
    }
)
#: Constructor arguments that RL Zoo passes itself.
GIVEN_BY_ZOO = frozenset({"env", "tensorboard_log", "seed", "verbose", "device", "_init_setup_model"})
#: Arguments for which ``lin_0.1`` is a schedule that decreases from 0.1 to 0.
SCHEDULES = ("learning_rate", "target_kl")


def folder() -> Path:
    """
    Return the folder of the hyperparameter files: inside the installed package, or beside it in a checkout.

    :return: the folder ``zoo_hyperparams``
    """
    here = Path(__file__).resolve().parents[1]
    return next(path for path in (here / "zoo_hyperparams", here.parent / "zoo_hyperparams") if path.is_dir())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """
    Read a file of hyperparameters.

    :param path: the YAML file
    :return: hyperparameters of each environment, by its id
    :raises UsageError: no such file, broken YAML, or not one mapping for each environment
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"{path}: must map environment ids to hyperparameters")
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise UsageError(f"{path}: {name} must be a mapping of hyperparameters, and is {entry!r}")
    return entries


def lines(path: Path, entry: str) -> dict[str, int]:
    """
    Return the line of each key of an entry, including keys from a merged anchor (``<<: *defaults``).

    :param path: the YAML file
    :param entry: environment id
    :return: line of each key, counted from 1
    """
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    root = loader.get_single_node()
    for key, value in root.value:
        if key.value == entry:
            loader.flatten_mapping(value)  # merged keys come first, and the entry's own replace them below
            return {node.value: node.start_mark.line + 1 for node, _ in value.value}
    return {}


def check(algorithm: type[BaseAlgorithm], hyperparameters: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """
    Check names and values before anything is built.

    :param algorithm: the class whose constructor receives them
    :param hyperparameters: an entry of a file, with the overrides of the command line
    :param places: where each was given, for the message
    :raises UsageError: a name that neither RL Zoo nor the constructor knows, or a value that is not allowed
    """
    # A constructor with **kwargs passes them on to its base class.
    signatures = [inspect.signature(base).parameters for base in algorithm.__mro__ if issubclass(base, BaseAlgorithm)]
    handed_on = [any(p.kind is p.VAR_KEYWORD for p in signature.values()) for signature in signatures]
    depth = handed_on.index(False) + 1
    known = ZOO_KEYS | set().union(*signatures[:depth]) - GIVEN_BY_ZOO
    rules = getattr(algorithm, "argument_rules", {})
    for name, value in hyperparameters.items():
        place = places.get(name, "hyperparameters")
        if name not in known:
            raise UsageError(f"{place}: unknown hyperparameter {name!r} of {algorithm.__name__}{did_you_mean(name, known)}")
        if name in rules and not (name in SCHEDULES and is_linear(value)):
            try:
                check_arguments({name: rules[name]}, hyperparameters)
            except ValueError as error:
                raise UsageError(f"{place}: {error}") from error


def is_linear(value: Any) -> bool:
    """
    Recognize RL Zoo's notation for a linear schedule.

    :param value: a hyperparameter
    :return: True for ``lin_`` followed by a number
    """
    if not (isinstance(value, str) and value.startswith("lin_")):
        return False
    try:
        float(value.removeprefix("lin_"))
    except ValueError:
        return False
    return True
