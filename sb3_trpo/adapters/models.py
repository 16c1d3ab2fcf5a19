"""SB3's policies as the models that the update takes: forward passes, parameters, layers."""

from collections.abc import Callable, Sequence

import torch as th
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
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn

from sb3_trpo.actions import BoundedActionPolicy, TanhGaussianDistribution
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.critic import value_output
from sb3_trpo.optim.distributions import Components, detach, has_closed_form, joint_kl
from sb3_trpo.optim.kfac import kfac_layers
from sb3_trpo.optim.mlp import MLP, as_mlp, recorded_calls
from sb3_trpo.optim.objective import Model, ModelOutput
from sb3_trpo.optim.plain import are_original, has_patched_methods, is_plain
from sb3_trpo.optim.sequential import Sequential, as_sequential

PolicyFunction = Callable[[Inputs], Distribution]
ValueFunction = Callable[[Inputs], th.Tensor]

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


def components(distribution: Distribution) -> Components:
    """
    Return the independent torch distributions of an SB3 action distribution.

    SB3 returns one mutable wrapper per policy; every forward pass makes new torch distributions inside, so the tuple stays
    valid.

    :param distribution: SB3 action distribution
    :return: its torch distributions, each with the states in its first batch dimension
    """
    several = isinstance(distribution, MaskableMultiCategoricalDistribution)
    inner = distribution.distributions if several else distribution.distribution  # type: ignore[attr-defined]
    return tuple(inner) if isinstance(inner, (list, tuple)) else (inner,)


def policy_output(policy: PolicyFunction, batch: RolloutBatch, layers: Sequence[nn.Module] = ()) -> ModelOutput:
    """
    Evaluate a policy on states and actions.

    :param policy: observations ↦ SB3 action distribution
    :param batch: states and actions
    :param layers: layers whose calls to record
    :return: distribution, log-probabilities and entropy
    :raises ValueError: the distribution's log-probabilities are not one number a state
    """
    with recorded_calls(layers) as calls:
        distribution = policy(batch.inputs)
    log_prob = distribution.log_prob(batch.actions)
    if log_prob.shape != batch.advantages.shape:
        raise ValueError(
            f"log_prob of {type(distribution).__name__} has shape {tuple(log_prob.shape)}; "
            f"it must be one number a state: {tuple(batch.advantages.shape)}"
        )
    if batch.sequence_length > 1:  # ratios of padding could be infinite, and no weight masks that
        log_prob = log_prob.where(batch.mask, 0.0)
    return ModelOutput(components(distribution), log_prob, distribution.entropy(), calls)


def actor_model(policy: nn.Module, distribution: PolicyFunction, inputs: Inputs) -> Model:
    """
    Describe the policy for the update.

    :param policy: module that holds all parameters
    :param distribution: observations ↦ SB3 action distribution
    :param inputs: a few observations
    :return: the policy as a function of θ
    """
    theta = actor_parameters(policy, distribution, inputs)

    def forward(batch: RolloutBatch, layers: Sequence[nn.Module]) -> ModelOutput:
        return policy_output(distribution, batch, layers)

    mlp = actor_mlp(policy)
    return Model(forward, theta, kfac_layers(policy, theta), mlp, None if mlp else actor_sequential(policy))


def critic_model(policy: nn.Module, values: ValueFunction, critic: list[nn.Parameter]) -> Model:
    """
    Describe the value function for its regression.

    :param policy: module that holds all parameters
    :param values: observations, or features, ↦ values, shape ``(n_states,)``
    :param critic: the parameters to train
    :return: the value function as a function of them
    """

    def forward(batch: RolloutBatch, layers: Sequence[nn.Module]) -> ModelOutput:
        return value_output(values, batch, layers)

    mlp = critic_mlp(policy)
    return Model(forward, critic, kfac_layers(policy, critic), mlp, None if mlp else critic_sequential(policy))


def _is_standard(policy: nn.Module, methods: Sequence[str]) -> bool:
    """Whether the policy is one of SB3's, unchanged in these methods and in all its modules."""
    return (
        isinstance(policy, STANDARD_POLICIES)
        and is_plain(policy)
        and all(
            getattr(type(policy), method) in [getattr(standard, method) for standard in STANDARD_POLICIES]
            for method in methods
        )
    )


