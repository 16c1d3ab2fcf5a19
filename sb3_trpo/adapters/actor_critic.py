"""SB3's actor-critic policies as their ``forward`` computes them.

SB3's ``get_distribution`` and ``predict_values`` call the features extractors past a policy's own ``extract_features``. A
policy that was given another one acts by it, so that the update must go by it too.
"""

from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo.optim.batch import Inputs

EXTRACT_FEATURES = ActorCriticPolicy.extract_features


def policy_distribution(policy: ActorCriticPolicy, inputs: Inputs) -> Distribution:
    """
    Return π(·|s), from which ``policy.forward`` samples.

    :param policy: the policy
    :param inputs: observations
    """
    if not _bypasses_features(policy, "get_distribution"):
        return policy.get_distribution(inputs)
    return policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(_features(policy, inputs)[0]))


def policy_values(policy: ActorCriticPolicy, inputs: Inputs) -> th.Tensor:
    """
    Return the critic's outputs, as ``policy.forward`` gives them.

    :param policy: the policy
    :param inputs: observations
    """
    if not _bypasses_features(policy, "predict_values"):
        return policy.predict_values(inputs)
    return policy.value_net(policy.mlp_extractor.forward_critic(_features(policy, inputs)[1]))


def _bypasses_features(policy: ActorCriticPolicy, method: str) -> bool:
    """Whether a method is SB3's, and the features that ``forward`` uses are not."""
    return (
        isinstance(policy, ActorCriticPolicy)
        and getattr(policy.extract_features, "__func__", None) is not EXTRACT_FEATURES
        and getattr(getattr(policy, method), "__func__", None) is getattr(ActorCriticPolicy, method)
    )


def _features(policy: ActorCriticPolicy, inputs: Inputs) -> tuple[th.Tensor, th.Tensor]:
    """Features for the actor and for the critic."""
    features: Any = policy.extract_features(inputs)
    return (features, features) if policy.share_features_extractor else features
