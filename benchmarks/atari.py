"""
Atari: our TRPO by ``zoo_hyperparams/trpo.yml`` beside SB3's PPO by RL Zoo's ``ppo.yml``, on the same number of steps.

    python benchmarks/atari.py --env PongNoFrameskip-v4 --algorithm sb3_trpo --folder runs/atari
    python benchmarks/atari.py --table     # what the finished runs say
    python benchmarks/atari.py --picture   # and their learning curves

A run takes hours. It saves a checkpoint every 25 updates, and the same command continues from the last one, with new games.
``results/atari_curves.csv`` has the mean return of the last 100 training episodes (whole games, rewards that are not clipped)
against steps and CPU seconds; ``results/atari.csv`` has the final evaluation: 10 games, actions sampled as in training.
"""

import peers  # isort: skip  (first: one thread)

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from returns import OURS, RL_ZOO, decode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from yaml import safe_load

from sb3_trpo import TRPO

gym.register_envs(ale_py)

N_EVAL_EPISODES, UPDATES_PER_CHECKPOINT, CHECKPOINT = 10, 25, "checkpoint.zip"
ENTRIES: dict[str, tuple[type[OnPolicyAlgorithm], Path]] = {
    "sb3_trpo": (TRPO, OURS / "trpo.yml"),
    "PPO": (PPO, RL_ZOO / "ppo.yml"),
}
FINALS, CURVES = peers.RESULTS / "atari.csv", peers.RESULTS / "atari_curves.csv"


def settings_of(name: str) -> tuple[type[OnPolicyAlgorithm], dict[str, Any]]:
    """Return the class and the constructor arguments of the file's entry for all games."""
    algorithm, path = ENTRIES[name]
    entry = safe_load(path.read_text(encoding="utf-8"))["atari"]
    names = set(entry) - {"env_wrapper", "frame_stack", "n_envs", "n_timesteps"}
    return algorithm, {key: decode(entry[key], key) for key in names}


def make_env(env: str, n_envs: int, seed: int) -> VecEnv:
    return VecFrameStack(make_atari_env(env, n_envs, seed=seed), 4)


class Record(BaseCallback):
    """Writes the curve and the checkpoints, between updates."""

    def __init__(self, run: dict[str, Any], folder: Path, cpu_seconds: float) -> None:
        super().__init__()
        self.run, self.folder, self.n_updates = run, folder, 0
        self.started = time.process_time() - cpu_seconds

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.n_updates += 1
        if self.n_updates % UPDATES_PER_CHECKPOINT == 0:
            self.save()

    def save(self) -> None:
        """Save the model, and a row of the curve."""
        path = self.folder / "new.zip"
        if isinstance(self.model, TRPO):
            self.model.save_checkpoint(path)
        else:
            self.model.save(path)
        path.replace(self.folder / CHECKPOINT)
        returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
        mean = round(float(np.mean(returns)), 3) if returns else ""
        seconds = round(time.process_time() - self.started, 1)
        append(CURVES, {**self.run, "at": self.num_timesteps, "cpu_seconds": seconds, "mean_return": mean})


def append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def perform(name: str, env_id: str, seed: int, steps: int, folder: Path) -> None:
    """Train from the last checkpoint on, evaluate, and write the rows."""
    th.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    run = {"algorithm": name, "env": env_id, "seed": seed, "steps": steps}
    algorithm, settings = settings_of(name)
    env = make_env(env_id, 8, seed)
    seconds, last = 0.0, folder / CHECKPOINT
    if not last.exists():
        model = algorithm(env=env, seed=seed, device="cpu", **settings)
    else:
        model = TRPO.resume(last, env) if algorithm is TRPO else algorithm.load(last, env)
        curves = pd.read_csv(CURVES)
        seconds = curves[(curves[list(run)] == pd.Series(run)).all(axis=1)].cpu_seconds.max()
    record = Record(run, folder, seconds)
    model.learn(steps - model.num_timesteps, callback=record, reset_num_timesteps=model.num_timesteps == 0)
    record.save()
    seconds = round(time.process_time() - record.started, 1)
    games = make_env(env_id, N_EVAL_EPISODES, seed + 1_000)
    returns, _ = evaluate_policy(model, games, N_EVAL_EPISODES, deterministic=False, return_episode_rewards=True)
    append(
        FINALS,
        {**run, "final_return": np.mean(returns), "final_std": round(float(np.std(returns)), 2), "cpu_seconds": seconds},
    )


def draw(path: Path) -> None:
    """Draw the learning curves."""
    import matplotlib.pyplot as plt

    curves = pd.read_csv(CURVES)
    games = list(dict.fromkeys(curves.env))
    figure, axes = plt.subplots(len(games), 2, figsize=(9, 3.2 * len(games)), squeeze=False, sharey="row")
    for row, game in zip(axes, games, strict=True):
        for axis, x, label in zip(row, ("at", "cpu_seconds"), ("environment steps", "CPU seconds"), strict=True):
            for (name, _), curve in curves[curves.env == game].groupby(["algorithm", "seed"]):
                axis.plot(curve[x], curve.mean_return, label=name, color="C0" if name == "sb3_trpo" else "C1")
            axis.set(xlabel=label, title=game)
        row[0].set_ylabel("return of training episodes")
        row[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PongNoFrameskip-v4")
    parser.add_argument("--algorithm", choices=ENTRIES, default="sb3_trpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/atari"), help="where the checkpoints are")
    parser.add_argument("--table", action="store_true", help="print what the runs say, and run nothing")
    parser.add_argument("--picture", action="store_true", help="draw the learning curves, and run nothing")
    args = parser.parse_args()
    if args.picture:
        draw(peers.RESULTS / "atari.png")
    elif not args.table:
        name = f"{args.algorithm}_{args.env}_{args.seed}"
        perform(args.algorithm, args.env, args.seed, args.steps, args.folder / name)
    if args.table:
        print(pd.read_csv(CURVES).groupby(["env", "algorithm", "seed"]).last())
        if FINALS.exists():
            print(pd.read_csv(FINALS).to_string())


if __name__ == "__main__":
    main()
