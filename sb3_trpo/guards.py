"""The doors where bad numbers come in: what environments return, and what an update computes."""

import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn

from sb3_trpo.acting import Observations
from sb3_trpo.collect import Truncation
from sb3_trpo.conjugate_gradient import Solution, Status
from sb3_trpo.critic import CriticFit
from sb3_trpo.errors import NonFiniteError
from sb3_trpo.line_search import Outcome, Search
from sb3_trpo.parameters import Snapshot, all_finite


def is_finite(array: np.ndarray) -> bool:
    """
    Whether an array holds neither a NaN nor an infinity.

    :param array: array of any type and shape
    :return: True if every element is finite
    """
    if array.dtype.kind != "f":
        return True
    # The square sum costs a quarter of `isfinite(...).all()`. Large finite numbers may overflow it, hence the second look.
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


class StepGuard:
    """
    Checks what the environments return, step by step.

    :param observations: those that the rollout begins with
    :param num_timesteps: environment steps before the rollout
    :raises NonFiniteError: an observation is not finite
    """

    def __init__(self, observations: Observations, num_timesteps: int) -> None:
        self._num_timesteps = num_timesteps
        self._step = -1
        self._check("observation", observations)

    def __call__(self, observations: Any, rewards: np.ndarray) -> None:
        """
        Check the next step.

        :param observations: one for each environment
        :param rewards: shape ``(n_envs,)``
        :raises NonFiniteError: one of them is not finite; names the environment and the step
        """
        self._step += 1
        if not is_finite(rewards):
            self._check("reward", rewards)
        if not (isinstance(observations, np.ndarray) and is_finite(observations)):
            self._check("observation", observations)

    def check_truncations(self, truncations: list[Truncation]) -> None:
        """
        Check the last observations of truncated episodes, whose values take the place of the rewards to come.

        :param truncations: the truncated episodes
        :raises NonFiniteError: an observation is not finite; names the environment and the step
        """
        for self._step, env, observation in truncations:
            self._check("last observation", observation, env)

    def _check(self, what: str, values: Any, env: int | None = None) -> None:
        for key, array in values.items() if isinstance(values, dict) else [(None, values)]:
            array = np.asarray(array)
            if is_finite(array):
                continue
            where = np.argwhere(~np.isfinite(array))[0].tolist()
            value = array[tuple(where)]
            env = where.pop(0) if env is None else env
            label = f"{what}{'' if key is None else f' {key!r}'}{f' (element {where})' if where else ''}"
            step = "before the first step" if self._step < 0 else f"at step {self._step}"
            raise NonFiniteError(
                f"{label} of environment {env} is {value} {step} of the rollout that began at num_timesteps="
                f"{self._num_timesteps}; no update was made from it"
            )


def check_buffer(buffer: RolloutBuffer, num_timesteps: int) -> None:
    """
    Check a rollout that SB3's own loop has collected.

    :param buffer: the buffer
    :param num_timesteps: environment steps before the rollout
    :raises NonFiniteError: an observation or a reward is not finite; names the environment and the step
    """
    observations: Any = buffer.observations
    keyed = observations.items() if isinstance(observations, dict) else [(None, observations)]
    if is_finite(buffer.rewards) and all(is_finite(array) for _, array in keyed):
        return
    guard = StepGuard({}, num_timesteps)
    for step, rewards in enumerate(buffer.rewards):
        guard({key: array[step] for key, array in keyed} if isinstance(observations, dict) else observations[step], rewards)


class UpdateGuard:
    """
    Sees to it that an update leaves the policy finite, and counts those that came to a NaN or an infinity.

    :param policy: the policy before the update
    """

    def __init__(self, policy: nn.Module) -> None:
        self._tensors = [*policy.parameters(), *policy.buffers()]
        self._before = Snapshot(self._tensors)
        self._reason = ""

    def count(self, failed: int, gradient: th.Tensor, solution: Solution, search: Search, critic: CriticFit) -> int:
        """
        Look at what the update came to; put the policy back if a number in it is not finite.

        :param failed: updates in a row that failed before this one
        :param gradient: g
        :param solution: of the linear system
        :param search: the step
        :param critic: the regression
        :return: updates in a row that have failed, 0 if this one has not
        """
        accepted = search.outcome is Outcome.ACCEPTED
        if not all_finite(self._tensors):
            self._before.restore()
            self._reason = "a parameter"
        elif not all_finite([gradient]):
            self._reason = "the gradient"
        elif not accepted and not (solution.status is not Status.NOT_FINITE and all_finite([solution.x])):
            self._reason = "the conjugate gradient method's result"
        elif not critic.succeeded and not math.isfinite(critic.value_loss):
            self._reason = "the critic's loss"
        else:
            return 0
        return failed + 1

    def stop_after(self, failed: int, most: int) -> None:
        """
        End a training that gets nowhere.

        :param failed: updates in a row that have failed
        :param most: so many are too many
        :raises NonFiniteError: that many have failed
        """
        if failed >= most:
            raise NonFiniteError(
                f"{failed} updates in a row were undone since a number was not finite, in the last one {self._reason}; "
                "the parameters are as before. Look for very large rewards or observations"
            )
