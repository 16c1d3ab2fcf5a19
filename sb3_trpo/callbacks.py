"""Checkpoints while training."""

import pathlib
import re

from stable_baselines3.common.callbacks import BaseCallback

from sb3_trpo.arguments import BOOLEAN, POSITIVE_INTEGER, POSITIVE_INTEGER_OR_NONE, check_arguments
from sb3_trpo.distributed.synchronization import DistributedAlgorithm
from sb3_trpo.saving.signals import catch_signals, exit_status, received_signal, release_signals


class CheckpointCallback(BaseCallback):
    """
    Writes checkpoints to resume from exactly, between updates, where no step of the environment is lost.

    :param folder: folder for the files, ``<name_prefix>_<environment steps>_steps.zip``
    :param save_freq: environment steps (over all environments) between two checkpoints; one more is written at the end
    :param keep_last: keep this many checkpoints, the newest; None for all
    :param name_prefix: beginning of the files' names
    :param handle_signals: on SIGINT or SIGTERM finish the rollout and its update, write a checkpoint and exit with status
        130 or 143; a second signal exits at once
    :param verbose: 1 to print the name of each file
    :raises ValueError: an argument is not allowed
    """

    model: DistributedAlgorithm
    on_every_rank = True  # the first process writes what all of them have to say

    def __init__(
        self,
        folder: str | pathlib.Path,
        save_freq: int,
        keep_last: int | None = None,
        name_prefix: str = "checkpoint",
        handle_signals: bool = False,
        verbose: int = 0,
    ) -> None:
        check_arguments(
            {"save_freq": POSITIVE_INTEGER, "keep_last": POSITIVE_INTEGER_OR_NONE, "handle_signals": BOOLEAN}, locals()
        )
        super().__init__(verbose)
        self.folder = pathlib.Path(folder)
        self.save_freq = save_freq
        self.keep_last = keep_last
        self.name_prefix = name_prefix
        self.handle_signals = handle_signals
        self._last_save = 0

    def _init_callback(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".{self.name_prefix}_*.tmp"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)

    def _on_training_start(self) -> None:
        self._last_save = self.model.num_timesteps
        if self.handle_signals:
            catch_signals()

    def _on_rollout_start(self) -> None:
        self._between_updates(finished=False)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if not self.model.rollout_was_broken_off:
            self._between_updates(finished=True)
        release_signals()

    def _between_updates(self, finished: bool) -> None:
        steps, number = self.model.num_timesteps, self.model.sync_signal(received_signal())
        due = steps // self.save_freq > self._last_save // self.save_freq
        if due or (steps > self._last_save and (finished or number is not None)):
            self._save(steps)
        if number is not None:
            release_signals()
            raise SystemExit(exit_status(number))

    def _save(self, steps: int) -> None:
        path = self.folder / f"{self.name_prefix}_{steps}_steps.zip"
        self.model.save_checkpoint(path)
        self._last_save = steps
        if self.verbose >= 1:
            print(f"Saved {path}")
        if self.keep_last is not None:
            for old in checkpoints(self.folder, self.name_prefix)[: -self.keep_last]:
                old.unlink(missing_ok=True)


def checkpoints(folder: str | pathlib.Path, name_prefix: str = "checkpoint") -> list[pathlib.Path]:
    """
    The checkpoints in a folder.

    :param folder: the folder; it need not exist
    :param name_prefix: as for :class:`CheckpointCallback`
    :return: their files, by the environment steps that they were written after
    """
    pattern = re.compile(rf"{re.escape(name_prefix)}_(\d+)_steps\.zip")
    found = [(pattern.fullmatch(path.name), path) for path in pathlib.Path(folder).glob("*.zip")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def latest_checkpoint(folder: str | pathlib.Path, name_prefix: str = "checkpoint") -> pathlib.Path | None:
    """
    The newest checkpoint in a folder.

    :param folder: the folder; it need not exist
    :param name_prefix: as for :class:`CheckpointCallback`
    :return: its file; None if there is none
    """
    return next(reversed(checkpoints(folder, name_prefix)), None)
