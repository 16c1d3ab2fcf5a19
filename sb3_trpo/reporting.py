"""What an update tells the logger."""

from collections.abc import Sequence

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger

from sb3_trpo.optim.line_search import LineSearchStatus
from sb3_trpo.optim.moments import moments
from sb3_trpo.optim.reduction import Reduction
from sb3_trpo.optim.statistics import PolicyStep, UpdateStats

#: Of these figures, the whole update has one, whatever number of steps it took: the last.
OF_UPDATE = ("policy_objective", "kl_divergence_loss")


def record_update(logger: Logger, stats: UpdateStats) -> None:
    """
    Record the figures of an update: their means over its steps, and to TensorBoard their spread where there are several.

    :param logger: the logger
    :param stats: the figures
    """
    for name, summary in stats.summaries.items():
        logger.record(f"train/{name}", summary.last if name in OF_UPDATE else summary.mean)
        if summary.count > 1:
            for statistic in ("std", "min", "max"):
                logger.record(f"train/{name}_{statistic}", getattr(summary, statistic), exclude="stdout")
    logger.record("time/train_seconds", stats.train_seconds)


def share_accepted(steps: Sequence[PolicyStep]) -> float:
    """
    Return the share of the steps that were taken.

    :param steps: steps of the policy, at least one
    """
    return float(np.mean([step.search.outcome is LineSearchStatus.ACCEPTED for step in steps]))


def explained_variance(buffer: RolloutBuffer, ranks: Reduction) -> float:
    """
    Return the share of the returns' variance that the values explain; NaN if the returns have none.

    :param buffer: a full rollout buffer
    :param ranks: the processes that have shares in the rollout
    """
    seen = np.stack([buffer.returns - buffer.values, buffer.returns], axis=-1).reshape(-1, 2)
    unexplained, total = moments(th.from_numpy(seen), ranks).variance.tolist()
    return 1.0 - unexplained / total if total > 0.0 else float("nan")
