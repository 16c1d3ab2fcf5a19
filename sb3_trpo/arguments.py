"""Rules for arguments: what is allowed, and what it is converted to."""

import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import Schedule

#: No argument needs larger integers: they fit into the sizes of NumPy and torch.
MAX_INTEGER = 2**63 - 1
MAX_SEED = 2**32 - 1  # NumPy's limit
MAX_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True, repr=False)
class Rule:
    """
    What is allowed for one argument, and what it is converted to.

    :param convert: value ↦ converted value; raises ``ValueError`` if the value is not allowed, with the reason where
        ``allowed`` does not say it
    :param allowed: description of the allowed values
    """

    convert: Callable[[Any], Any]
    allowed: str

    def __repr__(self) -> str:
        return f"<{self.allowed}>"

    def holds(self, value: Any) -> bool:
        """
        Check a value.

        :param value: the value
        :return: True if it is allowed
        """
        try:
            self.convert(value)
        except ValueError:
            return False
        return True

    def check(self, name: str, value: Any) -> Any:
        """
        Check and convert a value.

        :param name: name of the argument
        :param value: the value
        :return: the converted value
        :raises ValueError: the value is not allowed
        """
        try:
            return self.convert(value)
        except ValueError as error:
            reason = f"; {error}" if str(error) else ""
            raise ValueError(f"{name}={shown(value)} is not allowed: it must be {self.allowed}{reason}") from error.__cause__


