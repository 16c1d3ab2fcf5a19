"""What the attributes in a model's file may be, beside the rules for arguments of the constructor."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value).bit_length() < 64


def _is_rate(value: Any) -> bool:
    return value is None or _is_number(value) or isinstance(value, (FloatSchedule, LinearSchedule, ConstantSchedule))


def is_plain_data(value: Any) -> bool:
    """
    Return True if a value is a number, a text, bytes, None, an array of numbers, or a container of these.

    :param value: any value
    """
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and not value.dtype.hasobject
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_plain_data, value.values()))
    if type(value) in (list, tuple):
        return all(map(is_plain_data, value))
    return value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, np.generic)


def _is_class(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, type) and issubclass(value, kind)


def _is_observation(value: Any) -> bool:
    arrays = list(value.values()) if isinstance(value, dict) else [value]
    return value is None or all(isinstance(array, np.ndarray) for array in arrays)


#: Classes that the arguments of a policy may name; elsewhere in them there is plain data.
POLICY_CLASSES = {
    "activation_fn": _is_class(nn.Module),
    "optimizer_class": _is_class(th.optim.Optimizer),
    "features_extractor_class": _is_class(BaseFeaturesExtractor),
}


def _are_policy_kwargs(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(name) is str and (POLICY_CLASSES[name](item) if name in POLICY_CLASSES else not isinstance(item, type))
        for name, item in value.items()
    )


def _are_keywords(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(type(name) is str for name in value))


#: What an attribute from a file may be, beside the rules for arguments.
RULES: dict[str, Callable[[Any], bool]] = {
    "policy_class": _is_class(BasePolicy),
    "policy_kwargs": _are_policy_kwargs,
    "rollout_buffer_class": lambda value: value is None or _is_class(RolloutBuffer)(value),
    "rollout_buffer_kwargs": _are_keywords,
    **dict.fromkeys(("observation_space", "action_space"), lambda value: isinstance(value, spaces.Space)),
    **dict.fromkeys(("learning_rate", "target_kl"), _is_rate),
    **dict.fromkeys(("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num"), _is_integer),
    **dict.fromkeys(("_n_updates", "_iteration", "_iterations_before", "_failed_updates"), _is_integer),
    **dict.fromkeys(("verbose", "sde_sample_freq"), _is_integer),
    **dict.fromkeys(("n_envs", "_stats_window_size", "n_steps"), lambda value: _is_integer(value) and value >= 1),
    **dict.fromkeys(("start_time", "_current_progress_remaining"), _is_number),
    "_kl_ratio": lambda value: _is_number(value) and 0.0 < value < math.inf,
    **dict.fromkeys(("ep_info_buffer", "ep_success_buffer"), lambda value: value is None or isinstance(value, deque)),
    **dict.fromkeys(("_last_obs", "_last_original_obs", "_last_episode_starts"), _is_observation),
    "use_sde": lambda value: isinstance(value, bool),
    "seed": lambda value: value is None or (_is_integer(value) and 0 <= value < 2**32),
}
#: Attributes that are made anew from others when a model is set up.
DERIVED = ("lr_schedule", "_target_kl_schedule")
#: Attributes that a model has beside those that its constructor sets without an environment.
LATER = {"observation_space", "action_space", "n_envs", *DERIVED}


def is_plain_name(name: str) -> bool:
    """
    Return True if a name is an identifier without underscores at both ends.

    :param name: any text
    """
    return name.isidentifier() and not (name.startswith("__") and name.endswith("__"))


def allowed_attributes(model: OnPolicyAlgorithm) -> set[str]:
    """
    Names of the attributes that a file may set.

    They are those that the constructor sets, or whose default (a number, a text, None) stands in the class, and that ``save``
    does not leave out.

    :param model: a model that is not set up yet
    :return: the names
    """
    defaults = {
        name
        for base in type(model).__mro__
        for name, value in vars(base).items()
        if is_plain_name(name) and isinstance(value, (bool, int, float, str, type(None)))
    }
    return (vars(model).keys() | defaults | LATER) - {*model._excluded_save_params(), "tensorboard_log"}


def is_users_data(model: OnPolicyAlgorithm, name: str, value: Any) -> bool:
    """
    Return True if an attribute can only be a note of the user's: plain data, under a name that nothing else reads.

    :param model: a model that is not set up yet
    :param name: name of the attribute
    :param value: its value
    """
    annotated = {key for base in type(model).__mro__ for key in vars(base).get("__annotations__", {})}
    return not (name.startswith("_") or name in annotated or hasattr(model, name)) and is_plain_data(value)
