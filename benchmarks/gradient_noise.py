"""
How much of what a step of RecurrentTRPO promises on its own rollout holds on other rollouts of the same policy.

    python benchmarks/gradient_noise.py

A policy is trained for some steps, then collects rollouts without being changed. Each gives a direction s by conjugate
gradients; the gain gᵀs / √(sᵀFs) is the slope of the objective per unit of distance, by gradient and Fisher matrix of the same
rollout, or of the others. The ratio of the two is what of a step is no noise. The same for several λ of the advantages, and
for a direction from 150 instead of 15 iterations.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from recurrent import TASKS, TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import RecurrentTRPO
from sb3_trpo.optim.batch import RolloutBatch, normalize_advantages
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner
from sb3_trpo.optim.objective import Surrogate

LAMBDAS = (0.95, 0.9, 0.8, 0.5)
N_ROLLOUTS, N_LONG = 8, 3


class Local(NamedTuple):
    """Gradient, Fisher products and preconditioner of one rollout."""

    gradient: th.Tensor
    fisher: FisherOperator
    inverse: KFACPreconditioner

    def direction(self, damping: float, max_iter: int, rtol: float) -> th.Tensor:
        """s."""

        def damped(v: th.Tensor) -> th.Tensor:
            return self.fisher(v) + damping * v

        return conjugate_gradient(damped, self.gradient, max_iter=max_iter, rtol=rtol, M=self.inverse).x

    def gain(self, s: th.Tensor) -> float:
        """Slope of the objective along s, per unit of distance in the Fisher metric."""
        return float(self.gradient.dot(s) / s.dot(self.fisher(s)).sqrt())


def collect(model: RecurrentTRPO) -> dict[float, list[RolloutBatch]]:
    """Rollouts of the unchanged policy, with advantages for each λ."""
    _, callback = model._setup_learn(10**9, None, reset_num_timesteps=False)
    rollouts: dict[float, list[RolloutBatch]] = {lam: [] for lam in LAMBDAS}
    for _ in range(N_ROLLOUTS):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        dones = model._last_episode_starts
        with th.no_grad():
            last_values = model.adapter.last_values(model._last_obs, dones)
        for lam in LAMBDAS:
            model.rollout_buffer.gae_lambda = lam
            model.rollout_buffer.compute_returns_and_advantage(last_values, dones)
            rollouts[lam].append(normalize_advantages(model.adapter.read()))
    return rollouts


def linearize(model: RecurrentTRPO, rollout: RolloutBatch) -> Local:
    surrogate = Surrogate(model.adapter.actor(rollout), rollout)
    return Local(surrogate.gradient(), FisherOperator(surrogate, 0.0), KFACPreconditioner(surrogate, model.cg_damping))


def measure(model: RecurrentTRPO, rollouts: list[RolloutBatch], max_iter: int, rtol: float, n: int) -> tuple[float, float]:
    """Mean gain of the first n rollouts' directions on their own rollout, and on the others."""
    locals_ = [linearize(model, rollout) for rollout in rollouts]
    own, others = [], []
    for k, local in enumerate(locals_[:n]):
        s = local.direction(model.cg_damping, max_iter, rtol)
        own.append(local.gain(s))
        others += [other.gain(s) for other in [*locals_[:k], *locals_[k + 1 :]]]
    return float(np.mean(own)), float(np.mean(others))


def perform(name: str, steps: int, seed: int) -> list[dict[str, Any]]:
    task = TASKS[name]
    settings = task.settings[TRPO]
    env = VecNormalize(make_vec_env(task.make, task.n_envs[TRPO], seed=seed), gamma=settings["gamma"])
    model = RecurrentTRPO(env=env, seed=seed, device="cpu", **{**settings, "target_kl": 0.05})
    model.learn(steps)
    rollouts = collect(model)
    cells = [(lam, 15, 0.05, N_ROLLOUTS) for lam in LAMBDAS] + [
        (LAMBDAS[0], n, r, N_LONG) for n, r in ((15, 0.05), (150, 1e-5))
    ]
    rows = []
    for lam, max_iter, rtol, n in cells:
        own, others = measure(model, rollouts[lam], max_iter, rtol, n)
        row = {"task": name, "seed": seed, "steps": steps, "gae_lambda": lam, "cg_max_steps": max_iter, "n_directions": n}
        rows.append({**row, "own": round(own, 4), "others": round(others, 4), "ratio": round(others / own, 3)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--tasks", nargs="+", choices=("CartPoleNoVel-v1", "PendulumNoVel-v1"), default=["CartPoleNoVel-v1"])
    parser.add_argument("--steps", type=int, default=12_000, help="environment steps of training before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gradient_noise.json")
    args = parser.parse_args()
    th.set_num_threads(1)

    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["task"], row["seed"]) for row in rows}
    for name, seed in itertools.product(args.tasks, args.seeds):
        if (name, seed) not in done:
            rows += perform(name, args.steps, seed)
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
