"""Statistics of float16 observations, in float64.

SB3's ``RunningMeanStd`` computes mean and variance of a batch in the type of the batch. In float16 the squares of deviations
above 255 are infinite, and those below 1e-4 are 0.
"""

from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_trpo.saving.vec_normalize import running_moments


class WideRunningMeanStd(RunningMeanStd):
    """SB3's running mean and variance, of float16 batches in float64. Pickles and copies are of SB3's own class."""

    def update(self, arr: np.ndarray) -> None:
        """
        Add a batch.

        :param arr: the batch, shape ``(n_envs, ...)``
        """
        super().update(arr.astype(np.float64) if arr.dtype == np.float16 else arr)

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningMeanStd, (), vars(self)


def widen_moments(env: VecEnv) -> None:
    """
    Let every ``VecNormalize`` around an environment compute the moments of float16 observations in float64, from here on.

    The objects stay the same, for those that share them. Subclasses of SB3's are left alone.

    :param env: the vectorized environment
    """
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            for moments in running_moments(env).values():
                if type(moments) is RunningMeanStd:
                    moments.__class__ = WideRunningMeanStd
        env = env.venv
