"""Record an update in the log."""

from collections.abc import Sequence

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger

from sb3_trpo.optim.conjugate_gradient import CGStatus
from sb3_trpo.optim.line_search import LineSearchStatus
from sb3_trpo.optim.moments import moments
from sb3_trpo.optim.reduction import Reduction
from sb3_trpo.optim.statistics import SPREAD, PolicyStep, UpdateStats
from sb3_trpo.optim.transaction import UpdateTransaction

#: Statistics in every printed table; the others go to TensorBoard and files only.
TABLE = ("policy_objective", "kl_divergence_loss", "value_loss")


def record_update(logger: Logger, stats: UpdateStats) -> None:
    """
    Record the statistics of an update, and the spread of those that summarize several values.

    :param logger: the logger
    :param stats: the statistics
    """
    logger.record("time/train_seconds", stats.train_seconds, exclude="stdout")
    for name, value in stats.logged.items():
        logger.record(f"train/{name}", value, exclude=None if name in TABLE else "stdout")
    for name, summary in stats.summaries.items():
        for statistic in SPREAD if summary.count > 1 else ():
            logger.record(f"train/{name}_{statistic}", getattr(summary, statistic), exclude="stdout")


def record_statuses(logger: Logger, update: UpdateTransaction) -> None:
    """
    Record whether conjugate gradients, critic and the update as a whole succeeded.

    :param logger: the logger
    :param update: the update, at its end
    """
    status = update.steps[-1].solution.status
    record_status(logger, "train/cg_status", status.value, status in (CGStatus.CONVERGED, CGStatus.ITERATION_BOUND))
    fits = update.critic.succeeded
    record_status(logger, "train/is_critic_fit_success", float(fits), fits)
    record_status(logger, "train/failed_updates", update.n_failed, update.n_failed == 0)


def record_line_search(logger: Logger, steps: Sequence[PolicyStep]) -> None:
    """
    Record how the line search ended.

    :param logger: the logger
    :param steps: steps of the policy, at least one
    """
    outcome = steps[-1].search.outcome
    logger.record("train/is_line_search_success", share_accepted(steps))
    record_status(logger, "train/line_search", outcome.value, outcome is LineSearchStatus.ACCEPTED)


def record_status(logger: Logger, name: str, value: float | str, is_usual: bool) -> None:
    """
    Record a status, which is printed only if it is unusual.

    :param logger: the logger
    :param name: key
    :param value: the status; text is not for TensorBoard
    :param is_usual: whether to leave it out of the printed table
    """
    exclude = (*(("tensorboard",) if isinstance(value, str) else ()), *(("stdout",) if is_usual else ()))
    logger.record(name, value, exclude=exclude)


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
