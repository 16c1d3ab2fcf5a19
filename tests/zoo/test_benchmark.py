import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rl_zoo3", reason="needs the extra [zoo]")
pytest.importorskip("rliable", reason="needs the extra [zoo]")

import numpy as np
import pandas as pd
import rl_zoo3.import_envs  # noqa: F401
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO
from sb3_trpo.errors import UsageError
from sb3_trpo.zoo import benchmark
from sb3_trpo.zoo import report as compare
from sb3_trpo.zoo import training as jobs


def job(folder: Path, algorithm: str = "trpo", **changes: Any) -> jobs.TrainingJob:
    settings = {"env": "CartPole-v1", "algorithm": algorithm, "seed": 0, "n_timesteps": 1024, "eval_freq": 512}
    return jobs.TrainingJob(**{**settings, "eval_episodes": 2, "folder": folder, "gym_packages": (), **changes})


@pytest.fixture(autouse=True)
def _few_bootstrap_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "N_BOOTSTRAP", 100)


def arguments(folder: Path, *more: str) -> Any:
    return benchmark.parse_arguments(["--env", "CartPole-v1", "--output", str(folder), *more])


def test_evaluation_log_excludes_the_time_of_evaluations(tmp_path: Path) -> None:
    now = np.zeros(2)
    record = jobs.EvaluationLog(job(tmp_path), lambda: now.copy())

    def evaluate() -> list[float]:
        now[:] += 100
        return [1.0, 3.0]

    now[:] += [3, 2]
    record.evaluate(10, evaluate)
    now[:] += [4, 1]
    record.evaluate(20, evaluate)
    assert [(row["seconds"], row["cpu_seconds"]) for row in record.rows] == [(3, 2), (7, 3)]
    assert [(row["steps"], row["mean_return"], row["std_return"], row["episodes"]) for row in record.rows] == [
        (10, 2.0, 1.0, 2),
        (20, 2.0, 1.0, 2),
    ]


@pytest.mark.parametrize("algorithm", ["trpo", "sb3_contrib_trpo", "ppo"])
def test_every_algorithm_is_trained_and_recorded_alike(tmp_path: Path, algorithm: str) -> None:
    done = jobs.run(job(tmp_path, algorithm))
    rows = pd.read_csv(done.results)
    assert list(rows["steps"]) == [512, 1024]
    assert set(rows["algorithm"]) == {algorithm}
    assert rows["mean_return"].between(8, 500).all()
    assert rows["seconds"].is_monotonic_increasing
    assert (done.run_folder / "CartPole-v1.zip").exists()
    assert list(done.run_folder.rglob("events.out.tfevents.*"))


def test_evaluations_see_the_running_normalisation(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 1, seed=0))
    held_out = VecNormalize(make_vec_env("CartPole-v1", 1, seed=1), training=False, norm_reward=False)
    record = jobs.EvaluationLog(job(tmp_path))
    TRPO("MlpPolicy", env, n_steps=64).learn(128, callback=jobs.Evaluation(record, held_out, 64))
    assert [row["steps"] for row in record.rows] == [64, 128]
    assert env.obs_rms.count > 128
    np.testing.assert_array_equal(held_out.obs_rms.mean, env.obs_rms.mean)


def test_normalized_runs_record_raw_returns(tmp_path: Path) -> None:
    done = jobs.run(job(tmp_path, env="MountainCar-v0", n_timesteps=2048, eval_freq=2048))
    assert (done.run_folder / "MountainCar-v0" / "vecnormalize.pkl").exists()
    assert list(pd.read_csv(done.results)["mean_return"]) == [-200.0]


def test_random_actions_are_the_zero_of_scores(tmp_path: Path) -> None:
    rows = pd.read_csv(jobs.run(job(tmp_path, "random", eval_episodes=30)).results)
    assert list(rows["steps"]) == [0]
    assert rows["mean_return"].between(15, 30).all()  # CartPole falls after some 22 steps


