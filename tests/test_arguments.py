import math
from fractions import Fraction

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from sb3_trpo import arguments as validation
from sb3_trpo.arguments import POSITIVE, Rule, check_arguments, instance_of, one_of, schedule_value, shown, subclass_of

BOXES = (spaces.Box(-1.0, 1.0), spaces.Box(-1.0, 1.0))
NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = [None, "1", [1], 1j, th.tensor(1.0), np.array([1.0, 2.0]), int, len]


def no_argument():
    return 1.0


def raises(progress_remaining):
    raise KeyError("no such phase")


def returns(value):
    def schedule(progress_remaining):
        return value

    schedule.__qualname__ = f"returns {value!r}"
    return schedule


SCHEDULES = [
    math.sqrt,
    ConstantSchedule(0.1),
    LinearSchedule(0.1, 0.0, 1.0),
    returns(np.float32(0.1)),
    returns(th.tensor(0.1)),
    returns(1),
]
NO_SCHEDULES = [
    no_argument,
    raises,
    lambda progress_remaining: 1.0 / progress_remaining,
    lambda progress_remaining: progress_remaining - 0.5,
    *map(returns, [None, "0.1", np.array([0.1]), th.tensor([0.1]), -0.1, NAN, INF, True, 1j]),
]

#: Rule ↦ values it allows, values it refuses.
TABLE = {
    "POSITIVE_INTEGER": (
        [1, 7, np.int64(3), np.int8(100), np.uint8(200), 2**63 - 1],
        [0, -1, 1.0, 1.5, True, np.True_, NAN, INF, np.float64(2.0), 2**63, 10**30, Fraction(3, 1), *NOT_NUMBERS],
    ),
    "POSITIVE_INTEGER_OR_NONE": ([None, 1, np.int64(3)], [0, -1, 1.0, True, NAN, "1", 2**63]),
    "BOOLEAN": ([True, False, np.True_], [0, 1, None, "no", np.array(True)]),
    "VERBOSITY": ([0, 1, 2, True, np.int8(1)], [-1, 0.5, None, "1"]),
    "SEED": ([None, 0, 2**32 - 1, np.uint32(7)], [-1, 2**32, 0.0, True, "0"]),
    "SAMPLE_FREQUENCY": ([-1, 1, 4, np.int8(-1)], [0, -2, 1.5, True, None]),
    "NATURAL_NUMBER": ([0, 1, np.int32(3)], [-1, 0.0, False, NAN, INF, *NOT_NUMBERS]),
    "UNIT_INTERVAL": (
        [0, 0.0, 1, 1.0, 0.99, np.float32(0.5), Fraction(1, 4)],
        [-1e-9, 1.0 + 1e-9, True, NAN, INF, *NOT_NUMBERS],
    ),
    "OPEN_UNIT_INTERVAL": ([1e-9, 0.8, 1.0 - 1e-9], [0, 0.0, 1, 1.0, -0.5, 2, True, NAN, *NOT_NUMBERS]),
    "NON_NEGATIVE": ([0, 0.0, 1e-300, 5, np.float64(2.0), 2**70], [-1e-300, -1, False, NAN, INF, -INF, 10**400, *NOT_NUMBERS]),
    "POSITIVE": (
        [1e-300, 5, np.float64(2.0), np.int8(100)],
        [0, 0.0, -0.0, -1, True, NAN, INF, -INF, Fraction(1, 10**400), *NOT_NUMBERS],
    ),
    "POSITIVE_OR_SCHEDULE": ([0.05, *SCHEDULES], [0, -1.0, True, NAN, INF, *NOT_NUMBERS, *NO_SCHEDULES]),
    "POSITIVE_OR_SCHEDULE_OR_NONE": ([None, 0.05, *SCHEDULES], [0, -1.0, True, NAN, INF, "1", *NO_SCHEDULES]),
    "NON_NEGATIVE_OR_SCHEDULE": ([0, 0.05, *SCHEDULES], [-1.0, True, NAN, INF, *NOT_NUMBERS, *NO_SCHEDULES]),
    "PATH_OR_NONE": ([None, "logs"], [b"logs", 1, ["logs"], True]),
    "KEYWORD_ARGUMENTS_OR_NONE": ([None, {}, {"net_arch": [4]}], [[], "dict()", {1: 2}, 0]),
    "DEVICE": (
        ["auto", "cpu", th.device("cpu"), "cuda"],
        ["", "gpu", 0, None, "meta", "cpu:-1", *([] if th.cuda.device_count() == 0 else ["cuda:99"])],
    ),
    "ROLLOUT_BUFFER_CLASS_OR_NONE": (
        [None, RolloutBuffer, DictRolloutBuffer],
        [ReplayBuffer, RolloutBuffer(1, *BOXES), "", 0],
    ),
    "ENVIRONMENT": ([None, "CartPole-v1"], [0, object(), [], dict]),
}


