"""Which networks of a policy are plain multilayer perceptrons, whose products need no differentiation graph."""

from collections.abc import Sequence

from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_trpo.actions import BoundedActionPolicy, TanhGaussianDistribution
from sb3_trpo.adapters.plain import are_original, has_patched_methods, is_plain
from sb3_trpo.optim.mlp import MLP, chain

STATE_INDEPENDENT_NOISE = (
    DiagGaussianDistribution,
    TanhGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
    MaskableBernoulliDistribution,
)
STANDARD_POLICIES = (ActorCriticPolicy, BoundedActionPolicy, MaskableActorCriticPolicy)


def actor_mlp(policy: nn.Module) -> MLP | None:
    """
    Return the layers from the flat observation to the main parameters of the action distribution.

    :param policy: any policy
    :return: the layers, or None if the policy is not SB3's standard MLP policy, unchanged
    """
    if not _is_standard(policy, ["get_distribution", "extract_features", "_get_action_dist_from_latent"]):
        return None
    family: type = type(policy.action_dist)  # a subclass may have other parameters
    if family not in STATE_INDEPENDENT_NOISE or has_patched_methods(policy.action_dist) or not are_original(family):
        return None
    return chain([*policy.mlp_extractor.policy_net, policy.action_net])  # type: ignore[union-attr,misc,list-item]


def critic_mlp(policy: nn.Module) -> MLP | None:
    """
    Return the layers from the flat observation to the value.

    :param policy: any policy
    :return: the layers, or None if the policy is not SB3's standard MLP policy, unchanged
    """
    if not _is_standard(policy, ["predict_values", "extract_features"]):
        return None
    return chain([*policy.mlp_extractor.value_net, policy.value_net])  # type: ignore[union-attr,misc,list-item]


def _is_standard(policy: nn.Module, methods: Sequence[str]) -> bool:
    """Whether the policy feeds flat features to an MlpExtractor the way SB3's own class does, through these methods."""
    if not isinstance(policy, STANDARD_POLICIES):
        return False
    extractor = policy.mlp_extractor
    return (
        type(extractor) is MlpExtractor
        and type(extractor.policy_net) is type(extractor.value_net) is nn.Sequential
        and type(policy.features_extractor) is FlattenExtractor
        and all(
            getattr(type(policy), method) in [getattr(standard, method) for standard in STANDARD_POLICIES]
            for method in methods
        )
        and is_plain(policy)
    )