def _feeds_flat(policy: nn.Module, extractor: str, network: str) -> bool:
    """Whether the policy feeds flat features to a part of an MlpExtractor."""
    return (
        type(policy.mlp_extractor) is MlpExtractor
        and type(getattr(policy.mlp_extractor, network)) is nn.Sequential
        and _only_flattens(getattr(policy, extractor))
    )


def _is_standard_actor(policy: nn.Module) -> bool:
    """Whether the distribution is made of the action net's output as in SB3's policy, with no other parameter but log_std."""
    if not _is_standard(policy, ["get_distribution", "extract_features", "_get_action_dist_from_latent"]):
        return False
    family: type = type(policy.action_dist)  # a subclass may have other parameters
    return family in STATE_INDEPENDENT_NOISE and not has_patched_methods(policy.action_dist) and are_original(family)


def _is_standard_critic(policy: nn.Module) -> bool:
    """Whether the value is the value net's output as in SB3's policy."""
    return _is_standard(policy, ["predict_values", "extract_features"])


def actor_sequential(policy: nn.Module) -> Sequential | None:
    """
    Return the modules that may lie one after another between observation and action distribution.

    :param policy: any policy
    :return: the modules; None if the policy is not SB3's standard policy, whatever its extractor
    """
    return _sequential(policy, "pi_features_extractor", "action_net") if _is_standard_actor(policy) else None


def critic_sequential(policy: nn.Module) -> Sequential | None:
    """
    Return the modules that may lie one after another between observation and value.

    :param policy: any policy
    :return: the modules; None if the policy is not SB3's standard policy, whatever its extractor
    """
    return _sequential(policy, "vf_features_extractor", "value_net") if _is_standard_critic(policy) else None


def _sequential(policy: nn.Module, extractor: str, output: str) -> Sequential | None:
    return as_sequential(policy, getattr(policy, output), channels_last=type(getattr(policy, extractor)) is NatureCNN)


def _only_flattens(extractor: nn.Module) -> bool:
    flatten = getattr(extractor, "flatten", None)
    return (
        type(extractor) is FlattenExtractor and type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
    )


def actor_mlp(policy: nn.Module) -> MLP | None:
    """
    Return the MLP from the flat observation to the action distribution's main parameters.

    :param policy: any policy
    :return: the MLP, or None if the policy is not SB3's standard MLP policy, unchanged
    """
    if not (_is_standard_actor(policy) and _feeds_flat(policy, "pi_features_extractor", "policy_net")):
        return None
    return as_mlp([*policy.mlp_extractor.policy_net, policy.action_net])  # type: ignore[union-attr,misc,list-item]


def critic_mlp(policy: nn.Module) -> MLP | None:
    """
    Return the MLP from the flat observation to the value.

    :param policy: any policy
    :return: the MLP, or None if the policy is not SB3's standard MLP policy, unchanged
    """
    if not (_is_standard_critic(policy) and _feeds_flat(policy, "vf_features_extractor", "value_net")):
        return None
    return as_mlp([*policy.mlp_extractor.value_net, policy.value_net])  # type: ignore[union-attr,misc,list-item]


def actor_parameters(policy: nn.Module, distribution: PolicyFunction, inputs: Inputs) -> list[nn.Parameter]:
    """
    Find θ, the parameters that the KL depends on, by differentiating it.

    :param policy: module that holds all parameters
    :param distribution: observations ↦ SB3 action distribution
    :param inputs: a few observations
    :return: the trainable parameters that π depends on, in the policy's order
    :raises ValueError: the distribution depends on no trainable parameter
    """
    new = components(distribution(inputs))
    if has_closed_form(new):
        old = detach(new)
    else:
        with th.no_grad():
            old = components(distribution(inputs))
    actor = _reached(policy, joint_kl(old, new))
    if not actor:
        raise ValueError(f"the action distribution of {type(policy).__name__} depends on none of its trainable parameters")
    return actor


def critic_parameters(
    policy: nn.Module, values: ValueFunction, inputs: Inputs, actor: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """
    Find the parameters that the values depend on and the policy does not: those that the critic may train.

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
    Split V(s) = head(encode(s)), to compute what the critic cannot change once per update.

    The encoding is SB3's features if the critic trains no parameter of their extractor: flat observations, or an extractor
    shared with the actor.

    :param policy: actor-critic policy
    :param values: observations ↦ values
    :param critic: the critic's own parameters
    :return: encode (None if there is nothing to precompute) and head
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
