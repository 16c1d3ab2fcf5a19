"""What the constructor accepts, argument by argument, said in words."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """
    A condition on one argument.

    :param holds: value ↦ whether it is allowed
    :param allowed: the allowed values, in words
    """

    holds: Callable[[Any], bool]
    allowed: str


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


POSITIVE_INTEGER = Rule(lambda value: _is_integer(value) and value >= 1, "a positive integer")
POSITIVE_INTEGER_OR_NONE = Rule(
    lambda value: value is None or POSITIVE_INTEGER.holds(value), f"{POSITIVE_INTEGER.allowed}, or None"
)
NATURAL_NUMBER = Rule(lambda value: _is_integer(value) and value >= 0, "an integer of at least 0")
BOOLEAN = Rule(lambda value: isinstance(value, bool), "True or False")
SAMPLE_FREQUENCY = Rule(lambda value: _is_integer(value) and (value == -1 or value >= 1), "a positive integer, or -1")
UNIT_INTERVAL = Rule(lambda value: _is_real(value) and 0 <= value <= 1, "a number in [0, 1]")
OPEN_UNIT_INTERVAL = Rule(lambda value: _is_real(value) and 0 < value < 1, "a number in (0, 1)")
NON_NEGATIVE = Rule(lambda value: _is_real(value) and value >= 0, "a finite number of at least 0")
POSITIVE = Rule(lambda value: _is_real(value) and value > 0, "a finite number above 0")
POSITIVE_OR_SCHEDULE = Rule(
    lambda value: callable(value) or POSITIVE.holds(value), f"{POSITIVE.allowed}, or a schedule progress_remaining -> number"
)
POSITIVE_OR_SCHEDULE_OR_NONE = Rule(
    lambda value: value is None or POSITIVE_OR_SCHEDULE.holds(value), f"{POSITIVE_OR_SCHEDULE.allowed}, or None"
)
NON_NEGATIVE_OR_SCHEDULE = Rule(
    lambda value: callable(value) or NON_NEGATIVE.holds(value),
    f"{NON_NEGATIVE.allowed}, or a schedule progress_remaining -> number",
)


def one_of(*values: object) -> Rule:
    """
    Rule for an argument with a few values.

    :param values: the allowed values
    :return: the rule
    """
    return Rule(lambda value: value in values, " or ".join(map(repr, values)))


def check_arguments(rules: Mapping[str, Rule], arguments: Mapping[str, Any]) -> None:
    """
    Check arguments against their rules.

    :param rules: rule of each argument, by name
    :param arguments: values, by name; those without a rule are not looked at
    :raises ValueError: a value is not allowed; names the argument, the value and what is allowed
    """
    for name, rule in rules.items():
        if not rule.holds(arguments[name]):
            raise ValueError(f"{name}={arguments[name]!r} is not allowed: it must be {rule.allowed}")
