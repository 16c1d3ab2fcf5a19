"""
Train and compare algorithms over environments and seeds.

``python -m sb3_trpo benchmark --env CartPole-v1 --algo trpo sb3_contrib_trpo ppo --seeds 3`` trains each algorithm with its
published hyperparameters, in parallel processes of one thread each. Finished jobs are not repeated.
"""

import argparse
import importlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import gymnasium as gym
import matplotlib as mpl
import pandas as pd
from gymnasium import spaces
from rl_zoo3 import ALGOS
from rl_zoo3.utils import StoreDict
from tqdm import tqdm

from sb3_trpo.errors import UsageError, did_you_mean
from sb3_trpo.zoo.plots import plot
from sb3_trpo.zoo.report import report
from sb3_trpo.zoo.training import RANDOM, TIANSHOU, TrainingJob, hyperparameters_of, run


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param argv: the arguments, those of the process if ``None``
    :return: the arguments
    """
    parser = argparse.ArgumentParser(prog="sb3_trpo benchmark", description="Train and compare algorithms.")
    parser.add_argument("--env", nargs="+", required=True, help="environment ids")
    parser.add_argument("--algo", nargs="+", default=["trpo", "sb3_contrib_trpo", "ppo"], help=f"RL Zoo's, or {TIANSHOU}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at least 2")
    parser.add_argument("-n", "--n-timesteps", type=int, help="environment steps (default: those of our hyperparameters)")
    parser.add_argument("--n-evaluations", type=int, default=20, help="evaluations per training")
    parser.add_argument("--eval-episodes", type=int, default=10, help="episodes per evaluation")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmark"), help="folder for results, logs, pictures")
    parser.add_argument(
        "--threshold",
        nargs="+",
        action=StoreDict,
        default={},
        help="ENV:RETURN for the time to threshold (default: Gymnasium's)",
    )
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine that does other work")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """
    Check the arguments before any job starts.

    :param arguments: from :func:`parse_arguments`
    :raises UsageError: an argument is invalid
    """
    for env_id in [*arguments.env, *arguments.threshold]:
        if env_id not in gym.registry:
            raise UsageError(f"{env_id}: unknown environment{did_you_mean(env_id, gym.registry)}")
    for name in arguments.algo:
        if name not in {*ALGOS, TIANSHOU}:
            raise UsageError(f"{name}: unknown algorithm{did_you_mean(name, [*ALGOS, TIANSHOU])}")
    for name in ("n_evaluations", "eval_episodes", "jobs"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.seeds < 2:
        raise UsageError(f"--seeds {arguments.seeds}: an interval needs at least 2 runs of each algorithm")
    if TIANSHOU in arguments.algo:
        check_tianshou(arguments.env)


def check_tianshou(env_ids: Sequence[str]) -> None:
    """
    Check that Tianshou's TRPO can run.

    :param env_ids: environment ids
    :raises UsageError: it is not installed, or an environment has observations or actions other than Box
    """
    if find_spec("tianshou") is None:
        raise UsageError(f"{TIANSHOU} needs Tianshou: pip install 'tianshou>=2,<2.1'")
    for env_id in env_ids:
        env = gym.make(env_id)
        if not (isinstance(env.action_space, spaces.Box) and isinstance(env.observation_space, spaces.Box)):
            raise UsageError(f"{TIANSHOU} needs Box observations and actions, and {env_id} has others")
        env.close()


def plan(arguments: argparse.Namespace) -> list[TrainingJob]:
    """
    List the jobs, finished or not.

    :param arguments: from :func:`parse_arguments`
    :return: the jobs, seed by seed, so that all algorithms can be compared early
    """
    jobs = []
    for seed in range(arguments.seeds):
        for env_id in arguments.env:
            n_timesteps = arguments.n_timesteps or int(hyperparameters_of("trpo", env_id)["n_timesteps"])
            for algorithm in [*arguments.algo, *([RANDOM] if seed == 0 else [])]:
                jobs.append(
                    TrainingJob(
                        env=env_id,
                        algorithm=algorithm,
                        seed=seed,
                        n_timesteps=n_timesteps,
                        eval_freq=max(n_timesteps // arguments.n_evaluations, 1),
                        eval_episodes=arguments.eval_episodes,
                        folder=arguments.output / f"seed_{seed}",
                        gym_packages=tuple(arguments.gym_packages),
                    )
                )
    return jobs


def keep_settings(path: Path, jobs: Sequence[TrainingJob]) -> None:
    """
    Check that the folder has no results with other settings.

    :param path: JSON file with the settings of earlier results; written if missing
    :param jobs: the jobs
    :raises UsageError: an environment's settings differ
    """
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for job in jobs:
        new = {"n_timesteps": job.n_timesteps, "eval_freq": job.eval_freq, "eval_episodes": job.eval_episodes}
        old = settings.setdefault(job.env, new)
        if old != new:
            raise UsageError(f"{path.parent} holds results of {job.env} with {old}, not {new}: choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def collect(jobs: Sequence[TrainingJob], path: Path) -> None:
    """
    Concatenate the evaluations of all finished jobs.

    :param jobs: finished or not
    :param path: the CSV file
    """
    frames = [pd.read_csv(job.results) for job in jobs if job.results.exists()]
    temporary = path.with_suffix(".tmp")
    pd.concat(frames, ignore_index=True).to_csv(temporary, index=False)
    temporary.replace(path)


def run_jobs(jobs: Sequence[TrainingJob], n_processes: int, results: Path) -> dict[TrainingJob, BaseException]:
    """
    Run the jobs that are not finished.

    :param jobs: all jobs
    :param n_processes: number of jobs at a time
    :param results: CSV file of all evaluations, updated after each job
    :return: failed jobs and their exceptions
    """
    waiting = [job for job in jobs if not job.results.exists()]
    failed: dict[TrainingJob, BaseException] = {}
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes inherit it
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="training")
    with bar, ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, job): job for job in waiting}
        left = Counter(job.algorithm for job in waiting)
        bar.set_postfix_str(remaining(left))
        for future in as_completed(futures):
            job = futures[future]
            error = future.exception()
            if error is not None:
                failed[job] = error
            else:
                collect(jobs, results)
            left -= Counter([job.algorithm])
            bar.update()
            bar.set_postfix_str(remaining(left))
    return failed


def remaining(left: Counter[str]) -> str:
    """
    Describe the remaining jobs.

    :param left: number of jobs by algorithm
    :return: the description
    """
    return "left: " + (", ".join(f"{count} {name}" for name, count in left.items()) or "nothing")


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    :param argv: its arguments
    :raises UsageError: an argument cannot be used, or a training failed
    """
    arguments = parse_arguments(argv)
    for package in ["rl_zoo3.import_envs", *arguments.gym_packages]:
        importlib.import_module(package)
    check(arguments)
    jobs = plan(arguments)
    keep_settings(arguments.output / "settings.json", jobs)
    results = arguments.output / "results.csv"
    failed = run_jobs(jobs, arguments.jobs, results)
    for job, error in failed.items():
        print(f"{job.algorithm} on {job.env}, seed {job.seed}: {type(error).__name__}: {error}")
    if failed:
        raise UsageError(f"{len(failed)} of {len(jobs)} trainings failed; the same command tries them again")
    collect(jobs, results)
    mpl.use("Agg")
    plot(arguments.output, clock=arguments.clock)
    report(results, arguments.threshold, arguments.clock)
