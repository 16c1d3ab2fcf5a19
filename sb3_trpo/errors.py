"""Exceptions, and helpers for error messages and warnings."""

import difflib
import io
import pathlib
import sys
import warnings
from collections.abc import Iterable

#: Packages whose frames are not the user's code, with those of decorators.
PACKAGES = ("sb3_trpo", "stable_baselines3", "sb3_contrib", "torch", "contextlib")

Source = str | pathlib.Path | io.BufferedIOBase


class NamedBytes(io.BytesIO):
    """
    The contents of a file, with its name for messages.

    :param contents: the file's bytes
    :param source: the file
    """

    def __init__(self, contents: bytes, source: Source) -> None:
        super().__init__(contents)
        self.name = name_of(source)


def name_of(source: Source) -> str:
    """
    Return the name of a file for a message.

    :param source: path or file object
    :return: the path, the name of the file object, or its class if it has no name
    """
    if isinstance(source, (str, pathlib.Path)):
        return str(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def short(value: object, limit: int = 300) -> str:
    """
    Describe an error or a value from a file briefly; it may have any length.

    :param value: an error, or a value
    :param limit: maximum number of characters
    :return: the text of an error, the ``repr`` of a number or text, the type of anything else
    """
    if isinstance(value, BaseException):
        return f"{value}"[:limit] or type(value).__name__
    if isinstance(value, str):
        return repr(value[:limit])
    if isinstance(value, int) and value.bit_length() > limit:
        return "a whole number of many digits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


class CorruptCheckpointError(ValueError):
    """
    A saved file is damaged or incomplete.

    :param path: the file
    :param member: the damaged or missing part; None for the whole file
    :param reason: what is wrong
    """

    def __init__(self, path: Source, member: str | None, reason: object) -> None:
        what = "the file" if member is None else repr(member)
        reason = short(reason) if isinstance(reason, BaseException) else reason
        super().__init__(f"{name_of(path)}: {what} cannot be read: {reason}")
        self.path, self.member = path, member


class UntrustedFileError(ValueError):
    """
    Reading a saved file would run code that is not known to be safe. Nothing was run.

    :param path: the file
    :param entry: the entry that would run it
    :param what: the global that the entry names, or a description
    :param remedy: what the user can do
    """

    def __init__(self, path: Source, entry: str, what: str, remedy: str = "") -> None:
        super().__init__(
            f"{name_of(path)}: entry {entry[:200]!r} is refused, since it asks for {what}; nothing was run. {remedy}".rstrip()
        )
        self.path, self.entry = path, entry


class MismatchError(ValueError):
    """An environment differs from the one that a checkpoint was saved with."""


class NonFiniteError(ValueError):
    """A NaN or an infinity where a finite number is required."""


class WorkerError(RuntimeError):
    """
    An environment in a worker process failed.

    :param indices: indices of the workers
    :param reason: what happened
    """

    def __init__(self, indices: Iterable[int], reason: str) -> None:
        self.indices = tuple(indices)
        super().__init__(f"worker {', '.join(map(str, self.indices))} {reason}")


class RankError(RuntimeError):
    """
    The processes of a distributed training cannot continue together.

    :param ranks: the ranks that caused the error, as far as they are known
    :param reason: what is wrong
    """

    def __init__(self, ranks: Iterable[int], reason: str) -> None:
        self.ranks = tuple(ranks)
        super().__init__(reason)


class _ArgumentTypeError(ValueError, TypeError):
    """An argument is not allowed; SB3 raises a TypeError."""


class _ArgumentAssertionError(ValueError, AssertionError):
    """An argument is not allowed; SB3 raises an AssertionError."""


def argument_error(message: str, error: Exception) -> ValueError:
    """
    Return a ValueError that is also of the type that SB3 raises for the argument.

    :param message: the argument, its value and what is allowed
    :param error: SB3's error
    :return: the error to raise
    """
    if isinstance(error, TypeError):
        return _ArgumentTypeError(message)
    return _ArgumentAssertionError(message) if isinstance(error, AssertionError) else ValueError(message)


class UsageError(ValueError):
    """An option of the command line or an entry of a file is not allowed; the message says what is."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """
    Suggest what a misspelled name may have meant.

    :param name: the unknown name
    :param names: the known ones
    :return: ``"; did you mean 'this'?"``, or an empty string
    """
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def warn_user(message: str) -> None:
    """
    Warn at the line of the user's code that called this package, however deep the call.

    :param message: the warning
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
