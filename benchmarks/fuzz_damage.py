"""Ways to damage a model file by its structure, for ``fuzz_files.py``."""

import base64
import io
import json
import pickle
import pickletools
import random
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from sb3_trpo import TRPO
from sb3_trpo.saving.unpickling import restricted_loads

#: Where NumPy has what pickles of arrays call, by the name of its version.
CORE: Any = np._core if hasattr(np, "_core") else np.core

Generator = random.Random

MARKS = [
    ("os", "mkdir"),
    ("posix", "mkdir"),
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "open"),
]
GLOBALS = [
    *MARKS,
    ("builtins", "getattr"),
    ("builtins", "bytearray"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("numpy.random._pickle", "__generator_ctor"),
    ("torch.nn.modules.activation", "PReLU"),
    ("torch.nn.modules.linear", "Linear"),
    ("torch.nn.modules.activation", "ReLU"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("gymnasium.spaces.box", "Box"),
    ("gymnasium.spaces.multi_binary", "MultiBinary"),
    ("stable_baselines3.common.running_mean_std", "RunningMeanStd"),
    ("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize"),
    ("stable_baselines3.common.utils", "FloatSchedule"),
    ("collections", "deque"),
    ("collections", "OrderedDict"),
    ("cloudpickle.cloudpickle", "_make_function"),
]
NAMES = [
    "__setstate__",
    "__class__",
    "__dict__",
    "__reduce__",
    "predict",
    "_setup_model",
    "env",
    "mean",
    "n",
    "low",
    "_shape",
    "x",
]
NUMBERS = [0, 1, -1, 2, 3, 255, 624, 625, 10**6, 10**9, 2**31, 2**48, 2**63, -(2**63), 2**200]
CODES = ["O", "V16", "V8", "f4", "f8", "U3", "S1", "M8", "|O8", "object", "V0", "U99999", "f16", "i4,O"]


# ---- what is changed


def _value(generator: Generator, depth: int = 0) -> Any:
    """A value of any kind, for the places in a file where one stands."""
    kind = generator.randrange(11 if depth < 3 else 6)
    simple = [
        None,
        generator.random() < 0.5,
        generator.choice(NUMBERS),
        generator.uniform(-1, 1) * 10 ** generator.randrange(40),
    ]
    if kind < 4:
        return simple[kind]
    if kind == 4:
        return generator.choice([*NAMES, *CODES, "", "x" * 1000])
    if kind == 5:
        return generator.choice([float("nan"), float("inf"), 1e-320])
    if kind in (6, 7):
        return [_value(generator, depth + 1) for _ in range(generator.randrange(5))]
    if kind in (8, 9):
        return {generator.choice(NAMES): _value(generator, depth + 1) for _ in range(generator.randrange(4))}
    value: Any = []
    for _ in range(generator.choice([10, 200])):
        value = [value]
    return value


def _pickled(generator: Generator, depth: int = 0) -> bytes:
    """The operations that push a value, without the beginning and the end of a pickle."""
    kind = generator.randrange(8)
    if kind == 0:
        return pickle.dumps(_value(generator), 2)[2:-1]
    if kind == 1 and depth < 3:
        return b"(" + b"".join(_pickled(generator, depth + 1) for _ in range(generator.randrange(4))) + b"t"
    if kind == 2:
        twice = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200, 240))
        return b")" + twice
    if kind == 3:
        return _global(generator)
    if kind == 4 and depth < 3:
        return _global(generator) + b"(" + _pickled(generator, depth + 1) + b"t" + generator.choice([b"R", b"\x81"])
    if kind == 5 and depth < 3:
        return _pickled(generator, depth + 1) + _pickled(generator, depth + 1) + b"b"
    if kind == 6:
        return _marking_call(generator)
    return b"\x8c" + bytes([1]) + b"x"


def _global(generator: Generator) -> bytes:
    module, name = generator.choice(GLOBALS)
    return f"c{module}\n{name}\n".encode()


def _marking_call(generator: Generator) -> bytes:
    """A call that leaves a mark in the working folder, if it is made."""
    module, name = generator.choice(MARKS)
    arguments: dict[str, tuple[Any, ...]] = {
        "mkdir": ("mark",),
        "system": ("touch mark",),
        "eval": ("open('mark', 'w')",),
        "exec": ("open('mark', 'w')",),
        "open": ("mark", "w"),
    }
    return f"c{module}\n{name}\n".encode() + pickle.dumps(arguments[name], 2)[2:-1] + b"R"


def _operations(contents: bytes) -> list[bytes]:
    """A pickle, operation by operation, without the frames, whose lengths would no longer be right."""
    places = [(opcode.name, place) for opcode, _, place in pickletools.genops(contents)]
    ends = [place for _, place in places[1:]] + [len(contents)]
    return [contents[start:end] for (name, start), end in zip(places, ends, strict=True) if name != "FRAME"]


