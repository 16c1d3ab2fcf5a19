"""
MiniGrid-DoorKey-5x5 by the settings of zoo_hyperparams/trpo.yml, beside SB3's PPO at RL Zoo's.

    python benchmarks/doorkey.py            # goes on where it was stopped
    python benchmarks/doorkey.py --table    # what the finished runs say

Observations are those of RL Zoo: the flat image and the mission. Mean return of 200 episodes, stochastic policy (a return of
0.96 or so is perfect), and CPU seconds of ``learn``.
"""

import peers  # isort: skip  (first: one thread)

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import minigrid  # noqa: F401 (registers the tasks)
import numpy as np
from minigrid.wrappers import FlatObsWrapper
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO

ENV, N_ENVS, N_EVAL_EPISODES = "MiniGrid-DoorKey-5x5-v0", 8, 200
ALGORITHMS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any]]] = {
    "sb3_trpo": (TRPO, {"n_steps": 128, "target_kl": 0.01}),
    "PPO": (PPO, {"n_steps": 128, "batch_size": 64, "n_epochs": 10, "learning_rate": 2.5e-4}),
}


def perform(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train, evaluate, and return one row of the results."""
    algorithm, settings = ALGORITHMS[name]
    env = VecNormalize(make_vec_env(ENV, N_ENVS, seed=seed, wrapper_class=FlatObsWrapper))
    model = algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings)
    start = time.process_time()
    model.learn(steps)
    cpu_seconds = time.process_time() - start
    env.training, env.norm_reward = False, False
    mean, _ = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic=False)
    return {
        "algorithm": name,
        "seed": seed,
        "steps": steps,
        "settings": settings,
        "mean_return": round(float(mean), 4),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=peers.RESULTS / "doorkey.json")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["algorithm"], row["seed"], row["steps"]) for row in rows}
    for seed, name in itertools.product(args.seeds, ALGORITHMS):
        if args.table or (name, seed, args.steps) in done:
            continue
        rows.append(perform(name, seed, args.steps))
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for name in ALGORITHMS:
        finished = [row for row in rows if row["algorithm"] == name]
        returns, seconds = (np.array([row[key] for row in finished]) for key in ("mean_return", "cpu_seconds"))
        print(f"{name:10} return {returns.mean():.3f} ± {returns.std():.3f}, {seconds.mean():.0f} CPU s, seeds {returns}")


if __name__ == "__main__":
    main()
