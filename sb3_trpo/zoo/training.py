"""One training job of a benchmark: an algorithm of RL Zoo, Tianshou's TRPO, or random actions."""

import argparse
import contextlib
import importlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization
from torch.utils.tensorboard import SummaryWriter

from sb3_trpo.zoo import tianshou_peer
from sb3_trpo.zoo.hyperparameters import read
from sb3_trpo.zoo.registration import ALGORITHMS, PEERS, ZOO_CONFIGS

#: Tianshou's TRPO, if it is installed, and random actions, the zero of normalized scores.
TIANSHOU, RANDOM = "tianshou_trpo", "random"


Clocks = Callable[[], np.ndarray]


def wall_and_cpu_seconds() -> np.ndarray:
    """Return wall and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class TrainingJob(NamedTuple):
    """
    One training job.

    :param env: environment id
    :param algorithm: name on the command line
    :param seed: seed of environments, networks and minibatches
    :param n_timesteps: environment steps
    :param eval_freq: environment steps between evaluations
    :param eval_episodes: episodes per evaluation
    :param folder: folder for the runs of this seed, in RL Zoo's layout
    :param gym_packages: packages that register environments
    """

    env: str
    algorithm: str
    seed: int
    n_timesteps: int
    eval_freq: int
    eval_episodes: int
    folder: Path
    gym_packages: tuple[str, ...]

    @property
    def run_folder(self) -> Path:
        """Folder of this job, named as RL Zoo does."""
        return self.folder / self.algorithm / f"{self.env.replace('/', '-')}_1"

    @property
    def results(self) -> Path:
        """File of the evaluations, written at the end: the job is finished if it exists."""
        return self.run_folder / "evaluations.csv"


class EvaluationLog:
    """
    Evaluations of one job, with the training time at which they ran, excluding evaluation.

    :param job: the job
    :param clocks: gives wall and CPU seconds
    """

    def __init__(self, job: TrainingJob, clocks: Clocks = wall_and_cpu_seconds) -> None:
        self.job, self._clocks = job, clocks
        self.rows: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Start the clocks."""
        self._started = self._clocks()

    def evaluate(self, steps: int, evaluation: Callable[[], Sequence[float] | np.ndarray]) -> None:
        """
        Evaluate and store the returns.

        :param steps: environment steps trained so far
        :param evaluation: returns the return of each episode
        """
        stopped = self._clocks()
        seconds, cpu_seconds = stopped - self._started
        returns = evaluation()
        self.rows.append(
            {
                "env": self.job.env,
                "algorithm": self.job.algorithm,
                "seed": self.job.seed,
                "steps": steps,
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                "mean_return": float(np.mean(returns)),
                "std_return": float(np.std(returns)),
                "episodes": len(returns),
            }
        )
        self._started += self._clocks() - stopped


class Evaluation(BaseCallback):
    """Evaluate the deterministic policy at even intervals, as SB3's ``EvalCallback`` does, and record the training time."""

    def __init__(self, log: EvaluationLog, env: VecEnv, eval_freq: int) -> None:
        """
        Initialize the callback.

        :param log: log for the evaluations
        :param env: evaluation environment, normalized if the training environment is
        :param eval_freq: calls between evaluations
        """
        super().__init__()
        self.log, self.env, self.eval_freq = log, env, eval_freq

    def _on_training_start(self) -> None:
        self.log.start()

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0:
            self.log.evaluate(self.num_timesteps, self._evaluate)
            self.logger.record("eval/mean_reward", self.log.rows[-1]["mean_return"])
        return True

    def _evaluate(self) -> list[float]:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.env)
        returns, _ = evaluate_policy(self.model, self.env, self.log.job.eval_episodes, return_episode_rewards=True, warn=False)
        assert isinstance(returns, list)
        return returns


