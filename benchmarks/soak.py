"""
Does a training survive being killed? One CartPole training is killed (SIGKILL) at random moments and resumed, over and over.

Each time a new process runs the same command. At its end the model must be that of an uninterrupted training, bit for bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO, CheckpointCallback, latest_checkpoint

RESULT = Path(__file__).parent / "results" / "soak.json"


def train(folder: Path, total: int) -> None:
    """Begin or resume, and train to the end."""
    th.set_num_threads(1)
    env = VecNormalize(make_vec_env("CartPole-v1", 2))
    latest = latest_checkpoint(folder)
    if latest is None:
        model = TRPO("MlpPolicy", env, n_steps=256, seed=0, device="cpu")
    else:
        model = TRPO.resume(latest, env, device="cpu")
    print("begins", flush=True)
    steps = total if latest is None else model.remaining_timesteps
    model.learn(steps, CheckpointCallback(folder, save_freq=512, keep_last=2), reset_num_timesteps=latest is None)


def start(folder: Path, total: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--train", str(folder), "--total", str(total)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def soak(cycles: int, total: int, longest: float) -> dict[str, object]:
    generator, kills, began, leftover = random.Random(0), 0, time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        with start(whole, total) as process:
            if process.wait() != 0:
                raise SystemExit("the uninterrupted training failed")
        finished = False
        while not finished:
            with start(killed, total) as process:
                if kills < cycles and process.stdout is not None and process.stdout.readline():
                    time.sleep(generator.uniform(0.0, longest))
                    process.kill()
                status = process.wait()
                kills += status == -signal.SIGKILL
                leftover += len(list(killed.glob(".*.tmp"))) > 0
                finished = status == 0
                if status not in (0, -signal.SIGKILL):
                    raise SystemExit(f"cycle {kills} failed with status {status}")
            if kills % 20 == 0:
                print(kills, latest_checkpoint(killed), round(time.monotonic() - began), flush=True)
        models = []
        for folder in (whole, killed):
            path = latest_checkpoint(folder)
            assert path is not None
            models.append(TRPO.resume(path, VecNormalize(make_vec_env("CartPole-v1", 2)), device="cpu"))
    same = [th.equal(*pair) for pair in zip(*(model.policy.state_dict().values() for model in models), strict=True)]
    rms = [model.get_vec_normalize_env().obs_rms.mean.tolist() for model in models]
    return {
        "environment steps": models[1].num_timesteps,
        "updates": models[1]._n_updates,
        "kills": kills,
        "kills while a file was being written": leftover,
        "seconds": round(time.monotonic() - began),
        "parameters equal bit for bit": all(same),
        "normaliser equal bit for bit": rms[0] == rms[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200, help="kill so often")
    parser.add_argument("--total", type=int, default=300_000, help="environment steps of the training")
    parser.add_argument("--longest", type=float, default=0.6, help="seconds of training before a kill, at most")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.total)
        return
    result = soak(arguments.cycles, arguments.total, arguments.longest)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
