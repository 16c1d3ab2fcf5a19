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
    methods = ["get_distribution", "extract_features", "_get_action_dist_from_latent"]
    if not _is_standard(policy, methods, "pi_features_extractor", "policy_net"):
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
    if not _is_standard(policy, ["predict_values", "extract_features"], "vf_features_extractor", "value_net"):
        return None
    return chain([*policy.mlp_extractor.value_net, policy.value_net])  # type: ignore[union-attr,misc,list-item]


def _is_standard(policy: nn.Module, methods: Sequence[str], extractor: str, network: str) -> bool:
    """Whether the policy feeds flat features to a part of an MlpExtractor as SB3's own class does, through these methods."""
    return (
        isinstance(policy, STANDARD_POLICIES)
        and is_plain(policy)
        and type(policy.mlp_extractor) is MlpExtractor
        and type(getattr(policy.mlp_extractor, network)) is nn.Sequential
        and _only_flattens(getattr(policy, extractor))
        and all(
            getattr(type(policy), method) in [getattr(standard, method) for standard in STANDARD_POLICIES]
            for method in methods
        )
    )


def _only_flattens(extractor: nn.Module) -> bool:
    flatten = getattr(extractor, "flatten", None)
    return (
        type(extractor) is FlattenExtractor and type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
    )
