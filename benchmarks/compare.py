"""
Returns and CPU seconds of algorithms and settings on a few tasks, study by study (``studies.py``).

    python benchmarks/compare.py spaces --jobs 2    # continues after an interruption
    python benchmarks/compare.py spaces --table     # the table of the finished runs

Each run is a process with one thread and adds a row to ``results/STUDY.csv`` when it ends: the mean and standard deviation of
the deterministic policy's return at the end, CPU seconds of ``learn`` and of the updates in it, the variance of returns that
the critic explained in the last quarter of the updates, and how many of 10,000 sampled actions the masks forbid. Where a study
evaluates during training too, ``results/STUDY_curves.csv`` has these evaluations.
"""

import study  # isort: skip  (first: one thread)

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from returns import Evaluation, seconds_to
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization
from studies import STUDIES, Case
from study import Evaluations, FinalEvaluation, Run

RESULTS = Path(__file__).parent / "results"
N_SAMPLED = 10_000


def watched(algorithm: type[OnPolicyAlgorithm]) -> type[Any]:
    """Derive a class that keeps the CPU seconds of its updates and the explained variances that they log."""

    class Watched(algorithm):  # type: ignore[misc,valid-type]
        def train(self) -> None:
            start = time.process_time()
            super().train()
            self.train_seconds = getattr(self, "train_seconds", 0.0) + time.process_time() - start
            explained = float(self.logger.name_to_value["train/explained_variance"])
            self.explained = [*getattr(self, "explained", []), explained]

    return Watched


def make_env(case: Case, env: str, seed: int) -> VecEnv:
    vec_env = make_vec_env(case.make or partial(gym.make, env), case.n_envs, seed=seed)
    return VecNormalize(vec_env, gamma=case.settings.get("gamma", 0.99)) if case.normalize else vec_env


def train(run: Run, name: str) -> FinalEvaluation:
    """Train and evaluate one agent of a study."""
    th.set_num_threads(1)
    case = STUDIES[name]()[run.cell, run.env]
    env, eval_env = make_env(case, run.env, run.seed), make_env(case, run.env, run.seed + 1_000)
    if isinstance(eval_env, VecNormalize):
        eval_env.training = eval_env.norm_reward = False
    model = watched(case.algorithm)(env=env, seed=run.seed, device="cpu", **case.settings)
    evaluations = Evaluations(run, case.n_evals)
    model.learn(run.steps, callback=Evaluation(evaluations, eval_env) if case.n_evals else None)
    cpu_seconds = evaluations.cpu_seconds
    if isinstance(eval_env, VecNormalize):
        sync_envs_normalization(env, eval_env)
    masked = is_masking_supported(eval_env)
    returns, _ = evaluate_policy(
        model, eval_env, case.n_eval_episodes, return_episode_rewards=True, use_masking=masked, warn=False
    )
    more = {
        "train_seconds": round(model.train_seconds, 1),
        "explained_variance": round(float(np.mean(model.explained[-len(model.explained) // 4 :])), 3),
        "invalid_actions": count_invalid(model, eval_env) if masked else "",
    }
    return FinalEvaluation(run, returns, cpu_seconds, more, evaluations.points)


def count_invalid(model: OnPolicyAlgorithm, env: VecEnv) -> int:
    """Count the sampled actions that the masks forbid."""
    space = env.action_space
    sizes = [space.n] if isinstance(space, gym.spaces.Discrete) else [*getattr(space, "nvec", [2] * int(np.prod(space.shape)))]
    offsets = np.cumsum([0, *sizes[:-1]])
    observations, invalid = env.reset(), 0
    for _ in range(N_SAMPLED // env.num_envs):
        masks = get_action_masks(env)
        actions, _ = model.predict(observations, action_masks=masks)
        columns = actions.reshape(env.num_envs, -1).astype(int) + offsets
        invalid += int((~np.take_along_axis(masks.reshape(env.num_envs, -1), columns, axis=1).all(axis=1)).sum())
        observations, *_ = env.step(actions)
    return invalid


def print_table(runs: list[Run], out: Path, interquartile: bool) -> None:
    """Print mean ± standard deviation over seeds, and the interquartile mean over tasks."""
    rows = pd.read_csv(out)
    titles = f"{'return':>20}{'explained':>16}{'CPU s':>8}{'in updates':>11}{'invalid':>8}"
    print(f"{'task':34}{'cell':46}{'steps':>8}{'seeds':>6}{titles}")
    for cell, env, steps in dict.fromkeys((run.cell, run.env, run.steps) for run in runs):
        group = rows[(rows.cell == cell) & (rows.env == env) & (rows.steps == steps)]
        if len(group):
            spreads = f"{spread(group.final_return):>20}{spread(group.explained_variance):>16}"
            seconds = f"{group.cpu_seconds.mean():8.1f}{group.train_seconds.mean():11.1f}"
            line = f"{env:34}{cell:46}{steps:8}{len(group):6}{spreads}{seconds}{group.invalid_actions.sum(min_count=1):8.0f}"
            print(line.replace("nan", "   "))
    if study.curves_path(out).exists():
        print_seconds_to_peer(rows, pd.read_csv(study.curves_path(out)))
    if interquartile:
        print_interquartile_means(rows)


def print_seconds_to_peer(rows: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Print the CPU seconds until each cell's evaluations reached the mean final return of each other cell of its task."""
    finals = rows.groupby(["env", "cell"]).final_return.mean()
    print(f"\n{'task':34}{'cell':46}{'CPU s to the final return of':34}")
    for (env, cell), group in curves.groupby(["env", "cell"]):
        for peer, level in finals[env].drop(cell, errors="ignore").items():
            print(f"{env:34}{cell:46}{f'{peer}, {level:.2f}':34}{seconds_to(group, level)}")


def spread(values: pd.Series) -> str:
    return "" if values.isna().all() else f"{values.mean():.2f} ± {values.std(ddof=0):.2f}"


def print_interquartile_means(rows: pd.DataFrame) -> None:
    """Print them for returns divided by the mean of all runs of their task, over the seeds that all tasks have."""
    rows = rows.assign(score=rows.final_return / rows.groupby("env").final_return.transform("mean"))
    tables = {
        cell: group.pivot_table(index="seed", columns="env", values="score").dropna() for cell, group in rows.groupby("cell")
    }
    scores = {cell: table.to_numpy() for cell, table in tables.items() if len(table) > 1}  # one seed has no interval
    print("\nInterquartile mean over tasks and seeds, each return divided by the mean of all runs of its task:")
    for cell, (mean, low, high) in study.interquartile_means(scores).items():
        print(f"{cell:24}{mean:.2f} [{low:.2f}, {high:.2f}] of {scores[cell].shape[0]} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--envs", nargs="+", help="some of the tasks")
    parser.add_argument("--cells", nargs="+", help="some of the cells")
    parser.add_argument("--steps", type=int, help="environment steps of each run, instead of the study's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/STUDY.csv")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    out = args.out or RESULTS / f"{args.study}.csv"

    cases = {
        (cell, env): case
        for (cell, env), case in STUDIES[args.study]().items()
        if cell in (args.cells or [cell]) and env in (args.envs or [env])
    }
    grid = itertools.product(args.seeds, cases.items())
    runs = [Run(cell, env, seed, args.steps or case.steps) for seed, ((cell, env), case) in grid]
    failures = 0 if args.table else study.perform_missing(runs, partial(train, name=args.study), out, args.jobs)
    print_table(runs, out, interquartile=args.study == "critic")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
