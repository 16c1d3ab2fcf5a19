"""Checks of constructor arguments against one another; :mod:`sb3_trpo.arguments` has the rules of single ones."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sb3_trpo.actions import BoundedActionPolicy
from sb3_trpo.arguments import shown
from sb3_trpo.errors import argument_error, warn_user
from sb3_trpo.saving.sb3_contrib import MINIBATCH_ARGUMENTS

MAX_STATES = 2**31 - 1  # in a rollout
#: Arguments that only the Gauss-Newton critic uses.
GAUSS_NEWTON_ARGUMENTS = ("critic_damping", "n_critic_steps")
OPTIMIZER_OPTIONS = ("optimizer_class", "optimizer_kwargs")


def check_rollout_size(
    n_steps: int,
    n_envs: int,
    *,
    normalize_advantage: bool,
    sub_sampling_factor: int,
    policy_batch_size: int | None,
    critic_batch_size: int | None,
) -> None:
    """
    Check the number of states in a rollout against the arguments that divide it.

    :param n_steps: steps of each environment
    :param n_envs: number of environments
    :param normalize_advantage: whether advantages are normalized, which takes two states
    :param sub_sampling_factor: one in so many states is used
    :param policy_batch_size: states of one policy step; None for all
    :param critic_batch_size: states in a minibatch of the critic; None if it has no minibatches
    :raises ValueError: the rollout is too small or too large
    """
    n_states = n_steps * n_envs
    words = f"n_steps={n_steps} * n_envs={n_envs} = {n_states} states"
    if n_states > MAX_STATES:
        raise ValueError(f"a rollout of {words} is not allowed: it must have at most {MAX_STATES}")
    if normalize_advantage and n_states < 2:
        message = f"a rollout of {words} is not allowed with normalize_advantage=True: it must have at least 2"
        raise argument_error(message, AssertionError())  # an AssertionError as well, as in sb3-contrib
    for name, value in (("sub_sampling_factor", sub_sampling_factor), ("policy_batch_size", policy_batch_size)):
        if value is not None and value > n_states:
            raise ValueError(f"{name}={value} is not allowed: it must be at most the rollout's {words}")
    if critic_batch_size is not None and n_states % critic_batch_size > 0:
        warn_user(
            f"batch_size={critic_batch_size} does not divide the rollout's {words}: "
            f"the last minibatch of each pass has {n_states % critic_batch_size}"
        )


def with_action_bound(policy: type, policy_kwargs: Mapping[str, Any], action_bound: str) -> dict[str, Any]:
    """
    Add ``action_bound`` to the arguments of a policy.

    :param policy: the policy class
    :param policy_kwargs: its arguments
    :param action_bound: ``"clip"`` or ``"tanh"``
    :return: the arguments, with ``action_bound``
    :raises ValueError: the policy takes no such argument, or was given another one
    """
    if not issubclass(policy, BoundedActionPolicy):
        raise ValueError(
            f"policy={policy.__name__} is not allowed with action_bound={action_bound!r}: "
            "it must derive from MlpPolicy, CnnPolicy or MultiInputPolicy of sb3_trpo"
        )
    other = policy_kwargs.get("action_bound", action_bound)
    if other != action_bound:
        raise ValueError(f"action_bound={action_bound!r} is not allowed with policy_kwargs['action_bound']={other!r}")
    return {**policy_kwargs, "action_bound": action_bound}


@contextmanager
def named_keyword_arguments(policy: type, arguments: Mapping[str, Any]) -> Iterator[None]:
    """
    Name the user's keyword arguments if policy or buffer cannot be made from them.

    :param policy: the policy class
    :param arguments: name of the argument ↦ dictionary
    :return: context manager
    :raises ValueError: something was raised inside the context, and there are such arguments
    """
    try:
        yield
    except (TypeError, AttributeError, AssertionError, LookupError, RuntimeError, OverflowError) as error:
        words = " and ".join(f"{name}={shown(value)}" for name, value in arguments.items() if value)
        if not words:
            raise
        raise argument_error(
            f"{words} is not allowed: it must suit {policy.__name__} and the rollout buffer, which raised {error!r}", error
        ) from error


def unused_arguments(critic_method: str) -> dict[str, tuple[str, ...]]:
    """
    Return the arguments that have no effect, by the argument that disables them.

    :param critic_method: how the critic is fitted
    """
    unused = GAUSS_NEWTON_ARGUMENTS if critic_method == "minibatch" else MINIBATCH_ARGUMENTS
    return {f"critic_method={critic_method!r}": unused}


def warn_of_unused_arguments(
    unused: Mapping[str, tuple[str, ...]], given: Collection[str], policy_kwargs: Mapping[str, Any]
) -> None:
    """
    Warn once about arguments that the user gave and that have no effect.

    :param unused: arguments that have no effect, by the argument that disables them
    :param given: names of the arguments that the user gave
    :param policy_kwargs: arguments of the policy; without the minibatch critic its optimizer has no effect
    """
    optimizer = [f"policy_kwargs[{name!r}]" for name in OPTIMIZER_OPTIONS if name in policy_kwargs]
    for reason, names in unused.items():
        found = [name for name in names if name in given]
        if names is MINIBATCH_ARGUMENTS and "policy_kwargs" in given:
            found += optimizer
        if found:
            warn_user(f"no effect with {reason}: {', '.join(found)}")