def shown(value: Any) -> str:
    """
    Represent a value in a message.

    :param value: any object
    :return: its ``repr``, shortened; its type if it has none
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 (the user's own __repr__, or an integer of too many digits)
        return f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# ---- kinds of rules


def _number(lowest: float, highest: float, allowed: str, *, is_open: bool = False) -> Rule:
    def convert(value: Any) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise ValueError
        try:
            number = float(value)
        except OverflowError as error:
            raise ValueError from error
        inside = lowest < number < highest if is_open else lowest <= number <= highest
        if not (inside and math.isfinite(number)):
            raise ValueError
        return number

    return Rule(convert, allowed)


def _integer(lowest: int, allowed: str, *, highest: int = MAX_INTEGER, other: int | None = None) -> Rule:
    def convert(value: Any) -> int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
            raise ValueError
        number = int(value)
        if number > MAX_INTEGER:
            raise ValueError(f"the largest integer is {MAX_INTEGER}")
        if not (lowest <= number <= highest or number == other):
            raise ValueError
        return number

    return Rule(convert, allowed)


def optional(rule: Rule) -> Rule:
    """
    Allow None as well.

    :param rule: rule for all other values
    :return: the rule
    """
    return Rule(lambda value: None if value is None else rule.convert(value), f"{rule.allowed}, or None")


def one_of(*values: object) -> Rule:
    """
    Allow a few values.

    :param values: the allowed values
    :return: the rule
    """

    def convert(value: Any) -> Any:
        for allowed in values:
            if value is allowed or (isinstance(value, str) and value == allowed):
                return allowed
        raise ValueError

    return Rule(convert, " or ".join(map(repr, values)))


def or_schedule(rule: Rule) -> Rule:
    """
    Also allow a schedule: a function of the remaining progress that returns a number of at least 0.

    Functions are evaluated at the start and the end of training, to reject wrong ones before training starts.

    :param rule: rule for numbers
    :return: the rule
    """

    def convert(value: Any) -> Any:
        if not callable(value) or isinstance(value, type):
            return rule.convert(value)
        for progress_remaining in (1.0, 0.0):
            _schedule_value(value, progress_remaining)
        return value

    return Rule(convert, f"{rule.allowed}, or a schedule progress_remaining -> number")


def _schedule_value(schedule: Callable[[float], Any], progress_remaining: float) -> float:
    try:
        value = schedule(progress_remaining)
    except Exception as error:
        raise ValueError(f"it raised {error!r} at progress_remaining={progress_remaining}") from error
    if isinstance(value, (np.ndarray, th.Tensor)) and value.ndim == 0:  # a number in another form
        value = value.item()
    try:
        return NON_NEGATIVE.convert(value)
    except ValueError:
        raise ValueError(
            f"it returned {shown(value)} at progress_remaining={progress_remaining}, which must be {NON_NEGATIVE.allowed}"
        ) from None


def schedule_value(name: str, schedule: float | Schedule, progress_remaining: float) -> float:
    """
    Evaluate an argument that is a number or a schedule.

    :param name: name of the argument
    :param schedule: its value
    :param progress_remaining: from 1 at the start of the training to 0 at its end
    :return: the number
    :raises ValueError: the schedule raised an error or returned no finite number of at least 0
    """
    if not callable(schedule):
        return float(schedule)
    try:
        return _schedule_value(schedule, progress_remaining)
    except ValueError as error:
        raise ValueError(f"{name}={shown(schedule)} is not allowed: {error}") from error.__cause__


# ---- the rules

POSITIVE_INTEGER = _integer(1, "a positive integer")
POSITIVE_INTEGER_OR_NONE = optional(POSITIVE_INTEGER)
NATURAL_NUMBER = _integer(0, "an integer of at least 0")
SAMPLE_FREQUENCY = _integer(1, "a positive integer, or -1", other=-1)
SEED = optional(_integer(0, f"an integer from 0 to {MAX_SEED}", highest=MAX_SEED))
UNIT_INTERVAL = _number(0.0, 1.0, "a number in [0, 1]")
OPEN_UNIT_INTERVAL = _number(0.0, 1.0, "a number in (0, 1)", is_open=True)
NON_NEGATIVE = _number(0.0, math.inf, "a finite number of at least 0")
POSITIVE = _number(0.0, math.inf, "a finite number above 0", is_open=True)
NON_NEGATIVE_OR_SCHEDULE = or_schedule(NON_NEGATIVE)
POSITIVE_OR_SCHEDULE = or_schedule(POSITIVE)
POSITIVE_OR_SCHEDULE_OR_NONE = optional(POSITIVE_OR_SCHEDULE)


def _boolean(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError
    return bool(value)


def _verbosity(value: Any) -> int:
    return int(value) if isinstance(value, (bool, np.bool_)) else NATURAL_NUMBER.convert(value)


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ValueError
    return os.fspath(value)


def _keyword_arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError
    return dict(value)


def _device(value: Any) -> Any:
    if not isinstance(value, (str, th.device)):
        raise ValueError
    if value == "auto":
        return value
    try:
        device = th.device(value)
        is_absent_card = device.type == "cuda" and not th.cuda.is_available()  # SB3 takes the CPU then
        if device.type == "cuda" and not is_absent_card and (device.index or 0) >= th.cuda.device_count():
            raise ValueError(f"there are {th.cuda.device_count()} CUDA devices")
        if device.type != "cuda":
            th.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(str(error).partition("\n")[0][:MAX_SHOWN]) from error
    return value


BOOLEAN = Rule(_boolean, "True or False")
VERBOSITY = Rule(_verbosity, "0 for no output, 1 for info or 2 for debug messages")
PATH_OR_NONE = optional(Rule(_path, "a path"))
KEYWORD_ARGUMENTS_OR_NONE = optional(Rule(_keyword_arguments, "a dictionary of keyword arguments"))
DEVICE = Rule(_device, "'auto' or a torch device that this machine has")


def instance_of(*types: type[Any], allowed: str) -> Rule:
    """
    Allow the instances of some classes.

    :param types: the classes
    :param allowed: description of the allowed values
    :return: the rule
    """

    def convert(value: Any) -> Any:
        if not isinstance(value, types):
            raise ValueError
        return value

    return Rule(convert, allowed)


def subclass_of(base: type[Any], allowed: str) -> Rule:
    """
    Allow a class and those derived from it.

    :param base: the class
    :param allowed: description of the allowed values
    :return: the rule
    """

    def convert(value: Any) -> Any:
        if not (isinstance(value, type) and issubclass(value, base)):
            raise ValueError
        return value

    return Rule(convert, allowed)


def _environment(value: Any) -> Any:
    is_env = not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in ("reset", "step"))
    if not (value is None or isinstance(value, str) or is_env):  # None while loading a model
        raise ValueError
    return value


ROLLOUT_BUFFER_CLASS_OR_NONE = optional(subclass_of(RolloutBuffer, "a class derived from SB3's RolloutBuffer"))
ENVIRONMENT = Rule(_environment, "an environment or its registered name")


# ---- checking


def check_arguments(rules: Mapping[str, Rule], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check and convert arguments.

    :param rules: rule of each argument, by name
    :param arguments: values, by name; those without a rule are ignored
    :return: the converted values of the arguments with a rule
    :raises ValueError: a value is not allowed; names the argument, the value and what is allowed
    """
    return {name: rule.check(name, arguments[name]) for name, rule in rules.items()}
