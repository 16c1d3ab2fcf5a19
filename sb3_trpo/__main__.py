"""
The command line: RL Zoo's commands with our algorithms, and a few of our own.

``python -m sb3_trpo COMMAND --help`` shows the arguments of a command. Modules are imported when a command needs them, to keep
``--help`` fast.
"""

import argparse
import importlib
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sb3_trpo import __version__
from sb3_trpo.errors import UsageError


class Command(NamedTuple):
    """
    A command.

    :param run: takes the command's arguments
    :param help: one line of help
    """

    run: Callable[[list[str]], None]
    help: str


def zoo(module: str, *given: str, prepare: Sequence[str] = ()) -> Callable[[list[str]], None]:
    """
    Forward a command to RL Zoo.

    :param module: the zoo's module
    :param given: default arguments; the user's override them
    :param prepare: names of functions of :mod:`sb3_trpo.zoo.commands` that check or complete the arguments
    :return: the command
    """

    def run(arguments: list[str]) -> None:
        commands = importlib.import_module("sb3_trpo.zoo.commands")
        for name in prepare:
            arguments = getattr(commands, name)(arguments)
        sys.argv[1:] = [*given, *arguments]
        runpy.run_module(module, run_name="__main__")

    return run


def own(module: str) -> Callable[[list[str]], None]:
    """
    Call a command of ours.

    :param module: a module with a function ``main(arguments)``
    :return: the command
    """

    def run(arguments: list[str]) -> None:
        importlib.import_module(module).main(arguments)

    return run


_TRAIN = ("check_names", "show_progress")
_PLAY = ("check_names", "find_run", "quiet_loading")
COMMANDS = {
    "train": Command(zoo("rl_zoo3.train", "--algo", "trpo", prepare=_TRAIN), "train an agent, or continue one (-i)"),
    "optimize": Command(
        zoo("rl_zoo3.train", "--algo", "trpo", "--optimize-hyperparameters", prepare=_TRAIN),
        "search hyperparameters with Optuna",
    ),
    "enjoy": Command(zoo("rl_zoo3.enjoy", "--algo", "trpo", "--folder", "logs", prepare=_PLAY), "watch a trained agent"),
    "record-video": Command(
        zoo("rl_zoo3.record_video", "--algo", "trpo", "--folder", "logs", prepare=_PLAY), "record a video of a trained agent"
    ),
    "gif": Command(own("sb3_trpo.zoo.gif"), "turn a video into an animated GIF"),
    "plot": Command(own("sb3_trpo.zoo.plots"), "draw learning curves and the trust region, from a folder or a results file"),
    "benchmark": Command(own("sb3_trpo.zoo.benchmark"), "train and compare algorithms, over environments and seeds"),
    "convert": Command(own("sb3_trpo.zoo.convert"), "convert hyperparameters of sb3-contrib's TRPO"),
    "plot-train": Command(zoo("rl_zoo3.cli", "plot_train"), "RL Zoo's plot of training episodes"),
    "all-plots": Command(zoo("rl_zoo3.cli", "all_plots"), "RL Zoo's plots and table of evaluations"),
    "plot-from-file": Command(zoo("rl_zoo3.cli", "plot_from_file"), "RL Zoo's plots from the file of all-plots"),
}


def is_usage_error(error: Exception) -> bool:
    """
    Tell errors about the user's input from faults in the code.

    :param error: the error
    :return: True for our own usage errors, Gymnasium's errors, and checks in RL Zoo's own modules
    """
    if isinstance(error, UsageError) or type(error).__module__ == "gymnasium.error":
        return True
    if not isinstance(error, (ValueError, AssertionError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = getattr(frame.f_globals.get("__spec__"), "name", "")
    return module.startswith(("rl_zoo3", "huggingface_sb3"))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's name; the command parses the rest."""
    commands = "\n".join(f"  {name:<16}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sb3_trpo",
        description=f"TRPO for Stable-Baselines3 at RL Zoo's command line.\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own; COMMAND --help lists them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: the arguments, those of the process if ``None``
    :return: the exit status: 0, or 2 if the input cannot be used
    """
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help()
        return 0
    arguments = parser.parse_args(argv)
    sys.argv[0] = f"sb3_trpo {arguments.command}"  # what the zoo's parsers call themselves
    try:
        COMMANDS[arguments.command].run(arguments.arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sb3_trpo"):
            raise
        message = (
            f"the module {error.name!r} is missing; install the extra zoo: pip install '.[zoo]' in a checkout of sb3_trpo"
        )
    except Exception as error:
        if not is_usage_error(error):
            raise
        message = str(error)
    else:
        return 0
    print(f"sb3_trpo {arguments.command}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
