"""Trust Region Policy Optimization for policies with a memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo.adapters.sequences import LstmStates, lstm_states, read_sequences, without_cudnn
from sb3_trpo.arguments import Rule, one_of
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.distributions import components, has_closed_form
from sb3_trpo.optim.lstm import gauss_newton_lstms, is_standard
from sb3_trpo.rollouts.collect import Truncation, bootstrap, stack_observations
from sb3_trpo.rollouts.samplers import ActionSampler, Observations
from sb3_trpo.trpo import TRPO

SelfRecurrentTRPO = TypeVar("SelfRecurrentTRPO", bound="RecurrentTRPO")

MlpLstmPolicy = RecurrentActorCriticPolicy


class CnnLstmPolicy(RecurrentActorCriticCnnPolicy):
    """
    sb3-contrib's CNN policy with an LSTM, with a features extractor each for actor and critic unless told otherwise.

    :param args: as sb3-contrib's ``RecurrentActorCriticCnnPolicy``
    :param kwargs: as sb3-contrib's ``RecurrentActorCriticCnnPolicy``; ``shared_lstm=True`` shares the extractor as well.
        For ``share_features_extractor`` see :class:`~sb3_trpo.policies.CnnPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", kwargs.get("shared_lstm", False))
        super().__init__(*args, **kwargs)


class MultiInputLstmPolicy(RecurrentMultiInputActorCriticPolicy):
    """
    sb3-contrib's policy with an LSTM for Dict observations, with an extractor each for actor and critic.

    :param args: as sb3-contrib's ``RecurrentMultiInputActorCriticPolicy``
    :param kwargs: as sb3-contrib's ``RecurrentMultiInputActorCriticPolicy``; for ``share_features_extractor`` see
        :class:`CnnLstmPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", kwargs.get("shared_lstm", False))
        super().__init__(*args, **kwargs)


