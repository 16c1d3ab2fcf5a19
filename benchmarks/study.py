"""
Runs, their rows and a pool of processes, for any study.

A study is a set of runs. Each run is a process that appends one row to a CSV when it ends, and its evaluations, if it has
several, to a second one. Rows are never rewritten: an interrupted study continues, and failed runs are repeated.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import csv
import fcntl
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: An evaluation every so many steps, but at least so many and at most so many in a run.
EVAL_INTERVAL, MIN_EVALS, MAX_EVALS = 100_000, 5, 20
N_EVAL_EPISODES = 10


class Run(NamedTuple):
    """One run of a study; written as text, these are the key columns of its rows."""

    cell: str
    env: str
    seed: int
    steps: int


class Evaluations:
    """
    Evaluations of one run at even intervals, against steps and the CPU seconds of the training alone.

    :param run: the run
    :param n_evals: how many; None for one in ``EVAL_INTERVAL`` steps, within bounds
    """

    def __init__(self, run: Run, n_evals: int | None = None) -> None:
        self.run = run
        self.interval = run.steps // (n_evals or min(max(run.steps // EVAL_INTERVAL, MIN_EVALS), MAX_EVALS))
        self.points: list[dict[str, Any]] = []
        self._excluded = 0.0
        self._started = time.process_time()

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds since the start, without those of the evaluations."""
        return time.process_time() - self._started - self._excluded

    def due(self, steps: int) -> bool:
        """Return True if an evaluation is due after so many steps; the last one comes after the last update."""
        return len(self.points) < steps // self.interval and steps < self.run.steps

    def add(self, steps: int, evaluate: Callable[[], Sequence[float] | np.ndarray]) -> None:
        """Evaluate; the time is not counted."""
        before, seconds = time.process_time(), self.cpu_seconds
        returns = np.asarray(evaluate(), dtype=float)
        self.points.append(
            {
                "at": steps,
                "cpu_seconds": round(seconds, 1),
                "mean_return": round(float(returns.mean()), 2),
                "std_return": round(float(returns.std()), 2),
            }
        )
        self._excluded += time.process_time() - before

    def row(self) -> dict[str, Any]:
        """Return the row of the run: the last evaluation, and the best."""
        last, best = self.points[-1], max(self.points, key=lambda point: point["mean_return"])
        return {
            **self.run._asdict(),
            "final_return": last["mean_return"],
            "final_std": last["std_return"],
            "best_return": best["mean_return"],
            "mean_over_training": round(float(np.mean([point["mean_return"] for point in self.points])), 2),
            "cpu_seconds": last["cpu_seconds"],
            "commit": commit(),
        }


class FinalEvaluation(NamedTuple):
    """One run with a thorough evaluation at its end, and perhaps others during training."""

    run: Run
    returns: Sequence[float]
    cpu_seconds: float
    more: dict[str, Any]
    points: Sequence[dict[str, Any]] = ()

    def row(self) -> dict[str, Any]:
        """Return the row of the run."""
        return {
            **self.run._asdict(),
            "final_return": round(float(np.mean(self.returns)), 3),
            "final_std": round(float(np.std(self.returns)), 3),
            "cpu_seconds": round(self.cpu_seconds, 1),
            **self.more,
            "commit": commit(),
        }


Train = Callable[[Run], Evaluations | FinalEvaluation]


def commit() -> str:
    """Name the code that is being measured."""
    command = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "../sb3_trpo"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows, with a header if there is none. Several processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if os.fstat(file.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerows(rows)


def curves_path(out: Path) -> Path:
    """Return the file with all evaluations of the runs."""
    return out.with_name(f"{out.stem}_curves.csv")


def is_done(run: Run, out: Path) -> bool:
    return tuple(map(str, run)) in {tuple(row[name] for name in Run._fields) for row in read_rows(out)}


def perform(run: Run, train: Train, out: Path) -> dict[str, Any]:
    """Train, and write the rows of the run."""
    result = train(run)
    if result.points:
        append_rows(curves_path(out), [{**run._asdict(), **point} for point in result.points])
    row = result.row()
    append_rows(out, [row])
    return row


def perform_missing(runs: Iterable[Run], train: Train, out: Path, jobs: int) -> int:
    """Perform the runs that the CSV does not hold yet, in order, also after one fails; return how many failed."""
    missing = [run for run in runs if not is_done(run, out)]
    print(f"{len(missing)} runs are missing in {out.name}; {jobs} at a time", flush=True)
    if len(missing) == 1:
        report(perform(missing[0], train, out))
        return 0
    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed(futures := {pool.submit(perform, run, train, out): run for run in missing}):
            if error := future.exception():
                failures += 1
                print(f"{futures[future]} failed: {error!r}", flush=True)
                continue
            report(future.result())
    return failures


def report(row: dict[str, Any]) -> None:
    run = " ".join(str(row[name]) for name in Run._fields)
    print(f"{run}: {row['final_return']} in {row['cpu_seconds']} s", flush=True)


def interquartile_means(scores: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """
    Return interquartile means over seeds and tasks, with stratified bootstrap intervals (95%), by rliable.

    :param scores: of each cell, shape ``(n_seeds, n_tasks)``
    :return: of each cell: mean, lower and upper bound
    """
    from sb3_trpo.zoo import report

    means, intervals = report.interquartile_means(scores)
    return {cell: (mean, *map(float, intervals[cell])) for cell, mean in means.items()}
