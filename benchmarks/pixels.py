"""
Which CnnPolicy learns from pixels: one features extractor for actor and critic, or one each?

    python benchmarks/pixels.py            # goes on where it was stopped
    python benchmarks/pixels.py --table    # what the finished runs say

TRPO's critic must not move the policy, so it cannot train an extractor that it shares: it reads the values off features
that only the policy objective shapes. sb3-contrib's TRPO shares; ours does not unless told to. Seconds are CPU seconds of
``learn``, and the explained variance is what the updates of the last quarter of the training logged.
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
from typing import Any

import envs  # noqa: F401 (registers the task)
import gymnasium as gym
import numpy as np
import sb3_contrib
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import sb3_trpo

ENV = "Catch-v0"
VARIANTS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any]]] = {
    "sb3_trpo, one each": (sb3_trpo.TRPO, {}),
    "sb3_trpo, one each, small steps, minibatches": (sb3_trpo.TRPO, {"target_kl": 0.02, "critic_method": "minibatch"}),
    "sb3_trpo, shared": (sb3_trpo.TRPO, {"policy_kwargs": {"share_features_extractor": True}}),
    "sb3_contrib, shared": (sb3_contrib.TRPO, {}),
    # Rollouts of 1,024 states, of which curvature is computed from all or from some.
    "sb3_trpo, 1,024 states, all": (sb3_trpo.TRPO, {"n_steps": 128, "curvature_batch_size": 1024}),
    "sb3_trpo, 1,024 states, 256": (sb3_trpo.TRPO, {"n_steps": 128, "curvature_batch_size": 256}),
    "sb3_trpo, 1,024 states, 128": (sb3_trpo.TRPO, {"n_steps": 128, "curvature_batch_size": 128}),
}
OURS = inspect.signature(sb3_trpo.TRPO).parameters
SETTINGS: dict[str, Any] = {
    "n_steps": 32,
    "gamma": 0.9,
    # Our defaults. One Discrete action: sb3-contrib's KL is the same as ours.
    "target_kl": OURS["target_kl"].default,
    "cg_damping": OURS["cg_damping"].default,
}
N_ENVS, N_EVAL_EPISODES = 8, 200


def perform(variant: str, seed: int, steps: int) -> dict[str, Any]:
    """Train, evaluate, and return one row of the results."""
    algorithm, arguments = VARIANTS[variant]
    explained: list[float] = []

    class Watched(algorithm):  # type: ignore[misc,valid-type]
        def train(self) -> None:
            super().train()
            explained.append(float(self.logger.name_to_value["train/explained_variance"]))

    env = make_vec_env(partial(gym.make, ENV), N_ENVS, seed=seed)
    model = Watched("CnnPolicy", env, seed=seed, device="cpu", **{**SETTINGS, **arguments})
    start = time.process_time()
    model.learn(steps)
    cpu_seconds = time.process_time() - start
    env.close()

    eval_env = make_vec_env(partial(gym.make, ENV), N_ENVS, seed=seed + 1_000)
    mean_return, _ = evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic=True)
    eval_env.close()
    return {
        "env": ENV,
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "n_envs": N_ENVS,
        **SETTINGS,
        **{name: arguments[name] for name in ("target_kl", "n_steps", "curvature_batch_size") if name in arguments},
        "mean_return": float(mean_return),
        "explained_variance": round(float(np.mean(explained[-len(explained) // 4 :])), 3),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def print_table(rows: list[dict[str, Any]], steps: int) -> None:
    """Mean ± standard deviation over seeds, then each seed's return."""
    print(f"{'features extractor':46}{'mean return':>16}{'explained variance':>22}{'CPU s':>8}   each seed")
    for variant in VARIANTS:
        finished = [row for row in rows if row["variant"] == variant and row["steps"] == steps]
        if finished:
            returns, explained, seconds = (
                np.array([row[name] for row in finished]) for name in ("mean_return", "explained_variance", "cpu_seconds")
            )
            line = f"{variant:46}{f'{returns.mean():.2f} ± {returns.std():.2f}':>16}"
            line += f"{f'{explained.mean():.2f} ± {explained.std():.2f}':>22}{seconds.mean():8.1f}"
            print(line + "   " + ", ".join(f"{value:.2f}" for value in returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10_240)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pixels.json")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    th.set_num_threads(1)

    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    for seed, variant in itertools.product(args.seeds, args.variants):
        if args.table or (variant, seed, args.steps) in done:
            continue
        row = perform(variant, seed, args.steps)
        print(
            f"{variant}, seed {seed}: return {row['mean_return']:.2f}, explained variance {row['explained_variance']:.2f} "
            f"in {row['cpu_seconds']} s",
            flush=True,
        )
        rows.append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows, args.steps)


if __name__ == "__main__":
    main()
