"""Reading the zip files that SB3 and this package write, without running what is in them."""

import base64
import io
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.save_util import open_path

from sb3_trpo.errors import CorruptCheckpointError, NonFiniteError, Source, UntrustedFileError, name_of
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads

#: A file may not unpack to more than this many times its size, and in any case to 64 MiB. SB3 does not compress.
MAX_EXPANSION = 4
ALWAYS_ALLOWED = 2**26
#: SB3's parameter files, all of which a model needs.
PARAMETERS = ("policy.pth", "policy.optimizer.pth")
#: Tensors that are attributes of a model.
VARIABLES = "pytorch_variables.pth"
#: Written beside SB3's members: what the file is.
METADATA = "sb3_trpo.json"
#: Attributes that are made anew from others when a model is set up.
DERIVED = ("lr_schedule", "_target_kl_schedule")


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
    :raises CorruptCheckpointError: it is no zip file, or would unpack to far more than its size
    """

    def __init__(self, contents: bytes, path: Source, member: str | None = None) -> None:
        self.contents, self._path = contents, path
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(contents))
            entries = self._zip.infolist()
        except Exception as error:
            raise CorruptCheckpointError(path, member, f"it is no zip file ({error})") from error
        self.names = [entry.filename for entry in entries]
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(MAX_EXPANSION * len(contents), ALWAYS_ALLOWED):
            raise CorruptCheckpointError(path, member, f"its {len(contents)} bytes would unpack to {unpacked}")
        if len(set(self.names)) < len(self.names):
            raise CorruptCheckpointError(path, member, "a member is there twice")

    def read(self, member: str) -> bytes:
        """
        Read a member.

        :param member: its name
        :return: its bytes
        :raises CorruptCheckpointError: it is not there, or damaged
        """
        if member not in self.names:
            raise CorruptCheckpointError(self._path, member, "it is missing")
        try:
            return self._zip.read(member)
        except Exception as error:
            raise CorruptCheckpointError(self._path, member, error) from error

    def read_json(self, member: str) -> dict[str, Any]:
        """
        Read a member that holds a JSON object.

        :param member: its name
        :return: the object
        :raises CorruptCheckpointError: it is not there, damaged, or something else
        """
        text = self.read(member)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpointError(self._path, member, error) from error
        if not isinstance(value, dict):
            raise CorruptCheckpointError(self._path, member, "it holds no attributes")
        return value

    def read_state(self, member: str) -> Any:
        """
        Read a member that holds parameters. No code can run: torch's own loader refuses what is not a tensor.

        :param member: its name
        :return: the state dictionary, on the CPU
        :raises CorruptCheckpointError: it is not there, or damaged
        :raises UntrustedFileError: it holds something else than tensors
        """
        contents = self.read(member)
        Archive(contents, self._path, member)
        try:
            return th.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused is None:
                raise CorruptCheckpointError(self._path, member, error) from error
            raise UntrustedFileError(self._path, member, f"the global {refused[1]}") from error
        except Exception as error:
            raise CorruptCheckpointError(self._path, member, error) from error


def without_search_direction(archive: Archive) -> bytes:
    """
    Leave out the search direction that earlier versions saved, which is no attribute of a model anymore.

    :param archive: the file of a model
    :return: the file's bytes, without the member if the direction is all it holds
    """
    variables = archive.read_state(VARIABLES) if VARIABLES in archive.names else None
    if not (isinstance(variables, dict) and set(variables) == {"_direction"}):
        return archive.contents
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as copy:
        for name in archive.names:
            if name != VARIABLES:
                copy.writestr(name, archive.read(name))
    return buffer.getvalue()


def check_parameters(archive: Archive, path: Source, allow_non_finite: bool) -> None:
    """
    Read all parameters once, to know that they can be read and are finite.

    :param archive: the file
    :param path: what to call it
    :param allow_non_finite: accept NaN and infinities
    :raises CorruptCheckpointError: one is damaged or missing
    :raises UntrustedFileError: one holds something else than tensors
    :raises NonFiniteError: one holds a NaN or an infinity
    """
    for member in sorted({*PARAMETERS, *(name for name in archive.names if name.endswith(".pth"))}):
        for name, tensor in _tensors(archive.read_state(member), ""):
            if tensor.layout != th.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CorruptCheckpointError(path, member, f"{name!r} claims {tensor.numel()} elements that are not there")
            if not allow_non_finite and not bool(th.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{name_of(path)}: {name!r} in {member!r} is not finite; allow_non_finite=True loads it nevertheless"
                )


def _tensors(value: Any, name: str) -> Iterator[tuple[str, th.Tensor]]:
    if isinstance(value, th.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


@dataclass(frozen=True)
class Attributes:
    """
    The attributes in a saved model.

    :param values: by name; those that were pickled and have not been decoded are missing
    :param names: all names
    """

    values: dict[str, Any]
    names: set[str]


def read_attributes(archive: Archive, path: Source, replaced: dict[str, Any], trust: bool) -> Attributes:
    """
    Read the attributes of a saved model.

    :param archive: the file
    :param path: what to call it
    :param replaced: attributes of the user's, which are not read from the file
    :param trust: leave pickled attributes to SB3, which runs what is in them
    :return: the attributes
    :raises CorruptCheckpointError: they are missing or damaged
    :raises UntrustedFileError: one of them asks for something that may run code
    """
    entries = archive.read_json("data")
    values = dict(replaced)
    for name, entry in entries.items():
        if name in replaced:
            continue
        if not (isinstance(entry, dict) and ":serialized:" in entry):
            values[name] = entry
        elif name in DERIVED:
            values[name] = None
        elif not trust:
            values[name] = _decode(entry[":serialized:"], name, path)
    return Attributes(values, set(entries))


def _decode(serialized: Any, name: str, path: Source) -> Any:
    try:
        return restricted_loads(base64.b64decode(serialized))
    except RefusedError as error:
        remedy = (
            "If you know where the file is from, trust=True loads it as SB3 does; "
            f"custom_objects={{{name!r}: ...}} puts an object of your own in the entry's place"
        )
        raise UntrustedFileError(path, name, error.what, remedy) from error
    except Exception as error:
        raise CorruptCheckpointError(path, "data", f"its entry {name!r} is damaged ({error!r})") from error
