"""Pickles in saved files: what SB3 writes comes back, and crafted ones are refused before anything is made."""

import base64
import copyreg
import json
import pathlib
import pickle
import random
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from numpy.random import _pickle as numpy_random
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_trpo.saving.pickle_records import MAX_MEMORY, Budget
from sb3_trpo.saving.random_state import random_state, set_random_state
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads

BLOCK = np.arange(24.0).reshape(2, 3, 4)
STRUCTURED = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])


def read_only() -> np.ndarray:
    array = np.ones(3)
    array.flags.writeable = False
    return array


def drawn(generator: Any) -> Any:
    """A generator with half a Gaussian or 32 bits kept back."""
    generator.gauss(0.0, 1.0) if isinstance(generator, random.Random) else generator.normal()
    return generator


def seeded(space: spaces.Space) -> spaces.Space:
    space.seed(3)
    return space


GENERATORS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
ARRAYS = {
    "transposed": BLOCK.transpose(2, 0, 1),
    "fortran": np.asfortranarray(BLOCK),
    "with_gaps": BLOCK[::2, ::2, ::2],
    "float16": BLOCK.astype(np.float16),
    "bool": BLOCK > 3,
    "empty": np.zeros((0, 3)),
    "one_number": np.zeros(()),
    "read_only": read_only(),
    "big_endian": BLOCK.astype(">f4"),
    "complex": BLOCK.astype(np.complex64),
    "text": np.array(["ab", "c"]),
    "bytes": np.array([b"ab", b"c"]),
    "structured": STRUCTURED,
    "padded": np.zeros(2, np.dtype({"names": ["a"], "formats": ["f4"], "offsets": [4], "itemsize": 16})),
    "dates": np.array([1, 2], "M8[ns]"),
    "spans": np.array([1, 2], "m8[10s]"),
    "matrix": np.asmatrix(np.ones((1, 2))),
    "records": STRUCTURED.view(np.recarray),
}
VALUES = {
    "float32": np.float32(1.5),
    "truth": np.bool_(True),
    "date": np.datetime64("2020-01-01"),
    "dtype": np.dtype("U3"),
    "deque": deque([1, 2], 3),
    "endless_deque": deque([1]),
    "ordered": OrderedDict(a=1),
    "slice": slice(1, None),
    "path": pathlib.Path("/a/b"),
    "complex": 1 + 2j,
    "set": {1, "a", b"b"},
    "frozenset": frozenset({1}),
    "bytearray": bytearray(b"ab"),
    "nested": [1, {"a": (1, None, {2: [True]})}],
    "class": th.nn.ReLU,
    "number_class": np.float32,
}
SPACES = {
    "box": seeded(spaces.Box(-1, 1, (2,))),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "image": spaces.Box(0, 255, (2, 3, 3), np.uint8),
    "integers": spaces.Box(-np.inf, 3, (2,), np.int32),
    "half_bounded": spaces.Box(np.zeros(2), np.array([1, np.inf]), dtype=np.float64),
    "discrete": seeded(spaces.Discrete(3, start=2)),
    "multi_discrete": spaces.MultiDiscrete([2, 3], start=[1, 1]),
    "nested_multi_discrete": spaces.MultiDiscrete([[2, 3]]),
    "multi_binary": spaces.MultiBinary(3),
    "multi_binary_matrix": spaces.MultiBinary([2, 2]),
    "dict": seeded(spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple([spaces.Box(-1, 1, (2,))]))),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_restricted_loads_gives_back_arrays(name: str, protocol: int) -> None:
    contents = pickle.dumps(ARRAYS[name], protocol)
    expected, made = pickle.loads(contents), restricted_loads(contents)

    assert (type(made), made.shape) == (type(expected), expected.shape)
    assert made.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")  # NumPy makes early protocols' numbers native
    assert np.array_equal(made, expected)
    assert made.flags.writeable == expected.flags.writeable
    if made.size:
        assert made.strides == expected.strides


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_restricted_loads_gives_back_values(name: str, protocol: int) -> None:
    made = restricted_loads(pickle.dumps(VALUES[name], protocol))

    assert type(made) is type(VALUES[name])
    assert made == VALUES[name]
    if isinstance(made, deque):
        assert made.maxlen == VALUES[name].maxlen


