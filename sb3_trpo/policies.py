"""The policies by their SB3 names, and what the update asks of any actor-critic policy."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import is_image_space

from sb3_trpo.actions import BoundedActionPolicy


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
