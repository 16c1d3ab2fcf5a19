"""SB3's actor-critic policies as their ``forward`` computes them.

SB3's ``get_distribution`` and ``predict_values`` call the features extractors directly, not the policy's ``extract_features``.
Where a policy has another one, ``forward`` acts by it, and the update must follow.
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo.actions import raw_actions
from sb3_trpo.adapters.base import PolicyAdapter
from sb3_trpo.adapters.models import actor_mlp
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.rollouts.buffers import ARRAY_BUFFERS
from sb3_trpo.rollouts.eligibility import has_own_forward
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.samplers import ActionSampler, make_sampler, resamples_noise

EXTRACT_FEATURES = ActorCriticPolicy.extract_features


class ActorCriticAdapter(PolicyAdapter):
    """SB3's actor-critic policies, and those of the user with the methods ``get_distribution`` and ``predict_values``."""

    policy_base = ActorCriticPolicy
    buffer_bases = (RolloutBuffer, DictRolloutBuffer)

    @classmethod
    def check_policy(cls, policy: type) -> None:
        """See :meth:`PolicyAdapter.check_policy`."""
        for method in ("get_distribution", "predict_values"):
            if not hasattr(policy, method):
                raise ValueError(
                    f"policy={policy.__name__} is not allowed: it must be an actor-critic policy "
                    f"with the methods get_distribution and predict_values, and it has no {method}"
                )

    @classmethod
    def find_buffer_class(cls, given: type[RolloutBuffer] | None, observation_space: spaces.Space[Any]) -> type[RolloutBuffer]:
        """See :meth:`PolicyAdapter.find_buffer_class`; SB3 allows any rollout buffer."""
        return given or super().find_buffer_class(given, observation_space)

    def fits_loop(self, buffer: RolloutBuffer) -> bool:
        """See :meth:`ActingPolicy.fits_loop`."""
        return type(buffer) in ARRAY_BUFFERS and not has_own_forward(self.policy)

    def collect_by_sb3(
        self, model: Any, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_steps: int
    ) -> bool:
        """See :meth:`PolicyAdapter.collect_by_sb3`."""
        with raw_actions(self.policy):
            return OnPolicyAlgorithm.collect_rollouts(model, env, callback, rollout_buffer, n_steps)

    def start_rollout(self, env: VecEnv, n_steps: int, sde_sample_freq: int, is_watched: bool) -> ActionSampler | None:
        """See :meth:`ActingPolicy.start_rollout`."""
        self._sde_sample_freq = sde_sample_freq
        return make_sampler(self.policy, actor_mlp(self.policy), n_steps, env.num_envs, sde_sample_freq)

    @th.no_grad()
    def forward(self, env: VecEnv, observations: Observations, step: int) -> tuple[np.ndarray, dict[str, Any]]:
        """See :meth:`ActingPolicy.forward`."""
        if self.policy.use_sde and resamples_noise(step, self._sde_sample_freq):
            self.policy.reset_noise(env.num_envs)
        obs_tensor = obs_as_tensor(observations, self.policy.device)
        with raw_actions(self.policy):
            actions, values, log_probs = self.policy(obs_tensor)
        return actions.cpu().numpy(), {"obs_tensor": obs_tensor, "values": values, "log_probs": log_probs}

    def evaluate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """See :meth:`ActingPolicy.evaluate`."""
        with raw_actions(self.policy):
            return self.policy.evaluate_actions(batch.inputs, batch.actions)[:2]

    def distribution(self, inputs: Inputs) -> Distribution:
        """See :meth:`PolicyAdapter.distribution`."""
        policy = self.policy
        if not self._bypasses_features("get_distribution"):
            return policy.get_distribution(inputs)
        return policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(self._features(inputs)[0]))

    def values(self, inputs: Inputs) -> th.Tensor:
        """See :meth:`PolicyAdapter.values`."""
        policy = self.policy
        if not self._bypasses_features("predict_values"):
            return super().values(inputs)
        return policy.value_net(policy.mlp_extractor.forward_critic(self._features(inputs)[1])).flatten()

    def _bypasses_features(self, method: str) -> bool:
        """Whether a method is SB3's, and the features that ``forward`` uses are not."""
        return (
            isinstance(self.policy, ActorCriticPolicy)
            and getattr(self.policy.extract_features, "__func__", None) is not EXTRACT_FEATURES
            and getattr(getattr(self.policy, method), "__func__", None) is getattr(ActorCriticPolicy, method)
        )

    def _features(self, inputs: Inputs) -> tuple[th.Tensor, th.Tensor]:
        """Features for the actor and for the critic."""
        features: Any = self.policy.extract_features(inputs)
        return (features, features) if self.policy.share_features_extractor else features
