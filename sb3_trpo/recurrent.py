"""Trust Region Policy Optimization for policies with a memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

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
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo.adapters.models import components
from sb3_trpo.adapters.plain import is_plain
from sb3_trpo.adapters.sequences import LstmStates, lstm_states, read_sequences, without_cudnn
from sb3_trpo.arguments import Rule, one_of
from sb3_trpo.constructors import checked, takes_arguments_of
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.distributions import has_closed_form
from sb3_trpo.optim.lstm import gauss_newton_lstms, is_standard
from sb3_trpo.rollouts.actor import RolloutActor
from sb3_trpo.rollouts.callback_locals import are_known
from sb3_trpo.rollouts.collect import Truncation, stack_observations
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.lstm_sampler import NumpyLstmNetworks, serves_lstm
from sb3_trpo.rollouts.policy_state import PolicyState
from sb3_trpo.rollouts.samplers import ActionSampler, resamples_noise
from sb3_trpo.trpo import TRPO

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
    ``sub_sampling_factor``, ``curvature_batch_size``, which is all states unless given. They are padded to the longest, so that memory and time of an update grow with the number of
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
    image_sample = None  # states of a few sequences are too much alike
    _step_variables = TRPO._step_variables | {"lstm_states", "episode_starts"}

    @takes_arguments_of(TRPO.__init__)
    @checked
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
        self._networks: NumpyLstmNetworks | None = None
        self._watched_policy: PolicyState | None = None

    def _fits_loop(self, rollout_buffer: RolloutBuffer) -> bool:
        return type(rollout_buffer) in (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)

    def _collect_by_sb3(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        return RecurrentPPO.collect_rollouts(self, env, callback, rollout_buffer, n_rollout_steps)  # type: ignore[arg-type]

    def _make_actor(self, env: VecEnv, callback: BaseCallback, n_rollout_steps: int) -> RolloutActor:
        self._networks = NumpyLstmNetworks(self.policy) if serves_lstm(self.policy) else None
        # A callback of the user's own may change the policy at any step, which the networks in NumPy would not notice.
        is_watched = self._networks is not None and not are_known(callback)
        self._watched_policy = PolicyState(self.policy) if is_watched else None
        return super()._make_actor(env, callback, n_rollout_steps)

    def _make_sampler(self, env: VecEnv, n_rollout_steps: int) -> ActionSampler | None:
        return None  # evaluating later would have to run the LSTMs once more

    @th.no_grad()
    def _forward(self, env: VecEnv, observations: Observations, step: int) -> tuple[np.ndarray, dict[str, Any]]:
        policy, buffer = self.policy, self.rollout_buffer
        if policy.use_sde and resamples_noise(step, self.sde_sample_freq):
            policy.reset_noise(env.num_envs)
        if step > 0:
            self._last_lstm_states = self._next_lstm_states
        before = self._last_lstm_states
        episode_starts = th.as_tensor(self._last_episode_starts, dtype=th.float32, device=self.device)
        obs_tensor = obs_as_tensor(observations, self.device)
        if self._watched_policy is not None and self._watched_policy.has_changed():
            self._networks = self._watched_policy = None
        if self._networks is not None:
            *outputs, after = self._networks(observations, before, episode_starts)
        else:
            *outputs, after = policy(obs_tensor, before, episode_starts)
        (actions, values, log_probs), self._next_lstm_states = outputs, after
        for name, states in (("pi", before.pi), ("vf", before.vf)):
            for kind, state in zip(("hidden", "cell"), states, strict=True):
                getattr(buffer, f"{kind}_states_{name}")[step] = state.cpu().numpy()
        variables = {"obs_tensor": obs_tensor, "values": self._value_scale * values, "log_probs": log_probs}
        return actions.cpu().numpy(), {**variables, "lstm_states": self._next_lstm_states, "episode_starts": episode_starts}

    def _last_values(self, observations: Observations, dones: np.ndarray) -> th.Tensor:
        self._last_lstm_states = self._next_lstm_states
        starts = th.as_tensor(dones, dtype=th.float32, device=self.device)
        return self._predict_values(observations, self._last_lstm_states.vf, starts)

    def _truncated_values(self, truncations: list[Truncation]) -> list[float]:
        """V of the last observations, given the whole episodes; called at the step at which they end."""
        no_start = th.zeros(1, device=self.device)
        values: list[float] = []
        for truncation in truncations:
            env = slice(truncation.env, truncation.env + 1)
            states = [state[:, env].contiguous() for state in self._next_lstm_states.vf]
            values.append(float(self._predict_values(stack_observations([truncation.observation]), states, no_start)))
        return values

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
        if th.is_grad_enabled() and all(is_standard(lstm) and is_plain(lstm) for lstm in self._lstms):
            return gauss_newton_lstms(self._lstms)
        return self._twice_differentiable()

    def _twice_differentiable(self) -> AbstractContextManager[None]:
        """cuDNN's LSTM cannot be differentiated twice, as the Fisher matrix asks for; torch's own can, and is slower."""
        if self.device.type != "cuda" or not th.is_grad_enabled():
            return nullcontext()
        return without_cudnn(self._lstms)

    def _excluded_save_params(self) -> list[str]:
        own = ("_last_lstm_states", "_next_lstm_states", "_networks", "_watched_policy")
        return [*super()._excluded_save_params(), *own]

    def get_extra_state(self) -> dict[str, Any]:
        """See :meth:`TRPO.get_extra_state`."""
        states = [state.cpu().numpy() for pair in self._next_lstm_states for state in pair]
        return {**super().get_extra_state(), "lstm_states": states}

    def set_extra_state(self, state: dict[str, Any], trust: bool) -> None:
        """See :meth:`TRPO.set_extra_state`."""
        super().set_extra_state(state, trust)
        hidden_pi, cell_pi, hidden_vf, cell_vf = (th.as_tensor(array, device=self.device) for array in state["lstm_states"])
        self._last_lstm_states = self._next_lstm_states = RNNStates((hidden_pi, cell_pi), (hidden_vf, cell_vf))
