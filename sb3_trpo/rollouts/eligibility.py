"""Which fast path may serve a policy: acting in NumPy, evaluating the rollout in large batches, or neither.

Each must give the numbers of SB3's loop, which calls ``policy.forward`` at every step. The rule is checked at the start of
every rollout, and :class:`~sb3_trpo.rollouts.policy_state.PolicyState` notices changes within one.
"""

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable import distributions as maskable_distributions
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common import distributions, policies, torch_layers
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn

from sb3_trpo import actions
from sb3_trpo.actions import BoundedActionPolicy
from sb3_trpo.optim.mlp import MLP
from sb3_trpo.optim.plain import are_original, has_hooks, has_patched_methods, is_of_library, is_plain, remember
from sb3_trpo.rollouts.policy_state import PolicyState

for library in (policies, torch_layers, distributions, maskable_distributions, actions):
    remember(*{item for item in vars(library).values() if isinstance(item, type)})
remember(MaskableActorCriticPolicy)

#: Methods that act or evaluate. All others, such as `_get_action_dist_from_latent`, are called by each of them alike.
ACTING_METHODS = ("forward", "extract_features", "get_distribution", "evaluate_actions", "predict_values")
#: Classes whose methods belong together, the most specific first.
STANDARD_POLICIES = (MaskableActorCriticPolicy, BoundedActionPolicy, ActorCriticPolicy)
NUMPY_ACTIVATIONS = (nn.Tanh, nn.ReLU)


def has_own_forward(policy: BasePolicy) -> bool:
    """
    Return True if the policy's class has a ``forward`` of its own, which may bound and scale actions in its own way.

    :param policy: the policy
    """
    return type(policy).forward not in {standard.forward for standard in STANDARD_POLICIES}


def supports_deferred_evaluation(policy: BasePolicy) -> bool:
    """
    Return True if a rollout can be evaluated after it was collected, in batches of any size.

    :param policy: the policy, in the mode in which it acts
    """
    return _acts_as_its_class(policy) and not any(part.training for part in policy.modules())


def _acts_as_its_class(policy: BasePolicy) -> bool:
    """Whether the policy acts by SB3's methods, without hooks."""
    cls = type(policy)
    standard = next((each for each in STANDARD_POLICIES if issubclass(cls, each)), None)
    return (
        standard is not None
        and all(getattr(cls, method) is getattr(standard, method) for method in ACTING_METHODS)
        and are_original(cls, type(policy.action_dist))
        and not has_patched_methods(policy)
        and not has_hooks(policy)
    )


def has_known_modules(policy: BasePolicy) -> bool:
    """
    Return True if all modules are of torch's and SB3's classes, which neither count calls nor draw random numbers.

    :param policy: the policy
    """
    return is_plain(policy) and all(is_of_library(type(part)) for part in policy.modules())


@th.no_grad()
def draws_random_numbers(policy: ActorCriticPolicy, observations: th.Tensor | dict[str, th.Tensor]) -> bool:
    """
    Return True if the policy's networks draw random numbers, so that two calls give two distributions.

    The generator and the policy are left as they were.

    :param policy: the policy
    :param observations: some observations
    """
    generator = th.cuda if policy.device.type == "cuda" else th
    before = generator.get_rng_state()
    with PolicyState(policy).restored():
        policy.predict_values(observations)
        policy.get_distribution(observations)
    after = generator.get_rng_state()
    generator.set_rng_state(before)
    return not th.equal(before, after)


def acts_as_mlp(policy: BasePolicy, mlp: MLP) -> bool:
    """
    Return True if NumPy may evaluate the actor in place of the policy.

    :param policy: the policy
    :param mlp: its actor
    """
    tensors = [*mlp.parameters, *([policy.log_std] if hasattr(policy, "log_std") else [])]
    return (
        _acts_as_its_class(policy)
        and type(policy.observation_space) is spaces.Box
        and not is_image_space(policy.observation_space)
        and all(type(activation) in NUMPY_ACTIVATIONS for activation in mlp.activations)
        and all(tensor.dtype is th.float32 and tensor.device.type == "cpu" for tensor in tensors)
    )