@pytest.mark.parametrize("name", SPACES)
def test_restricted_loads_gives_back_spaces(name: str) -> None:
    contents = pickle.dumps(SPACES[name])
    expected, made = pickle.loads(contents), restricted_loads(contents)

    assert made == expected
    assert vars(made).keys() == vars(expected).keys()
    if expected._np_random is None:
        expected.seed(0), made.seed(0)
    assert str([made.sample() for _ in range(3)]) == str([expected.sample() for _ in range(3)])


@pytest.mark.parametrize("bits", GENERATORS)
def test_restricted_loads_gives_back_generators(bits: Any) -> None:
    for generator in (drawn(np.random.Generator(bits(1))), drawn(np.random.RandomState(np.random.MT19937(1)))):
        generator.integers(9) if hasattr(generator, "integers") else None
        made = restricted_loads(pickle.dumps(generator))
        assert made.normal() == generator.normal()
    made = restricted_loads(pickle.dumps(np.random.Generator(bits(1))))
    if hasattr(made, "spawn"):  # from NumPy 1.25 on
        assert made.spawn(1)[0].random() == np.random.Generator(bits(1)).spawn(1)[0].random()


def test_restricted_loads_gives_back_seeds_and_pythons_generator() -> None:
    seeds = np.random.SeedSequence(1).spawn(2)[1]
    made = restricted_loads(pickle.dumps(seeds))
    assert made.state == seeds.state
    assert np.array_equal(made.generate_state(4), seeds.generate_state(4))

    generator = drawn(random.Random(3))
    assert restricted_loads(pickle.dumps(generator)).gauss(0, 1) == generator.gauss(0, 1)


def test_restricted_loads_gives_back_wrappers_and_schedules() -> None:
    env = VecNormalize(VecFrameStack(make_vec_env("Pendulum-v1", 2), 3))
    env.reset()
    env.step(np.zeros((2, 1)))
    made = restricted_loads(pickle.dumps(env))
    assert np.array_equal(made.obs_rms.mean, env.obs_rms.mean)
    assert made.venv is None
    frames = restricted_loads(pickle.dumps(env.venv.stacked_obs))
    assert np.array_equal(frames.stacked_obs, env.venv.stacked_obs.stacked_obs)

    wrapped = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
    wrapped.reset(seed=0)
    assert np.array_equal(restricted_loads(pickle.dumps(wrapped.obs_rms)).mean, wrapped.obs_rms.mean)
    assert restricted_loads(pickle.dumps(FloatSchedule(LinearSchedule(1.0, 0.0, 1.0))))(0.5) == 0.5
    assert restricted_loads(pickle.dumps(ConstantSchedule(2.0)))(0.5) == 2.0


def test_restricted_loads_reads_pickles_of_numpy_1() -> None:
    contents = json.loads((Path(__file__).parent / "numpy_1_26.json").read_text())
    made = {name: restricted_loads(base64.b64decode(entry)) for name, entry in contents.items()}

    assert made["fortran"].flags.f_contiguous
    assert np.array_equal(made["transposed"], BLOCK.transpose(2, 0, 1))
    assert made["scalar"] == np.float32(1.5)
    for bits in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        assert made[f"generator_{bits.__name__}"].random() == np.random.Generator(bits(1)).random()
    assert made["random_state"].normal() == drawn(np.random.RandomState(1)).normal()
    assert np.array_equal(made["box"].sample(), seeded(spaces.Box(-1, 1, (2,))).sample())
    assert made["dict"] == spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(2))
    assert made["multi_binary"] == spaces.MultiBinary([2, 2])


# ---- crafted pickles


