"""Write a file so that it is complete or absent."""

import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

HAS_LOCKS = os.name == "posix"  # Windows has others, and does not delete a file that is open
if HAS_LOCKS:
    import fcntl


@contextmanager
def atomic_write(path: str | pathlib.Path) -> Iterator[BinaryIO]:
    """
    Open a file that replaces ``path`` once it is complete and on the disk.

    If anything fails before that, power and process included, an older file stays as it was. An exception leaves no temporary
    file behind; a killed process may leave one, named ``.<name>.<random>.tmp``, which :func:`remove_leftovers` deletes.

    :param path: destination; a symbolic link is followed
    :return: context manager that gives the file to write to
    :raises OSError: the file cannot be written
    """
    target = pathlib.Path(os.path.realpath(path))
    with ExitStack() as stack:
        temporary, file = _create(target, stack)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    _sync_folder(target.parent)


def _create(target: pathlib.Path, stack: ExitStack) -> tuple[pathlib.Path, BinaryIO]:
    """Create and lock a temporary file; the lock outlives the file's closing, up to its renaming."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        file = temporary.open("xb")
        stack.callback(temporary.unlink, missing_ok=True)
        descriptor = os.dup(file.fileno())
        stack.callback(os.close, descriptor)
        with suppress(OSError):  # a file system without locks: then remove_leftovers cannot lock either, and deletes nothing
            _lock(descriptor, wait=True)
        if temporary.exists():  # remove_leftovers may have come between its creation and its locking
            return temporary, file
        file.close()


def _lock(descriptor: int, wait: bool) -> None:
    if HAS_LOCKS:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def remove_leftovers(folder: pathlib.Path, name: str) -> None:
    """
    Delete the temporary files that killed processes have left. A file that is being written is locked, and stays.

    :param folder: the folder
    :param name: regular expression of the names of the files that were to be written
    """
    pattern = re.compile(rf"\.{name}\.[0-9a-f]{{8}}\.tmp")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            with suppress(OSError):  # in use, or deleted by another process
                _delete_if_unused(path)


def _delete_if_unused(path: pathlib.Path) -> None:
    if not HAS_LOCKS:
        path.unlink()
        return
    with path.open("rb") as file:
        _lock(file.fileno(), wait=False)
        path.unlink()


def _sync_folder(folder: pathlib.Path) -> None:
    """Put the folder's new entry on the disk, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
