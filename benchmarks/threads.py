"""
How many threads should torch use? Environment steps per second and CPU seconds, by size of the network.

    python benchmarks/threads.py

Each case trains for a few rollouts with each number of threads, in alternation, in one process per run (torch reads
OMP_NUM_THREADS once). The machine's load average is recorded with each run: on a busy machine more threads wait for
one another.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Case -> environment, policy, rollout per environment, hidden layers.
CASES: dict[str, dict[str, Any]] = {
    "mlp_64": {"net_arch": [64, 64], "n_steps": 1024},
    "mlp_256": {"net_arch": [256, 256], "n_steps": 1024},
    "cnn": {"images": True, "n_steps": 32},
}
N_ENVS = 2


def measure(case: str, n_updates: int) -> dict[str, float]:
    """Train in this process, after one rollout for warm-up."""
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.envs import FakeImageEnv
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_trpo import TRPO

    settings = CASES[case]
    if settings.get("images"):
        env = DummyVecEnv([lambda: FakeImageEnv(action_dim=4, screen_height=84, screen_width=84, n_channels=4)] * N_ENVS)
        policy, policy_kwargs = "CnnPolicy", {}
    else:
        env = make_vec_env("HalfCheetah-v5", N_ENVS, seed=0)
        policy, policy_kwargs = "MlpPolicy", {"net_arch": settings["net_arch"]}
    model = TRPO(policy, env, n_steps=settings["n_steps"], policy_kwargs=policy_kwargs, seed=0, device="cpu")
    n_states = N_ENVS * settings["n_steps"]
    threads = th.get_num_threads()
    model.learn(n_states)
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(n_updates * n_states, reset_num_timesteps=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"threads": threads, "steps_per_second": n_updates * n_states / wall, "cpu_seconds": cpu, "wall_seconds": wall}


def run(case: str, threads: int, n_updates: int) -> dict[str, float]:
    """Measure in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--worker", case, "--updates", str(n_updates)]
    load = os.getloadavg()[0]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return {**json.loads(output.splitlines()[-1]), "load_before": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="timed updates of a run")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, os.cpu_count() or 1}))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "threads.json")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.updates)))
        return

    rows: dict[str, Any] = {}
    for case in args.case:
        runs: dict[int, list[dict[str, float]]] = {threads: [] for threads in args.threads}
        for _ in range(args.rounds):
            for threads, samples in runs.items():
                samples.append(run(case, threads, args.updates))
        for threads, samples in runs.items():
            row = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
            rows.setdefault(case, {})[threads] = {key: round(value, 3) for key, value in row.items()}
            speed, cpu = row["steps_per_second"], row["cpu_seconds"]
            print(
                f"{case:10}{threads:3} threads{speed:10,.0f} steps/s{cpu:8.2f} CPU s, load {row['load_before']:.1f}",
                flush=True,
            )
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        result = {"machine": machine, "rounds": args.rounds, "cases": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
