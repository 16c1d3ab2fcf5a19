"""Choosing actions during a rollout: the sampling law of the policy, at the least cost per step."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_trpo.actions import BoundedActionPolicy
from sb3_trpo.optim.mlp import MLP
from sb3_trpo.rollouts.eligibility import acts_as_mlp, supports_deferred_evaluation
from sb3_trpo.rollouts.fast_step import Observations


class ActionSampler(Protocol):
    """Samples actions from the policy's distribution."""

    @property
    def calls_policy(self) -> bool:
        """Whether the policy's modules are called, which may be of any class."""

    def __call__(self, observations: Observations, step: int) -> np.ndarray:
        """
        Sample actions.

        :param observations: one for each environment
        :param step: number of the step in the rollout
        :return: actions, shape ``(n_envs, *action_shape)``
        """


def make_sampler(
    policy: ActorCriticPolicy, mlp: MLP | None, n_steps: int, n_envs: int, sde_sample_freq: int
) -> ActionSampler | None:
    """
    Return the cheapest sampler of the policy's actions.

    :param policy: the policy; its parameters must not change while the sampler is used
    :param mlp: its actor, if that is an MLP
    :param n_steps: steps in the rollout
    :param n_envs: number of environments
    :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
    :return: the sampler; None if the policy must be asked for values and log-probabilities at every step as well
    """
    sampler = make_numpy_sampler(policy, mlp, n_steps, n_envs)
    if sampler is not None:
        return sampler
    return PolicyActionSampler(policy, n_envs, sde_sample_freq) if supports_deferred_evaluation(policy) else None


def make_numpy_sampler(policy: BasePolicy, mlp: MLP | None, n_steps: int, n_envs: int) -> "NumpyActionSampler | None":
    """
    Return a sampler that does without torch, for policies that have one.

    :param policy: the policy; its parameters must not change while the sampler is used
    :param mlp: its actor, if that is an MLP
    :param n_steps: steps in the rollout
    :param n_envs: number of environments
    :return: the sampler, or None
    """
    return NumpyActionSampler(policy, mlp, n_steps, n_envs) if mlp is not None and acts_as_mlp(policy, mlp) else None


def resamples_noise(step: int, sde_sample_freq: int) -> bool:
    """
    Return True if gSDE samples its noise matrix at this step.

    :param step: number of the step in the rollout
    :param sde_sample_freq: sample a new matrix every so many steps; -1 for once a rollout
    """
    return step == 0 or (sde_sample_freq > 0 and step % sde_sample_freq == 0)


def action_transform(policy: ActorCriticPolicy) -> Callable[[np.ndarray], np.ndarray]:
    """
    Return the function that scales bounded actions to the action space, and clips all others to it.

    :param policy: the policy
    :return: actions of the policy ↦ actions of the environment
    """
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return lambda actions: actions
    if isinstance(policy, BoundedActionPolicy) and policy.action_bound is not None:
        return lambda actions: policy.unscale_action(policy.bounded(th.from_numpy(actions)).numpy())
    if policy.squash_output:
        return policy.unscale_action
    low, high = space.low, space.high
    return lambda actions: np.minimum(np.maximum(actions, low), high)


class PolicyActionSampler:
    """
    Acts by the policy's own distribution; the values are left for later.

    :param policy: the policy
    :param n_envs: number of environments
    :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
    """

    calls_policy = True

    def __init__(self, policy: ActorCriticPolicy, n_envs: int, sde_sample_freq: int) -> None:
        self._policy = policy
        self._n_envs = n_envs
        self._sde_sample_freq = sde_sample_freq

    def __call__(self, observations: Observations, step: int) -> np.ndarray:
        """See :class:`ActionSampler`."""
        policy = self._policy
        if policy.use_sde and resamples_noise(step, self._sde_sample_freq):
            policy.reset_noise(self._n_envs)
        with th.no_grad():
            actions = policy.get_distribution(obs_as_tensor(observations, policy.device)).get_actions()
        shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]
        return actions.reshape(-1, *shape).cpu().numpy()


def _relu(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    return np.maximum(x, 0.0, out=out)


ACTIVATIONS: dict[type[nn.Module], Callable[..., np.ndarray]] = {nn.Tanh: np.tanh, nn.ReLU: _relu}
#: Whatever torch's default type and device are.
FLOAT32: dict[str, Any] = {"dtype": th.float32, "device": "cpu"}


class NumpyActionSampler:
    """
    Acts for SB3's standard MLP policy with a few NumPy calls per step.

    The noise of the whole rollout is drawn beforehand from torch's global generator, so that a seed fixes it: standard
    normal for Box; Gumbel for Discrete and MultiDiscrete, whose largest perturbed logit is a sample of the softmax;
    logistic for MultiBinary, whose sign of the perturbed logit is a sample of the Bernoulli.

    :param policy: the policy
    :param mlp: its actor
    :param n_steps: steps in the rollout
    :param n_envs: number of environments
    """

    calls_policy = False

    def __init__(self, policy: BasePolicy, mlp: MLP, n_steps: int, n_envs: int) -> None:
        # Views of the parameters, not copies.
        *weights, self._last_layer = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in mlp.layers]
        activations = [ACTIVATIONS[type(activation)] for activation in mlp.activations]
        self._hidden_layers = [(*pair, activation) for pair, activation in zip(weights, activations, strict=True)]
        space = policy.action_space
        self._is_box, self._is_discrete = isinstance(space, spaces.Box), isinstance(space, spaces.Discrete)
        self._shape: tuple[int, ...] = space.shape  # type: ignore[assignment]
        shape = (n_steps, n_envs, mlp.layers[-1].out_features)
        distribution: Any = policy.action_dist
        #: Number of choices in each part of the action; None where it is not a choice.
        self._choices: list[int] | None = None
        if self._is_box:
            noise = th.randn(shape, **FLOAT32) * policy.log_std.detach().exp()  # type: ignore[operator]
        elif isinstance(distribution, BernoulliDistribution):
            noise = th.rand(shape, **FLOAT32).logit(eps=1e-7)
        else:
            noise = -th.empty(shape, **FLOAT32).exponential_().log()
            self._choices = [shape[-1]] if self._is_discrete else list(distribution.action_dims)
        self._noise = noise.numpy()

    def __call__(self, observations: Observations, step: int, action_masks: np.ndarray | None = None) -> np.ndarray:
        """
        Sample actions.

        :param observations: one for each environment
        :param step: number of the step in the rollout
        :param action_masks: which choices are allowed, shape ``(n_envs, n_choices)``; None for all
        :return: actions, shape ``(n_envs, *action_shape)``
        """
        hidden: np.ndarray = observations  # type: ignore[assignment]
        hidden = hidden.reshape(len(hidden), -1).astype(np.float32, copy=False)
        for weight, bias, activation in self._hidden_layers:
            hidden = hidden @ weight
            hidden += bias
            activation(hidden, out=hidden)
        weight, bias = self._last_layer
        noisy = hidden @ weight
        noisy += bias
        noisy += self._noise[step]
        if self._is_box:
            return noisy.reshape(len(noisy), *self._shape)
        if self._choices is None:
            return (noisy > 0).astype(np.float32)
        if action_masks is not None:
            noisy = np.where(action_masks, noisy, -np.inf)
        if self._is_discrete:
            return noisy.argmax(axis=1)
        splits = np.split(noisy, np.cumsum(self._choices)[:-1], axis=1)
        return np.stack([split.argmax(axis=1) for split in splits], axis=1)
