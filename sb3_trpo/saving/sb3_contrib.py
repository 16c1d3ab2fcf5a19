"""What differs between sb3-contrib's TRPO and this one: the KL, averaged over action dimensions there, and the critic."""

from collections.abc import Collection, Mapping
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_trpo.errors import warn_user

#: sb3-contrib's defaults of the arguments that refer to its KL.
CONTRIB_DEFAULTS = {"target_kl": 0.01, "cg_damping": 0.1}
#: Arguments of its minibatch critic, which the Gauss-Newton critic does not use.
MINIBATCH_ARGUMENTS = ("learning_rate", "batch_size", "n_critic_updates")


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


def convert_model(model: BaseAlgorithm, keep: Collection[str]) -> None:
    """
    Convert the arguments of a model that was loaded from a file of sb3-contrib, and warn about the differences.

    :param model: the loaded model
    :param keep: names of the arguments that the user gave to ``load``
    """
    values = {name: value for name, value in joint_kl_arguments(vars(model), model.action_space).items() if name not in keep}
    changes = [f"{name}={getattr(model, name)} -> {value}" for name, value in values.items()]
    vars(model).update(values)
    message = (
        "the file is from sb3-contrib, whose KL is averaged over action dimensions; converted to the joint KL of "
        f"{kl_dimensions(model.action_space)} dimension(s): {', '.join(changes) or 'nothing to change'}"
    )
    if "critic_method" not in keep:
        message += (
            f". The critic is now fitted with critic_method='gauss_newton', which does not use "
            f"{', '.join(MINIBATCH_ARGUMENTS)}; load(..., critic_method='minibatch') keeps sb3-contrib's"
        )
    warn_user(message)
