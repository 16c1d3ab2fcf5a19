"""What the commands say when something the user gave cannot be used."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what can."""


def closest(name: str, names: Iterable[str]) -> str:
    """
    Suggest what a misspelt name may have meant.

    :param name: the unknown name
    :param names: the known ones
    :return: ``"; did you mean 'this'?"``, or nothing
    """
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
