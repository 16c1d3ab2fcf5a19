"""
Where the line search starts: points tried and KL reached, from the full step and from where recent updates expect δ.

    python benchmarks/first_point.py            # some ten minutes on one core; each row is written when it ends
    python benchmarks/first_point.py --table    # what the last run says

Both kinds train with the same settings and seeds; only the first fraction of the step differs. Mean over all updates of a
training: points that the line search tried, KL over δ, and the improvement of the objective by an update; median over seeds.
"""

import peers  # isort: skip  (first: one thread)

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from stable_baselines3.common.callbacks import BaseCallback

import sb3_trpo.trpo

#: Task ↦ updates of 2 environments × 1,024 steps.
TASKS = {"HalfCheetah-v5": 60, "CartPole-v1": 40, "Hopper-v5": 60}
KINDS = ("full step", "measured")
N_ENVS, N_STEPS = 2, 1024


class Updates(BaseCallback):
    """The figures of every update; those of the last come after the training."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[float, float, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.add()

    def add(self) -> None:
        update = self.model.last_update
        if update is not None:
            kl = update.kl_divergence_loss.last / self.model._current_target_kl
            self.rows.append((update.backtracks.last + 1.0, kl, update.actual_improvement.last))


def train(task: str, kind: str, seed: int) -> dict[str, float]:
    env = peers.make_env(task, N_ENVS, normalize=task != "CartPole-v1")
    env.seed(seed)
    model = sb3_trpo.TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=seed, device="cpu")
    updates = Updates()
    full = mock.patch.object(sb3_trpo.trpo, "first_fraction", return_value=1.0)
    with full if kind == "full step" else nullcontext():
        model.learn(TASKS[task] * N_ENVS * N_STEPS, callback=updates)
    updates.add()
    points, kl, improvement = (statistics.mean(column) for column in zip(*updates.rows, strict=True))
    return {"points": points, "kl_over_target": kl, "improvement": improvement}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'task':16}{'start':12}{'points':>8}{'KL/δ':>8}{'improvement':>13}{'seeds':>7}")
    for task in TASKS:
        for kind in KINDS:
            found = [row for row in rows if (row["task"], row["kind"]) == (task, kind)]
            if found:
                points, kl, improvement = (
                    statistics.median(row[name] for row in found) for name in ("points", "kl_over_target", "improvement")
                )
                print(f"{task:16}{kind:12}{points:8.2f}{kl:8.3f}{improvement:13.4f}{len(found):7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=peers.RESULTS / "first_point.json")
    parser.add_argument("--table", action="store_true", help="print the table of the last run, and run nothing")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.table else []
    for seed in () if args.table else range(args.seeds):
        for task in TASKS:
            for kind in KINDS:
                rows.append({"task": task, "kind": kind, "seed": seed, **train(task, kind, seed)})
                args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
