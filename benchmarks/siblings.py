"""
RecurrentTRPO and MaskableTRPO beside sb3-contrib's RecurrentPPO and MaskablePPO.

    python benchmarks/siblings.py            # goes on where it was stopped
    python benchmarks/siblings.py --table    # what the finished runs say

Recurrent: CartPole and Pendulum with velocities hidden. RecurrentPPO has RL Zoo's settings, RecurrentTRPO earlier ones than
``recurrent.py``, both the same networks; plain TRPO has RecurrentTRPO's settings without the memory.
Maskable: sb3-contrib's environments with invalid actions, and ``Placement`` with 64 actions. Both have the same rollouts and
discount, and their defaults otherwise. Then each trained policy samples 10,000 actions under masks, and those that the masks
forbid are counted. "RecurrentTRPO, longer" has 2.5 times the steps, for about RecurrentPPO's time. Seconds are CPU seconds of
``learn``.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import envs  # noqa: F401 (registers the tasks)
import gymnasium as gym
import numpy as np
import sb3_contrib
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization
from torch import nn

import sb3_trpo

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {
    "RecurrentTRPO": sb3_trpo.RecurrentTRPO,
    "TRPO": sb3_trpo.TRPO,
    "RecurrentTRPO, longer": sb3_trpo.RecurrentTRPO,
    "RecurrentPPO": sb3_contrib.RecurrentPPO,
    "MaskableTRPO": sb3_trpo.MaskableTRPO,
    "MaskablePPO": sb3_contrib.MaskablePPO,
}
N_EVAL_EPISODES, N_SAMPLED = 20, 10_000
LONGER = 2.5


class Task(NamedTuple):
    """
    A task and its budget.

    :param make: makes one environment
    :param steps: environment steps of training
    :param n_envs: number of environments, by algorithm
    :param settings: arguments, by algorithm
    :param normalize: whether observations and rewards are normalised
    """

    make: Callable[[], gym.Env]
    steps: int
    n_envs: dict[str, int]
    settings: dict[str, dict[str, Any]]
    normalize: bool = False

    def steps_of(self, algorithm: str) -> int:
        """Environment steps of one training."""
        return int(self.steps * (LONGER if algorithm.endswith("longer") else 1.0))


LSTM = {
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "lstm_hidden_size": 64,
    "enable_critic_lstm": True,
    "net_arch": {"pi": [64], "vf": [64]},
}
FEEDFORWARD = {"activation_fn": nn.ReLU, "net_arch": {"pi": [64, 64], "vf": [64, 64]}}


def hidden(name: str, steps: int, ours: dict[str, Any], ppo_envs: int, ppo: dict[str, Any]) -> Task:
    """A task whose velocities are hidden."""
    settings = {
        "RecurrentTRPO": {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM, **ours},
        "RecurrentTRPO, longer": {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM, **ours},
        "TRPO": {"policy": "MlpPolicy", "policy_kwargs": FEEDFORWARD, **ours},
        "RecurrentPPO": {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM, **ppo},
    }
    n_envs = {**dict.fromkeys(settings, 8), "RecurrentPPO": ppo_envs}
    return Task(partial(gym.make, name), steps, n_envs, settings, normalize=True)


def masked(make: Callable[[], gym.Env], steps: int, gamma: float) -> Task:
    """A task with invalid actions."""
    settings = {"policy": "MlpPolicy", "n_steps": 256, "gamma": gamma}
    names = ("MaskableTRPO", "MaskablePPO")
    return Task(make, steps, dict.fromkeys(names, 4), dict.fromkeys(names, settings))


TASKS = {
    "CartPoleNoVel-v1": hidden(
        "CartPoleNoVel-v1",
        30_000,
        {"n_steps": 32, "gamma": 0.98},
        8,
        {
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
            "clip_range": LinearSchedule(0.2, 0.0, 1.0),
        },
    ),
    "PendulumNoVel-v1": hidden(
        "PendulumNoVel-v1",
        60_000,
        {
            "n_steps": 200,
            "gamma": 0.9,
            "gae_lambda": 0.9,
            "use_sde": True,
            "sde_sample_freq": 4,
            "n_critic_steps": 3,
        },
        4,
        {
            "n_steps": 1024,
            "gae_lambda": 0.95,
            "gamma": 0.9,
            "n_epochs": 10,
            "learning_rate": 1e-3,
            "use_sde": True,
            "sde_sample_freq": 4,
        },
    ),
    "Discrete(20), 15 invalid": masked(partial(InvalidActionEnvDiscrete, 20, n_invalid_actions=15), 10_000, 0.4),
    "MultiDiscrete([8, 6]), 7 invalid": masked(
        partial(InvalidActionEnvMultiDiscrete, [8, 6], n_invalid_actions=7), 10_000, 0.4
    ),
    "MultiBinary(6), 4 invalid": masked(partial(InvalidActionEnvMultiBinary, 6, n_invalid_actions=4), 10_000, 0.4),
    "Placement-v0": masked(partial(gym.make, "Placement-v0"), 40_000, 0.99),
}


def count_invalid(model: OnPolicyAlgorithm, env: VecEnv, space: gym.Space) -> int:
    """How many of the sampled actions the masks forbid."""
    choices = (
        [space.n] if isinstance(space, gym.spaces.Discrete) else [*getattr(space, "nvec", [2] * int(np.prod(space.shape)))]
    )
    offsets = np.cumsum([0, *choices[:-1]])
    observations, invalid = env.reset(), 0
    for _ in range(N_SAMPLED // env.num_envs):
        masks = get_action_masks(env)
        actions, _ = model.predict(observations, action_masks=masks)
        places = actions.reshape(env.num_envs, -1).astype(int) + offsets
        invalid += int((~np.take_along_axis(masks.reshape(env.num_envs, -1), places, axis=1).all(axis=1)).sum())
        observations, *_ = env.step(actions)
    return invalid


def perform(algorithm: str, name: str, seed: int) -> dict[str, Any]:
    """Train, evaluate, and return one row of the results."""
    task = TASKS[name]
    settings = task.settings[algorithm]

    def make(env_seed: int) -> VecEnv:
        env = make_vec_env(task.make, task.n_envs[algorithm], seed=env_seed)
        return VecNormalize(env, gamma=settings["gamma"]) if task.normalize else env

    env = make(seed)
    model = ALGORITHMS[algorithm](env=env, seed=seed, device="cpu", **settings)
    start = time.process_time()
    model.learn(task.steps_of(algorithm))
    cpu_seconds = time.process_time() - start

    eval_env = make(seed + 1_000)
    row = {"task": name, "algorithm": algorithm, "seed": seed, "steps": task.steps_of(algorithm), "n_envs": env.num_envs}
    if task.normalize:
        sync_envs_normalization(env, eval_env)
        eval_env.training = eval_env.norm_reward = False
        mean_return, std_return = evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic=True)
    else:
        mean_return, std_return = evaluate_masked(model, eval_env, N_EVAL_EPISODES, deterministic=True)
        row["invalid_actions"] = count_invalid(model, eval_env, env.action_space)
    return {
        **row,
        "n_steps": settings["n_steps"],
        "mean_return": float(mean_return),
        "std_return": float(std_return),
        "cpu_seconds": round(cpu_seconds, 2),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean ± standard deviation over seeds."""
    print(f"{'task':34}{'algorithm':22}{'steps':>7}{'seeds':>6}{'return':>18}{'CPU s':>8}{'invalid':>9}")
    for name, task in TASKS.items():
        for algorithm in task.settings:
            finished = [row for row in rows if (row["task"], row["algorithm"]) == (name, algorithm)]
            if finished:
                returns = np.array([row["mean_return"] for row in finished])
                spread = f"{returns.mean():.2f} ± {returns.std():.2f}"
                seconds = np.mean([row["cpu_seconds"] for row in finished])
                invalid = "" if task.normalize else sum(row["invalid_actions"] for row in finished)
                print(
                    f"{name:34}{algorithm:22}{task.steps_of(algorithm):7}{len(finished):6}{spread:>18}{seconds:8.1f}{invalid:>9}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "siblings.json")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and run nothing")
    args = parser.parse_args()
    th.set_num_threads(1)

    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["task"], row["algorithm"], row["seed"]) for row in rows}
    for seed, name, algorithm in itertools.product(args.seeds, args.tasks, args.algorithms):
        if args.table or algorithm not in TASKS[name].settings or (name, algorithm, seed) in done:
            continue
        row = perform(algorithm, name, seed)
        print(f"{name}, {algorithm}, seed {seed}: {row['mean_return']:.1f} in {row['cpu_seconds']} s", flush=True)
        rows.append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
