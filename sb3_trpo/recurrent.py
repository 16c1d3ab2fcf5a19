"""Trust Region Policy Optimization for policies with a memory."""

from typing import Any, ClassVar

import torch as th
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_trpo.adapters.base import PolicyAdapter
from sb3_trpo.adapters.recurrent import LstmMemory, RecurrentAdapter
from sb3_trpo.arguments import Rule, one_of
from sb3_trpo.constructors import checked, takes_arguments_of
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
    ``sub_sampling_factor``, ``curvature_batch_size`` (all states unless given). They are padded to the longest, so that memory
    and time of an update grow with the number of sequences times the length of the longest.

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
    adapter_class: ClassVar[type[PolicyAdapter]] = RecurrentAdapter
    policy: RecurrentActorCriticPolicy
    rollout_buffer: RecurrentRolloutBuffer | RecurrentDictRolloutBuffer

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

    @property
    def adapter(self) -> RecurrentAdapter:
        """See :attr:`TRPO.adapter`."""
        return RecurrentAdapter(self.policy, self.rollout_buffer, self._memory, self.critic_method == "minibatch")

    def _setup_networks(self) -> None:
        super()._setup_networks()
        lstm = self.policy.lstm_actor
        zeros = th.zeros(lstm.num_layers, self.n_envs, lstm.hidden_size, device=self.device)
        self._memory = LstmMemory(RNNStates((zeros, zeros), (zeros, zeros)))

    @property
    def _last_lstm_states(self) -> RNNStates:
        """States before the latest observations, by the name that sb3-contrib's loop reads and sets."""
        return self._memory.before

    @_last_lstm_states.setter
    def _last_lstm_states(self, states: RNNStates) -> None:
        self._memory = LstmMemory(states)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_memory"]

    def get_extra_state(self) -> dict[str, Any]:
        """See :meth:`TRPO.get_extra_state`."""
        states = [state.cpu().numpy() for pair in self._memory.after for state in pair]
        return {**super().get_extra_state(), "lstm_states": states}

    def set_extra_state(self, state: dict[str, Any], trust: bool) -> None:
        """See :meth:`TRPO.set_extra_state`."""
        super().set_extra_state(state, trust)
        hidden_pi, cell_pi, hidden_vf, cell_vf = (th.as_tensor(array, device=self.device) for array in state["lstm_states"])
        self._last_lstm_states = RNNStates((hidden_pi, cell_pi), (hidden_vf, cell_vf))
