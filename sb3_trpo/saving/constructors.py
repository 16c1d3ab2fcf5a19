"""Functions that make the objects in a file from checked plain data: containers, arrays, random generators.

Each takes a record whose parts are already made. What does not fit raises ``UnpicklingError`` (the file is damaged) or
:class:`~sb3_trpo.saving.pickle_records.RefusedError` (it may be sound, and is not read).
"""

import math
import pathlib
import pickle
import random
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from sb3_trpo.saving.objects import CLASSES, make_object
from sb3_trpo.saving.pickle_records import UNSET, Global, Record, RefusedError, label
from sb3_trpo.saving.random_state import BIT_GENERATORS, set_bit_generator_state, set_python_state

#: Data types without Python objects in them; texts and void of at most so many bytes.
DTYPE = re.compile(r"\?|b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[SUV]\d{1,5}|[mM]8")
MAX_ITEM_SIZE, MAX_FIELDS, MAX_DIMENSIONS = 2**16, 1000, 32
UNITS = ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic")
#: Classes of arrays, by name ↦ that of the array which is made.
ARRAYS: dict[str, type] = {
    "numpy.ndarray": np.ndarray,
    "numpy.memmap": np.ndarray,
    "numpy.matrix": np.matrix,
    "numpy.recarray": np.recarray,
    "numpy.rec.recarray": np.recarray,
}
MAX_POOL = 64


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise pickle.UnpicklingError(what)


def _only(record: Record, state: bool = False, items: bool = False, pairs: bool = False) -> None:
    """Refuse what a call of this kind has no use for."""
    if (record.state is not UNSET and not state) or (record.items and not items) or (record.pairs and not pairs):
        raise RefusedError(f"filling in {label(record)}")


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(_is_size(length, 2**48) for length in value)


def _named(value: Any, names: Any) -> str:
    if not (isinstance(value, Global) and value.name in names):
        raise RefusedError(f"an argument that is {label(value)}")
    return value.name


# ---- data types and arrays


def _dtype(record: Record) -> np.dtype[Any]:
    _only(record, state=True)
    _check(1 <= len(record.args) <= 3, "a data type has one to three arguments")
    code = record.args[0]
    if isinstance(code, Global):
        _named(code, ("numpy.record",))
        code = "V0"
    if not (isinstance(code, str) and DTYPE.fullmatch(code)):
        raise RefusedError(f"the data type {label(code)}")
    if record.state is UNSET:
        return _sized(np.dtype(code))
    _check(isinstance(record.state, tuple) and len(record.state) in (8, 9), "the state of a data type has eight parts")
    _, order, subarray, names, fields, size, alignment, _ = record.state[:8]
    _check(order in ("<", ">", "|", "="), "a byte order is unknown")
    if subarray is not None:
        raise RefusedError("a data type with arrays in it")
    if names is not None or fields is not None:
        return _structured(names, fields, size)
    dtype = np.dtype(code)
    if len(record.state) == 9 and dtype.kind in "mM":
        dtype = np.dtype(f"{code}[{_unit(record.state[8])}]") if _unit(record.state[8]) else dtype
    _check(size in (-1, dtype.itemsize) and type(alignment) is int, "a data type has another size")
    return _sized(dtype.newbyteorder(order))


def _sized(dtype: np.dtype[Any]) -> np.dtype[Any]:
    _check(dtype.itemsize <= MAX_ITEM_SIZE and not dtype.hasobject, "a data type is too large")
    return dtype


def _unit(metadata: Any) -> str:
    _check(isinstance(metadata, tuple) and len(metadata) == 2 and isinstance(metadata[1], tuple), "a unit of time is damaged")
    _check(len(metadata[1]) == 4, "a unit of time is damaged")
    unit, number = metadata[1][0], metadata[1][1]
    unit = unit.decode("ascii") if isinstance(unit, bytes) else unit
    _check(unit in UNITS and _is_size(number, 2**31 - 1), "a unit of time is unknown")
    return "" if unit == "generic" else f"{number}{unit}"


def _structured(names: Any, fields: Any, size: Any) -> np.dtype[Any]:
    _check(isinstance(names, tuple) and isinstance(fields, dict) and _is_size(size, MAX_ITEM_SIZE), "fields are damaged")
    _check(len(names) == len(fields) <= MAX_FIELDS and all(type(name) is str for name in names), "names of fields differ")
    formats, offsets = [], []
    for name in names:
        described = fields.get(name)
        if not (isinstance(described, tuple) and len(described) == 2):
            raise RefusedError("a field with a title")
        dtype, offset = described
        _check(isinstance(dtype, np.dtype) and _is_size(offset, size), "a field is damaged")
        _check(offset + dtype.itemsize <= size, "a field is outside its array")
        formats.append(dtype)
        offsets.append(offset)
    return _sized(np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size}))


