"""
The measurements on a graphics card, in one command: tests, then seconds and memory of an update, ours and its peers.

    python benchmarks/gpu.py                                # writes results/gpu.json
    python benchmarks/gpu.py --device cpu --quick --no-tests   # does it run?

Random observations and the policy before any training: sizes matter here, not returns. The waits are the times that our update
asks the card for a number and stands still until it comes; the copies are those from the CPU to the card.
"""

import peers  # isort: skip  (first: one thread)
import timing  # isort: skip

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO as ContribTRPO
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_trpo import TRPO, RecurrentTRPO

VECTOR, FRAMES = spaces.Box(-np.inf, np.inf, (376,)), spaces.Box(0, 255, (4, 84, 84), np.uint8)
BOX, DISCRETE = spaces.Box(-1.0, 1.0, (17,)), spaces.Discrete(6)
N_ENVS = 8
Case = tuple[spaces.Box, spaces.Space[Any], str, dict[str, Any], list[int], list[type[OnPolicyAlgorithm]]]
CASES: dict[str, Case] = {
    "mlp_64": (VECTOR, BOX, "MlpPolicy", {"net_arch": [64, 64]}, [2048, 32768], [TRPO, ContribTRPO, PPO]),
    "mlp_256": (VECTOR, BOX, "MlpPolicy", {"net_arch": [256, 256]}, [2048, 32768], [TRPO, ContribTRPO, PPO]),
    "frames": (FRAMES, DISCRETE, "CnnPolicy", {}, [1024, 4096, 16384], [TRPO, ContribTRPO, PPO]),
    "lstm": (VECTOR, BOX, "MlpLstmPolicy", {}, [2048], [RecurrentTRPO, RecurrentPPO]),
}


class Traffic(TorchDispatchMode):
    """Counts the numbers that are read from the card, and the copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.copies = self.copied_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += function is th.ops.aten._local_scalar_dense.default
        result = function(*args, **(kwargs or {}))
        copies = function in (th.ops.aten._to_copy.default, th.ops.aten.copy_.default)
        if copies and result.is_cuda and any(isinstance(each, th.Tensor) and each.device.type == "cpu" for each in args):
            self.copies += 1
            self.copied_bytes += result.nbytes
        return result


def measure(algorithm: type[OnPolicyAlgorithm], case: Case, n_states: int, device: str, repeats: int) -> dict[str, Any]:
    """Collect one rollout, then update several times."""
    observations, actions, policy, policy_kwargs, *_ = case
    env = peers.random_env(observations, actions, N_ENVS)
    model = algorithm(policy, env, n_steps=n_states // N_ENVS, seed=0, device=device, policy_kwargs=policy_kwargs)
    _, callback = model._setup_learn(10**9)
    model.set_logger(Logger(None, []))
    on_card = th.device(device).type == "cuda"

    def collect() -> None:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]

    def update() -> None:
        model.train()
        if on_card:
            th.cuda.synchronize()

    collecting = timing.seconds_of(collect)

    if on_card:
        th.cuda.reset_peak_memory_stats()
    first, *seconds = [timing.seconds_of(update) for _ in range(repeats + 1)]
    row = {"seconds": statistics.median(seconds), "first_update": first, "collecting": collecting}
    if on_card:
        row["peak_mib"] = th.cuda.max_memory_allocated() / 2**20
    if isinstance(model, TRPO):
        with Traffic() as traffic:
            model.train()
        row |= {"waits": traffic.waits, "copies": traffic.copies, "copied_mib": traffic.copied_bytes / 2**20}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, 64 states, and no file")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--out", type=Path, default=peers.RESULTS / "gpu.json")
    args = parser.parse_args()
    out = None if args.quick else args.out
    if not args.no_tests:
        command = [sys.executable, "-m", "pytest", "-q", "tests"]
        peers.update_json(out, "tests", "exit code", subprocess.run(command, check=False).returncode)
    name = th.cuda.get_device_name() if th.device(args.device).type == "cuda" else args.device
    for key in args.cases:
        for n_states in [64] if args.quick else CASES[key][4]:
            for algorithm in CASES[key][5]:
                library = algorithm.__module__.partition(".")[0]
                row = measure(algorithm, CASES[key], n_states, args.device, 1 if args.quick else args.repeats)
                print(key, n_states, library, algorithm.__name__, row, flush=True)
                peers.update_json(out, name, f"{key}, {n_states}, {library} {algorithm.__name__}", row)


if __name__ == "__main__":
    main()
