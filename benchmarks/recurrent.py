"""
RecurrentTRPO beside sb3-contrib's RecurrentPPO on tasks that need a memory.

    python benchmarks/recurrent.py            # goes on where it was stopped
    python benchmarks/recurrent.py --table    # what the finished runs say

CartPole and Pendulum with velocities hidden, and ``Recall``, where a cue is to be named eight steps later. RecurrentTRPO has
the settings of ``zoo_hyperparams/trpo_lstm.yml``, chosen on seeds from 100 on. RecurrentPPO has those of RL Zoo, and on
``Recall`` its defaults; both have the same networks. Runs in ``results/siblings.json`` with the same settings are
not repeated. Every run adds one row to the CSV when it ends; seconds are CPU seconds of ``learn``.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from critic import append_row, commit, read_rows
from siblings import ALGORITHMS, LSTM, N_EVAL_EPISODES, Task
from siblings import TASKS as SIBLINGS
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

RESULTS = Path(__file__).parent / "results"
TRPO, PPO = NAMES = ("RecurrentTRPO", "RecurrentPPO")


def task(env: str, steps: int, n_envs: int, ours: dict[str, Any], ppo_envs: int, ppo: dict[str, Any]) -> Task:
    """A task with normalized observations and rewards."""
    common = {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM}
    settings = {TRPO: {**common, **ours}, PPO: {**common, **ppo}}
    return Task(partial(gym.make, env), steps, {TRPO: n_envs, PPO: ppo_envs}, settings, normalize=True)


def from_siblings(env: str, n_envs: int, ours: dict[str, Any]) -> Task:
    """A task on which RecurrentPPO has the settings that it has in ``siblings.py``."""
    other = SIBLINGS[env]
    return task(env, other.steps, n_envs, ours, other.n_envs[PPO], other.settings[PPO])


TASKS = {
    "CartPoleNoVel-v1": from_siblings(
        "CartPoleNoVel-v1",
        8,
        {"n_steps": 32, "gamma": 0.98, "gae_lambda": 0.8, "target_kl": LinearSchedule(0.05, 0.0, 1.0)},
    ),
    "PendulumNoVel-v1": from_siblings("PendulumNoVel-v1", 8, SIBLINGS["PendulumNoVel-v1"].settings[TRPO]),
    "Recall-v0": task(
        "Recall-v0", 30_000, 8, {"n_steps": 64, "target_kl": LinearSchedule(0.05, 0.0, 1.0)}, 8, {"n_steps": 64}
    ),
}


def perform(name: str, algorithm: str, seed: int) -> dict[str, Any]:
    """Train, evaluate, and return the row of the CSV."""
    of_task = TASKS[name]
    settings, n_envs = of_task.settings[algorithm], of_task.n_envs[algorithm]

    def make(env_seed: int) -> VecNormalize:
        env: VecEnv = make_vec_env(of_task.make, n_envs, seed=env_seed)
        return VecNormalize(env, gamma=settings.get("gamma", 0.99))

    env, eval_env = make(seed), make(seed + 1_000)
    model = ALGORITHMS[algorithm](env=env, seed=seed, device="cpu", **settings)
    start = time.process_time()
    model.learn(of_task.steps)
    cpu_seconds = time.process_time() - start
    sync_envs_normalization(env, eval_env)
    eval_env.training = eval_env.norm_reward = False
    mean_return, std_return = evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic=True)
    return {
        "task": name,
        "algorithm": algorithm,
        "seed": seed,
        "steps": of_task.steps,
        "n_envs": n_envs,
        "n_steps": settings["n_steps"],
        "mean_return": round(float(mean_return), 2),
        "std_return": round(float(std_return), 2),
        "cpu_seconds": round(cpu_seconds, 1),
        "commit": commit(),
    }


def all_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the CSV, and those of ``siblings.json`` with the same settings."""
    others = json.loads((RESULTS / "siblings.json").read_text(encoding="utf-8"))

    def is_same(name: str, algorithm: str) -> bool:
        return (
            algorithm in NAMES
            and name in TASKS
            and name in SIBLINGS
            and (TASKS[name].settings[algorithm] == SIBLINGS[name].settings[algorithm])
        )

    return [*read_rows(path), *(row for row in others if is_same(row["task"], row["algorithm"]))]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean ± standard deviation over seeds."""
    print(f"{'task':20}{'algorithm':16}{'steps':>7}{'seeds':>6}{'return':>20}{'CPU s':>8}")
    for (name, of_task), algorithm in itertools.product(TASKS.items(), NAMES):
        finished = [row for row in rows if (row["task"], row["algorithm"]) == (name, algorithm)]
        if finished:
            returns, seconds = (np.array([float(row[key]) for row in finished]) for key in ("mean_return", "cpu_seconds"))
            spread = f"{returns.mean():.2f} ± {returns.std():.2f}"
            print(f"{name:20}{algorithm:16}{of_task.steps:7}{len(finished):6}{spread:>20}{seconds.mean():8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--algorithms", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--out", type=Path, default=RESULTS / "recurrent.csv")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    th.set_num_threads(1)

    done = {(row["task"], row["algorithm"], int(row["seed"])) for row in all_rows(args.out)}
    for seed, name, algorithm in itertools.product(args.seeds, args.tasks, args.algorithms):
        if args.table or (name, algorithm, seed) in done:
            continue
        row = perform(name, algorithm, seed)
        append_row(args.out, row)
        print(f"{name}, {algorithm}, seed {seed}: {row['mean_return']} in {row['cpu_seconds']} s", flush=True)
    print_table(all_rows(args.out))


if __name__ == "__main__":
    main()