def hyperparameters_of(algorithm: str, env_id: str) -> dict[str, Any]:
    """
    Look up an algorithm's published hyperparameters.

    :param algorithm: name in RL Zoo, with this package's algorithms registered
    :param env_id: environment id
    :return: the entry of the environment, else of Atari, of another version (``-v4`` for ``-v5``), or the default
    :raises UsageError: the file cannot be read
    """
    known = ALGORITHMS | PEERS
    entries = read(known[algorithm].config if algorithm in known else ZOO_CONFIGS / f"{algorithm}.yml")
    if env_id in entries:
        return entries[env_id]
    if ExperimentManager.is_atari(env_id):
        return entries["atari"]
    name = env_id.rpartition("-v")[0]
    return next((entry for other, entry in entries.items() if other.rpartition("-v")[0] == name), entries["default"])


def run(job: TrainingJob) -> TrainingJob:
    """
    Train and write the evaluations to ``job.results``. Remove the files of an interrupted run first.

    :param job: the job
    :return: the job
    """
    th.set_num_threads(1)
    for package in ["rl_zoo3.import_envs", *job.gym_packages]:
        importlib.import_module(package)
    shutil.rmtree(job.run_folder, ignore_errors=True)
    job.run_folder.parent.mkdir(parents=True, exist_ok=True)
    set_random_seed(job.seed)
    log = EvaluationLog(job)
    trainings = {TIANSHOU: train_tianshou, RANDOM: act_at_random}
    output = job.run_folder.parent / f"{job.run_folder.name}.log"
    with output.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        trainings.get(job.algorithm, train_zoo)(job, log)
    job.run_folder.mkdir(parents=True, exist_ok=True)
    rows = job.results.with_suffix(".tmp")
    pd.DataFrame(log.rows).to_csv(rows, index=False)
    rows.replace(job.results)
    return job


def train_zoo(job: TrainingJob, log: EvaluationLog) -> None:
    """
    Train an algorithm of RL Zoo as ``rl_zoo3.train`` does.

    :param job: the job
    :param log: log for the evaluations
    """
    config = job.run_folder.parent / f"{job.run_folder.name}.yml"
    config.write_text(yaml.safe_dump({job.env: hyperparameters_of(job.algorithm, job.env)}), encoding="utf-8")
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in job._asdict().items()}
    manager = ExperimentManager(
        argparse.Namespace(**plain, conf_file=str(config), env_kwargs=None),
        job.algorithm,
        job.env,
        str(job.folder),
        n_timesteps=job.n_timesteps,
        eval_freq=-1,
        log_interval=-1,
        seed=job.seed,
        verbose=0,
        device="cpu",
        config=str(config),
    )
    manager.tensorboard_log = manager.save_path
    experiment = manager.setup_experiment()
    assert experiment is not None
    model, _ = experiment
    env = manager.create_envs(1, eval_env=True)
    env.seed(job.seed + 1_000)
    manager.callbacks.append(Evaluation(log, env, max(job.eval_freq // manager.n_envs, 1)))
    manager.learn(model)
    manager.save_trained_model(model)


def train_tianshou(job: TrainingJob, log: EvaluationLog) -> None:
    """
    Train Tianshou's TRPO.

    :param job: the job
    :param log: log for the evaluations
    """
    writer = SummaryWriter(str(job.run_folder))

    def after_update(steps: int, evaluate: Callable[[], np.ndarray]) -> None:
        if len(log.rows) < steps // job.eval_freq:
            log.evaluate(steps, evaluate)
            writer.add_scalar("eval/mean_reward", log.rows[-1]["mean_return"], steps)

    tianshou_peer.train(job.env, job.seed, job.n_timesteps, job.eval_episodes, after_update)
    writer.close()


def act_at_random(job: TrainingJob, log: EvaluationLog) -> None:
    """
    Take random actions.

    :param job: the job
    :param log: log for the only row, at step 0
    """
    env = gym.make(job.env)
    env.action_space.seed(job.seed)

    def play(episode: int) -> float:
        env.reset(seed=job.seed + 1_000 + episode)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            done = terminated or truncated
        return total

    log.evaluate(0, lambda: [play(episode) for episode in range(job.eval_episodes)])
    env.close()
