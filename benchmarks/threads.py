"""
How many threads should torch use? Environment steps per second and CPU seconds, by size of the network.

    python benchmarks/threads.py

Each case trains for a few rollouts with each number of threads, in alternation, one process per run (torch reads
OMP_NUM_THREADS once). The machine's load average is recorded with each run: on a busy machine, threads wait for one another.
"""

import timing  # isort: skip  (first: one thread)

import argparse
import json
import os
import platform
import subprocess
import sys
from functools import partial
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
    started = {name: clock() for name, clock in timing.CLOCKS.items()}
    model.learn(n_updates * n_states, reset_num_timesteps=False)
    seconds = {name: clock() - started[name] for name, clock in timing.CLOCKS.items()}
    speed = n_updates * n_states / seconds["wall"]
    return {"threads": threads, "steps_per_second": speed, **{f"{name}_seconds": value for name, value in seconds.items()}}


def run(case: str, threads: int, n_updates: int) -> dict[str, float]:
    """Measure in a separate process."""
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

    cases: dict[str, Any] = {}
    for case in args.case:
        contenders = {str(threads): partial(run, case, threads, args.updates) for threads in args.threads}
        cases[case] = {
            threads: timing.medians(samples) for threads, samples in timing.alternate(contenders, args.rounds).items()
        }
        for threads, row in cases[case].items():
            figures = f"{row['steps_per_second']:10,.0f} steps/s{row['cpu_seconds']:8.2f} CPU s, load {row['load_before']:.1f}"
            print(f"{case:10}{threads:>3} threads{figures}", flush=True)
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        result = {"machine": machine, "rounds": args.rounds, "cases": cases}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
