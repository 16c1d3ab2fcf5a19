"""Rules for arguments: what is allowed, what it is converted to, and hints for names that do not exist."""

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import Schedule

from sb3_trpo.errors import did_you_mean

#: No argument needs larger integers: they fit into the sizes of NumPy and torch.
MAX_INTEGER = 2**63 - 1
MAX_SEED = 2**32 - 1  # NumPy's limit
MAX_SHOWN = 200  # characters of a value in a message

#: Arguments of other algorithms and libraries, and what plays their part here.
FOREIGN_ARGUMENTS = {
    **dict.fromkeys(("max_kl", "kl_target", "max_kl_step", "max_kl_div", "delta"), "use target_kl"),
    **dict.fromkeys(
        ("clip_range", "clip_ratio", "clip_coef", "eps_clip"), "there is no clipping; target_kl bounds each update"
    ),
    "clip_range_vf": "the value function is not clipped",
    **dict.fromkeys(
        ("vf_coef", "value_coef"), "policy and critic are fitted one after the other, so no weight between them is needed"
    ),
    "n_epochs": "use n_critic_updates (passes of the minibatch critic) or n_policy_updates (policy steps per rollout)",
    "max_grad_norm": "gradients are not clipped; target_kl bounds each update",
    "damping": "use cg_damping",
    **dict.fromkeys(("cg_iters", "cg_iterations", "max_cg_iters"), "use cg_max_steps"),
    **dict.fromkeys(("backtrack_coeff", "backtrack_ratio"), "use line_search_shrinking_factor"),
    **dict.fromkeys(("backtrack_iters", "max_backtracks"), "use line_search_max_iter"),
    **dict.fromkeys(("lam", "lambda_", "gae_tau"), "use gae_lambda"),
    **dict.fromkeys(("lr", "vf_lr"), "use learning_rate"),
    "vf_iters": "use n_critic_updates with critic_method='minibatch', or n_critic_steps",
    "cg_warm_start": "conjugate gradients always start at zero",
    "critic_cg_max_steps": "the critic's conjugate gradient iterations are fixed",
    "critic_cg_residual_tol": "the critic's conjugate gradient tolerance is fixed",
    "distributed": "set the class attribute, for example TRPO.distributed = False",
}

Constructor = TypeVar("Constructor", bound=Callable[..., None])


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
    Allow a schedule as well: a function of the remaining progress that returns a number of at least 0.

    Functions are tried at both ends of a training, so that a wrong one is refused before the training starts.

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


def rules_of(function: Callable[..., Any]) -> dict[str, Rule]:
    """
    Read the rules from a signature: ``n_steps: Annotated[int, POSITIVE_INTEGER] = 2048``.

    :param function: a constructor
    :return: rule of each argument that has one, by name
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        for item in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(item, Rule):
                found[name] = item
    return found


def checked(constructor: Constructor) -> Constructor:
    """
    Make a constructor check and convert its arguments by the rules in its signature, before its body runs.

    The names of the arguments that the caller gave are kept in the attribute ``_given_arguments``.

    :param constructor: the ``__init__`` of an algorithm
    :return: the same, with checks
    """
    signature, rules = inspect.signature(constructor), rules_of(constructor)

    @functools.wraps(constructor)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for name in () if takes_all else kwargs:
            if name not in signature.parameters:
                known = [known for known in inspect.signature(type(self)).parameters if not known.startswith("_")]
                raise TypeError(
                    f"{type(self).__name__}() got an unexpected keyword argument {name!r}{argument_hint(name, known)}"
                )
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError as error:  # a missing argument, or too many
            raise TypeError(f"{type(self).__name__}(): {error}") from None
        # The outermost constructor of a derived class is the one that the caller sees.
        names = {*given.arguments, *given.arguments.get("kwargs", ())}
        vars(self).setdefault("_given_arguments", frozenset(names - {"self", "args", "kwargs"}))
        for name, value in given.arguments.items():
            if name in rules:
                given.arguments[name] = rules[name].check(name, value)
        constructor(*given.args, **given.kwargs)

    return method  # type: ignore[return-value]


def takes_arguments_of(base: Callable[..., None], *, without: Iterable[str] = ()) -> Callable[[Constructor], Constructor]:
    """
    Show the full signature of a constructor that hands its ``**kwargs`` on to another one.

    :param base: the constructor that gets them
    :param without: arguments that it does not get
    :return: decorator that completes the signature that ``help()`` and ``inspect`` show
    """
    without = frozenset(without)

    def decorate(constructor: Constructor) -> Constructor:
        own = inspect.signature(constructor)
        kinds = {p.kind for p in own.parameters.values()}
        parameters = [p for p in own.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for name, parameter in inspect.signature(base).parameters.items():
            if name in own.parameters or name in without:
                continue
            is_positional = inspect.Parameter.VAR_POSITIONAL in kinds
            parameters.append(parameter if is_positional else parameter.replace(kind=parameter.KEYWORD_ONLY))
        parameters.sort(key=lambda parameter: parameter.kind)  # stable
        constructor.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return constructor

    return decorate


def argument_hint(name: str, names: Iterable[str]) -> str:
    """
    Suggest what an unknown argument may have meant.

    :param name: the unknown name
    :param names: the known names
    :return: ``"; did you mean 'this'?"``, what plays its part here, or nothing
    """
    if name.lower() in FOREIGN_ARGUMENTS:
        return f": {FOREIGN_ARGUMENTS[name.lower()]}"
    return did_you_mean(name, names)
