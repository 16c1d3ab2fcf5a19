import math

import numpy as np
import pytest

from sb3_trpo import arguments as validation
from sb3_trpo.arguments import POSITIVE, Rule, check_arguments, one_of

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = [None, "1", [1], 1j]

#: Rule ↦ values it allows, values it refuses.
TABLE = {
    "POSITIVE_INTEGER": ([1, 7, np.int64(3), 10**30], [0, -1, 1.0, 1.5, True, NAN, INF, np.float64(2.0), *NOT_NUMBERS]),
    "POSITIVE_INTEGER_OR_NONE": ([None, 1, np.int64(3)], [0, -1, 1.0, True, NAN, "1"]),
    "BOOLEAN": ([True, False], [0, 1, None, "no"]),
    "SAMPLE_FREQUENCY": ([-1, 1, 4], [0, -2, 1.5, True, None]),
    "NATURAL_NUMBER": ([0, 1, np.int32(3)], [-1, 0.0, False, NAN, INF, *NOT_NUMBERS]),
    "UNIT_INTERVAL": ([0, 0.0, 1, 1.0, 0.99, np.float32(0.5)], [-1e-9, 1.0 + 1e-9, True, NAN, INF, *NOT_NUMBERS]),
    "OPEN_UNIT_INTERVAL": ([1e-9, 0.8, 1.0 - 1e-9], [0, 0.0, 1, 1.0, -0.5, 2, True, NAN, *NOT_NUMBERS]),
    "NON_NEGATIVE": ([0, 0.0, 1e-300, 5, np.float64(2.0)], [-1e-300, -1, False, NAN, INF, -INF, *NOT_NUMBERS]),
    "POSITIVE": ([1e-300, 5, np.float64(2.0)], [0, 0.0, -0.0, -1, True, NAN, INF, -INF, *NOT_NUMBERS]),
    "POSITIVE_OR_SCHEDULE": ([0.05, math.sqrt], [0, -1.0, True, NAN, INF, *NOT_NUMBERS]),
    "POSITIVE_OR_SCHEDULE_OR_NONE": ([None, 0.05, math.sqrt], [0, -1.0, True, NAN, INF, "1"]),
    "NON_NEGATIVE_OR_SCHEDULE": ([0, 0.05, math.sqrt], [-1.0, True, NAN, INF, *NOT_NUMBERS]),
}


def pairs(column):
    return [pytest.param(name, value, id=f"{name}-{value!r}") for name, row in TABLE.items() for value in row[column]]


def test_every_rule_has_its_row():
    assert {name for name, value in vars(validation).items() if isinstance(value, Rule)} == set(TABLE)


@pytest.mark.parametrize(("rule", "value"), pairs(0))
def test_allowed(rule, value):
    check_arguments({"size": getattr(validation, rule)}, {"size": value})


@pytest.mark.parametrize(("rule", "value"), pairs(1))
def test_refused(rule, value):
    with pytest.raises(ValueError, match="size"):
        check_arguments({"size": getattr(validation, rule)}, {"size": value})


def test_message_names_argument_value_and_what_is_allowed():
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        check_arguments({"target_kl": POSITIVE}, {"target_kl": -0.5})
    assert str(error.value) == "target_kl=-0.5 is not allowed: it must be a finite number above 0"


def test_one_of_a_few_values():
    rule = one_of("kfac", None)
    check_arguments({"method": rule}, {"method": "kfac"})
    check_arguments({"method": rule}, {"method": None})
    with pytest.raises(ValueError, match=r"^method='adam' is not allowed: it must be 'kfac' or None$"):
        check_arguments({"method": rule}, {"method": "adam"})


def test_arguments_without_a_rule_are_not_looked_at():
    check_arguments({"target_kl": POSITIVE}, {"target_kl": 1.0, "self": object(), "verbose": -1})
    check_arguments({}, {"target_kl": -1.0})
