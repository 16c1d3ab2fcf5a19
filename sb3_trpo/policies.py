"""SB3's policies by name, with bounded actions and custom distributions."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, BasePolicy, MultiInputActorCriticPolicy
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
    SB3's CNN policy, with separate features extractors for actor and critic by default.

    TRPO's critic must not move the policy, so it cannot train a shared extractor: it would compute values from
    features that only the policy objective shapes.

    :param args: as SB3's ``ActorCriticCnnPolicy``
    :param kwargs: as SB3's ``ActorCriticCnnPolicy``, and those of :class:`~sb3_trpo.actions.BoundedActionPolicy`;
        ``share_features_extractor=True`` shares one extractor, which only the policy trains
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", False)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(BoundedActionPolicy, MultiInputActorCriticPolicy):
    """
    SB3's policy for Dict observations, with separate features extractors for actor and critic by default.

    :param args: as SB3's ``MultiInputActorCriticPolicy``
    :param kwargs: as SB3's ``MultiInputActorCriticPolicy``, and those of
        :class:`~sb3_trpo.actions.BoundedActionPolicy`; for ``share_features_extractor`` see :class:`CnnPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", False)
        super().__init__(*args, **kwargs)


#: Class of each name that the constructor takes.
POLICY_ALIASES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": MlpPolicy,
    "CnnPolicy": CnnPolicy,
    "MultiInputPolicy": MultiInputPolicy,
}


def has_images(space: spaces.Space[Any]) -> bool:
    """
    Return True if observations are images, or dictionaries with images.

    :param space: observation space
    :return: True if SB3 treats any of it as an image
    """
    return any(map(is_image_space, space.spaces.values() if isinstance(space, spaces.Dict) else [space]))
