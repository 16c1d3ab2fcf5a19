"""Reading the parameters of a model: torch's ``.pth`` files, with the sizes that they claim checked before anything is made.

``torch.load(weights_only=True)`` runs no code of the file's author, but hashes nested tuples for as long as they take, makes
byte arrays of any length, and believes the sizes of storages.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch as th

from sb3_trpo.errors import CorruptCheckpointError, NonFiniteError, Source, UntrustedFileError, name_of
from sb3_trpo.saving.archive import Archive
from sb3_trpo.saving.constructors import CONSTRUCTORS
from sb3_trpo.saving.pickle_records import UNSET, Record, RefusedError, label
from sb3_trpo.saving.unpickling import RestrictedUnpickler

#: SB3's parameter files, all of which a model needs.
PARAMETERS = ("policy.pth", "policy.optimizer.pth")
DTYPES = {
    "Float": th.float32,
    "Double": th.float64,
    "Half": th.float16,
    "BFloat16": th.bfloat16,
    "Long": th.int64,
    "Int": th.int32,
    "Short": th.int16,
    "Char": th.int8,
    "Byte": th.uint8,
    "Bool": th.bool,
    "ComplexFloat": th.complex64,
    "ComplexDouble": th.complex128,
}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise pickle.UnpicklingError(what)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(part) is int and 0 <= part < 2**48 for part in value)


def _tensor(record: Record) -> th.Tensor:
    _check(6 <= len(record.args) <= 7 and record.state is UNSET, "a tensor is damaged")
    storage, offset, size, stride = record.args[:4]
    _check(isinstance(storage, th.Tensor) and _are_sizes(size) and _are_sizes(stride), "a tensor is damaged")
    _check(len(size) == len(stride) and _are_sizes((offset,)), "a tensor is damaged")
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count > storage.numel() or (count and last >= storage.numel()):
        raise pickle.UnpicklingError(f"a tensor claims {count} elements that are not there")
    return storage.as_strided(size, stride, offset)


def _parameter(record: Record) -> th.Tensor:
    _check(len(record.args) == 3 and isinstance(record.args[0], th.Tensor) and record.state is UNSET, "a parameter is damaged")
    return record.args[0]


def _state_dict(record: Record) -> OrderedDict[Any, Any]:
    """Make a dictionary; those of modules hold versions beside their items."""
    if record.args or record.items:
        raise RefusedError(f"a call of {label(record)}")
    made = OrderedDict(record.pairs)
    if record.state is not UNSET:
        if not isinstance(record.state, dict) or record.state.keys() != {"_metadata"}:
            raise RefusedError(f"filling in {label(record)}")
        made._metadata = record.state["_metadata"]  # type: ignore[attr-defined]
    return made


TENSOR_CONSTRUCTORS = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _state_dict,
    **{name: CONSTRUCTORS[name] for name in ("numpy.dtype", "numpy._core.multiarray.scalar", "_codecs.encode")},
}


class _TensorUnpickler(RestrictedUnpickler):
    """
    Make the tensors of a ``.pth`` file.

    :param archive: the file
    :param root: the folder in it
    """

    def __init__(self, archive: Archive, root: str) -> None:
        super().__init__(archive.read(f"{root}/data.pkl"), TENSOR_CONSTRUCTORS, archive.budget)
        self._archive, self._root = archive, root
        self._storages: dict[str, th.Tensor] = {}

    def find_value(self, name: str) -> Any:
        """Look up the class of a storage; see the base class."""
        if name not in STORAGES:
            raise RefusedError(f"the global {name[:200]}")
        return STORAGES[name]

    def persistent_load(self, pid: Any) -> th.Tensor:
        """Read a storage; see the base class."""
        _check(isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage", "a storage is damaged")
        _, dtype, key, _, count = pid
        _check(isinstance(dtype, th.dtype) and isinstance(key, str) and type(count) is int, "a storage is damaged")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            _check(dtype is not th.bool or not data.translate(None, b"\0\1"), "a truth value is neither 0 nor 1")
            _check(len(data) == count * dtype.itemsize, f"a storage claims {count} elements that are not there")
            self._storages[key] = th.frombuffer(data, dtype=dtype) if data else th.empty(0, dtype=dtype)
        storage = self._storages[key]
        _check(storage.dtype is dtype and storage.numel() == count, "a storage is of two types")
        return storage


def read_state(archive: Archive, member: str, trust: bool) -> Any:
    """
    Read a member that holds parameters. No code can run, trusted or not.

    :param archive: the file
    :param member: its name
    :param trust: leave it to torch, which reads older formats as well
    :return: the state dictionary, on the CPU
    :raises CorruptCheckpointError: it is not there, or damaged
    :raises UntrustedFileError: it holds something else than tensors
    """
    contents = archive.read(member)
    try:
        if trust:
            return th.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
        inner = archive.inner(contents, member)
        roots = [name.rpartition("/")[0] for name in inner.names if name.endswith("/data.pkl")]
        _check(len(roots) == 1, "it holds no pickle, or several")
        order = f"{roots[0]}/byteorder"
        _check(order not in inner.names or inner.read(order) == b"little", "its byte order is another")
        return _TensorUnpickler(inner, roots[0]).load()
    except CorruptCheckpointError:
        raise
    except RefusedError as error:
        raise UntrustedFileError(archive.path, member, error.what) from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise CorruptCheckpointError(archive.path, member, error) from error
        raise UntrustedFileError(archive.path, member, f"the global {refused[1]}") from None
    except Exception as error:
        raise CorruptCheckpointError(archive.path, member, error) from error


def check_finite(state: Any, member: str, path: Source) -> None:
    """
    See that all parameters are finite.

    :param state: the state dictionary
    :param member: what to call it
    :param path: what to call the file
    :raises NonFiniteError: one holds a NaN or an infinity
    """
    for name, tensor in _tensors(state, "", set()):
        if not bool(th.isfinite(tensor).all()):
            raise NonFiniteError(
                f"{name_of(path)}: {name!r} in {member!r} is not finite; allow_non_finite=True loads it nevertheless"
            )


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, th.Tensor]]:
    if id(value) in seen:
        return
    if isinstance(value, th.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{label(key).strip(chr(39))}" if name else label(key).strip("'"), seen)
