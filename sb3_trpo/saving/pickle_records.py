"""Read a pickle as data: which calls it asks for, with which arguments, without making any of them.

A pickle is a program for a stack machine. This one has only the operations that pickles of protocols 2 to 5 are written with,
decoded by the public ``pickletools.genops``. It makes lists, tuples, numbers, text and bytes, and for everything else a
record of what was asked for, which a second step (:mod:`sb3_trpo.saving.unpickling`) checks and builds. Subclassing
``pickle.Unpickler`` cannot do that: it makes objects and fills them in while it reads, and filling in an object is a call.
"""

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

#: Most operations in a pickle, and the length of a whole number in bits.
MAX_OPERATIONS = 2_000_000
MAX_INTEGER_BITS = 1024
#: Memory that the objects in a pickle may take, beyond twice the file's size: estimates of bytes for each.
MAX_MEMORY = 2**25
CONTAINER_BYTES, SCALAR_BYTES, MEMO_BYTES = 500, 40, 100


class RefusedError(pickle.UnpicklingError):
    """
    A pickle asks for something that is not on the lists.

    :param what: the global, or the operation
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Budget:
    """
    Bound the memory of the objects that are read from one file.

    :param size: size of the file
    """

    def __init__(self, size: int) -> None:
        self._left = MAX_MEMORY + 2 * size

    def spend(self, amount: int) -> None:
        """
        Count an object.

        :param amount: its bytes, roughly
        :raises RefusedError: the objects of the file take too much memory
        """
        self._left -= amount
        if self._left < 0:
            raise RefusedError("far more memory than the file takes")


@dataclass(frozen=True)
class Global:
    """
    The name of a function or class.

    :param name: module and name, those of NumPy 1 as NumPy 2 has them
    """

    name: str


class _Unset:
    """The state of a record that has none."""


UNSET: Final = _Unset()


@dataclass(eq=False)
class Record:
    """
    A call that the pickle asks for, and what it then does to the result.

    :param name: the function or class
    :param args: positional arguments
    :param state: what the result is filled in with
    :param items: what is appended to it
    :param pairs: keys and values that are set in it
    """

    name: str
    args: tuple[Any, ...]
    state: Any = UNSET
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Reference:
    """
    An object outside the pickle.

    :param key: what it is known by
    """

    key: Any


class Mapping(list[tuple[Any, Any]]):
    """A dictionary as pairs: keys are hashed only after they are checked."""


class Members(list[Any]):
    """A set."""


class FrozenMembers(list[Any]):
    """A frozen set."""


#: Operations that push their own argument.
SCALARS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": Mapping, "EMPTY_SET": Members}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """
    The stack machine.

    :param budget: bound of the memory
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """
        Read a pickle.

        :param data: the pickle
        :return: what is on the stack at the end
        :raises RefusedError: an operation is not allowed, or there are too many
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if count >= MAX_OPERATIONS:
                raise RefusedError(f"more than {MAX_OPERATIONS} operations")
            if name in SCALARS:
                self._push_scalar(argument)
            elif name in CONSTANTS:
                self._push(CONSTANTS[name], SCALAR_BYTES)
            elif name in CONTAINERS:
                self._push(CONTAINERS[name](), CONTAINER_BYTES)
            elif name in TUPLES:
                self._push(tuple(self._pop(TUPLES[name])), CONTAINER_BYTES)
            elif name in OPERATIONS:
                OPERATIONS[name](self, argument)
            elif name == "STOP":
                return self._pop(1)[0]
            elif name not in ("PROTO", "FRAME"):
                raise RefusedError("an operation that SB3's files do not need")
        raise pickle.UnpicklingError("the pickle has no end")

    def _push(self, value: Any, size: int) -> None:
        self._budget.spend(size)
        self._stack.append(value)

    def _push_scalar(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise RefusedError(f"a whole number of more than {MAX_INTEGER_BITS} bits")
        size = len(value) if isinstance(value, (str, bytes, bytearray)) else 0
        # A character outside Latin-1 takes up to four bytes.
        self._push(value, SCALAR_BYTES + (size if not isinstance(value, str) or value.isascii() else 4 * size))

    def _pop(self, count: int) -> list[Any]:
        """Take the topmost values; those below a mark cannot be reached."""
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise pickle.UnpicklingError("the stack is empty")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise pickle.UnpicklingError("there is no mark")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self) -> Any:
        (value,) = self._pop(1)
        self._stack.append(value)
        return value

    def mark(self, _: Any) -> None:
        self._budget.spend(SCALAR_BYTES)
        self._marks.append(len(self._stack))

    def make_tuple(self, _: Any) -> None:
        self._push(tuple(self._pop_mark()), CONTAINER_BYTES)

    def make_frozenset(self, _: Any) -> None:
        self._push(FrozenMembers(self._pop_mark()), CONTAINER_BYTES)

    def name_text(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def name_stack(self, _: Any) -> None:
        self._name(*self._pop(2))

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedError("a global whose name is no text")
        full = f"{module}.{name}"
        if full.startswith("numpy.core."):  # NumPy 1's name
            full = full.replace("numpy.core.", "numpy._core.", 1)
        self._push(Global(full), CONTAINER_BYTES)

    def call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError(f"a call of what the global {label(function)} gives")
        self._push(Record(function.name, arguments), CONTAINER_BYTES)

    def fill_in(self, _: Any) -> None:
        (state,) = self._pop(1)
        target = self._top()
        if not isinstance(target, Record) or target.state is not UNSET:
            raise RefusedError(f"filling in {label(target)}")
        target.state = state

    def append(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target.items.extend(values)
        elif type(target) is list:
            target.extend(values)
        else:
            raise RefusedError(f"appending to {label(target)}")

    def add(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, Members):
            raise RefusedError(f"adding to {label(target)}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self._top()
        pairs = target.pairs if isinstance(target, Record) else target
        if not isinstance(target, (Record, Mapping)) or len(values) % 2:
            raise RefusedError(f"setting an item of {label(target)}")
        self._budget.spend(MEMO_BYTES * (len(values) // 2))
        pairs.extend(zip(values[::2], values[1::2], strict=True))

    def remember(self, index: Any) -> None:
        self._budget.spend(MEMO_BYTES)
        self._memo[len(self._memo) if index is None else index] = self._top()

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise pickle.UnpicklingError("a reference to nothing")
        self._push(self._memo[index], SCALAR_BYTES)

    def refer(self, _: Any) -> None:
        self._push(Reference(self._pop(1)[0]), CONTAINER_BYTES)


OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.make_tuple,
    "FROZENSET": _Machine.make_frozenset,
    "GLOBAL": _Machine.name_text,
    "STACK_GLOBAL": _Machine.name_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.fill_in,
    "APPEND": lambda machine, _: machine.append(machine._pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine._pop_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine._pop_mark()),
    "MEMOIZE": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "BINPERSID": _Machine.refer,
}


def label(value: object) -> str:
    """
    Name an object in a message, which its own ``repr`` could make endless.

    :param value: any object
    :return: at most about a hundred characters
    """
    if isinstance(value, (Global, Record)):
        return value.name[:100]
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value if not isinstance(value, str) else value[:80])[:100]
    return f"a {type(value).__name__.strip('_')}"[:100]


def read_records(data: bytes, budget: Budget) -> Any:
    """
    Read a pickle without making an object of it.

    :param data: the pickle
    :param budget: bound of the memory
    :return: plain data and records
    :raises RefusedError: an operation is not allowed, or there are too many
    """
    return _Machine(budget).run(data)
