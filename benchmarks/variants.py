"""
What the options beyond plain TRPO learn: bounded actions, a user's own distribution, the natural policy gradient.

    python benchmarks/variants.py            # goes on where it was stopped
    python benchmarks/variants.py --table    # what the finished runs say

Returns are of deterministic evaluation episodes; seconds are CPU seconds of ``learn``.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch.distributions import AffineTransform, Beta, Normal, TransformedDistribution
from torch.nn import functional as F

from sb3_trpo import NPG, TRPO


def beta(outputs: th.Tensor) -> TransformedDistribution:
    """Beta distributions on [-1, 1], with one mode each."""
    alpha, beta = (1.0 + F.softplus(outputs)).chunk(2, dim=-1)
    return TransformedDistribution(Beta(alpha, beta), AffineTransform(-1.0, 2.0))


def state_dependent_gaussian(outputs: th.Tensor) -> Normal:
    """Normal distributions whose standard deviations depend on the state."""
    mean, scale = outputs.chunk(2, dim=-1)
    return Normal(mean, F.softplus(scale) + 1e-3)


class Variant(NamedTuple):
    """An algorithm on a task, with its arguments."""

    algorithm: type[TRPO]
    env: str
    n_envs: int
    normalize: bool
    steps: int
    settings: dict[str, Any]


PENDULUM: dict[str, Any] = {"n_steps": 256, "gamma": 0.9}
HALF_CHEETAH: dict[str, Any] = {"n_steps": 1024, "target_kl": 0.035}


def pendulum(**settings: Any) -> Variant:
    return Variant(TRPO, "Pendulum-v1", 4, False, 100_000, {**PENDULUM, **settings})


VARIANTS = {
    "Gaussian, clipped by SB3": pendulum(),
    'action_bound="clip"': pendulum(action_bound="clip"),
    'action_bound="tanh"': pendulum(action_bound="tanh"),
    "Beta": pendulum(action_bound="clip", policy_kwargs={"dist_fn": beta}),
    "state-dependent Gaussian": pendulum(policy_kwargs={"dist_fn": state_dependent_gaussian}),
    "NPG": Variant(NPG, "HalfCheetah-v5", 2, True, 500_000, HALF_CHEETAH),
    "TRPO": Variant(TRPO, "HalfCheetah-v5", 2, True, 500_000, HALF_CHEETAH),
}
N_EVAL_EPISODES = 20


def perform(name: str, seed: int) -> dict[str, Any]:
    """Train, evaluate, and return one row of the results."""
    variant = VARIANTS[name]
    env: VecEnv = make_vec_env(variant.env, variant.n_envs, seed=seed)
    if variant.normalize:
        env = VecNormalize(env, gamma=0.99)
    model = variant.algorithm("MlpPolicy", env, seed=seed, device="cpu", **variant.settings)
    start = time.process_time()
    model.learn(variant.steps)
    cpu_seconds = time.process_time() - start

    eval_env: VecEnv = make_vec_env(variant.env, 1, seed=seed + 1_000)
    if isinstance(env, VecNormalize):
        eval_env = VecNormalize(eval_env, training=False, norm_reward=False)
        eval_env.obs_rms = env.obs_rms
    mean_return, std_return = evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic=True)
    return {
        "variant": name,
        "env": variant.env,
        "seed": seed,
        "steps": variant.steps,
        "mean_return": round(float(mean_return), 1),
        "std_return": round(float(std_return), 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean ± standard deviation over seeds, then each seed's return."""
    for name, variant in VARIANTS.items():
        finished = [row for row in rows if row["variant"] == name]
        if finished:
            returns = np.array([row["mean_return"] for row in finished])
            seconds = np.mean([row["cpu_seconds"] for row in finished])
            each = ", ".join(f"{value:.0f}" for value in returns)
            spread = f"{returns.mean():9.1f} ± {returns.std():6.1f}"
            print(f"{variant.env:16}{name:26}{variant.steps:8}{spread}{seconds:7.0f} s   {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "variants.json")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    th.set_num_threads(1)

    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed, name in itertools.product(args.seeds, VARIANTS):
        if args.table or (name, seed) in done:
            continue
        row = perform(name, seed)
        print(f"{name}, seed {seed}: {row['mean_return']} in {row['cpu_seconds']} s", flush=True)
        rows.append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
