"""Leftovers of killed processes are deleted; a file that is being written is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from sb3_trpo.saving.atomic import atomic_write, remove_leftovers

WRITES = """
import sys
from sb3_trpo.saving.atomic import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"x" * 10**6)
    print("writing", flush=True)
    sys.stdin.readline()
"""


def writer(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_remove_leftovers_spares_the_file_that_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "run_96_steps.zip"
    with writer(path) as process:
        remove_leftovers(tmp_path, r"run_\d+_steps\.zip")
        assert len(list(tmp_path.iterdir())) == 1
        process.communicate("\n")
    assert process.returncode == 0
    assert path.stat().st_size == 10**6
    assert list(tmp_path.iterdir()) == [path]


def test_remove_leftovers_deletes_the_file_of_a_killed_process(tmp_path: Path) -> None:
    with writer(tmp_path / "run_96_steps.zip") as process:
        process.kill()
    (tmp_path / ".run_best_96_steps.zip.0123abcd.tmp").touch()
    (tmp_path / ".run_96_steps.zip.tmp").touch()
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path, r"run_\d+_steps\.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run_96_steps.zip.tmp", ".run_best_96_steps.zip.0123abcd.tmp"]


def test_atomic_write_spares_the_older_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
