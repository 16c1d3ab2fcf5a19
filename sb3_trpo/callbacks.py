"""Write checkpoints while training."""

import pathlib
import re

from stable_baselines3.common.callbacks import BaseCallback

from sb3_trpo.arguments import BOOLEAN, POSITIVE_INTEGER, POSITIVE_INTEGER_OR_NONE, check_arguments
from sb3_trpo.base import ResumableAlgorithm
from sb3_trpo.saving.atomic import remove_leftovers
from sb3_trpo.saving.checkpoint import read_run
from sb3_trpo.saving.signals import catch_signals, exit_status, received_signal, release_signals


class CheckpointCallback(BaseCallback):
    """
    Write checkpoints between updates, from which training resumes exactly.

    :param folder: folder for the files, ``<name_prefix>_<environment steps>_steps.zip``
    :param save_freq: environment steps (over all environments) between two checkpoints; one more is written at the end
    :param keep_last: number of newest checkpoints of this run to keep; None for all. Files of other runs are never deleted
    :param name_prefix: start of the file names
    :param handle_signals: on SIGINT or SIGTERM finish the rollout and its update, write a checkpoint and exit with status
        130 or 143; a second signal exits at once
    :param verbose: 1 to print the name of each file
    :raises ValueError: an argument is not allowed
    """

    model: ResumableAlgorithm
    on_every_rank = True  # the first process writes the state of all
    draws_random_numbers = False

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
        self.folder = _checked_folder(folder, name_prefix)
        self.save_freq = save_freq
        self.keep_last = keep_last
        self.name_prefix = name_prefix
        self.handle_signals = handle_signals
        self._last_save = 0

    def _init_callback(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, rf"{re.escape(self.name_prefix)}_\d+_steps\.zip")

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
            self._delete_old(path, self.keep_last)

    def _delete_old(self, written: pathlib.Path, keep_last: int) -> None:
        own = [path for path in checkpoints(self.folder, self.name_prefix) if read_run(path)[0] == self.model.run_id]
        for path in own[:-keep_last]:
            if path != written:
                path.unlink(missing_ok=True)


def checkpoints(folder: str | pathlib.Path, name_prefix: str = "checkpoint") -> list[pathlib.Path]:
    """
    List the checkpoints in a folder, from the oldest to the newest.

    :param folder: the folder; it need not exist
    :param name_prefix: as for :class:`CheckpointCallback`
    :return: the files, by the time they were written
    :raises ValueError: an argument is not allowed
    """
    folder = _checked_folder(folder, name_prefix)
    pattern = re.compile(rf"{re.escape(name_prefix)}_(\d+)_steps\.zip")
    found = [(pattern.fullmatch(path.name), path) for path in folder.glob("*.zip")]
    return [path for _, _, path in sorted((read_run(path)[1], int(match[1]), path) for match, path in found if match)]


def latest_checkpoint(folder: str | pathlib.Path, name_prefix: str = "checkpoint") -> pathlib.Path | None:
    """
    Find the newest checkpoint in a folder.

    :param folder: the folder; it need not exist
    :param name_prefix: as for :class:`CheckpointCallback`
    :return: the file written last, or None
    :raises ValueError: an argument is not allowed
    """
    return next(reversed(checkpoints(folder, name_prefix)), None)


def _checked_folder(folder: str | pathlib.Path, name_prefix: str) -> pathlib.Path:
    if not isinstance(folder, (str, pathlib.Path)):
        raise ValueError(f"folder={folder!r} is not allowed: it must be a path")
    path = pathlib.Path(folder)
    if file := next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None):
        raise ValueError(f"folder={str(folder)!r} is not allowed: it must be a folder, and {file} is a file")
    if (
        not isinstance(name_prefix, str)
        or pathlib.PurePath(f"{name_prefix}_").name != f"{name_prefix}_"
        or "\\" in name_prefix
    ):
        raise ValueError(f"name_prefix={name_prefix!r} is not allowed: it must be the start of a file name, without a folder")
    return path
