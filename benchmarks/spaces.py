"""
Does it learn on every space? Ours with its defaults against sb3-contrib's TRPO with the same settings and budget.

    python benchmarks/spaces.py            # goes on where it was stopped
    python benchmarks/spaces.py --table    # what the finished runs say

Both get the same rollouts and the same trust region. sb3-contrib averages the KL over the d dimensions of Box and
MultiBinary actions, so it is given our ``target_kl / d`` and ``cg_damping / d`` there. Its critic has its default
regression, ours has ours. Seconds are CPU seconds of ``learn``.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import inspect
import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import envs  # noqa: F401 (registers the tasks)
import gymnasium as gym
import numpy as np
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import sb3_trpo
from sb3_trpo.saving.sb3_contrib import kl_dimensions

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"sb3_trpo": sb3_trpo.TRPO, "sb3_contrib": sb3_contrib.TRPO}
N_ENVS, N_EVAL_EPISODES = 4, 20


class Task(NamedTuple):
    """
    A task, its budget, and what both algorithms are given for it beside their defaults.

    :param env: registered name
    :param what: which space it is there for
    :param steps: environment steps of training
    :param settings: arguments
    """

    env: str
    what: str
    steps: int
    settings: dict[str, Any]


TASKS = (
    Task("CartPole-v1", "Discrete", 30_000, {"policy": "MlpPolicy", "n_steps": 256}),
    Task("Pendulum-v1", "Box, gSDE", 60_000, {"policy": "MlpPolicy", "n_steps": 256, "gamma": 0.9, "use_sde": True}),
    Task("Chase-v0", "MultiDiscrete", 30_000, {"policy": "MlpPolicy", "n_steps": 256, "gamma": 0.9}),
    Task("Hover-v0", "MultiBinary", 30_000, {"policy": "MlpPolicy", "n_steps": 256, "gamma": 0.95}),
    Task("Errands-v0", "Dict observations", 30_000, {"policy": "MultiInputPolicy", "n_steps": 256, "gamma": 0.9}),
)


def trust_region(algorithm: str, action_space: spaces.Space) -> dict[str, float]:
    """Our defaults, in terms of the KL that the algorithm uses."""
    ours = inspect.signature(sb3_trpo.TRPO).parameters
    dimensions = kl_dimensions(action_space) if algorithm == "sb3_contrib" else 1
    return {name: ours[name].default / dimensions for name in ("target_kl", "cg_damping")}


def perform(algorithm: str, task: Task, seed: int) -> dict[str, Any]:
    """Train, evaluate, and return one row of the results."""
    env = make_vec_env(partial(gym.make, task.env), N_ENVS, seed=seed)
    region = trust_region(algorithm, env.action_space)
    model = ALGORITHMS[algorithm](env=env, seed=seed, device="cpu", **region, **task.settings)
    start = time.process_time()
    model.learn(task.steps)
    cpu_seconds = time.process_time() - start
    env.close()

    eval_env = make_vec_env(partial(gym.make, task.env), N_ENVS, seed=seed + 1_000)
    mean_return, std_return = evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic=True)
    eval_env.close()
    return {
        "env": task.env,
        "algorithm": algorithm,
        "seed": seed,
        "steps": task.steps,
        "n_envs": N_ENVS,
        **task.settings,
        **region,
        "mean_return": float(mean_return),
        "std_return": float(std_return),
        "cpu_seconds": round(cpu_seconds, 2),
    }


def random_return(task: Task) -> float:
    """Mean return of random actions, to see that there is something to learn."""
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(task.env))
    env.action_space.seed(0)
    returns = []
    for episode in range(N_EVAL_EPISODES):
        env.reset(seed=episode)
        info: dict[str, Any] = {}
        while "episode" not in info:
            *_, info = env.step(env.action_space.sample())
        returns.append(info["episode"]["r"])
    return float(np.mean(returns))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean ± standard deviation over seeds."""
    header = f"{'task':14}{'space':20}{'steps':>7}{'random':>9}"
    print(header + "".join(f"{name:>18}{'CPU s':>7}" for name in ALGORITHMS))
    for task in TASKS:
        line = f"{task.env:14}{task.what:20}{task.steps:7}{random_return(task):9.1f}"
        for name in ALGORITHMS:
            finished = [row for row in rows if (row["env"], row["algorithm"]) == (task.env, name)]
            if finished:
                returns = np.array([row["mean_return"] for row in finished])
                spread = f"{returns.mean():.1f} ± {returns.std():.1f}"
                line += f"{spread:>18}{np.mean([row['cpu_seconds'] for row in finished]):7.1f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "spaces.json")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    th.set_num_threads(1)

    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["env"], row["algorithm"], row["seed"]) for row in rows}
    for seed, task, algorithm in itertools.product(args.seeds, TASKS, ALGORITHMS):
        if args.table or (task.env, algorithm, seed) in done:
            continue
        row = perform(algorithm, task, seed)
        print(f"{task.env}, {algorithm}, seed {seed}: {row['mean_return']:.1f} in {row['cpu_seconds']} s", flush=True)
        rows.append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
