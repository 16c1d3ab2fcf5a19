"""Checks and completes the arguments of RL Zoo's commands."""

import argparse
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
from rl_zoo3 import ALGOS

from sb3_trpo.errors import UsageError, did_you_mean

#: RL Zoo's default of ``--env``.
DEFAULT_ENV = "CartPole-v1"


def parse_known(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Parse the arguments that the functions below need.

    :param arguments: the command's arguments
    :return: the values; ``env`` and ``exp_id`` are None if not given
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="trpo")
    parser.add_argument("--env")
    parser.add_argument("-f", "--folder", type=Path, default=Path("logs"))
    parser.add_argument("--exp-id", type=int)
    parser.add_argument("--load-best", action="store_true")
    parser.add_argument("--load-checkpoint")
    parser.add_argument("--load-last-checkpoint", action="store_true")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    parser.add_argument("-P", "--progress", action="store_true")
    return parser.parse_known_args(arguments)[0]


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return True if the command only prints its help."""
    return "-h" in arguments or "--help" in arguments


def check_names(arguments: list[str]) -> list[str]:
    """
    Check the names of environment and algorithm, and print the default environment if none is given.

    :param arguments: the command's arguments
    :return: the arguments
    :raises UsageError: unknown environment or algorithm
    """
    known = parse_known(arguments)
    for package in ["rl_zoo3.import_envs", *known.gym_packages]:
        importlib.import_module(package)
    if known.algo not in ALGOS:
        raise UsageError(
            f"--algo {known.algo}: unknown algorithm{did_you_mean(known.algo, ALGOS)} (known: {', '.join(sorted(ALGOS))})"
        )
    if known.env is None:
        if not asks_for_help(arguments):
            print(f"no --env given: {DEFAULT_ENV}", file=sys.stderr)
    elif known.env not in gym.registry:
        raise UsageError(f"{known.env}: unknown environment{did_you_mean(known.env, gym.registry)}")
    return arguments


def show_progress(arguments: list[str]) -> list[str]:
    """
    Show a progress bar if the output is a terminal, unless ``--no-progress`` is given.

    :param arguments: the command's arguments
    :return: the arguments for RL Zoo, which knows ``--progress`` only
    """
    rest = [argument for argument in arguments if argument != "--no-progress"]
    wanted = rest == arguments and sys.stdout.isatty() and not parse_known(arguments).progress
    return [*rest, "--progress"] if wanted else rest


def find_run(arguments: list[str]) -> list[str]:
    """
    Choose the latest run with a model: RL Zoo takes the latest folder, which has none after ``optimize``.

    :param arguments: the command's arguments
    :return: the arguments, with ``--exp-id`` unless it was given
    :raises UsageError: the chosen run has no model, or none has
    """
    known = parse_known(arguments)
    if asks_for_help(arguments) or known.exp_id == -1:
        return arguments
    env_id = (known.env or DEFAULT_ENV).replace("/", "-")
    folder = known.folder / known.algo
    pattern = re.compile(rf"{re.escape(env_id)}_(\d+)")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob("*")]
    runs = {int(match[1]): path for match, path in matches if match}
    with_model = sorted(number for number, path in runs.items() if list(path.glob(_model_pattern(known, env_id))))
    if known.exp_id:
        if known.exp_id in with_model:
            return arguments
        others = f"; --exp-id {', '.join(map(str, with_model))} would do" if with_model else ""
        raise UsageError(f"--exp-id {known.exp_id}: no model of {env_id} in {folder / f'{env_id}_{known.exp_id}'}{others}")
    if not with_model:
        raise UsageError(f"no model of {known.algo} on {env_id} in {folder}: train one first, or name another --folder")
    return [*arguments, "--exp-id", str(with_model[-1])]


def quiet_loading(arguments: list[str]) -> list[str]:
    """
    Ignore the warnings that RL Zoo causes when it loads a model to play.

    It passes a learning rate to every algorithm, and an environment to models with a log, though neither is used.

    :param arguments: the command's arguments
    :return: the arguments
    """
    for message in (r"no effect with critic_method='gauss_newton': learning_rate$", "tensorboard_log=.* is not used"):
        warnings.filterwarnings("ignore", message, UserWarning)
    return arguments


def _model_pattern(known: argparse.Namespace, env_id: str) -> str:
    if known.load_best:
        return "best_model.zip"
    if known.load_checkpoint is not None:
        return f"rl_model_{known.load_checkpoint}_steps.zip"
    return "rl_model_*_steps.zip" if known.load_last_checkpoint else f"{env_id}.zip"
