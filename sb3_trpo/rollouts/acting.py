"""What a rollout asks of a policy."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.rollouts.buffers import read_rollout
from sb3_trpo.rollouts.collect import Truncation, stack_observations
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.samplers import ActionSampler


class ActingPolicy(ABC):
    """
    How a policy is called during a rollout, and how the rollout is read.

    Values are the critic's outputs: the algorithm multiplies them by its return scale.

    :param policy: the policy
    :param buffer: the rollout buffer
    """

    #: SB3's local variables of a step, for callbacks, that come from the policy.
    step_variables: ClassVar[frozenset[str]] = frozenset({"obs_tensor", "values", "log_probs"})

    def __init__(self, policy: Any, buffer: Any) -> None:
        self.policy = policy
        self.buffer = buffer

    @abstractmethod
    def fits_loop(self, buffer: RolloutBuffer) -> bool:
        """
        Return True if TRPO's loop can fill the buffer by this policy; otherwise SB3's own loop does.

        :param buffer: a rollout buffer
        """

    @abstractmethod
    def start_rollout(self, env: VecEnv, n_steps: int, sde_sample_freq: int, is_watched: bool) -> ActionSampler | None:
        """
        Prepare acting in the next rollout.

        :param env: the training environment
        :param n_steps: steps in the rollout
        :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
        :param is_watched: whether a callback may change the policy during the rollout
        :return: what samples actions without evaluating them; None to call :meth:`forward` at every step
        """

    @abstractmethod
    def forward(self, env: VecEnv, observations: Observations, step: int) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Act as SB3's loop does.

        :param env: the training environment
        :param observations: one for each environment
        :param step: number of the step in the rollout; the buffer has its episode starts
        :return: actions, and SB3's local variables :attr:`step_variables`
        """

    def more_variables(self, step: int) -> dict[str, Any]:
        """
        Return SB3's local variables of a step that :meth:`evaluate` does not give.

        :param step: number of the step in the rollout
        """
        return {}

    @abstractmethod
    def evaluate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """
        Evaluate states and actions.

        :param batch: some or all states of :meth:`read`
        :return: values and log-probabilities, one for each state
        """

    def last_values(self, observations: Observations, dones: np.ndarray) -> th.Tensor:
        """
        Evaluate the observations after a rollout.

        :param observations: one for each environment
        :param dones: whether the last step ended an episode
        :return: values, shape ``(n_envs, 1)``
        """
        return self.policy.predict_values(obs_as_tensor(observations, self.policy.device))

    def truncated_values(self, truncations: list[Truncation], chunk_size: int | None) -> list[float]:
        """
        Evaluate the last observations of episodes that a time limit cut off.

        :param truncations: the episodes
        :param chunk_size: most states in one forward pass; None for all
        :return: the value of each
        """
        values: list[float] = []
        size = chunk_size or len(truncations)
        for start in range(0, len(truncations), size):
            batch = stack_observations([truncation.observation for truncation in truncations[start : start + size]])
            values += self.policy.predict_values(obs_as_tensor(batch, self.policy.device)).flatten().tolist()
        return values

    def read(self) -> RolloutBatch:
        """Return the rollout in the buffer as tensors."""
        return read_rollout(self.buffer, self.policy.action_space)