@pytest.mark.skipif(find_spec("tianshou") is None, reason="needs tianshou, which is no dependency")
def test_tianshou_is_recorded_alike(tmp_path: Path) -> None:
    done = jobs.run(job(tmp_path, "tianshou_trpo", env="Pendulum-v1", n_timesteps=2048, eval_freq=1024))
    rows = pd.read_csv(done.results)
    assert list(rows["steps"]) == [1024, 2048]
    assert rows["mean_return"].between(-2000, -100).all()


def test_hyperparameters_are_those_of_the_files() -> None:
    ours = jobs.hyperparameters_of("trpo", "HalfCheetah-v5")
    theirs = jobs.hyperparameters_of("sb3_contrib_trpo", "HalfCheetah-v5")  # the zoo has HalfCheetah-v4
    assert (ours["target_kl"], theirs["target_kl"]) == (0.03, 0.04)
    assert "clip_range" in jobs.hyperparameters_of("ppo", "HalfCheetah-v5")
    assert jobs.hyperparameters_of("trpo", "HalfCheetah-v5") == jobs.hyperparameters_of("trpo", "Reacher-v5")


def test_the_plan_goes_seed_by_seed_with_random_actions_once(tmp_path: Path) -> None:
    planned = benchmark.plan(arguments(tmp_path, "--algo", "trpo", "ppo", "--seeds", "2", "--n-evaluations", "4"))
    assert [(one.seed, one.algorithm) for one in planned] == [(0, "trpo"), (0, "ppo"), (0, "random"), (1, "trpo"), (1, "ppo")]
    assert {(one.n_timesteps, one.eval_freq) for one in planned} == {(100_000, 25_000)}
    assert len({one.results for one in planned}) == len(planned)


def test_settings_are_not_mixed_in_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    benchmark.keep_settings(path, [job(tmp_path)])
    benchmark.keep_settings(path, [job(tmp_path), job(tmp_path, env="Pendulum-v1", n_timesteps=5)])
    with pytest.raises(UsageError, match=r"holds results of CartPole-v1 with .*1024.* not .*2048.*choose another --output"):
        benchmark.keep_settings(path, [job(tmp_path, n_timesteps=2048)])


def test_what_is_left_is_said() -> None:
    assert benchmark.remaining(benchmark.Counter(["trpo", "ppo", "trpo"])) == "left: 2 trpo, 1 ppo"
    assert benchmark.remaining(benchmark.Counter()) == "left: nothing"


def test_from_the_command_to_tables_and_pictures_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["-n", "1024", "--n-evaluations", "1", "--eval-episodes", "2", "--seeds", "2", "--jobs", "1"]
    command = ["--env", "CartPole-v1", "--algo", "trpo", *short, "--output", str(tmp_path)]
    with contextlib.suppress(UsageError):  # one update may not do better than random actions, which the report refuses
        benchmark.main(command)
    results = pd.read_csv(tmp_path / "results.csv")
    assert sorted(zip(results["algorithm"], results["seed"], results["steps"], strict=True)) == [
        ("random", 0, 0),
        ("trpo", 0, 1024),
        ("trpo", 1, 1024),
    ]
    assert (tmp_path / "learning_curves.png").exists()

    planned = benchmark.plan(benchmark.parse_arguments(command))
    written = {one.results: one.results.stat().st_mtime_ns for one in planned}
    planned[1].results.unlink()  # one is lost, and is done again; the others are kept
    assert benchmark.run_jobs(planned, 1, tmp_path / "results.csv") == {}
    again = {path for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert again == {planned[1].results}
    assert "left: 1 " in capsys.readouterr().err


def test_a_training_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    planned = [job(tmp_path, "random", env="CartPole-v77"), job(tmp_path, "random")]
    failed = benchmark.run_jobs(planned, 1, tmp_path / "results.csv")
    assert list(failed) == planned[:1]
    assert planned[1].results.exists()
