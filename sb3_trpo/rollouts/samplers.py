"""Choosing actions during a rollout: the sampling law of the policy, at the least cost per step."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_trpo.actions import BoundedActionPolicy
from sb3_trpo.adapters.models import actor_mlp
from sb3_trpo.optim.mlp import MLP

Observations = np.ndarray | dict[str, np.ndarray]


class ActionSampler(Protocol):
    """Something that acts for the policy."""

    def __call__(self, observations: Observations, step: int) -> np.ndarray:
        """
        Sample actions.

        :param observations: one for each environment
        :param step: number of the step in the rollout
        :return: actions, shape ``(n_envs, *action_shape)``
        """


def make_sampler(policy: ActorCriticPolicy, n_steps: int, n_envs: int, sde_sample_freq: int) -> ActionSampler:
    """
    The cheapest actor that samples from the policy's law.

    :param policy: the policy; its parameters must not change while the actor is used
    :param n_steps: steps in the rollout
    :param n_envs: number of environments
    :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
    :return: the actor
    """
    return make_numpy_sampler(policy, n_steps, n_envs) or PolicyActionSampler(policy, n_envs, sde_sample_freq)


def make_numpy_sampler(policy: BasePolicy, n_steps: int, n_envs: int) -> "NumpyActionSampler | None":
    """
    An actor that does without torch, for those policies that have one.

    :param policy: the policy; its parameters must not change while the actor is used
    :param n_steps: steps in the rollout
    :param n_envs: number of environments
    :return: the actor, or None
    """
    mlp = actor_mlp(policy)
    lean = (
        mlp is not None
        and policy.device.type == "cpu"
        and type(policy.observation_space) is spaces.Box
        and not is_image_space(policy.observation_space)
        and all(type(activation) in NUMPY_ACTIVATIONS for activation in mlp.activations)
        and mlp.layers[0].weight.dtype == th.float32
    )
    return NumpyActionSampler(policy, mlp, n_steps, n_envs) if lean and mlp is not None else None


def action_transform(policy: ActorCriticPolicy) -> Callable[[np.ndarray], np.ndarray]:
    """
    What the environment gets for the policy's actions: bounded ones are scaled to the space, all others clipped to it.

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

    def __init__(self, policy: ActorCriticPolicy, n_envs: int, sde_sample_freq: int) -> None:
        self._policy = policy
        self._n_envs = n_envs
        self._sde_sample_freq = sde_sample_freq

    def __call__(self, observations: Observations, step: int) -> np.ndarray:
        """See :class:`ActionSampler`."""
        policy = self._policy
        if policy.use_sde and (step == 0 or (self._sde_sample_freq > 0 and step % self._sde_sample_freq == 0)):
            policy.reset_noise(self._n_envs)
        with th.no_grad():
            actions = policy.get_distribution(obs_as_tensor(observations, policy.device)).get_actions()
        shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]
        return actions.reshape(-1, *shape).cpu().numpy()


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0, out=x)


def _tanh(x: np.ndarray) -> np.ndarray:
    return np.tanh(x, out=x)


NUMPY_ACTIVATIONS = {nn.Tanh: _tanh, nn.ReLU: _relu}


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

    def __init__(self, policy: BasePolicy, mlp: MLP, n_steps: int, n_envs: int) -> None:
        # Views of the parameters, not copies.
        self._weights = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in mlp.layers]
        self._activations = [NUMPY_ACTIVATIONS[type(activation)] for activation in mlp.activations]
        self._space = policy.action_space
        shape = (n_steps, n_envs, mlp.layers[-1].out_features)
        distribution: Any = policy.action_dist
        #: Number of choices in each part of the action; None where it is not a choice.
        self._choices: list[int] | None = None
        if isinstance(self._space, spaces.Box):
            noise = th.randn(shape) * policy.log_std.detach().exp()  # type: ignore[operator]
        elif isinstance(distribution, BernoulliDistribution):
            noise = th.rand(shape).logit(eps=1e-7)
        else:
            noise = -th.empty(shape).exponential_().log()
            self._choices = [shape[-1]] if isinstance(self._space, spaces.Discrete) else list(distribution.action_dims)
        self._noise = noise.numpy()

    def __call__(self, observations: Observations, step: int, action_masks: np.ndarray | None = None) -> np.ndarray:
        """
        Sample actions.

        :param observations: one for each environment
        :param step: number of the step in the rollout
        :param action_masks: which choices are allowed, shape ``(n_envs, n_choices)``; None for all
        :return: actions, shape ``(n_envs, *action_shape)``
        """
        assert isinstance(observations, np.ndarray)
        hidden = observations.reshape(len(observations), -1).astype(np.float32, copy=False)
        for (weight, bias), activation in zip(self._weights, self._activations, strict=False):
            hidden = activation(hidden @ weight + bias)
        weight, bias = self._weights[-1]
        noisy = hidden @ weight + bias + self._noise[step]
        if isinstance(self._space, spaces.Box):
            return noisy.reshape(len(noisy), *self._space.shape)
        if self._choices is None:
            return (noisy > 0).astype(np.float32)
        if action_masks is not None:
            noisy = np.where(action_masks, noisy, -np.inf)
        if isinstance(self._space, spaces.Discrete):
            return noisy.argmax(axis=1)
        splits = np.split(noisy, np.cumsum(self._choices)[:-1], axis=1)
        return np.stack([split.argmax(axis=1) for split in splits], axis=1)
