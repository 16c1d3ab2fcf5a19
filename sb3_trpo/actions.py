"""
Bounded actions and custom action distributions.

A policy's distribution describes raw actions, before they are bounded. The rollout buffer and the update use raw actions: no
inverse of a saturated tanh is needed. The methods ``forward``, ``evaluate_actions`` and ``predict`` of a policy use the
environment's actions.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.distributions import Bernoulli, Independent, TransformedDistribution
from torch.distributions import Distribution as TorchDistribution
from torch.nn import functional as F

from sb3_trpo.arguments import POSITIVE_INTEGER_OR_NONE, Rule, check_arguments, one_of, optional, shown

ACTION_BOUNDS = ("clip", "tanh")
#: The policies' own arguments.
ACTION_OPTIONS = ("action_bound", "dist_fn", "n_dist_outputs")


def _function(value: Any) -> Any:
    if not callable(value):
        raise ValueError
    return value


OPTION_RULES = {
    "action_bound": one_of(*ACTION_BOUNDS, None),
    "dist_fn": optional(Rule(_function, "a function outputs -> torch distribution")),
    "n_dist_outputs": POSITIVE_INTEGER_OR_NONE,
}

#: First logarithm of the standard deviation of a Gaussian without gSDE. SB3 has 0, which learns slower on MuJoCo's tasks.
LOG_STD_INIT = -0.5

DistributionFunction = Callable[[th.Tensor], TorchDistribution]
SelfUserDistribution = TypeVar("SelfUserDistribution", bound="CustomDistribution")


def log_tanh_slope(u: th.Tensor) -> th.Tensor:
    """
    Log of d tanh(u)/du = 1 − tanh²(u), accurate for large u.

    :param u: tensor of any shape
    :return: log(1 − tanh²(u)), same shape
    """
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))


class TanhGaussianDistribution(DiagGaussianDistribution):
    """Distribution of a = tanh(u) with Gaussian u. Samples are u; log-probabilities are densities of a in [-1, 1]."""

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of a = tanh(u).

        :param actions: u, shape ``(n_states, n_dimensions)``
        :return: log π(a|s), shape ``(n_states,)``
        """
        return super().log_prob(actions) - log_tanh_slope(actions).sum(dim=1)

    def entropy(self) -> None:
        """Return None: there is no closed form."""
        return


