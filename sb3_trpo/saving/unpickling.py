"""Unpickling what SB3 puts into its files, and nothing else.

A pickle is a program: it names functions and calls them. Here it may name a class of SB3, sb3-contrib, torch.nn or
torch.optim, as a value, and call or fill in only what :data:`FUNCTIONS` and :data:`CLASSES` list, none of which runs code of
the file's author. Names with dots, nested pickles, ``getattr`` and the like are not on the lists.
"""

import io
import pathlib
import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.random import bit_generator
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations
from torch import nn
from torch.optim import Optimizer

BIT_GENERATORS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
#: Modules whose classes a pickle may name as values, if they are already imported and of these kinds.
VALUE_MODULES = ("stable_baselines3.", "sb3_contrib.", "sb3_trpo.", "torch.nn.modules.", "torch.optim.")
VALUE_KINDS = (nn.Module, Optimizer, BaseBuffer)


class RefusedError(pickle.UnpicklingError):
    """
    A pickle asks for something that is not on the lists.

    :param what: the global, or the operation
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def _array(buffer: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _empty_array(subtype: type, shape: tuple[int, ...], _: bytes) -> np.ndarray:
    """Make the array that a pickle's next operation fills: a file may not ask for a large one here."""
    if subtype is not np.ndarray or shape != (0,):
        raise RefusedError("an array before its contents")
    return np.empty(0, np.int8)


def _byte_array(data: bytes = b"") -> bytearray:
    return bytearray(memoryview(data))  # a number would ask for that many zeros


def _dtype(code: str, align: bool = False, _: bool = False) -> np.dtype[Any]:
    """Make a data type of the pickle's own, for filling in NumPy's one would change it for everybody."""
    if not isinstance(code, str):
        raise RefusedError("a data type made from an object")
    return np.dtype(code, align=bool(align), copy=True)


def _scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _bit_generator(kind: Any = "MT19937") -> Any:
    for known in BIT_GENERATORS:
        if kind is known or kind == known.__name__:
            return known(0)
    raise RefusedError("an unknown bit generator")


def _generator(bits: Any = "MT19937", _: Any = None) -> np.random.Generator:
    return np.random.Generator(bits if isinstance(bits, BIT_GENERATORS) else _bit_generator(bits))


def _random_state(bits: Any = "MT19937", _: Any = None) -> np.random.RandomState:
    return np.random.RandomState(bits if isinstance(bits, BIT_GENERATORS) else _bit_generator(bits))


def _seed_sequence(kind: type, checksum: int, state: Any) -> Any:
    if kind is not np.random.SeedSequence:
        raise RefusedError("a seed sequence of another class")
    return vars(bit_generator)["__pyx_unpickle_SeedSequence"](kind, checksum, state)


#: What a pickle may call, by the name it has there.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "numpy._core.numeric._frombuffer": _array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
    "numpy.random._pickle.__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle.__generator_ctor": _generator,
    "numpy.random._pickle.__randomstate_ctor": _random_state,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _seed_sequence,
    "random.Random": random.Random,
    "pathlib.PosixPath": pathlib.Path,
    "pathlib.WindowsPath": pathlib.Path,
    "pathlib._local.PosixPath": pathlib.Path,
    "pathlib._local.WindowsPath": pathlib.Path,
    "collections.deque": deque,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": _byte_array,
    "builtins.complex": complex,
    "builtins.slice": slice,
}
#: Classes whose objects a pickle may make and fill in.
CLASSES: tuple[type, ...] = (
    spaces.Box,
    spaces.Discrete,
    spaces.MultiDiscrete,
    spaces.MultiBinary,
    spaces.Dict,
    spaces.Tuple,
    FloatSchedule,
    ConstantSchedule,
    LinearSchedule,
    RunningMeanStd,
    StackedObservations,
    VecNormalize,
)
#: Further values that a pickle may name.
VALUES: tuple[type, ...] = (np.ndarray, np.random.SeedSequence, *BIT_GENERATORS)
#: Types whose objects a pickle may fill in; those that have functions above make them.
FILLED: tuple[type, ...] = (
    *CLASSES,
    *VALUES,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
    deque,
    OrderedDict,
)

NAMED: dict[str, Any] = {
    **FUNCTIONS,
    **{f"{kind.__module__}.{kind.__qualname__}": kind for kind in (*CLASSES, *VALUES)},
    **{f"numpy.random.{kind.__module__.rpartition('.')[2]}.{kind.__name__}": kind for kind in BIT_GENERATORS},
}


def _label(target: object) -> str:
    """What to call an object; its own ``repr`` could be endless."""
    return getattr(target, "__qualname__", None) or f"a {type(target).__name__}"


def _is_value(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, VALUE_KINDS)


class RestrictedUnpickler(pickle._Unpickler):
    """
    Python's own unpickler with the lists above. The C one cannot tell a class from its object when it fills one in.

    :param data: the pickle
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._size = len(data)

    def find_class(self, module: str, name: str) -> Any:
        """
        Look up a global.

        :param module: its module
        :param name: its name
        :return: what the lists have for it
        :raises RefusedError: the lists do not have it
        """
        full = f"{module}.{name}"
        if module.startswith("numpy.core."):  # NumPy 1's name
            full = full.replace("numpy.core.", "numpy._core.", 1)
        if full in NAMED:
            return NAMED[full]
        if module.startswith(VALUE_MODULES) and module in sys.modules:
            value = vars(sys.modules[module]).get(name)
            if _is_value(value):
                return value
        raise RefusedError(f"the global {full}")

    def persistent_load(self, pid: Any) -> Any:
        """
        Refuse to look up an object outside the file.

        :param pid: its name
        :raises RefusedError: always
        """
        raise RefusedError("an object outside the file")

    def _reduce(self) -> None:
        function = self.stack[-2]
        if not any(function is known for known in FUNCTIONS.values()):
            raise RefusedError(f"a call of {_label(function)}")
        pickle._Unpickler.dispatch[pickle.REDUCE[0]](self)  # type: ignore[arg-type]

    def _new_object(self) -> None:
        kind, arguments = self.stack[-2:]
        if not any(kind is known for known in CLASSES) or arguments:
            raise RefusedError(f"an object made by {_label(kind)}")
        pickle._Unpickler.dispatch[pickle.NEWOBJ[0]](self)  # type: ignore[arg-type]

    def _build(self) -> None:
        target = self.stack[-2]
        if not (type(target) in FILLED or isinstance(target, np.dtype)):
            raise RefusedError(f"filling in {_label(target)}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(self.read(size)))

    def _refuse(self) -> None:
        raise RefusedError("an operation that SB3's files do not need")

    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new_object
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = _refuse
    del _code


def restricted_loads(data: bytes) -> Any:
    """
    Unpickle what the lists of this module allow.

    :param data: the pickle
    :return: the object
    :raises RefusedError: the pickle asks for something else; nothing of it was run
    """
    return RestrictedUnpickler(data).load()
