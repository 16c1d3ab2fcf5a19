"""
Several processes that take one common step: scaling, all-reduces, and a model for many more processes.

    python benchmarks/distributed.py            # some minutes; two free cores
    python benchmarks/distributed.py --table    # what the last run says

HalfCheetah-v5 with ``VecNormalize``, 64 and 64 units, two or eight environments of 1,024 steps in a process. Weak scaling has
as many environments in each of two processes as one process has alone; strong scaling has as many in all. Two processes
that train apart at the same time show what the machine has to give. The runs alternate, and every ratio is taken within one
repetition. A run's speed is that of the updates after the first two, by the wall clock.

The model of an update's time with N processes, from the time t of one process with its share, and the k sums of s bytes:
T(N) = t + Σₖ (2 ⌈log₂ N⌉ α + 2 (N − 1) / N · sₖ / B), with latency α and bandwidth B of the network.
"""

import timing  # isort: skip  (first: one thread)

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
WARM_UP, N_UPDATES, N_STEPS = 2, 12, 1024
#: Latency in seconds, and bandwidth in bytes a second.
NETWORKS = {"TCP, 10 Gbit/s": (50e-6, 1.25e9), "InfiniBand, 200 Gbit/s": (5e-6, 25e9)}
#: Name ↦ environment, and how many of them a process has.
TASKS = {"HalfCheetah-v5 x 2": ("HalfCheetah-v5", 2), "HalfCheetah-v5 x 8": ("HalfCheetah-v5", 8)}


def work(task: str, n_envs: int, out: Path) -> None:
    """Train in this process, one of those that were launched, and write down speed and traffic."""
    import torch as th
    import torch.distributed as dist
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_trpo import TRPO

    th.set_num_threads(1)
    sizes: list[int] = []
    clock: list[tuple[float, int, int]] = []

    def counted(function: Any, size_of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sizes.append(size_of(*args))
            return function(*args, **kwargs)

        return call

    dist.all_reduce = counted(dist.all_reduce, lambda tensor: tensor.numel() * tensor.element_size())
    dist.all_gather = counted(dist.all_gather, lambda rows, tensor: len(rows) * tensor.numel() * tensor.element_size())
    dist.all_gather_object = counted(dist.all_gather_object, lambda values, value: 0)

    class Clock(BaseCallback):
        on_every_rank = True

        def _on_rollout_start(self) -> None:
            clock.append((time.perf_counter(), self.model.num_timesteps, len(sizes)))

        def _on_step(self) -> bool:
            return True

    env = VecNormalize(make_vec_env(task, n_envs), gamma=0.99)
    model = TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu")
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    model.learn((WARM_UP + N_UPDATES + 1) * N_STEPS * n_envs * n_processes, callback=Clock())
    (start, first_step, first_sum), (end, last_step, last_sum) = clock[WARM_UP], clock[WARM_UP + N_UPDATES]
    if int(os.environ.get("RANK", "0")) == 0:
        row = {
            "steps_per_second": (last_step - first_step) / (end - start),
            "seconds_per_update": (end - start) / N_UPDATES,
            "sums_per_update": (last_sum - first_sum) / N_UPDATES,
            "bytes_per_update": sum(sizes[first_sum:last_sum]) / N_UPDATES,
            "sum_bytes": sizes[first_sum : clock[WARM_UP + 1][2]],
        }
        out.write_text(json.dumps(row), encoding="utf-8")


def run_apart(task: str, n_envs: int) -> dict[str, Any]:
    """Two processes that know nothing of each other."""
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda _: run(task, 1, n_envs), range(2)))
    return {
        "steps_per_second": sum(row["steps_per_second"] for row in rows),
        "seconds_per_update": rows[0]["seconds_per_update"],
    }


def run(task: str, n_processes: int, n_envs: int) -> dict[str, Any]:
    """One run; each process has its own core as far as the machine has them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"] if n_processes > 1 else []
        )
        command = [sys.executable, "-W", "ignore", *launcher, __file__, "--work", task, str(n_envs), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        row: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return row


def told(name: str, make_run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Make a run, and print its speed."""
    row = make_run()
    print(f"{name}: {row['steps_per_second']:,.0f} steps/s", flush=True)
    return row


def measure(task: str, repetitions: int) -> dict[str, Any]:
    """Median speeds, and medians of their ratios."""
    env, n_envs = TASKS[task]
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "one": lambda: run(env, 1, n_envs),
        "two": lambda: run(env, 2, n_envs),
        "apart": lambda: run_apart(env, n_envs),
        "one_with_all": lambda: run(env, 1, 2 * n_envs),
    }
    runs = timing.alternate({kind: partial(told, f"{task} {kind}", make_run) for kind, make_run in kinds.items()}, repetitions)

    def ratio(of: str, to: str) -> dict[str, Any]:
        pairs = zip(runs[of], runs[to], strict=True)
        ratios = [round(upper["steps_per_second"] / lower["steps_per_second"], 3) for upper, lower in pairs]
        return {"median": round(statistics.median(ratios), 3), "all": ratios}

    def median(kind: str, key: str) -> float:
        return round(statistics.median(row[key] for row in runs[kind]), 4)

    return {
        "repetitions": repetitions,
        "steps_per_second": {kind: round(median(kind, "steps_per_second")) for kind in runs},
        "seconds_per_update": {kind: median(kind, "seconds_per_update") for kind in runs},
        "weak_scaling": ratio("two", "one"),
        "strong_scaling": ratio("two", "one_with_all"),
        "apart": ratio("apart", "one"),
        "two_of_apart": ratio("two", "apart"),
        "sums_per_update": median("two", "sums_per_update"),
        "bytes_per_update": round(median("two", "bytes_per_update")),
        "sum_bytes": runs["two"][0]["sum_bytes"],
    }


def predicted_seconds(result: dict[str, Any], n_processes: int, latency: float, bandwidth: float) -> float:
    """T(N) of the model in the docstring above."""
    total_bytes = result["bytes_per_update"] * 2 * (n_processes - 1) / n_processes
    latencies = result["sums_per_update"] * 2 * math.ceil(math.log2(n_processes)) * latency
    return float(result["seconds_per_update"]["one"] + latencies + total_bytes / bandwidth)


def print_table(results: dict[str, Any]) -> None:
    for task, result in results.items():
        speeds, sums = result["steps_per_second"], result["sums_per_update"]
        print(f"\n{task}, median of {result['repetitions']} repetitions")
        print(f"  steps/s: {', '.join(f'{kind} {speed:,}' for kind, speed in speeds.items())}")
        for name in ("weak_scaling", "strong_scaling", "apart", "two_of_apart"):
            print(f"  {name} {result[name]['median']} ({min(result[name]['all'])} to {max(result[name]['all'])})")
        print(f"  {sums:.1f} sums and {result['bytes_per_update'] / 1e3:,.0f} kB an update")
        for network, (latency, bandwidth) in NETWORKS.items():
            alone = result["seconds_per_update"]["one"]
            shares = [f"{n}: {alone / predicted_seconds(result, n, latency, bandwidth):.1%}" for n in (8, 64, 512)]
            print(f"  efficiency by the model, {network}: {', '.join(shares)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "distributed.json")
    parser.add_argument("--table", action="store_true", help="print the table of the last run, and run nothing")
    parser.add_argument("--work", nargs=3, metavar=("TASK", "N_ENVS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], int(args.work[1]), Path(args.work[2]))
        return
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for task in () if args.table else args.tasks:
        results[task] = measure(task, args.repetitions)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
