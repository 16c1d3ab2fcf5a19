"""The policies by their SB3 names, and what the update asks of any actor-critic policy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn

from sb3_trpo.actions import BoundedActionPolicy
from sb3_trpo.optim.batch import Inputs
from sb3_trpo.optim.distributions import components, joint_kl
from sb3_trpo.optim.objective import PolicyFunction


class MlpPolicy(BoundedActionPolicy):
    """
    SB3's MLP policy.

    :param args: as SB3's ``ActorCriticPolicy``
    :param kwargs: as SB3's ``ActorCriticPolicy``, and those of :class:`~sb3_trpo.actions.BoundedActionPolicy`
    """


class CnnPolicy(BoundedActionPolicy, ActorCriticCnnPolicy):
    """
    SB3's CNN policy, with a features extractor each for actor and critic unless told otherwise.

    TRPO's critic must not move the policy, so it cannot train a shared extractor: it would have to read the values off
    features that only the policy objective shapes.

    :param args: as SB3's ``ActorCriticCnnPolicy``
    :param kwargs: as SB3's ``ActorCriticCnnPolicy``, and those of :class:`~sb3_trpo.actions.BoundedActionPolicy`;
        ``share_features_extractor=True`` saves the critic's own extractor, at the price above
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", False)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(BoundedActionPolicy, MultiInputActorCriticPolicy):
    """
    SB3's policy for Dict observations, with a features extractor each for actor and critic unless told otherwise.

    :param args: as SB3's ``MultiInputActorCriticPolicy``
    :param kwargs: as SB3's ``MultiInputActorCriticPolicy``, and those of
        :class:`~sb3_trpo.actions.BoundedActionPolicy`; for ``share_features_extractor`` see :class:`CnnPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", False)
        super().__init__(*args, **kwargs)


def has_images(space: spaces.Space[Any]) -> bool:
    """
    Whether observations are images, or dictionaries with images.

    :param space: observation space
    :return: True if SB3 treats any of it as an image
    """
    return any(map(is_image_space, space.spaces.values() if isinstance(space, spaces.Dict) else [space]))


def actor_parameters(policy: nn.Module, distribution: PolicyFunction, inputs: Inputs) -> list[nn.Parameter]:
    """
    θ: the parameters that the KL depends on, found by differentiating it, whatever they are called.

    :param policy: module that holds all parameters
    :param distribution: observations ↦ SB3 action distribution
    :param inputs: a few observations
    :return: the trainable parameters that π depends on, in the policy's order
    :raises ValueError: the distribution depends on no trainable parameter
    """
    with th.no_grad():
        old = components(distribution(inputs))
    actor = _reached(policy, joint_kl(old, components(distribution(inputs))))
    if not actor:
        raise ValueError(f"the action distribution of {type(policy).__name__} depends on none of its trainable parameters")
    return actor


def critic_parameters(
    policy: nn.Module, values: Callable[[Inputs], th.Tensor], inputs: Inputs, actor: list[nn.Parameter]
) -> list[nn.Parameter]:
    """
    The parameters that the values depend on and the policy does not: the critic may train these and no others.

    :param policy: module that holds all parameters
    :param values: observations ↦ values
    :param inputs: a few observations
    :param actor: θ
    :return: the critic's own trainable parameters, possibly none
    """
    taken = {id(parameter) for parameter in actor}
    return [parameter for parameter in _reached(policy, values(inputs)) if id(parameter) not in taken]


def value_function(
    policy: nn.Module, values: Callable[[Inputs], th.Tensor], critic: list[nn.Parameter]
) -> tuple[Callable[[Inputs], th.Tensor] | None, Callable[[Inputs], th.Tensor]]:
    """
    V(s) in two parts, so that what the critic cannot change is computed once per update: V(s) = head(encode(s)).

    The encoding is SB3's features wherever the critic has no parameter in their extractor: flat observations, or an
    extractor that it shares with the actor.

    :param policy: actor-critic policy
    :param values: observations ↦ values
    :param critic: the critic's own parameters
    :return: encode (None if there is nothing to compute beforehand) and head
    """
    trained = {id(parameter) for parameter in critic}
    if (
        isinstance(policy, (ActorCriticPolicy, MaskableActorCriticPolicy))
        and type(policy).predict_values in (ActorCriticPolicy.predict_values, MaskableActorCriticPolicy.predict_values)
        and not any(id(parameter) in trained for parameter in policy.vf_features_extractor.parameters())
    ):
        return (
            lambda inputs: BasePolicy.extract_features(policy, inputs, policy.vf_features_extractor),
            lambda features: policy.value_net(policy.mlp_extractor.forward_critic(features)).flatten(),
        )
    return None, values


def _reached(module: nn.Module, tensor: th.Tensor) -> list[nn.Parameter]:
    """Find the trainable parameters that a tensor depends on."""
    candidates = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not (candidates and tensor.requires_grad):
        return []
    slopes: Sequence[th.Tensor | None] = th.autograd.grad(tensor.sum(), candidates, allow_unused=True)
    return [parameter for parameter, slope in zip(candidates, slopes, strict=True) if slope is not None]
