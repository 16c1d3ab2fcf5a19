"""What differs between sb3-contrib's TRPO and this one: the KL, which sb3-contrib averages over action dimensions."""

from collections.abc import Mapping
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim

#: sb3-contrib's defaults of the arguments that refer to its KL.
CONTRIB_DEFAULTS = {"target_kl": 0.01, "cg_damping": 0.1}


def kl_dimensions(action_space: spaces.Space[Any]) -> int:
    """
    Return the factor between the joint KL and sb3-contrib's.

    :param action_space: the environment's action space
    :return: number of dimensions of Box and MultiBinary, over which sb3-contrib averages; 1 for other spaces
    """
    return get_action_dim(action_space) if isinstance(action_space, spaces.Box | spaces.MultiBinary) else 1


def joint_kl_arguments(arguments: Mapping[str, Any], action_space: spaces.Space[Any]) -> dict[str, float]:
    """
    Convert sb3-contrib's arguments that refer to its KL.

    :param arguments: arguments of sb3-contrib's TRPO, by name; its defaults where one is missing
    :param action_space: the environment's action space
    :return: ``target_kl`` and ``cg_damping`` in terms of the joint KL
    """
    dimensions = kl_dimensions(action_space)
    values = {name: arguments.get(name, default) for name, default in CONTRIB_DEFAULTS.items()}
    # Rounded, because 0.1 * 3 is 0.30000000000000004.
    return {name: float(f"{value * dimensions:.12g}") for name, value in values.items()}
