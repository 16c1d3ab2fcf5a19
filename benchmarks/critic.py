"""
Which critic: Gauss-Newton steps or minibatches, on three MuJoCo tasks and two rollout shapes.

    python benchmarks/critic.py --jobs 2    # 36 runs of 500,000 steps, seed by seed; goes on where it was stopped
    python benchmarks/critic.py --table     # what the finished runs say

Every run has a process of its own and adds one row to the CSV when it ends. Times are CPU seconds of that process, so that
other work on the machine does not count. The two methods share everything but the arguments in METHODS.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import csv
import itertools
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO

HERE = Path(__file__).parent

ENVS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SHARED: dict[str, Any] = {"gamma": 0.99, "gae_lambda": 0.95, "cg_damping": 0.1}
# n_envs, and what goes with the shape of the rollout.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "2x1024": (2, {"n_steps": 1024, "target_kl": 0.035, "batch_size": 128}),
    "16x64": (16, {"n_steps": 64, "target_kl": 0.0125, "batch_size": 1024, "policy_kwargs": {"log_std_init": -0.5}}),
}
METHODS: dict[str, dict[str, Any]] = {
    "gauss_newton": {"critic_method": "gauss_newton", "critic_damping": 0.03, "n_critic_steps": 1},
    "minibatch": {"critic_method": "minibatch", "n_critic_updates": 20, "learning_rate": 1e-3},
}
N_CURVE_POINTS = 10
N_EVAL_EPISODES = 10


class Run(NamedTuple):
    """One cell of the study; written as text, these are the key columns of its row."""

    env: str
    shape: str
    method: str
    seed: int
    steps: int


class TimedTRPO(TRPO):
    """TRPO that adds up the CPU seconds spent in its updates."""

    train_seconds = 0.0

    def train(self) -> None:
        start = time.process_time()
        super().train()
        self.train_seconds += time.process_time() - start


class LearningCurve(BaseCallback):
    """The mean return of the last 100 training episodes, at N_CURVE_POINTS evenly spaced steps."""

    def __init__(self, interval: int) -> None:
        super().__init__()
        self.interval = interval
        self.points: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        while len(self.points) < min(self.num_timesteps // self.interval, N_CURVE_POINTS):
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            self.points.append(float(np.mean(returns)) if returns else float("nan"))


def perform(run: Run) -> dict[str, Any]:
    """Train, evaluate, and return the row of the CSV."""
    th.set_num_threads(1)
    n_envs, shape = SHAPES[run.shape]
    env = VecNormalize(make_vec_env(run.env, n_envs, seed=run.seed), gamma=SHARED["gamma"])
    model = TimedTRPO("MlpPolicy", env, seed=run.seed, device="cpu", **SHARED, **shape, **METHODS[run.method])
    curve = LearningCurve(run.steps // N_CURVE_POINTS)

    start = time.process_time()
    model.learn(run.steps, callback=curve)
    cpu_seconds = time.process_time() - start

    env.training = env.norm_reward = False
    mean_return, std_return = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic=True)
    env.close()
    return {
        **run._asdict(),
        "mean_return": round(mean_return, 1),
        "std_return": round(std_return, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "train_seconds": round(model.train_seconds, 1),
        **{f"curve_{i:02}": round(point, 1) for i, point in enumerate(curve.points, start=1)},
        "commit": commit(),
    }


def commit() -> str:
    """Name the code that is being measured."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[field] for field in Run._fields)


def perform_missing(runs: Sequence[Run], out: Path, jobs: int) -> int:
    """Perform the runs that the CSV does not hold yet, in order; return how many failed."""
    done = {key(row) for row in read_rows(out)}
    missing = [run for run in runs if tuple(map(str, run)) not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are in {out.name}; {jobs} at a time", flush=True)
    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed(futures := {pool.submit(perform, run): run for run in missing}):
            if error := future.exception():
                failures += 1
                print(f"{futures[future]} failed: {error!r}", flush=True)
                continue
            row = future.result()
            append_row(out, row)
            print(f"{futures[future]}: {row['mean_return']} in {row['cpu_seconds']} s", flush=True)
    return failures


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half; the scores at its edges count in part."""
    ordered = np.sort(scores)
    edges = np.arange(len(ordered) + 1) / len(ordered)
    inside = np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25)
    return float(np.average(ordered, weights=np.maximum(inside, 0.0)))


def print_table(rows: list[dict[str, str]]) -> None:
    """Mean ± standard deviation over seeds, then the interquartile mean over all tasks and seeds of a shape."""

    def column(name: str, **where: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows if where.items() <= row.items()])

    print(f"{'task':16}{'rollout':10}{'critic':14}{'seeds':>5}{'return':>16}{'CPU s':>8}{'in train()':>12}")
    for env, shape, method in itertools.product(ENVS, SHAPES, METHODS):
        where = {"env": env, "shape": shape, "method": method}
        returns = column("mean_return", **where)
        if len(returns):
            spread = f"{returns.mean():.0f} ± {returns.std():.0f}"
            seconds, in_train = (column(name, **where).mean() for name in ("cpu_seconds", "train_seconds"))
            print(f"{env:16}{shape:10}{method:14}{len(returns):5}{spread:>16}{seconds:8.0f}{in_train:12.0f}")

    print("\nInterquartile mean over tasks and seeds, each return divided by the mean of all runs of its task:")
    scale = {env: column("mean_return", env=env).mean() for env in {row["env"] for row in rows}}
    for shape, method in itertools.product(SHAPES, METHODS):
        scores = [
            float(row["mean_return"]) / scale[row["env"]] for row in rows if (row["shape"], row["method"]) == (shape, method)
        ]
        if scores:
            print(f"{shape:10}{method:14}{interquartile_mean(np.array(scores)):.2f} of {len(scores)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=500_000, help="environment steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--envs", nargs="+", default=ENVS, choices=ENVS, metavar="ENV")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "critic.csv")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()

    failures = 0
    if not args.table:
        grid = itertools.product(args.seeds, args.envs, SHAPES, METHODS)
        runs = [Run(env, shape, method, seed, args.steps) for seed, env, shape, method in grid]
        failures = perform_missing(runs, args.out, args.jobs)
    print_table(read_rows(args.out))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
