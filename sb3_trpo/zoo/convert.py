"""
Convert hyperparameters of sb3-contrib's TRPO, whose KL is averaged over action dimensions, to the joint KL.

``python -m sb3_trpo convert theirs.yml --output ours.yml`` does it for a file of RL Zoo, and
``python -m sb3_trpo convert --env HalfCheetah-v5 --hyperparams target_kl:0.04`` for arguments.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from gymnasium import spaces

from sb3_trpo.errors import UsageError, did_you_mean
from sb3_trpo.saving.sb3_contrib import CONTRIB_DEFAULTS, MINIBATCH_ARGUMENTS, joint_kl_arguments
from sb3_trpo.zoo.hyperparameters import read


def convert(
    arguments: Mapping[str, Any], action_space: spaces.Space[Any] | None, *, keep_critic: bool = False
) -> dict[str, Any]:
    """
    Convert arguments of sb3-contrib's TRPO.

    :param arguments: constructor arguments, or an entry of RL Zoo's ``trpo.yml``
    :param action_space: the environment's; None if unknown, which leaves ``target_kl`` and ``cg_damping`` at the defaults
    :param keep_critic: keep sb3-contrib's minibatch critic and its arguments
    :return: arguments of this package's TRPO, always with ``target_kl`` and ``cg_damping`` if the action space is known,
        because the defaults differ
    """
    dropped = () if keep_critic else MINIBATCH_ARGUMENTS
    converted = {name: value for name, value in arguments.items() if name not in {*dropped, *CONTRIB_DEFAULTS}}
    if action_space is not None:
        converted |= joint_kl_arguments(arguments, action_space)
    if keep_critic:
        converted["critic_method"] = "minibatch"
    return converted


def action_space_of(env_id: str, entry: Mapping[str, Any]) -> spaces.Space[Any]:
    """
    Return the action space of an environment.

    :param env_id: registered id
    :param entry: its hyperparameters, for ``env_kwargs`` and ``env_wrapper``
    :return: the action space
    :raises UsageError: the environment is unknown, or cannot be made here
    """
    from rl_zoo3 import get_wrapper_class

    if env_id not in gym.registry:
        raise UsageError(f"{env_id}: unknown environment{did_you_mean(env_id, gym.registry)}")
    try:
        env = gym.make(env_id, **entry.get("env_kwargs", {}))
        wrapper = get_wrapper_class(dict(entry))
        env = wrapper(env) if wrapper else env
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"{env_id}: cannot be made here: {error}") from error
    space = env.action_space
    env.close()
    return space


def convert_entry(name: str, entry: Mapping[str, Any], *, keep_critic: bool) -> dict[str, Any]:
    """
    Convert one entry of a file.

    :param name: environment id, or the zoo's ``atari`` or ``default``
    :param entry: its hyperparameters
    :param keep_critic: as for :func:`convert`
    :return: the converted hyperparameters
    :raises UsageError: the environment cannot be made
    """
    if name == "default":
        return convert(entry, None, keep_critic=keep_critic)
    space = spaces.Discrete(18) if name == "atari" else action_space_of(name, entry)
    return convert(entry, space, keep_critic=keep_critic)


def convert_file(path: Path, *, keep_critic: bool) -> dict[str, dict[str, Any]]:
    """
    Convert a file of RL Zoo. Entries whose environment cannot be created are left out, with a message on stderr.

    :param path: a YAML file for sb3-contrib's TRPO
    :param keep_critic: as for :func:`convert`
    :return: the converted entries
    :raises UsageError: the file cannot be used
    """
    converted: dict[str, dict[str, Any]] = {}
    for name, entry in read(path).items():
        try:
            converted[name] = convert_entry(name, entry, keep_critic=keep_critic)
        except UsageError as error:
            print(f"left out: {error}", file=sys.stderr)
    if "default" in converted:
        print("default: target_kl and cg_damping depend on the environment and keep their defaults", file=sys.stderr)
    return converted


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    :param argv: its arguments
    :raises UsageError: an argument cannot be used
    """
    from rl_zoo3.utils import StoreDict

    parser = argparse.ArgumentParser(prog="sb3_trpo convert", description="sb3-contrib's hyperparameters for our TRPO.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="YAML file for sb3-contrib's TRPO")
    source.add_argument("--env", help="environment id, to convert --hyperparams")
    parser.add_argument("-params", "--hyperparams", nargs="+", action=StoreDict, default={}, help="target_kl:0.04 ...")
    parser.add_argument("-o", "--output", type=Path, help="YAML file to write; without it, print")
    parser.add_argument("--keep-critic", action="store_true", help="keep sb3-contrib's minibatch critic")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    arguments = parser.parse_args(argv)

    for name in ["rl_zoo3.import_envs", *arguments.gym_packages]:
        importlib.import_module(name)
    if arguments.env:
        entries: Mapping[str, Any] = {
            arguments.env: convert_entry(arguments.env, arguments.hyperparams, keep_critic=arguments.keep_critic)
        }
    else:
        entries = convert_file(arguments.file, keep_critic=arguments.keep_critic)
    text = yaml.safe_dump(entries, sort_keys=False)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
        print(f"{len(entries)} entries: {arguments.output}")