class Made:
    """Pickled as a call, with a state that the result is filled in with."""

    def __init__(self, function: Any, arguments: tuple[Any, ...] = (), state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def data_type(code: str, *state: Any) -> Made:
    return Made(np.dtype, (code, False, True), state)


PLAIN = (None, None, None, -1, -1, 0)
FLOAT = data_type("f4", 3, "<", *PLAIN)
POINTERS = data_type("V16", 3, "|", (data_type("O", 3, "|", None, None, None, -1, -1, 63), (2,)), None, None, 16, 1, 0)
FAR_FIELD = data_type("V8", 3, "|", None, ("a",), {"a": (FLOAT, 2**30)}, 8, 1, 16)
NEGATIVE_FIELD = data_type("V8", 3, "|", None, ("a",), {"a": (FLOAT, -64)}, 8, 1, 16)
HIDDEN_OBJECT = data_type("V8", 3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 16)


def buffer_of(dtype: Any, data: bytes = bytes(16), shape: tuple[int, ...] = (1,)) -> Made:
    return Made(np.empty(1).__reduce_ex__(5)[0], (data, dtype, shape, "C"))


def bits_of(kind: Any, **changes: Any) -> Made:
    state = kind(0).state
    state = {**state, "state": {**state["state"], **changes.pop("inner", {})}, **changes}
    return Made(numpy_random.__dict__["__bit_generator_ctor"], (kind,), (state, None))


def seeds_of(size: int) -> Made:
    pool = np.zeros(4, np.uint32)
    function = vars(np.random.bit_generator)["__pyx_unpickle_SeedSequence"]
    return Made(function, (np.random.SeedSequence, 65708578, None), (1, 0, pool, size, ()))


def new(kind: type, state: Any) -> bytes:
    """A pickle of an object of a class with any state."""

    class Posing(Made):
        __class__ = property(lambda _: kind)  # type: ignore[assignment]

    return pickle.dumps(Posing(copyreg.__newobj__, (kind,), state))  # type: ignore[attr-defined]


def nested_tuple(depth: int, end: bytes = b"") -> bytes:
    """``x = (x, x)`` over and over: 4 bytes each, and 2 ** depth items."""
    twice = b"".join(pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(depth))
    return pickle.PROTO + b"\x02" + pickle.EMPTY_TUPLE + twice + end + pickle.STOP


MOMENTS = {"mean": np.zeros(2), "var": np.ones(2), "count": 1.0}
CRAFTED = {
    "s1_object_subarray": pickle.dumps(buffer_of(POINTERS, b"A" * 16, (2,))),
    "s1_field_far_outside": pickle.dumps(buffer_of(FAR_FIELD, bytes(8))),
    "s1_field_before_its_array": pickle.dumps(buffer_of(NEGATIVE_FIELD, bytes(8))),
    "s1_object_in_a_field": pickle.dumps(buffer_of(HIDDEN_OBJECT, bytes(8))),
    "s1_objects": pickle.dumps(buffer_of(np.dtype("O"), bytes(8))),
    "s1_array_of_objects": pickle.dumps(np.array([None, {}])),
    "s1_longer_than_its_bytes": pickle.dumps(buffer_of(FLOAT, bytes(4), (1000,))),
    "s1_negative_shape": pickle.dumps(buffer_of(FLOAT, bytes(4), (-1,))),
    "s1_item_of_an_array": pickle.dumps(np.zeros(3))[:-1] + b"K\x00K\x01s.",
    "s2_mt19937": pickle.dumps(bits_of(np.random.MT19937, inner={"pos": 10**9})),
    "s2_mt19937_before": pickle.dumps(bits_of(np.random.MT19937, inner={"pos": -1})),
    "s2_mt19937_short_key": pickle.dumps(bits_of(np.random.MT19937, inner={"key": np.zeros(3, np.uint32)})),
    "s2_philox": pickle.dumps(bits_of(np.random.Philox, buffer_pos=-(10**6))),
    "s2_philox_after": pickle.dumps(bits_of(np.random.Philox, buffer_pos=5)),
    "s2_pcg64": pickle.dumps(bits_of(np.random.PCG64, inner={"inc": -1})),
    "s2_sfc64": pickle.dumps(bits_of(np.random.SFC64, inner={"state": np.zeros(1, np.uint64)})),
    "s2_seed_sequence": pickle.dumps(seeds_of(10**9)),
    "s2_python": pickle.dumps(Made(random.Random, (), (3, (0,) * 624 + (10**6,), None))),
    "s3_setstate_in_the_object": new(RunningMeanStd, {**MOMENTS, "__setstate__": th.nn.PReLU}),
    "s3_class_replaced": new(RunningMeanStd, {**MOMENTS, "__class__": th.nn.Linear}),
    "s3_slots": new(RunningMeanStd, (None, {"__class__": th.nn.Linear})),
    "s3_twice": new(RunningMeanStd, MOMENTS)[:-1] + b"}b.",
    "s3_key_that_is_no_text": new(RunningMeanStd, {**MOMENTS, 1: 1}),
    "s3_another_attribute": new(RunningMeanStd, {**MOMENTS, "update": 1}),
    "s3_class_called": pickle.dumps(Made(th.nn.PReLU, (10,))),
    "s3_box_out_of_shape": new(spaces.Box, {**vars(spaces.Box(-1, 1, (2,))), "_shape": (10**6,)}),
    "s3_schedule_of_a_class": new(FloatSchedule, {"value_schedule": th.nn.PReLU}),
    "s4_tuple_as_key": nested_tuple(45, b"}" + pickle.BINGET + b"\x2cNs"),
    "s4_tuple_as_member": nested_tuple(45, b"\x8f(" + pickle.BINGET + b"\x2c\x90"),
    "s4_tuple": nested_tuple(45),
    "s4_deep": pickle.PROTO + b"\x02" + b")" + b"\x85" * 5000 + b".",
    "s4_itself": pickle.PROTO + b"\x02]q\x00h\x00a.",
    "s4_many_lists": b"\x80\x02(" + b"]" * 300_000 + b"t.",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_restricted_loads_refuses_crafted_pickles(name: str) -> None:
    with pytest.raises(pickle.UnpicklingError) as error:
        restricted_loads(CRAFTED[name])
    assert len(str(error.value)) < 500


def test_restricted_loads_makes_no_object_of_a_refused_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal at the end of a pickle comes before objects at its beginning are used."""
    calls: list[str] = []
    monkeypatch.setattr(RunningMeanStd, "__setstate__", lambda *_: calls.append("setstate"), raising=False)
    monkeypatch.setattr(RunningMeanStd, "__init__", lambda *_: calls.append("init"))

    restricted_loads(new(RunningMeanStd, MOMENTS))
    assert not calls


def test_restricted_loads_spends_one_budget_on_a_file() -> None:
    budget, contents = Budget(0), pickle.dumps([[] for _ in range(10_000)])
    restricted_loads(contents, budget)
    budget.spend(3 * MAX_MEMORY // 4)
    with pytest.raises(RefusedError, match="memory"):
        restricted_loads(contents, budget)


@pytest.mark.parametrize(
    "change",
    [
        {"numpy": ("MT19937", np.zeros(624, np.uint32), 10**9, 0, 0.0)},
        {"numpy": ("MT19937", np.zeros(3, np.uint32), 1, 0, 0.0)},
        {"python": (3, (0,) * 624 + (10**6,), None)},
        {"torch": np.zeros(3, np.uint8)},
        {"cuda": [1]},
    ],
)
def test_set_random_state_checks_before_it_sets(change: dict[str, Any]) -> None:
    before = random_state()
    with pytest.raises(pickle.UnpicklingError, match="generator"):
        set_random_state({**before, **change})
    assert np.array_equal(random_state()["numpy"][1], before["numpy"][1])
    assert random_state()["python"] == before["python"]
