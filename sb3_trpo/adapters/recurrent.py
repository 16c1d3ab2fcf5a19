"""sb3-contrib's policies with an LSTM."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch as th
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo.adapters.base import PolicyAdapter
from sb3_trpo.adapters.models import components
from sb3_trpo.adapters.sequences import LstmStates, lstm_states, read_sequences, without_cudnn
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.distributions import has_closed_form
from sb3_trpo.optim.lstm import gauss_newton_lstms, is_standard
from sb3_trpo.optim.plain import is_plain
from sb3_trpo.rollouts.collect import Truncation, stack_observations
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.lstm_sampler import NumpyLstmNetworks, serves_lstm
from sb3_trpo.rollouts.policy_state import PolicyState
from sb3_trpo.rollouts.samplers import ActionSampler, resamples_noise


class LstmMemory:
    """
    The LSTM states of all environments between steps.

    :param states: those before the first observations
    """

    def __init__(self, states: RNNStates) -> None:
        #: Before the observations that were last acted on, and after them.
        self.before = self.after = states


class RecurrentAdapter(PolicyAdapter):
    """
    sb3-contrib's LSTM policies, read as sequences: see :func:`read_sequences`.

    :param policy: the policy
    :param buffer: the rollout buffer
    :param memory: the LSTM states, kept by the algorithm
    :param minibatch_critic: whether the critic is fitted by first derivatives alone
    """

    policy_base = RecurrentActorCriticPolicy
    buffer_bases = (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)
    image_sample = None  # states of a few sequences are too much alike
    step_variables = PolicyAdapter.step_variables | {"lstm_states", "episode_starts"}

    def __init__(self, policy: Any, buffer: Any, memory: LstmMemory, minibatch_critic: bool = False) -> None:
        super().__init__(policy, buffer)
        self._memory = memory
        self._minibatch_critic = minibatch_critic
        #: The networks in NumPy, and the policy that they were made from where it may change.
        self.networks: NumpyLstmNetworks | None = None
        self._watched: PolicyState | None = None

    @staticmethod
    def buffer_arguments(policy: Any, n_steps: int, n_envs: int) -> tuple[Any, ...]:
        """See :meth:`PolicyAdapter.buffer_arguments`."""
        lstm = policy.lstm_actor
        return ((n_steps, lstm.num_layers, n_envs, lstm.hidden_size),)

    def fits_loop(self, buffer: RolloutBuffer) -> bool:
        """See :meth:`ActingPolicy.fits_loop`."""
        return type(buffer) in self.buffer_bases

    def collect_by_sb3(
        self, model: Any, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_steps: int
    ) -> bool:
        """See :meth:`PolicyAdapter.collect_by_sb3`."""
        return RecurrentPPO.collect_rollouts(model, env, callback, rollout_buffer, n_steps)

    def start_rollout(self, env: VecEnv, n_steps: int, sde_sample_freq: int, is_watched: bool) -> ActionSampler | None:
        """See :meth:`ActingPolicy.start_rollout`; evaluating later would run the LSTMs a second time."""
        self._sde_sample_freq = sde_sample_freq
        self._device = self.policy.device  # which torch takes long to find
        self.networks = NumpyLstmNetworks(self.policy) if serves_lstm(self.policy) else None
        self._watched = PolicyState(self.policy) if is_watched and self.networks is not None else None
        return None

    @th.no_grad()
    def forward(self, env: VecEnv, observations: Observations, step: int) -> tuple[np.ndarray, dict[str, Any]]:
        """See :meth:`ActingPolicy.forward`."""
        policy, memory = self.policy, self._memory
        if policy.use_sde and resamples_noise(step, self._sde_sample_freq):
            policy.reset_noise(env.num_envs)
        if step > 0:
            memory.before = memory.after
        before = memory.before
        episode_starts = th.as_tensor(self.buffer.episode_starts[step], device=self._device)
        obs_tensor = obs_as_tensor(observations, self._device)
        if self._watched is not None and self._watched.has_changed():
            self.networks = self._watched = None
        if self.networks is not None:
            actions, values, log_probs, memory.after = self.networks(observations, before, episode_starts)
        else:
            actions, values, log_probs, memory.after = policy(obs_tensor, before, episode_starts)
        for name, states in (("pi", before.pi), ("vf", before.vf)):
            for kind, state in zip(("hidden", "cell"), states, strict=True):
                getattr(self.buffer, f"{kind}_states_{name}")[step] = state.cpu().numpy()
        variables = {"obs_tensor": obs_tensor, "values": values, "log_probs": log_probs}
        return actions.cpu().numpy(), {**variables, "lstm_states": memory.after, "episode_starts": episode_starts}

    def last_values(self, observations: Observations, dones: np.ndarray) -> th.Tensor:
        """See :meth:`ActingPolicy.last_values`."""
        self._memory.before = self._memory.after
        starts = th.as_tensor(dones, dtype=th.float32, device=self.policy.device)
        return self._predict_values(observations, self._memory.after.vf, starts)

    def truncated_values(self, truncations: list[Truncation], chunk_size: int | None) -> list[float]:
        """See :meth:`ActingPolicy.truncated_values`; called at the step at which the episodes end."""
        no_start = th.zeros(1, device=self.policy.device)
        values: list[float] = []
        for truncation in truncations:
            env = slice(truncation.env, truncation.env + 1)
            states = [state[:, env].contiguous() for state in self._memory.after.vf]
            values.append(float(self._predict_values(stack_observations([truncation.observation]), states, no_start)))
        return values

    def _predict_values(self, observations: Observations, states: Sequence[th.Tensor], starts: th.Tensor) -> th.Tensor:
        tensors: Any = obs_as_tensor(observations, self.policy.device)
        return self.policy.predict_values(tensors, (states[0], states[1]), starts)

    def read(self) -> RolloutBatch:
        """See :meth:`ActingPolicy.read`."""
        return read_sequences(self.buffer, self.policy.action_space)

    def distribution(self, inputs: Inputs) -> Distribution:
        """See :meth:`PolicyAdapter.distribution`."""
        observations, states, no_starts = self._split(inputs, "actor_states")
        with self._fast_products():
            distribution = self.policy.get_distribution(observations, states, no_starts)[0]
        if not th.is_grad_enabled() or has_closed_form(components(distribution)):
            return distribution
        with self._twice_differentiable():  # the KL of this family is differentiated twice
            return self.policy.get_distribution(observations, states, no_starts)[0]

    def values(self, inputs: Inputs) -> th.Tensor:
        """See :meth:`PolicyAdapter.values`."""
        observations, states, no_starts = self._split(inputs, "critic_states")
        with nullcontext() if self._minibatch_critic else self._fast_products():
            return self.policy.predict_values(observations, states, no_starts).flatten()

    def _split(self, inputs: Inputs, name: str) -> tuple[Any, LstmStates, th.Tensor]:
        """Observations, first LSTM states of the sequences, and no further episode starts: the LSTM runs in one call."""
        assert isinstance(inputs, dict)
        return inputs["observations"], lstm_states(inputs[name]), th.zeros(len(inputs[name]), device=self.policy.device)

    @property
    def _lstms(self) -> list[nn.LSTM]:
        return [module for module in self.policy.modules() if isinstance(module, nn.LSTM)]

    def _fast_products(self) -> AbstractContextManager[None]:
        """Let the LSTMs run with derivatives made for Gauss-Newton products, where they are torch's own."""
        if th.is_grad_enabled() and all(is_standard(lstm) and is_plain(lstm) for lstm in self._lstms):
            return gauss_newton_lstms(self._lstms)
        return self._twice_differentiable()

    def _twice_differentiable(self) -> AbstractContextManager[None]:
        """cuDNN's LSTM has no second derivative, which the Fisher matrix needs; torch's own has, and is slower."""
        if self.policy.device.type != "cuda" or not th.is_grad_enabled():
            return nullcontext()
        return without_cudnn(self._lstms)