def change_operations(contents: bytes, generator: Generator) -> bytes:
    """Leave out, repeat, exchange, replace or add operations of a pickle."""
    operations = _operations(contents)
    for _ in range(generator.choice([1, 1, 2, 5])):
        place, other = generator.randrange(1, len(operations)), generator.randrange(1, len(operations))
        kind = generator.randrange(7)
        if kind == 0 and len(operations) > 3:
            del operations[place]
        elif kind == 1:
            operations.insert(place, operations[other])
        elif kind == 2:
            operations[place], operations[other] = operations[other], operations[place]
        elif kind == 3:
            operations[place] = operations[other]
        elif kind == 4:
            operations[place] = _pickled(generator)
        elif kind == 5:
            operations.insert(place, _pickled(generator))
        else:
            code = generator.choice(pickletools.opcodes)
            operations.insert(place, code.code.encode("latin-1") + generator.randbytes(generator.choice([0, 1, 4])))
    return b"".join(operations)


def change_arguments(contents: bytes, generator: Generator) -> bytes:
    """Put other numbers, texts or nothing in the place of arguments: shapes, positions, names of attributes, codes."""
    operations = _operations(contents)
    arguments = [i for i, operation in enumerate(operations) if operation[:1] in b"KMJGNhX\x8a\x8c\x88\x89)" and i]
    for place in generator.sample(arguments, min(len(arguments), generator.choice([1, 1, 2, 4]))):
        is_text = operations[place][:1] in (b"\x8c", b"X")
        value = (
            generator.choice([*NAMES, *CODES]) if is_text else generator.choice([*NUMBERS, None, True, 0.5, "x", (), (1, 2)])
        )
        operations[place] = pickle.dumps(value, 2)[2:-1]
        if is_text:  # what refers to it later must find it
            text = str(value).encode()
            operations[place] = b"\x8c" + bytes([len(text)]) + text
    return b"".join(operations)


class _Call:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def _data_type(generator: Generator, depth: int = 0) -> Any:
    """A data type with any state, as NumPy's own ``__setstate__`` would believe it."""
    pick = generator.choice
    inner = _data_type(generator, depth + 1) if depth < 2 else np.dtype("f4")
    subarray = pick([None, None, (inner, (pick([1, 2, -1, 2**30]),)), (np.dtype("O"), (2,))])
    fields = pick([None, {"a": (inner, pick([0, 4, -8, 2**31]))}, {"a": (np.dtype("O"), 0), "b": (inner, 8, "title")}])
    names = None if fields is None else tuple(fields)
    sizes = (pick([-1, 0, 4, 8, 16, 2**40]), pick([-1, 1, 4, 16]), pick([0, 1, 16, 27, 63, -1]))
    state = (pick([3, 4, 0]), pick(["<", ">", "|", "=", "x"]), subarray, names, fields, *sizes)
    return _Call(np.dtype, (pick(CODES), pick([False, True]), True), state)


def crafted(generator: Generator) -> bytes:
    """A pickle of an array with a data type of any state, or of a random generator out of range."""
    kind = generator.randrange(4)
    data = generator.randbytes(generator.choice([0, 4, 8, 16, 64]))
    shape = tuple(generator.choice([0, 1, 2, 4, -1, 2**40]) for _ in range(generator.randrange(3)))
    if kind == 0:
        order = generator.choice([("C",), ("F",), ("K", (0,)), ("K", (1, 0)), ("K", (5, -9)), (7,)])
        return pickle.dumps(_Call(CORE.numeric._frombuffer, (data, _data_type(generator), shape, *order)))
    if kind == 1:
        state = (1, shape, _data_type(generator), generator.choice([True, False]), generator.choice([data, [data, None]]))
        return pickle.dumps(_Call(CORE.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state))
    if kind == 2:
        return pickle.dumps(_Call(CORE.multiarray.scalar, (_data_type(generator), data)))
    bits = generator.choice([np.random.MT19937, np.random.Philox, np.random.PCG64, np.random.SFC64])
    state = json.loads(json.dumps(bits(0).state, default=lambda value: value.tolist()))
    inner: Any = state["state"]
    for part in (inner, state):
        for name, value in part.items():
            part[name] = (
                np.array(value, np.uint32 if bits is np.random.MT19937 else np.uint64) if isinstance(value, list) else value
            )
    for part in generator.sample([inner, state], generator.choice([1, 2])):
        name = generator.choice(sorted(part))
        part[name] = generator.choice([*NUMBERS, np.zeros(generator.choice([0, 1, 3]), np.uint64)])
    function = vars(np.random._pickle)["__bit_generator_ctor"]
    call = _Call(function, (bits,), (state, None))
    return pickle.dumps(_Call(vars(np.random._pickle)["__generator_ctor"], (call,)))


def change_pickle(contents: bytes, generator: Generator) -> bytes:
    """Change a pickle in one of the ways above."""
    kind = generator.randrange(10)
    if kind < 5:
        return change_operations(contents, generator)
    return change_arguments(contents, generator) if kind < 8 else crafted(generator)


# ---- where it is changed


def _members(contents: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED, twice: str | None = None) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, data in members.items():
            archive.writestr(name, data)
        if twice is not None:
            archive.writestr(twice, members[twice])
    return file.getvalue()


