"""Acting with sb3-contrib's LSTM policy without torch's networks, whose overhead exceeds the arithmetic many times over.

The networks are replaced, and Gaussian and categorical distributions. Other distributions stay the policy's own, so that every
action space and gSDE are served. The random numbers are those that the policy would draw.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent import policies
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_trpo.optim.lstm import is_standard
from sb3_trpo.optim.plain import are_original, has_patched_methods, is_plain, remember
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.samplers import ACTIVATIONS, FLOAT32

remember(*{item for item in vars(policies).values() if isinstance(item, type)})

#: Methods through which the policy's ``forward`` reaches its networks.
NETWORK_METHODS = ("forward", "extract_features", "_process_sequence")

Layers = list[tuple[np.ndarray, np.ndarray, Any]]


class NumpyLSTM:
    """
    Takes several LSTMs of one size one step further, on the same inputs.

    A logistic function is a hyperbolic tangent, σ(x) = (1 + tanh(x / 2)) / 2, so that one call activates all gates.

    :param lstms: standard LSTMs in float32 on the CPU; their weights are copied
    """

    def __init__(self, lstms: Sequence[nn.LSTM]) -> None:
        self._size = lstms[0].hidden_size
        layers = [[self._read_layer(lstm, layer) for lstm in lstms] for layer in range(lstms[0].num_layers)]
        self._layers = [tuple(np.stack(each) for each in zip(*networks, strict=True)) for networks in layers]

    def _read_layer(self, lstm: nn.LSTM, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights of inputs and hidden state, and biases; gates in the order i, f, o, g, halved where they are logistic."""
        W, U, *biases = (tensor.detach().numpy() for tensor in lstm.all_weights[layer])
        weight = np.concatenate([W, U], axis=1).T
        bias = biases[0] + biases[1] if biases else np.zeros(4 * self._size, np.float32)
        order = np.arange(4 * self._size).reshape(4, -1)[[0, 1, 3, 2]].flatten()
        scale = np.repeat(np.array([0.5, 0.5, 0.5, 1.0], np.float32), self._size)
        return weight[:, order] * scale, bias[order] * scale

    def __call__(self, inputs: np.ndarray, hidden: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Take one step.

        :param inputs: shape ``(n_envs, n_inputs)``
        :param hidden: hidden states, shape ``(n_lstms, n_layers, n_envs, hidden_size)``
        :param cells: cell states, of the same shape
        :return: outputs, shape ``(n_lstms, n_envs, hidden_size)``, and the states afterwards
        """
        outputs = inputs
        hidden_after, cells_after = np.empty_like(hidden), np.empty_like(cells)
        size = self._size
        for layer, (weight, bias) in enumerate(self._layers):
            both = np.empty((*hidden.shape[::2], weight.shape[1]), np.float32)
            both[..., :-size], both[..., -size:] = outputs, hidden[:, layer]
            gates = np.matmul(both, weight)
            gates += bias[:, None]
            np.tanh(gates, out=gates)
            logistic = gates[..., : 3 * size]
            logistic *= 0.5
            logistic += 0.5
            cell = gates[..., size : 2 * size] * cells[:, layer]
            cell += gates[..., :size] * gates[..., 3 * size :]
            outputs = gates[..., 2 * size : 3 * size] * np.tanh(cell)
            hidden_after[:, layer], cells_after[:, layer] = outputs, cell
        return outputs, hidden_after, cells_after


class NumpyGaussian:
    """
    Samples a Gaussian whose standard deviations are the same in every state.

    :param log_std: logarithms of the standard deviations; copied
    """

    def __init__(self, log_std: th.Tensor) -> None:
        log_stds = log_std.detach().numpy()
        self._std = np.exp(log_stds)
        self._largest_log_prob = -log_stds.sum() - 0.5 * len(log_stds) * math.log(2.0 * math.pi)

    def __call__(self, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Sample.

        :param means: outputs of the actor, shape ``(n_envs, n_actions)``
        :return: actions, and their log-probabilities, shape ``(n_envs,)``
        """
        noise = th.empty(means.shape, **FLOAT32).normal_().numpy()
        return means + self._std * noise, self._largest_log_prob - 0.5 * np.square(noise).sum(axis=1)


def sample_categorical(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Sample categorical distributions.

    :param logits: outputs of the actor, shape ``(n_envs, n_choices)``
    :return: choices, and their log-probabilities, both of shape ``(n_envs,)``
    """
    noise = th.empty(logits.shape, **FLOAT32).exponential_().numpy()
    choices = (logits - np.log(noise)).argmax(axis=1)
    logits = logits - logits.max(axis=1, keepdims=True)
    return choices, logits[np.arange(len(logits)), choices] - np.log(np.exp(logits).sum(axis=1))


class NumpyLstmNetworks:
    """
    Evaluates an LSTM policy at one step.

    :param policy: a policy that :func:`serves_lstm` allows, whose parameters do not change while this is used
    """

    def __init__(self, policy: RecurrentActorCriticPolicy) -> None:
        self._policy = policy
        self._shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]
        self._lstm = NumpyLSTM([policy.lstm_actor, *([policy.lstm_critic] if policy.lstm_critic is not None else [])])
        self._actor_head = _read_layers(policy.mlp_extractor.policy_net)
        self._critic_head = _read_layers([*policy.mlp_extractor.value_net, policy.value_net])
        self._critic_base = _read_layers([] if policy.critic is None else [policy.critic])
        #: Outputs of the actor ↦ actions and log-probabilities; None for the policy's own distribution.
        self._sample = _numpy_distribution(policy)
        self._action_net = _read_layers([policy.action_net]) if self._sample else []
        self._after: RNNStates | None = None
        self._arrays: tuple[np.ndarray, np.ndarray]

    @th.no_grad()
    def __call__(
        self, observations: Observations, states: RNNStates, episode_starts: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, RNNStates]:
        """
        Return what ``policy.forward`` returns.

        :param observations: one for each environment
        :param states: LSTM states before them
        :param episode_starts: 1 for those that begin an episode, else 0
        :return: actions, values, log-probabilities and the states afterwards
        """
        assert isinstance(observations, np.ndarray)
        features = observations.reshape(len(observations), -1).astype(np.float32, copy=False)
        hidden, cells = self._read_states(states)
        begun = episode_starts.numpy() > 0.0
        if begun.any():
            hidden, cells = hidden.copy(), cells.copy()
            hidden[:, :, begun] = cells[:, :, begun] = 0.0
        outputs, hidden, cells = self._lstm(features, hidden, cells)
        below = _apply(self._critic_base, features) if self._critic_base else outputs[-1]
        values = th.from_numpy(_apply(self._critic_head, below))
        actions, log_probs = self._act(_apply(self._actor_head, outputs[0]))
        after = [(th.from_numpy(h), th.from_numpy(c)) for h, c in zip(hidden, cells, strict=True)]
        self._after, self._arrays = RNNStates(after[0], after[-1]), (hidden, cells)
        return actions.reshape(-1, *self._shape), values, log_probs, self._after

    def _read_states(self, states: RNNStates) -> tuple[np.ndarray, np.ndarray]:
        """Hidden and cell states as arrays, which are at hand where they are those of the last call."""
        if states is self._after:
            return self._arrays
        pairs = [states.pi, states.vf] if self._policy.lstm_critic is not None else [states.pi]
        hidden, cells = (np.stack([pair[i].numpy() for pair in pairs]) for i in range(2))
        return hidden, cells

    def _act(self, latent: np.ndarray) -> tuple[th.Tensor, th.Tensor]:
        """Actions and their log-probabilities."""
        if self._sample is not None:
            actions, log_probs = self._sample(_apply(self._action_net, latent))
            return th.from_numpy(actions), th.from_numpy(log_probs)
        distribution = self._policy._get_action_dist_from_latent(th.from_numpy(latent))
        sampled = distribution.get_actions()
        return sampled, distribution.log_prob(sampled)


def _numpy_distribution(policy: RecurrentActorCriticPolicy) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    """What samples the policy's distribution in NumPy; None for a distribution that has no such counterpart."""
    usual = ActorCriticPolicy._get_action_dist_from_latent
    distribution: Any = policy.action_dist
    if (
        type(policy)._get_action_dist_from_latent is not usual
        or has_patched_methods(distribution)
        or not are_original(type(distribution))
        or type(policy.action_net) is not nn.Linear
    ):
        return None
    if type(distribution) is DiagGaussianDistribution:
        return NumpyGaussian(policy.log_std)
    return sample_categorical if type(distribution) is CategoricalDistribution else None


def _read_layers(modules: Sequence[nn.Module] | nn.Sequential) -> Layers:
    """Weights and biases of the Linear layers, each with the activation after it, or None."""
    parts = [*modules]
    return [
        (layer.weight.detach().numpy().T, layer.bias.detach().numpy(), ACTIVATIONS.get(type(after)))
        for layer, after in zip(parts[::2], [*parts[1::2], None], strict=False)
    ]


def _apply(layers: Layers, x: np.ndarray) -> np.ndarray:
    for weight, bias, activation in layers:
        x = x @ weight + bias
        x = x if activation is None else activation(x)
    return x


def serves_lstm(policy: RecurrentActorCriticPolicy) -> bool:
    """
    Return True if :class:`NumpyLstmNetworks` may act in place of the policy's ``forward``.

    :param policy: the policy, in the mode in which it acts
    """
    extractor, networks = getattr(policy, "features_extractor", None), getattr(policy, "mlp_extractor", None)
    return (
        all(getattr(type(policy), name) is getattr(RecurrentActorCriticPolicy, name) for name in NETWORK_METHODS)
        and are_original(type(policy))
        and not has_patched_methods(policy)
        and is_plain(policy)
        and type(policy.observation_space) is spaces.Box
        and not is_image_space(policy.observation_space)
        and type(extractor) is FlattenExtractor
        and type(extractor.flatten) is nn.Flatten
        and (extractor.flatten.start_dim, extractor.flatten.end_dim) == (1, -1)
        and all(is_standard(lstm) for lstm in (policy.lstm_actor, policy.lstm_critic) if lstm is not None)
        and type(networks) is MlpExtractor
        and _are_layers([*networks.policy_net])
        and _are_layers([*networks.value_net])
        and all(type(layer) is nn.Linear for layer in (policy.value_net, policy.critic) if layer is not None)
        and all(tensor.dtype is th.float32 and tensor.device.type == "cpu" for tensor in policy.parameters())
    )


def _are_layers(modules: list[nn.Module]) -> bool:
    """Whether these are Linear layers with biases, each with a known activation after it."""
    return (
        len(modules) % 2 == 0
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in modules[::2])
        and all(type(activation) in ACTIVATIONS for activation in modules[1::2])
    )
