"""Writing a file so that it is there whole, or not at all."""

import os
import pathlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | pathlib.Path) -> Iterator[BinaryIO]:
    """
    Open a file to be put in the place of ``path`` once it is complete and on the disk.

    Whatever goes wrong before that, power and process included, leaves an older file as it was. An exception leaves no
    temporary file behind; a killed process may leave one, named ``.<name>.<random>.tmp``.

    :param path: where the file is to be; a symbolic link is followed
    :return: context manager that gives the file to write to
    :raises OSError: the file cannot be written
    """
    target = pathlib.Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    """Put the folder's new entry on the disk, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
