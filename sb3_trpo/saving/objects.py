"""The classes whose objects are made attribute by attribute: for each its attributes, and what each may be.

An attribute that is not in the list of its class is refused, so is one that is missing. No method of the class is called.
"""

import math
import pickle
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_trpo.saving.pickle_records import UNSET, Record, RefusedError, label

Check = Callable[[Any], bool]
MAX_COUNT = 2**62
#: Gymnasium's own running moments, which its versions keep in different modules.
GymRunningMeanStd: Any = vars(sys.modules[NormalizeObservation.__module__])["RunningMeanStd"]


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) < MAX_COUNT


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_integer(length) and length >= 0 for length in value)


def _is_real(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, np.ndarray) and value.dtype.kind == "f")


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _is_none(value: Any) -> bool:
    return value is None


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _all(kind: type, check: Check) -> Check:
    return lambda value: isinstance(value, kind) and all(check(each) for each in cast("Iterable[Any]", value))


def _by_name(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(type(key) is str for key in value) and all(map(check, value.values()))


def _or_by_name(check: Check) -> Check:
    return lambda value: check(value) or _by_name(check)(value)


@dataclass(frozen=True)
class Layout:
    """
    A class, and the attributes that its objects have in a file.

    :param kind: the class
    :param required: attribute ↦ what it may be
    :param optional: those that only some versions have
    :param fits: whether the attributes go together
    """

    kind: Any
    required: dict[str, Check]
    optional: dict[str, Check]
    fits: Check = lambda _: True


_is_space = _is(spaces.Space)
_is_dtype = _is(np.dtype)
_is_moments = _is(RunningMeanStd)
_is_text = _or_none(_is(str))
SEEDS: dict[str, Check] = {"_np_random": _or_none(_is(np.random.Generator)), "_np_random_seed": _or_none(_is_integer)}
SCHEDULES = _is(ConstantSchedule, LinearSchedule, FloatSchedule)


def _is_box(of: dict[str, Any]) -> bool:
    shape, dtype = of["_shape"], of["dtype"]
    bounds = all(of[name].shape == shape and of[name].dtype == dtype for name in ("low", "high"))
    bounded = (of["bounded_below"], of["bounded_above"])
    return bounds and all(flags.shape == shape and flags.dtype == np.bool_ for flags in bounded)


def _is_multi_discrete(of: dict[str, Any]) -> bool:
    sizes, start = of["nvec"], of.get("start")
    whole = sizes.dtype.kind in "iu" and of["dtype"].kind in "iu" and of["_shape"] == sizes.shape
    return whole and bool((sizes >= 1).all()) and (start is None or (start.dtype.kind in "iu" and start.shape == sizes.shape))


def _is_multi_binary(of: dict[str, Any]) -> bool:
    size = of["n"]
    shape = tuple(size) if isinstance(size, (tuple, list, np.ndarray)) else (size,)
    return of["_shape"] == shape and all(map(_is_count, shape)) and math.prod(map(int, shape)) < MAX_COUNT


def _are_moments(of: dict[str, Any]) -> bool:
    return np.shape(of["mean"]) == np.shape(of["var"])


SPACE: dict[str, Check] = {"dtype": _is_dtype, "_shape": _is_shape}
NESTED: dict[str, Check] = {"dtype": _is_none, "_shape": _is_none}
MOMENTS: dict[str, Check] = {"mean": _is_real, "var": _is_real, "count": _is_number}
LAYOUTS = (
    Layout(
        spaces.Box,
        {**SPACE, **dict.fromkeys(("low", "high", "bounded_below", "bounded_above"), _is_numeric)},
        {**SEEDS, "low_repr": _is_text, "high_repr": _is_text},
        _is_box,
    ),
    Layout(spaces.Discrete, {**SPACE, "n": _is_count, "start": _is_integer}, SEEDS, lambda of: of["_shape"] == ()),
    Layout(spaces.MultiDiscrete, {**SPACE, "nvec": _is_numeric}, {**SEEDS, "start": _is_numeric}, _is_multi_discrete),
    Layout(spaces.MultiBinary, {**SPACE, "n": _is(int, np.integer, tuple, list, np.ndarray)}, SEEDS, _is_multi_binary),
    Layout(spaces.Dict, {**NESTED, "spaces": _by_name(_is_space)}, {**SEEDS, "sort_keys": _is(bool)}),
    Layout(spaces.Tuple, {**NESTED, "spaces": _all(tuple, _is_space)}, SEEDS),
    Layout(ConstantSchedule, {"val": _is_number}, {}),
    Layout(LinearSchedule, {"start": _is_number, "end": _is_number, "end_fraction": _is_number}, {}),
    Layout(FloatSchedule, {"value_schedule": SCHEDULES}, {}),
    Layout(RunningMeanStd, MOMENTS, {}, _are_moments),
    Layout(GymRunningMeanStd, MOMENTS, {}, _are_moments),
    Layout(
        StackedObservations,
        {"n_stack": _is_count, "observation_space": _is_space, "stacked_observation_space": _is_space},
        {
            "sub_stacked_observations": _by_name(_is(StackedObservations)),
            "channels_first": _is(bool),
            "stack_dimension": _is_integer,
            "stacked_shape": _is_shape,
            "repeat_axis": _is_integer,
            "stacked_obs": _is_numeric,
        },
    ),
    Layout(
        VecNormalize,
        {
            **dict.fromkeys(("clip_obs", "clip_reward", "gamma", "epsilon"), _is_number),
            **dict.fromkeys(("training", "norm_obs", "norm_reward"), _is(bool)),
            **dict.fromkeys(("observation_space", "action_space"), _is_space),
            "num_envs": _is_count,
            "ret_rms": _is_moments,
        },
        {
            "obs_rms": _or_by_name(_is_moments),
            "obs_spaces": _or_none(_by_name(_is_space)),
            "norm_obs_keys": _or_none(_all(list, _is(str))),
            "old_reward": _is_numeric,
            "old_obs": _or_by_name(_is_numeric),
            "render_mode": _is_text,
            **dict.fromkeys(("reset_infos", "_seeds", "_options"), _is(list)),
            "metadata": _is(dict),
        },
    ),
)
CLASSES: dict[str, Layout] = {f"{layout.kind.__module__}.{layout.kind.__qualname__}": layout for layout in LAYOUTS}


def make_object(record: Record) -> Any:
    """
    Make an object of one of the classes.

    :param record: its class and attributes
    :return: the object
    :raises RefusedError: it has an attribute that is not in the list
    :raises UnpicklingError: an attribute is missing, or cannot be what it is
    """
    layout, values = CLASSES[record.name], record.state
    if record.args or record.items or record.pairs:
        raise RefusedError(f"a call of {label(record)}")
    if values is UNSET or not isinstance(values, dict):
        raise RefusedError(f"filling in {label(record)}")
    checks = {**layout.required, **layout.optional}
    for name, value in values.items():
        if name not in checks:
            raise RefusedError(f"the attribute {label(name)} of {label(record)}")
        if not checks[name](value):
            raise pickle.UnpicklingError(f"the attribute {name} of {label(record)} is damaged")
    if layout.required.keys() - values.keys() or not layout.fits(values):
        raise pickle.UnpicklingError(f"the attributes of {label(record)} do not go together")
    made = object.__new__(layout.kind)
    vars(made).update(values)
    if layout.kind is VecNormalize:
        made.venv = None
        if "norm_obs_keys" not in values and isinstance(made.observation_space, spaces.Dict):
            made.norm_obs_keys = list(made.observation_space.spaces)
    return made