def entry(contents: bytes, generator: Generator) -> bytes:
    """Change a pickled attribute."""
    members = _members(contents)
    data = json.loads(members["data"])
    pickled = [name for name, value in data.items() if isinstance(value, dict) and ":serialized:" in value]
    chosen = data[generator.choice(pickled)]
    changed = change_pickle(base64.b64decode(chosen[":serialized:"]), generator)
    chosen[":serialized:"] = base64.b64encode(changed).decode()
    return _zip({**members, "data": json.dumps(data).encode()})


def attribute(contents: bytes, generator: Generator) -> bytes:
    """Change, rename, add or exchange attributes."""
    members = _members(contents)
    data = json.loads(members["data"])
    kind, name = generator.randrange(5), generator.choice(sorted(data))
    if kind == 0:
        data[name] = _value(generator)
    elif kind == 1:
        data[generator.choice(NAMES)] = data.pop(name)
    elif kind == 2:
        data[generator.choice([*NAMES, *dir(TRPO)])] = _value(generator)
    elif kind == 3:
        other = generator.choice(sorted(data))
        data[name], data[other] = data[other], data[name]
    else:
        width = generator.choice([10**9, 60_000, 2**40])
        options = [{"net_arch": [width, width]}, {"net_arch": [8] * 10_000}, {generator.choice(NAMES): 1}, {"use_expln": [1]}]
        data["policy_kwargs"] = generator.choice(options)
        data["n_steps"] = generator.choice([data["n_steps"], 10**12, 2**20])
    return _zip({**members, "data": json.dumps(data).encode()})


def member(contents: bytes, generator: Generator) -> bytes:
    """Change the zip file: methods of compression, sizes in headers, members that are missing, twice, exchanged or bombs."""
    members = _members(contents)
    names = sorted(members)
    first, second, kind = generator.choice(names), generator.choice(names), generator.randrange(8)
    if kind == 0:
        del members[first]
    elif kind == 1:
        members[first], members[second] = members[second], members[first]
    elif kind == 2:
        members[generator.choice(["predict.pth", "../x", "x" * 70, "policy.pth/"])] = members[first]
    elif kind == 3:
        return _zip(members, twice=first)
    elif kind == 4:
        methods = [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
        return _zip(members, generator.choice(methods))
    elif kind == 5:
        members[first] = bytes(generator.choice([2**22, 2**25]))
        return _zip(members, generator.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    elif kind == 6:
        members[first] = b"[" * generator.choice([10, 10**4, 10**6])
    else:
        data = bytearray(_zip(members))
        for _ in range(generator.choice([1, 4])):
            header = data.find(generator.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6"]), generator.randrange(len(data)))
            if header >= 0:
                data[header + generator.randrange(4, 30)] = generator.randrange(256)
        return bytes(data)
    return _zip(members)


def inner(contents: bytes, generator: Generator) -> bytes:
    """Change a file inside the file: the pickle of parameters, their storages, the statistics."""
    members = _members(contents)
    name = generator.choice(["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "vec_normalize.npz"])
    parts = _members(members[name])
    chosen = generator.choice(sorted(parts))
    if chosen.endswith("data.pkl") or (name.endswith(".pth") and generator.random() < 0.6):
        chosen = next(part for part in parts if part.endswith("data.pkl"))
        parts[chosen] = change_pickle(parts[chosen], generator)
    elif chosen.endswith(".npy") and generator.random() < 0.7:
        file = io.BytesIO()
        shape = generator.choice([(2**40,), (), (3,), (-1,), (0, 2**62)])
        header = {
            "shape": shape,
            "fortran_order": generator.choice([True, False]),
            "descr": generator.choice(["<f8", "|O", "<U9"]),
        }
        np.lib.format.write_array_header_1_0(file, header)
        parts[chosen] = file.getvalue() + generator.randbytes(24)
    else:
        parts[chosen] = generator.choice([b"", parts[chosen][:-1], parts[chosen] * 2, bytes(2**23)])
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
    return _zip({**members, name: _zip(parts, generator.choice(methods))})


def resumption(contents: bytes, generator: Generator) -> bytes:
    """Change what a checkpoint has beside the model, the states of environments and wrappers inside it among them."""
    members = _members(contents)
    if generator.random() < 0.5:
        members["sb3_trpo_resume.pkl"] = change_pickle(members["sb3_trpo_resume.pkl"], generator)
        return _zip(members)
    states = restricted_loads(members["sb3_trpo_resume.pkl"])
    where, key = generator.choice([(states[0]["envs"], 0), (states[0]["wrappers"], "0:VecNormalize")])
    where[key] = change_pickle(where[key], generator)
    return _zip({**members, "sb3_trpo_resume.pkl": pickle.dumps(states)})


WAYS: list[Callable[[bytes, Generator], bytes]] = [entry, entry, attribute, member, inner, resumption]


def damaged(original: bytes, number: int) -> tuple[str, bytes]:
    """
    Make a damaged file.

    :param original: a whole one
    :param number: which
    :return: the way, and the file
    """
    generator = Generator(number)
    way, contents = generator.choice(WAYS), original
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        try:
            contents = way(contents, generator)
        except Exception:  # noqa: BLE001 - it is too damaged to be changed further
            break
    return way.__name__, contents
