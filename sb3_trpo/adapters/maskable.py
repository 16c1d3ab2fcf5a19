"""sb3-contrib's policies for tasks where some actions are invalid at times."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch as th
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo.adapters.base import PolicyAdapter
from sb3_trpo.adapters.models import actor_mlp
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.rollouts.buffers import ARRAY_BUFFERS
from sb3_trpo.rollouts.eligibility import has_own_forward, supports_deferred_evaluation
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.samplers import ActionSampler, NumpyActionSampler, make_numpy_sampler


class MaskableAdapter(PolicyAdapter):
    """
    sb3-contrib's maskable policies. The inputs of a batch are ``"observations"`` and ``"action_masks"``.

    :param policy: the policy
    :param buffer: the rollout buffer
    :param use_masking: whether actions are masked while collecting
    """

    policy_base = MaskableActorCriticPolicy
    buffer_bases = (MaskableRolloutBuffer, MaskableDictRolloutBuffer)
    step_variables = PolicyAdapter.step_variables | {"action_masks"}

    def __init__(self, policy: Any, buffer: Any, use_masking: bool) -> None:
        super().__init__(policy, buffer)
        self._use_masking = use_masking

    @staticmethod
    def policy_arguments(use_sde: bool) -> dict[str, Any]:
        """See :meth:`PolicyAdapter.policy_arguments`."""
        return {}

    def fits_loop(self, buffer: RolloutBuffer) -> bool:
        """See :meth:`ActingPolicy.fits_loop`."""
        return type(buffer) in ARRAY_BUFFERS and not has_own_forward(self.policy)

    def collect_by_sb3(
        self, model: Any, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_steps: int
    ) -> bool:
        """See :meth:`PolicyAdapter.collect_by_sb3`."""
        return MaskablePPO.collect_rollouts(model, env, callback, rollout_buffer, n_steps, self._use_masking)

    def start_rollout(self, env: VecEnv, n_steps: int, sde_sample_freq: int, is_watched: bool) -> ActionSampler | None:
        """See :meth:`ActingPolicy.start_rollout`."""
        numpy_sampler = make_numpy_sampler(self.policy, actor_mlp(self.policy), n_steps, env.num_envs)
        if numpy_sampler is None and not supports_deferred_evaluation(self.policy):
            return None
        return MaskedActionSampler(self, env, numpy_sampler)

    @th.no_grad()
    def forward(self, env: VecEnv, observations: Observations, step: int) -> tuple[np.ndarray, dict[str, Any]]:
        """See :meth:`ActingPolicy.forward`."""
        obs_tensor = obs_as_tensor(observations, self.policy.device)
        actions, values, log_probs = self.policy(obs_tensor, action_masks=self.read_masks(env, step))
        variables = {"obs_tensor": obs_tensor, "values": values, "log_probs": log_probs}
        return actions.cpu().numpy(), {**variables, **self.more_variables(step)}

    def read_masks(self, env: VecEnv, step: int) -> np.ndarray | None:
        """
        Ask the environments which actions are valid, and write that into the buffer.

        :param env: the training environment
        :param step: number of the step in the rollout
        :return: masks, shape ``(n_envs, n_choices)``; None for all actions
        """
        if self._use_masking:
            stored = self.buffer.action_masks
            stored[step] = get_action_masks(env).reshape(stored.shape[1:])
        return self._masks(step)

    def _masks(self, step: int) -> np.ndarray | None:
        return self.buffer.action_masks[step] > 0.5 if self._use_masking else None

    def more_variables(self, step: int) -> dict[str, Any]:
        """See :meth:`ActingPolicy.more_variables`."""
        return {"action_masks": self._masks(step)}

    def evaluate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """See :meth:`ActingPolicy.evaluate`."""
        observations, action_masks = _split(batch.inputs)
        return self.policy.evaluate_actions(observations, batch.actions, action_masks=action_masks)[:2]

    def distribution(self, inputs: Inputs) -> Distribution:
        """See :meth:`PolicyAdapter.distribution`."""
        observations, action_masks = _split(inputs)
        return self.policy.get_distribution(observations, action_masks=action_masks)

    def critic_batch(self, batch: RolloutBatch) -> RolloutBatch:
        """See :meth:`PolicyAdapter.critic_batch`."""
        return replace(batch, inputs=_split(batch.inputs)[0])


class MaskedActionSampler:
    """
    Samples valid actions.

    :param adapter: reads the masks
    :param env: the training environment
    :param numpy_sampler: samples without torch; None to call the policy
    """

    def __init__(self, adapter: MaskableAdapter, env: VecEnv, numpy_sampler: NumpyActionSampler | None) -> None:
        self._adapter, self._env, self._numpy_sampler = adapter, env, numpy_sampler

    @property
    def calls_policy(self) -> bool:
        """See :class:`ActionSampler`."""
        return self._numpy_sampler is None

    @th.no_grad()
    def __call__(self, observations: Observations, step: int) -> np.ndarray:
        """See :class:`ActionSampler`."""
        action_masks = self._adapter.read_masks(self._env, step)
        if self._numpy_sampler is not None:
            return self._numpy_sampler(observations, step, action_masks)
        policy = self._adapter.policy
        distribution = policy.get_distribution(obs_as_tensor(observations, policy.device), action_masks)
        return distribution.get_actions().cpu().numpy().reshape(-1, *policy.action_space.shape)


def _split(inputs: Inputs) -> tuple[Any, Any]:
    """Observations and action masks."""
    assert isinstance(inputs, dict)
    return inputs["observations"], inputs["action_masks"]
