"""
The command line: RL Zoo's commands with our algorithms registered, and a few of our own.

``python -m sb3_trpo COMMAND --help`` shows the arguments of a command; those of RL Zoo are its own, unchanged.
"""

import argparse
import importlib
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import gymnasium as gym

from sb3_trpo import __version__
from sb3_trpo.errors import UsageError, did_you_mean


class Command(NamedTuple):
    """
    A command.

    :param run: gets the command's arguments
    :param help: what it does, in a line
    """

    run: Callable[[list[str]], None]
    help: str


def zoo(module: str, *given: str, one_env: bool = True) -> Callable[[list[str]], None]:
    """
    Forward a command to RL Zoo.

    :param module: the zoo's module
    :param given: arguments to put before the user's, which therefore prevail
    :param one_env: ``--env`` must be an environment's id; False where it is a part of a folder's name
    :return: the command
    """

    def run(arguments: list[str]) -> None:
        if one_env:
            check_env(arguments)
        importlib.import_module("sb3_trpo.zoo")
        sys.argv[1:] = [*given, *arguments]
        runpy.run_module(module, run_name="__main__")

    return run


def own(module: str) -> Callable[[list[str]], None]:
    """
    Call a command of ours. Its module is imported late: it needs packages that the library does without.

    :param module: a module with a function ``main(arguments)``
    :return: the command
    """

    def run(arguments: list[str]) -> None:
        importlib.import_module("sb3_trpo.zoo")
        importlib.import_module(module).main(arguments)

    return run


def check_env(arguments: Sequence[str]) -> None:
    """
    Check the environment before the zoo looks for files of it.

    :param arguments: the command's
    :raises UsageError: ``--env`` names no registered environment
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    known, _ = parser.parse_known_args(arguments)
    for package in ["rl_zoo3.import_envs", *known.gym_packages]:
        importlib.import_module(package)
    if known.env is not None and known.env not in gym.registry:
        raise UsageError(f"{known.env}: unknown environment{did_you_mean(known.env, gym.registry)}")


_train = partial(zoo, "rl_zoo3.train", "--algo", "trpo")
COMMANDS = {
    "train": Command(_train(), "train an agent, or go on with one (-i)"),
    "optimize": Command(_train("--optimize-hyperparameters"), "search hyperparameters with Optuna"),
    "enjoy": Command(zoo("rl_zoo3.enjoy", "--algo", "trpo", "--folder", "logs"), "watch a trained agent"),
    "record-video": Command(
        zoo("rl_zoo3.record_video", "--algo", "trpo", "--folder", "logs"), "record a video of a trained agent"
    ),
    "gif": Command(own("sb3_trpo.zoo.gif"), "turn a video into an animated GIF"),
    "plot": Command(own("sb3_trpo.zoo.plots"), "draw learning curves and the trust region, from a folder or a results file"),
    "benchmark": Command(own("sb3_trpo.zoo.benchmark"), "train and compare algorithms, over environments and seeds"),
    "convert": Command(own("sb3_trpo.zoo.convert"), "convert hyperparameters of sb3-contrib's TRPO"),
    "plot-train": Command(zoo("rl_zoo3.cli", "plot_train", one_env=False), "RL Zoo's plot of training episodes"),
    "all-plots": Command(zoo("rl_zoo3.cli", "all_plots", one_env=False), "RL Zoo's plots and table of evaluations"),
    "plot-from-file": Command(
        zoo("rl_zoo3.cli", "plot_from_file", one_env=False), "RL Zoo's plots from the file of all-plots"
    ),
}


def said_by_zoo(error: BaseException) -> bool:
    """
    Tell the zoo's own complaints about its arguments from errors further inside.

    :param error: the error
    :return: whether the zoo raised it
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = getattr(frame.f_globals.get("__spec__"), "name", "")
    return module.startswith(("rl_zoo3", "huggingface_sb3"))


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: the arguments, those of the process if ``None``
    :return: the exit status: 0, or 2 if the input cannot be used
    """
    commands = "\n".join(f"  {name:<16}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sb3_trpo",
        description=f"TRPO for Stable-Baselines3 at RL Zoo's command line.\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own; COMMAND --help lists them")
    arguments = parser.parse_args(argv)
    sys.argv[0] = f"sb3_trpo {arguments.command}"  # what the zoo's parsers call themselves
    try:
        COMMANDS[arguments.command].run(arguments.arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sb3_trpo"):
            raise
        words = f"the module {error.name!r} is missing; pip install 'sb3_trpo[zoo]' brings what the commands need"
    except (UsageError, gym.error.Error) as error:
        words = str(error)
    except (ValueError, AssertionError) as error:
        if not said_by_zoo(error):
            raise
        words = str(error)
    else:
        return 0
    print(f"sb3_trpo {arguments.command}: error: {words}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
