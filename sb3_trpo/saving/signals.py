"""SIGINT and SIGTERM as a request to stop after the next update."""

import os
import signal
from types import FrameType
from typing import Any

_previous: dict[int, Any] = {}
_received: list[int] = []


def catch_signals() -> None:
    """
    Store the first SIGINT or SIGTERM from now on; a second one ends the process at once.

    :raises ValueError: this is not the main thread; Python handles signals only there
    """
    if not _previous:
        _received.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            _previous[number] = signal.signal(number, _note)


def release_signals() -> None:
    """Restore the signal handlers from before :func:`catch_signals`, if it was called."""
    while _previous:
        number, handler = _previous.popitem()
        signal.signal(number, handler)


def received_signal() -> int | None:
    """
    Return the signal that asked the process to stop.

    :return: its number, or None
    """
    return _received[0] if _received else None


def exit_status(number: int) -> int:
    """
    Return the exit status of a process that a signal stopped.

    :param number: the signal's number
    :return: 130 for SIGINT, 143 for SIGTERM
    """
    return 128 + number


def _note(number: int, _: FrameType | None) -> None:
    if _received:
        os._exit(exit_status(number))
    _received.append(number)