class CustomDistribution(Distribution):
    """
    A distribution that a user's function computes from the network's outputs.

    :param dist_fn: outputs, shape ``(n_states, n_outputs)`` ↦ torch distribution, with the states in its first batch dimension
    :param n_outputs: number of the network's outputs
    :param action_shape: shape of an action: ``(n_dimensions,)``, or ``()`` for Discrete
    :param is_tanh_bounded: log-probabilities are densities of the tanh of a sample
    """

    def __init__(
        self, dist_fn: DistributionFunction, n_outputs: int, action_shape: tuple[int, ...], is_tanh_bounded: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dist_fn = dist_fn
        self.n_outputs = n_outputs
        self.action_shape = action_shape
        self.is_tanh_bounded = is_tanh_bounded
        self.distribution: TorchDistribution

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """
        Make the output layer.

        :param latent_dim: width of the last hidden layer
        :return: a linear layer
        """
        return nn.Linear(latent_dim, self.n_outputs)

    def proba_distribution(self: SelfUserDistribution, outputs: th.Tensor) -> SelfUserDistribution:
        """
        Set the distribution for a batch of outputs.

        :param outputs: the network's outputs, shape ``(n_states, n_outputs)``
        :return: self
        :raises ValueError: the function did not return a distribution of one action per state
        """
        distribution = self.dist_fn(outputs)
        if not isinstance(distribution, TorchDistribution):
            raise ValueError(f"dist_fn returned a {type(distribution).__name__}; it must be a torch distribution")
        while isinstance(distribution, Independent):  # this class sums over the dimensions itself
            distribution = distribution.base_dist
        batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
        # Samples of another shape would be broadcast without an error.
        if batch[:1] != (len(outputs),) or batch + event != (len(outputs), *self.action_shape):
            raise ValueError(
                f"dist_fn returned {type(distribution).__name__} with batch_shape={batch} and event_shape={event}; the first "
                f"must begin with the {len(outputs)} states, and both must add up to {(len(outputs), *self.action_shape)}"
            )
        self.distribution = distribution
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of the joint action.

        :param actions: as sampled, shape ``(n_states, ...)``
        :return: log π(a|s), shape ``(n_states,)``
        """
        log_prob = _sum_dimensions(self.distribution.log_prob(actions))
        return log_prob - _sum_dimensions(log_tanh_slope(actions)) if self.is_tanh_bounded else log_prob

    def entropy(self) -> th.Tensor | None:
        """
        Entropy of the joint action in nats.

        :return: shape ``(n_states,)``; None if there is no closed form
        """
        try:
            return None if self.is_tanh_bounded else _sum_dimensions(self.distribution.entropy())
        except NotImplementedError:
            return None

    def sample(self) -> th.Tensor:
        """
        Sample.

        :return: actions, shape ``(n_states, ...)``
        """
        return self.distribution.sample()

    def mode(self) -> th.Tensor:
        """
        Return the mode; the mean if the mode has no closed form or is not unique.

        :return: actions, shape ``(n_states, ...)``
        """
        return _mode(self.distribution)

    def actions_from_params(self, outputs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """
        Set the distribution and choose actions.

        :param outputs: the network's outputs, shape ``(n_states, n_outputs)``
        :param deterministic: use the mode instead of a sample
        :return: actions, shape ``(n_states, ...)``
        """
        return self.proba_distribution(outputs).get_actions(deterministic)

    def log_prob_from_params(self, outputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Set the distribution and sample.

        :param outputs: the network's outputs, shape ``(n_states, n_outputs)``
        :return: actions and their log-probabilities
        """
        actions = self.actions_from_params(outputs)
        return actions, self.log_prob(actions)


def _sum_dimensions(tensor: th.Tensor) -> th.Tensor:
    return tensor.flatten(start_dim=1).sum(dim=1) if tensor.ndim > 1 else tensor


def _mode(distribution: TorchDistribution) -> th.Tensor:
    if isinstance(distribution, TransformedDistribution):
        mode = _mode(distribution.base_dist)
        for transform in distribution.transforms:
            mode = transform(mode)
        return mode
    if isinstance(distribution, Bernoulli):
        return distribution.probs.round()  # torch has no mode at 1/2, and the mean is no action
    try:
        mode = distribution.mode
    except NotImplementedError:
        return distribution.mean
    return th.where(mode.isfinite(), mode, distribution.mean) if mode.is_floating_point() else mode


class BoundedActionPolicy(ActorCriticPolicy):
    """
    SB3's actor-critic policy with a choice of action bounds and distributions.

    With ``action_bound``, :meth:`forward`, :meth:`evaluate_actions` and ``predict`` use the environment's actions;
    :meth:`get_distribution` describes raw actions, which :meth:`to_env` bounds and scales. Log-probabilities are densities of
    the bounded action in [-1, 1] (``"tanh"``) or of the raw action (``"clip"``), as in SB3.

    :param args: as SB3's ``ActorCriticPolicy``
    :param action_bound: ``"clip"`` or ``"tanh"`` to bound raw actions to [-1, 1] and scale them to the bounds of the space;
        None to clip them to the bounds of the space, as SB3 does
    :param dist_fn: returns the action distribution, a torch distribution, for the outputs of the network, shape
        ``(n_states, n_dist_outputs)``; None for SB3's, by action space. torch must know KL(p ‖ q) of its family
    :param n_dist_outputs: number of outputs of the network; None for two per action dimension
    :param kwargs: as SB3's ``ActorCriticPolicy``; ``log_std_init`` is -0.5 unless given, and 0 with gSDE
    :raises ValueError: an option is out of range, or does not fit the action space or gSDE
    """

    def __init__(
        self,
        *args: Any,
        action_bound: str | None = None,
        dist_fn: DistributionFunction | None = None,
        n_dist_outputs: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._uses_raw_actions = False
        if not kwargs.get("use_sde", False):
            kwargs.setdefault("log_std_init", LOG_STD_INIT)
        # SB3's constructor builds the networks, which depend on these.
        self.action_bound, self.dist_fn, self.n_dist_outputs = action_bound, dist_fn, n_dist_outputs
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        check_action_options(self.action_space, self.use_sde, self._action_options)
        is_tanh_bounded = self.action_bound == "tanh"
        if is_tanh_bounded:
            self.action_dist = TanhGaussianDistribution(get_action_dim(self.action_space))
        super()._build(lr_schedule)
        if self.dist_fn is None:
            return
        n_outputs = self.n_dist_outputs or 2 * get_action_dim(self.action_space)
        self.action_dist = CustomDistribution(self.dist_fn, n_outputs, _flat_shape(self.action_space), is_tanh_bounded)
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)
        if self.ortho_init:
            self.init_weights(self.action_net, gain=0.01)
        if hasattr(self, "log_std"):
            del self.log_std
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        if isinstance(self.action_dist, CustomDistribution):
            return self.action_dist.proba_distribution(self.action_net(latent_pi))
        return super()._get_action_dist_from_latent(latent_pi)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self._action_options}

    @property
    def _action_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ACTION_OPTIONS}

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Act and evaluate.

        :param obs: observations
        :param deterministic: use the mode instead of a sample
        :return: the environment's actions, values and log-probabilities
        """
        actions, values, log_prob = super().forward(obs, deterministic)  # type: ignore[arg-type]
        return actions if self._uses_raw_actions else self.to_env(actions), values, log_prob

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Evaluate the environment's actions, for instance an expert's.

        :param obs: observations
        :param actions: actions of the environment, shape ``(n_states, *action_shape)``
        :return: values, log-probabilities, and entropies if they have a closed form
        """
        return super().evaluate_actions(obs, actions if self._uses_raw_actions else self.from_env(actions))

    def bounded(self, actions: th.Tensor) -> th.Tensor:
        """
        Bound raw actions to [-1, 1].

        :param actions: samples of the distribution, shape ``(n_states, ...)``
        :return: their tanh, or clipped actions; unchanged without ``action_bound``
        """
        if self.action_bound is None:
            return actions
        return actions.tanh() if self.action_bound == "tanh" else actions.clip(-1.0, 1.0)

    def to_env(self, actions: th.Tensor) -> th.Tensor:
        """
        Convert raw actions to the environment's.

        :param actions: samples of the distribution, shape ``(n_states, ...)``
        :return: actions within the bounds of the space, exactly; unchanged without ``action_bound``
        """
        if self.action_bound is None:
            return actions
        low, high = self._bounds(actions.device)
        scaled = self.bounded(actions.flatten(1))
        return (low + 0.5 * (scaled + 1.0) * (high - low)).clip(low, high).reshape(actions.shape)

    def from_env(self, actions: th.Tensor) -> th.Tensor:
        """
        Convert the environment's actions to raw actions: the inverse of :meth:`to_env`.

        :param actions: actions of the environment, shape ``(n_states, *action_shape)``
        :return: raw actions; finite at the bounds and beyond; unchanged without ``action_bound``
        """
        if self.action_bound is None:
            return actions
        low, high = self._bounds(actions.device)
        scaled = 2.0 * (actions.flatten(1) - low) / (high - low) - 1.0
        scaled = scaled.to(next(self.parameters()).dtype)
        if self.action_bound == "clip":
            return scaled.clip(-1.0, 1.0)
        largest = 1.0 - th.finfo(scaled.dtype).eps
        return scaled.clip(-largest, largest).atanh()

    def _bounds(self, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        space: Any = self.action_space
        return th.as_tensor(space.low.ravel(), device=device), th.as_tensor(space.high.ravel(), device=device)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Scale actions from [-1, 1] to the bounds of the action space; rounding never exceeds them.

        :param scaled_action: actions in [-1, 1]; raw ones under :func:`raw_actions`
        :return: actions of the environment
        """
        if self._uses_raw_actions:
            return self.to_env(th.from_numpy(scaled_action)).numpy()
        assert isinstance(self.action_space, spaces.Box)
        return np.clip(super().unscale_action(scaled_action), self.action_space.low, self.action_space.high)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.to_env(super()._predict(observation, deterministic))


@contextmanager
def raw_actions(policy: nn.Module) -> Iterator[None]:
    """
    Make ``forward``, ``evaluate_actions`` and ``unscale_action`` of a policy use raw actions, as the rollout buffer does.

    SB3's loop stores the result of ``forward``, and passes it to ``unscale_action`` for the environment.

    :param policy: the policy; nothing changes for one without ``action_bound``
    """
    if not isinstance(policy, BoundedActionPolicy) or policy.action_bound is None or policy._uses_raw_actions:
        yield
        return
    policy._uses_raw_actions = policy._squash_output = True
    try:
        yield
    finally:
        policy._uses_raw_actions = policy._squash_output = False


def check_action_options(action_space: spaces.Space[Any], use_sde: bool, options: Mapping[str, Any]) -> None:
    """
    Check the options of a policy.

    :param action_space: the environment's action space
    :param use_sde: whether it explores with gSDE
    :param options: its :data:`ACTION_OPTIONS`
    :raises ValueError: an option is not allowed; the message names it, its value and what is allowed
    """
    check_arguments(OPTION_RULES, options)
    for name in ("action_bound", "dist_fn"):
        if use_sde and options[name] is not None:
            raise ValueError(f"{name}={shown(options[name])} is not allowed with use_sde=True: gSDE has its own distribution")
    if options["dist_fn"] is None and options["n_dist_outputs"] is not None:
        raise ValueError(f"n_dist_outputs={options['n_dist_outputs']!r} is not allowed without dist_fn")
    is_bounded = isinstance(action_space, spaces.Box) and action_space.is_bounded("both")
    if options["action_bound"] is not None and not is_bounded:
        raise ValueError(
            f"action_bound={options['action_bound']!r} is not allowed with the action space {action_space}: "
            "it must be a Box with finite bounds"
        )


def _flat_shape(action_space: spaces.Space[Any]) -> tuple[int, ...]:
    """Shape of one action as SB3's distributions give it."""
    return () if isinstance(action_space, spaces.Discrete) else (get_action_dim(action_space),)
