"""Reading the zip files that SB3 and this package write, of which every part is checked before it is unpacked."""

import io
import json
import math
import pathlib
import zipfile
from typing import Any

import numpy as np
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.utils import get_system_info

from sb3_trpo.errors import CorruptCheckpointError, Source, short
from sb3_trpo.saving.pickle_records import Budget, RefusedError

#: A file may not unpack to more than this many times its size, and in any case to 16 MiB. SB3 does not compress.
MAX_EXPANSION = 2
ALWAYS_ALLOWED = 2**24
MAX_MEMBERS = 20_000
#: Other methods of compression unpack more than they say.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: Written beside SB3's members: what the file is.
METADATA = "sb3_trpo.json"
#: Bytes that an object of a JSON text takes, roughly.
JSON_CONTAINER_BYTES, JSON_ITEM_BYTES = 200, 60


def read_bytes(source: Source) -> bytes:
    """
    The contents of a file.

    :param source: path, with or without ``.zip``, or file object, which is read from its start and rewound
    :return: its bytes
    """
    if isinstance(source, (str, pathlib.Path)):
        with open_path(source, "r", suffix="zip") as file:
            return file.read()
    open_path(source, "r")
    source.seek(0)
    contents = source.read()
    source.seek(0)
    return contents


class Archive:
    """
    A zip file in memory, of which every part is checked as it is read.

    :param contents: the file's bytes
    :param path: what to call the file in messages
    :param member: what to call it, if it is itself a member of the file
    :param budget: bound of the memory that its objects take; None for one of its own
    :raises CorruptCheckpointError: it is no zip file, or would unpack to far more than its size
    """

    def __init__(self, contents: bytes, path: Source, member: str | None = None, budget: Budget | None = None) -> None:
        self.contents, self.path = contents, path
        self.budget = budget or Budget(len(contents))
        if contents.count(b"PK\1\2") > MAX_MEMBERS:
            raise CorruptCheckpointError(path, member, f"it has more than {MAX_MEMBERS} members")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(contents))
            entries = self._zip.infolist()
        except Exception as error:
            raise CorruptCheckpointError(path, member, f"it is no zip file ({short(error)})") from error
        self._entries = {entry.filename: entry for entry in entries}
        self.names = list(self._entries)
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(MAX_EXPANSION * len(contents), ALWAYS_ALLOWED):
            raise CorruptCheckpointError(path, member, f"its {len(contents)} bytes would unpack to {unpacked}")
        if len(self.names) < len(entries):
            raise CorruptCheckpointError(path, member, "a member is there twice")
        if any(entry.compress_type not in METHODS for entry in entries):
            raise CorruptCheckpointError(path, member, "it is compressed in a way that SB3 does not use")

    def inner(self, contents: bytes, member: str) -> "Archive":
        """
        Open a zip file that is itself a member.

        :param contents: its bytes
        :param member: its name
        :return: the file
        :raises CorruptCheckpointError: as for the file itself
        """
        return Archive(contents, self.path, member, self.budget)

    def read(self, member: str) -> bytes:
        """
        Read a member.

        :param member: its name
        :return: its bytes
        :raises CorruptCheckpointError: it is not there, or damaged
        """
        if member not in self._entries:
            raise CorruptCheckpointError(self.path, member, "it is missing")
        entry = self._entries[member]
        try:
            with self._zip.open(entry) as file:
                contents = file.read(entry.file_size + 1)
        except Exception as error:
            raise CorruptCheckpointError(self.path, member, short(error)) from error
        if len(contents) != entry.file_size:
            raise CorruptCheckpointError(self.path, member, f"it has another size than {entry.file_size}")
        return contents

    def read_json(self, member: str) -> dict[str, Any]:
        """
        Read a member that holds a JSON object.

        :param member: its name
        :return: the object
        :raises CorruptCheckpointError: it is not there, damaged, or something else
        """
        text = self.read(member)
        try:
            if not text.isascii():
                raise ValueError("it is no ASCII text, which SB3 writes")
            containers = text.count(b"[") + text.count(b"{")
            self.budget.spend(JSON_CONTAINER_BYTES * containers + JSON_ITEM_BYTES * text.count(b","))
            value = json.loads(text.decode("ascii"))
        except (ValueError, RecursionError, RefusedError) as error:
            raise CorruptCheckpointError(self.path, member, short(error)) from error
        if not isinstance(value, dict):
            raise CorruptCheckpointError(self.path, member, "it holds no attributes")
        return value

    def read_arrays(self, member: str) -> dict[str, np.ndarray]:
        """
        Read a member that is a file of ``numpy.savez``. It holds numbers and texts, and no pickle.

        :param member: its name
        :return: the arrays, by name
        :raises CorruptCheckpointError: it is not there, or damaged
        """
        inner = self.inner(self.read(member), member)
        try:
            return {name.removesuffix(".npy"): _read_array(inner.read(name)) for name in inner.names}
        except CorruptCheckpointError:
            raise
        except Exception as error:
            raise CorruptCheckpointError(self.path, member, short(error)) from error


def print_versions(archive: Archive) -> None:
    """
    Print the present versions, and those that have saved a file.

    :param archive: the file
    """
    print("== CURRENT SYSTEM INFO ==")
    get_system_info()
    print("== SAVED MODEL SYSTEM INFO ==")
    text = archive.read("system_info.txt") if "system_info.txt" in archive.names else b"unknown"
    lines = text[:10_000].decode("ascii", "replace").splitlines()
    print("\n".join("".join(filter(str.isprintable, line)) for line in lines))


def _read_array(contents: bytes) -> np.ndarray:
    """Read a ``.npy`` file, after comparing its size with the one that it claims."""
    file = io.BytesIO(contents)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array is in an unknown format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biufU" or fortran:
        raise ValueError("an array is of an unknown type")
    data = contents[file.tell() :]
    if len(data) != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError("an array has another size than it claims")
    return np.frombuffer(data, dtype).reshape(shape).copy()