def _from_bytes(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """Make a C-ordered array of the bytes of exactly its size."""
    _check(isinstance(data, (bytes, bytearray)) and isinstance(dtype, np.dtype) and _is_shape(shape), "an array is damaged")
    _check(len(data) == math.prod(shape) * dtype.itemsize, f"an array has {len(data)} bytes")
    if dtype.itemsize == 0 or not data:
        return np.zeros(shape, dtype) if math.prod(shape) == 0 or dtype.itemsize else _refuse_empty()
    return np.frombuffer(bytes(data), dtype).reshape(shape)


def _refuse_empty() -> np.ndarray:
    raise RefusedError("an array of elements without a size")


def _array(record: Record) -> np.ndarray:
    """Make the array of protocol 5, whose axes NumPy 2.4 may order otherwise than C or Fortran do."""
    _only(record)
    _check(len(record.args) in (4, 5), "an array has four or five arguments")
    data, dtype, shape, order = record.args[:4]
    axes = record.args[4] if len(record.args) == 5 else None
    _check(order in ("C", "F", "K", "A") and _is_shape(shape), "the order of an array is unknown")
    if order == "F":
        array = _from_bytes(data, dtype, shape[::-1]).copy().transpose()
    elif order == "K" and axes is not None:
        _check(_is_shape(axes) and sorted(axes) == list(range(len(shape))), "the axes of an array are damaged")
        array = _from_bytes(data, dtype, shape).copy().transpose(axes)
    else:
        array = _from_bytes(data, dtype, shape).copy()
    array.flags.writeable = isinstance(data, bytearray)  # a pickle has what cannot be written to as bytes
    return array


def _array_in_steps(record: Record) -> np.ndarray:
    """Make the array of earlier protocols, and of layouts with gaps."""
    _only(record, state=True)
    _check(len(record.args) == 3 and isinstance(record.state, tuple) and len(record.state) == 5, "an array is damaged")
    kind = ARRAYS[_named(record.args[0], ARRAYS)]
    _, shape, dtype, fortran, data = record.state
    if isinstance(data, list):
        raise RefusedError("an array of objects")
    _check(_is_shape(shape) and type(fortran) is bool, "an array is damaged")
    array = _from_bytes(data, dtype, shape[::-1]).copy().transpose() if fortran else _from_bytes(data, dtype, shape).copy()
    _check(kind is not np.matrix or array.ndim == 2, "a matrix has two dimensions")
    return array if kind is np.ndarray else array.view(kind)


def _scalar(record: Record) -> Any:
    _only(record)
    _check(len(record.args) == 2, "a number has two arguments")
    return _from_bytes(record.args[1], record.args[0], (1,))[0]


# ---- containers and small values


def _deque(record: Record) -> deque[Any]:
    _only(record, items=True)
    _check(len(record.args) <= 2, "a deque is damaged")
    values: Any = record.args[0] if record.args else ()
    length: Any = record.args[1] if len(record.args) > 1 else None
    _check(isinstance(values, (tuple, list)), "a deque is damaged")
    _check(length is None or _is_size(length, 2**62), "the length of a deque is damaged")
    return deque([*values, *record.items], length)


def _ordered_dict(record: Record) -> OrderedDict[Any, Any]:
    _only(record, pairs=True)
    _check(not record.args, "a dictionary is damaged")
    return OrderedDict(record.pairs)


def _path(record: Record) -> pathlib.Path:
    _only(record)
    _check(all(type(part) is str for part in record.args), "a path is damaged")
    return pathlib.Path(*record.args)


def _members(kind: Callable[[Any], Any]) -> Callable[[Record], Any]:
    def make(record: Record) -> Any:
        _only(record)
        _check(len(record.args) == 1 and type(record.args[0]) is list, "a set is damaged")
        _check(all(type(value) in (str, int, bytes, bool) for value in record.args[0]), "the member of a set is damaged")
        return kind(record.args[0])

    return make


def _byte_array(record: Record) -> bytearray:
    _only(record)
    _check(not record.args or (len(record.args) == 1 and type(record.args[0]) is bytes), "bytes are damaged")
    return bytearray(*record.args)


def _encoded(record: Record) -> bytes:
    """Make the bytes of protocol 2, which torch writes."""
    _only(record)
    _check(len(record.args) == 2 and type(record.args[0]) is str and record.args[1] == "latin1", "bytes are damaged")
    return record.args[0].encode("latin1")


def _complex(record: Record) -> complex:
    _only(record)
    _check(len(record.args) == 2 and all(type(part) in (float, int) for part in record.args), "a number is damaged")
    return complex(*record.args)


def _slice(record: Record) -> slice:
    _only(record)
    _check(len(record.args) == 3 and all(part is None or type(part) is int for part in record.args), "a slice is damaged")
    return slice(*record.args)


# ---- random generators


def _bit_generator(record: Record) -> Any:
    _only(record, state=True)
    _check(len(record.args) <= 1, "a bit generator is damaged")
    state, seeds = record.state, None
    if isinstance(state, tuple):  # NumPy 2 adds the sequence of seeds
        _check(len(state) == 2, "the state of a bit generator is damaged")
        state, seeds = state
    _check(seeds is None or isinstance(seeds, np.random.SeedSequence), "the seeds of a bit generator are damaged")
    generator = _bit_generator_class(*record.args)(0 if seeds is None else seeds)
    if state is not UNSET:
        set_bit_generator_state(generator, state)
    return generator


def _bit_generator_class(kind: Any = "MT19937") -> Any:
    if isinstance(kind, Global):
        kind = kind.name.rpartition(".")[2]
    if not isinstance(kind, str) or kind not in BIT_GENERATORS:
        raise RefusedError(f"the bit generator {label(kind)}")
    return BIT_GENERATORS[kind]


def _generator(record: Record) -> np.random.Generator:
    return np.random.Generator(_inner_generator(record))


def _random_state(record: Record) -> np.random.RandomState:
    bits = _inner_generator(record)
    made = np.random.RandomState(bits)
    if isinstance(record.state, dict) and "has_gauss" in record.state:
        _check(type(record.state["has_gauss"]) is int and record.state["has_gauss"] in (0, 1), "a generator is damaged")
        _check(type(record.state.get("gauss")) is float, "a generator is damaged")
        made.set_state({**bits.state, "has_gauss": record.state["has_gauss"], "gauss": record.state["gauss"]})
    return made


def _inner_generator(record: Record) -> Any:
    """Find what a generator draws its bits from: an object, or (NumPy 1) a name and a later state."""
    _only(record, state=True)
    _check(len(record.args) <= 2, "a generator is damaged")
    bits = record.args[0] if record.args else "MT19937"
    if not isinstance(bits, tuple(BIT_GENERATORS.values())):
        bits = _bit_generator_class(bits)(0)
    if record.state is not UNSET and record.state is not None:
        set_bit_generator_state(bits, record.state)
    return bits


def _seed_sequence(record: Record) -> np.random.SeedSequence:
    _only(record, state=True)
    _check(len(record.args) == 3, "a sequence of seeds is damaged")
    _named(record.args[0], ("numpy.random.bit_generator.SeedSequence",))
    state = record.args[2] if record.state is UNSET else record.state
    _check(isinstance(state, tuple) and len(state) == 5, "a sequence of seeds is damaged")
    entropy, spawned, pool, size, key = state
    _check(isinstance(pool, np.ndarray) and pool.dtype == np.uint32 and pool.shape == (size,), "a pool of seeds is damaged")
    _check(4 <= size <= MAX_POOL and _is_size(spawned, 2**32), "a sequence of seeds is damaged")
    _check(isinstance(key, tuple) and len(key) <= MAX_POOL and all(_is_size(part, 2**64) for part in key), "keys are damaged")
    _check(_is_entropy(entropy), "entropy is damaged")
    made = np.random.SeedSequence(entropy, spawn_key=key, pool_size=size, n_children_spawned=spawned)
    _check(entropy is None or np.array_equal(made.pool, pool), "a pool of seeds is not that of its entropy")
    return made


def _is_entropy(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "ui" and value.ndim == 1 and value.size <= MAX_POOL and bool((value >= 0).all())
    values = value if isinstance(value, (list, tuple)) else [value]
    return value is None or (len(values) <= MAX_POOL and all(type(part) is int and part >= 0 for part in values))


def _python_random(record: Record) -> random.Random:
    _only(record, state=True)
    _check(not record.args, "a generator is damaged")
    made = random.Random(0)
    if record.state is not UNSET:
        set_python_state(made, record.state)
    return made


#: Name of a function or class ↦ what makes its result.
CONSTRUCTORS: dict[str, Callable[[Record], Any]] = {
    "numpy._core.numeric._frombuffer": _array,
    "numpy._core.multiarray._reconstruct": _array_in_steps,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
    "numpy.random._pickle.__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle.__generator_ctor": _generator,
    "numpy.random._pickle.__randomstate_ctor": _random_state,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _seed_sequence,
    "random.Random": _python_random,
    **{f"{module}.{kind}": _path for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")},
    "collections.deque": _deque,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _members(set),
    "builtins.frozenset": _members(frozenset),
    "builtins.bytearray": _byte_array,
    "_codecs.encode": _encoded,
    "builtins.complex": _complex,
    "builtins.slice": _slice,
    **dict.fromkeys(CLASSES, make_object),
}
#: Globals that stand among the arguments of the calls above.
NESTED_GLOBALS = frozenset(
    {
        *ARRAYS,
        "numpy.record",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random.bit_generator.SeedSequence",
        *(f"numpy.random._{module}.{kind}" for kind in BIT_GENERATORS for module in ("pcg64", "mt19937", "philox", "sfc64")),
    }
)