def pairs(column):
    return [
        pytest.param(name, value, id=f"{name}-{i}-{type(value).__name__}")
        for name, row in TABLE.items()
        for i, value in enumerate(row[column])
    ]


def test_rule_has_its_row():
    assert {name for name, value in vars(validation).items() if isinstance(value, Rule)} == set(TABLE)


@pytest.mark.parametrize(("rule", "value"), pairs(0))
def test_rule_allows_and_converts(rule, value):
    converted = check_arguments({"size": getattr(validation, rule)}, {"size": value})["size"]
    assert converted == value
    if isinstance(value, np.generic | Fraction):
        assert type(converted) in (int, float, bool)


@pytest.mark.parametrize(("rule", "value"), pairs(1))
def test_rule_refuses(rule, value):
    assert not getattr(validation, rule).holds(value)
    with pytest.raises(ValueError, match=r"^size=.* is not allowed: it must be"):
        check_arguments({"size": getattr(validation, rule)}, {"size": value})


def test_message_names_argument_value_and_what_is_allowed():
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        check_arguments({"target_kl": POSITIVE}, {"target_kl": -0.5})
    assert str(error.value) == "target_kl=-0.5 is not allowed: it must be a finite number above 0"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (raises, r"it raised KeyError\('no such phase'\) at progress_remaining=1.0"),
        (no_argument, r"it raised TypeError"),
        (lambda progress_remaining: 1.0 / progress_remaining, r"ZeroDivisionError.* at progress_remaining=0.0"),
        (returns(None), r"it returned None at progress_remaining=1.0"),
        (returns(NAN), r"it returned nan at progress_remaining=1.0"),
        (lambda progress_remaining: progress_remaining - 0.5, r"it returned -0.5 at progress_remaining=0.0"),
    ],
)
def test_message_says_what_a_schedule_did(schedule, words):
    with pytest.raises(ValueError, match=rf"^target_kl=<function .*{words}"):
        validation.POSITIVE_OR_SCHEDULE.check("target_kl", schedule)


def test_schedule_value_is_checked_at_use():
    """Between the ends, where the constructor cannot look."""
    assert schedule_value("target_kl", 0.5, 0.3) == 0.5
    assert schedule_value("target_kl", lambda progress: np.float32(progress), 0.5) == 0.5
    gap = lambda progress: 0.1 if progress in (0.0, 1.0) else NAN  # noqa: E731
    assert validation.POSITIVE_OR_SCHEDULE.holds(gap)
    with pytest.raises(ValueError, match=r"^target_kl=<function .*it returned nan at progress_remaining=0.5"):
        schedule_value("target_kl", gap, 0.5)


def test_one_of_a_few_values():
    rule = one_of("kfac", None)
    assert check_arguments({"method": rule}, {"method": "kfac"}) == {"method": "kfac"}
    assert check_arguments({"method": rule}, {"method": None}) == {"method": None}
    assert type(rule.check("method", np.str_("kfac"))) is str
    assert not rule.holds(np.array(["kfac", "kfac"]))
    assert not one_of(True, None).holds(1)
    with pytest.raises(ValueError, match=r"^method='adam' is not allowed: it must be 'kfac' or None$"):
        check_arguments({"method": rule}, {"method": "adam"})


def test_classes_and_instances():
    assert instance_of(str, allowed="a name").holds("a")
    assert not instance_of(str, allowed="a name").holds(1)
    assert subclass_of(dict, "a dict").holds(dict)
    assert not subclass_of(dict, "a dict").holds({})


def test_arguments_without_a_rule_are_ignored():
    assert check_arguments({"target_kl": POSITIVE}, {"target_kl": 1, "self": object(), "verbose": -1}) == {"target_kl": 1.0}
    assert check_arguments({}, {"target_kl": -1.0}) == {}


def test_shown_is_bounded_and_never_fails():
    class Mute:
        def __repr__(self):
            raise RuntimeError("no repr")

    assert shown(Mute()) == "<Mute>"
    assert shown(10**5000) == "<int>" or len(shown(10**5000)) < 300
    assert len(shown("x" * 10_000)) < 300
    assert shown(0.5) == "0.5"


def test_rule_shows_what_it_allows_in_a_signature():
    assert repr(POSITIVE) == "<a finite number above 0>"
