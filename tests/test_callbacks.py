"""Where checkpoints are written, which of them are deleted, and which one is the newest."""

import os
from pathlib import Path
from typing import Any

import pytest

from sb3_trpo import TRPO, CheckpointCallback, latest_checkpoint
from sb3_trpo.callbacks import checkpoints

N_STEPS = 16


def make() -> TRPO:
    return TRPO("MlpPolicy", "CartPole-v1", n_steps=N_STEPS, seed=0, device="cpu")


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_checkpoint_callback_never_deletes_the_files_of_another_run(tmp_path: Path) -> None:
    make().learn(4 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS))
    earlier = set(names(tmp_path))
    assert len(earlier) == 4
    model = make().learn(8 * N_STEPS)
    model.learn(8 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS, keep_last=1), reset_num_timesteps=False)
    assert set(names(tmp_path)) == {*earlier, f"checkpoint_{16 * N_STEPS}_steps.zip"}


def test_checkpoint_callback_keeps_the_file_just_written_beside_later_steps(tmp_path: Path) -> None:
    make().learn(6 * N_STEPS, CheckpointCallback(tmp_path, save_freq=3 * N_STEPS))
    make().learn(N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS, keep_last=1))
    assert names(tmp_path)[-1] == f"checkpoint_{N_STEPS}_steps.zip"
    assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint_{N_STEPS}_steps.zip"
    assert len(names(tmp_path)) == 3


def test_checkpoint_callback_rotates_on_after_a_resume(tmp_path: Path) -> None:
    make().learn(3 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS, keep_last=2))
    resumed = TRPO.resume(tmp_path / f"checkpoint_{3 * N_STEPS}_steps.zip", "CartPole-v1", device="cpu")
    resumed.learn(2 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS, keep_last=2), reset_num_timesteps=False)
    assert names(tmp_path) == [f"checkpoint_{n * N_STEPS}_steps.zip" for n in (4, 5)]


def test_checkpoint_callback_keeps_the_newest_after_a_resume_from_an_earlier_file(tmp_path: Path) -> None:
    make().learn(3 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS))
    resumed = TRPO.resume(tmp_path / f"checkpoint_{N_STEPS}_steps.zip", "CartPole-v1", device="cpu")
    resumed.learn(N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS, keep_last=1), reset_num_timesteps=False)
    assert names(tmp_path) == [f"checkpoint_{2 * N_STEPS}_steps.zip"]


def test_checkpoints_are_ordered_by_the_time_of_writing_in_copies_too(tmp_path: Path) -> None:
    make().learn(3 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS))
    before = names(tmp_path)
    for age, path in enumerate(checkpoints(tmp_path)):  # as a copy may change them
        os.utime(path, (10**9 - age, 10**9 - age))
    assert names(tmp_path) == before
    (tmp_path / f"checkpoint_{9 * N_STEPS}_steps.zip").write_bytes(b"damaged")
    assert names(tmp_path) == [*before, f"checkpoint_{9 * N_STEPS}_steps.zip"]


@pytest.mark.parametrize("prefix", ["sub/agent", "/agent", "sub\\agent", "../agent", 3, None])
def test_name_prefix_with_a_folder_is_refused(prefix: Any, tmp_path: Path) -> None:
    for call in (
        lambda: CheckpointCallback(tmp_path, 1, name_prefix=prefix),
        lambda: checkpoints(tmp_path, prefix),
        lambda: latest_checkpoint(tmp_path, prefix),
    ):
        with pytest.raises(ValueError, match=r"name_prefix=.* must be the start of a file name"):
            call()


@pytest.mark.parametrize("prefix", ["", "agent", "a*[b]", "..", "a.b"])
def test_name_prefix_may_hold_any_other_character(prefix: str, tmp_path: Path) -> None:
    make().learn(2 * N_STEPS, CheckpointCallback(tmp_path, save_freq=N_STEPS, keep_last=1, name_prefix=prefix))
    assert [path.name for path in tmp_path.iterdir()] == [f"{prefix}_{2 * N_STEPS}_steps.zip"]
    assert latest_checkpoint(tmp_path, prefix) == tmp_path / f"{prefix}_{2 * N_STEPS}_steps.zip"


@pytest.mark.parametrize("below", ["", "run", "run/a"])
def test_folder_that_is_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "model.zip").touch()
    folder = tmp_path / "model.zip" / below
    for call in (lambda: CheckpointCallback(folder, 1), lambda: latest_checkpoint(folder)):
        with pytest.raises(ValueError, match=r"folder=.* must be a folder, and .*model\.zip is a file"):
            call()
    with pytest.raises(ValueError, match="folder=3 is not allowed"):
        CheckpointCallback(3, 1)  # type: ignore[arg-type]
