"""What the attributes in a model's file may be, beside the rules for arguments of the constructor."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
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