class RecurrentTRPO(TRPO):
    """
    TRPO for policies with an LSTM, those of sb3-contrib's ``RecurrentPPO``.

    The update is that of :class:`TRPO`. Its derivatives, those in the Fisher matrix included, go through whole sequences:
    from the start of an episode, or of the rollout, to the end of either. What is cut or drawn elsewhere by states is so
    here by sequences, at least one at a time: ``batch_size``, ``policy_batch_size``, ``max_batch_size``,
    ``sub_sampling_factor``. They are padded to the longest, so that memory and time of an update grow with the number of
    sequences times the length of the longest.

    Takes the arguments of :class:`TRPO`; three mean something else.

    :param policy: policy class, or its name: ``MlpLstmPolicy``, ``CnnLstmPolicy``, ``MultiInputLstmPolicy``
    :param env: as :class:`TRPO`
    :param learning_rate: as :class:`TRPO`
    :param n_steps: steps of each environment per update, and the longest sequence. A step takes as long for many
        environments as for one, so it is better to have many than to make it large
    :param args: as :class:`TRPO`, from ``batch_size`` on; ``rollout_buffer_class`` derives from sb3-contrib's
        ``RecurrentRolloutBuffer`` or ``RecurrentDictRolloutBuffer``
    :param kwargs: as :class:`TRPO`; ``action_bound`` must be None
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }
    argument_rules: ClassVar[dict[str, Rule]] = {**TRPO.argument_rules, "action_bound": one_of(None)}
    policy: RecurrentActorCriticPolicy
    rollout_buffer: RecurrentRolloutBuffer | RecurrentDictRolloutBuffer

    def __init__(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 128,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, n_steps, *args, **kwargs)

    def _setup_networks(self) -> None:
        if not issubclass(self.policy_class, RecurrentActorCriticPolicy):
            raise ValueError(
                f"policy={self.policy_class.__name__} is not allowed: it must derive from sb3-contrib's "
                "RecurrentActorCriticPolicy"
            )
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        ).to(self.device)

        buffer_class: Any = self._buffer_class(RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)
        lstm = self.policy.lstm_actor
        self.rollout_buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            (self.n_steps, lstm.num_layers, self.n_envs, lstm.hidden_size),
            self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        zeros = th.zeros(lstm.num_layers, self.n_envs, lstm.hidden_size, device=self.device)
        #: LSTM states before the observations that were last acted on, and after them.
        self._last_lstm_states = self._next_lstm_states = RNNStates((zeros, zeros), (zeros, zeros))

    def _can_collect(self, rollout_buffer: RolloutBuffer) -> bool:
        return type(rollout_buffer) in (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)

    def _collect_step_by_step(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        return RecurrentPPO.collect_rollouts(self, env, callback, rollout_buffer, n_rollout_steps)  # type: ignore[arg-type]

    def _make_actor(self, env: VecEnv, rollout_buffer: RolloutBuffer, n_rollout_steps: int) -> ActionSampler:
        return self._act

    @th.no_grad()
    def _act(self, observations: Observations, step: int) -> np.ndarray:
        """Act, and write into the buffer what comes with it: evaluating later would have to run the LSTMs once more."""
        policy, buffer = self.policy, self.rollout_buffer
        if policy.use_sde and (step == 0 or (self.sde_sample_freq > 0 and step % self.sde_sample_freq == 0)):
            policy.reset_noise(self.n_envs)
        if step > 0:
            self._last_lstm_states = self._next_lstm_states
        before = self._last_lstm_states
        starts = th.as_tensor(self._last_episode_starts, dtype=th.float32, device=self.device)
        actions, values, log_probs, self._next_lstm_states = policy(obs_as_tensor(observations, self.device), before, starts)
        buffer.values[step] = self._value_scale * values.flatten().cpu().numpy()
        buffer.log_probs[step] = log_probs.cpu().numpy()
        for name, states in (("pi", before.pi), ("vf", before.vf)):
            for kind, state in zip(("hidden", "cell"), states, strict=True):
                getattr(buffer, f"{kind}_states_{name}")[step] = state.cpu().numpy()
        return actions.cpu().numpy()

    @th.no_grad()
    def _complete_buffer(
        self, rollout_buffer: RolloutBuffer, truncations: list[Truncation], last_obs: Observations, last_dones: np.ndarray
    ) -> th.Tensor:
        final_values = [self._final_value(truncation) for truncation in truncations]
        self._last_lstm_states = self._next_lstm_states
        starts = th.as_tensor(last_dones, dtype=th.float32, device=self.device)
        last_values = self._predict_values(last_obs, self._last_lstm_states.vf, starts)
        bootstrap(rollout_buffer, truncations, final_values, last_values, last_dones)
        return last_values

    def _final_value(self, truncation: Truncation) -> float:
        """V of the last observation of an episode, given all of it."""
        buffer, env = self.rollout_buffer, slice(truncation.env, truncation.env + 1)
        if truncation.step + 1 < buffer.buffer_size:
            stored = (buffer.hidden_states_vf[truncation.step + 1], buffer.cell_states_vf[truncation.step + 1])
            states = [th.as_tensor(state, device=self.device) for state in stored]
        else:
            states = [*self._next_lstm_states.vf]
        of_env = [state[:, env].contiguous() for state in states]
        return float(
            self._predict_values(stack_observations([truncation.observation]), of_env, th.zeros(1, device=self.device))
        )

    def _predict_values(self, observations: Observations, states: Sequence[th.Tensor], starts: th.Tensor) -> th.Tensor:
        """V of observations, one for each environment."""
        tensors: Any = obs_as_tensor(observations, self.device)
        return self._value_scale * self.policy.predict_values(tensors, (states[0], states[1]), starts)

    def _read_rollout(self) -> RolloutBatch:
        return read_sequences(self.rollout_buffer, self.action_space)

    def _distribution(self, inputs: Inputs) -> Distribution:
        observations, states, no_starts = self._apart(inputs, "actor_states")
        with self._fast_products():
            distribution = self.policy.get_distribution(observations, states, no_starts)[0]
        if not th.is_grad_enabled() or has_closed_form(components(distribution)):
            return distribution
        with self._twice_differentiable():  # the KL of this family is differentiated twice
            return self.policy.get_distribution(observations, states, no_starts)[0]

    def _values(self, inputs: Inputs) -> th.Tensor:
        observations, states, no_starts = self._apart(inputs, "critic_states")
        with self._fast_products() if self.critic_method == "gauss_newton" else nullcontext():
            return self.policy.predict_values(observations, states, no_starts).flatten()

    def _apart(self, inputs: Inputs, name: str) -> tuple[Any, LstmStates, th.Tensor]:
        """Observations, first LSTM states of the sequences, and no further episode starts: the LSTM runs in one call."""
        assert isinstance(inputs, dict)
        return inputs["observations"], lstm_states(inputs[name]), th.zeros(len(inputs[name]), device=self.device)

    @property
    def _lstms(self) -> list[nn.LSTM]:
        return [module for module in self.policy.modules() if isinstance(module, nn.LSTM)]

    def _fast_products(self) -> AbstractContextManager[None]:
        """Let the LSTMs run with derivatives made for Gauss-Newton products, where they are torch's own."""
        if th.is_grad_enabled() and all(map(is_standard, self._lstms)):
            return gauss_newton_lstms(self._lstms)
        return self._twice_differentiable()

    def _twice_differentiable(self) -> AbstractContextManager[None]:
        """cuDNN's LSTM cannot be differentiated twice, as the Fisher matrix asks for; torch's own can, and is slower."""
        if self.device.type != "cuda" or not th.is_grad_enabled():
            return nullcontext()
        return without_cudnn(self._lstms)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_lstm_states", "_next_lstm_states"]

    def _resume_state(self) -> dict[str, Any]:
        states = [state.cpu().numpy() for pair in self._next_lstm_states for state in pair]
        return {**super()._resume_state(), "lstm_states": states}

    def _restore(self, state: dict[str, Any], trust: bool) -> None:
        super()._restore(state, trust)
        hidden_pi, cell_pi, hidden_vf, cell_vf = (th.as_tensor(array, device=self.device) for array in state["lstm_states"])
        self._last_lstm_states = self._next_lstm_states = RNNStates((hidden_pi, cell_pi), (hidden_vf, cell_vf))

    def learn(
        self: SelfRecurrentTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "RecurrentTRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRecurrentTRPO:
        """
        Train.

        :param total_timesteps: as :class:`TRPO`
        :param callback: as :class:`TRPO`
        :param log_interval: as :class:`TRPO`
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: as :class:`TRPO`
        :param progress_bar: as :class:`TRPO`
        :return: the model
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
