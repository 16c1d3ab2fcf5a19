"""
When do environments in processes of their own pay? Steps a second, and what they cost the process that trains.

    python benchmarks/workers.py                        # everything
    python benchmarks/workers.py --task HalfCheetah-v5  # some of it
    python benchmarks/workers.py --table                # what the last run says, and the model for 16 cores

Bare vectorized environments, stepped with random actions in alternation: SB3's ``DummyVecEnv`` and ``SubprocVecEnv``, and
``WatchedSubprocVecEnv``. Wall-clock figures depend on what else the machine does; the CPU time of the main process hardly.

The model of a step of n environments on c cores, from the CPU time p + q·n of the main process that is measured here, the time
e of an environment, and the time a of acting and storing: T = a + p + q·n + e·⌈n / (c − 1)⌉ with workers, a + e·n without.
"""

import peers  # isort: skip  (first: one thread)
import timing  # isort: skip

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from contenders import random_actions
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_trpo import WatchedSubprocVecEnv
from sb3_trpo.rollouts.fast_step import fast_step_fn

TASKS = ("HalfCheetah-v5", "Humanoid-v5")
N_ENVS = (2, 8)
N_STEPS = 256
KINDS: dict[str, type[VecEnv]] = {
    "DummyVecEnv": DummyVecEnv,
    "SubprocVecEnv": SubprocVecEnv,
    "WatchedSubprocVecEnv": WatchedSubprocVecEnv,
}


def contender(env: VecEnv) -> Callable[[], tuple[float, float]]:
    """Steps a vectorized environment as a rollout does; seconds of the wall clock and of the main process."""
    actions = random_actions(env.action_space, N_STEPS, env.num_envs)
    env.reset()
    step = fast_step_fn(env)

    def play() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for row in actions:
            step(row)
        return time.perf_counter() - wall, time.process_time() - cpu

    return play


def measure(task: str, n_envs: int, rounds: int) -> dict[str, Any]:
    envs = {name: make_vec_env(task, n_envs, seed=0, vec_env_cls=kind) for name, kind in KINDS.items()}
    samples = timing.alternate({name: contender(env) for name, env in envs.items()}, rounds, warmup=2)
    for env in envs.values():
        env.close()
    rows = {}
    for name, seconds in samples.items():
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows[name] = {
            "steps_per_second": round(N_STEPS * n_envs / wall),
            "main_process_microseconds": round(1e6 * cpu / N_STEPS, 1),
        }
    return rows


def print_table(results: dict[str, Any]) -> None:
    for name, rows in results.items():
        for kind, row in rows.items():
            print(f"{name:22}{kind:24}{row['steps_per_second']:10,} steps/s{row['main_process_microseconds']:10,.0f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=peers.RESULTS / "workers.json")
    parser.add_argument("--table", action="store_true", help="print the table of the last run, and run nothing")
    args = parser.parse_args()
    for task in () if args.table else args.task:
        for n_envs in N_ENVS:
            peers.update_json(args.out, "steps", f"{task} x {n_envs}", measure(task, n_envs, args.rounds))
    print_table(json.loads(args.out.read_text(encoding="utf-8"))["steps"])


if __name__ == "__main__":
    main()
