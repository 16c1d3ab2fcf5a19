from pathlib import Path

import pytest

pytest.importorskip("seaborn", reason="needs the extra [zoo]")

import numpy as np
import pandas as pd
from stable_baselines3.common.env_util import make_vec_env
from torch.utils.tensorboard import SummaryWriter

from sb3_trpo import TRPO
from sb3_trpo.errors import UsageError
from sb3_trpo.zoo import plots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two updates of a run, with SB3's logs."""
    run = tmp_path / "trpo" / "CartPole-v1_1"
    env = make_vec_env("CartPole-v1", 2, seed=0, monitor_dir=str(run))
    TRPO("MlpPolicy", env, n_steps=64, seed=0, tensorboard_log=str(run), target_kl=0.02).learn(3 * 128)
    return tmp_path


def test_updates_are_read_from_the_log(folder: Path) -> None:
    updates = plots.read_updates(folder)
    assert updates["run"].unique() == ["trpo/CartPole-v1_1/TRPO_1"]
    assert list(updates["steps"]) == [256, 384]  # SB3 writes an update's figures after the next rollout
    assert (updates["target_kl"] == np.float32(0.02)).all()
    assert updates["kl"].between(0.001, 0.02).all()


def test_the_logs_of_others_are_left_out(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("train/kl_divergence_loss", 0.01, 1)  # sb3-contrib's: averaged over dimensions, and without its bound
    writer.close()
    assert plots.read_updates(tmp_path).empty


def test_episodes_are_counted_over_all_environments(folder: Path) -> None:
    episodes = plots.read_episodes(folder)
    assert set(episodes["env"]) == {"CartPole-v1"}
    assert episodes["steps"].is_monotonic_increasing
    assert episodes["steps"].iloc[-1] == episodes["return"].sum() <= 3 * 128  # CartPole pays 1 a step
    assert episodes["seconds"].is_monotonic_increasing


def trust_region_updates() -> pd.DataFrame:
    """Updates of three runs in RL Zoo's layout: two seeds of one environment, and another environment."""
    runs = ["seed_0/trpo/CartPole-v1_1/TRPO_1"] * 2 + ["seed_1/trpo/CartPole-v1_1/TRPO_1"] + ["seed_0/npg/Pendulum-v1_2/NPG_1"]
    return pd.DataFrame(
        {
            "run": runs,
            "steps": [10, 20, 10, 30],
            "kl": [0.01, 0.0, 0.02, 0.005],
            "target_kl": [0.02, 0.02, 0.02, 0.01],
            "cg_iterations": [3, 4, 5, 6],
            "backtracks": [0, 10, 1, 0],
            "step_length": [0.5, 0.0, 0.25, 0.1],
        }
    )


def test_describe_runs_reads_environment_and_algorithm_from_the_folders() -> None:
    described = plots.describe_runs(trust_region_updates())
    assert list(described["env"]) == ["CartPole-v1"] * 3 + ["Pendulum-v1"]
    assert list(described["algorithm"]) == ["TRPO (sb3_trpo)"] * 3 + ["NPG (sb3_trpo)"]
    assert list(described["update"]) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("run", "env", "algorithm"),
    [("trpo/Hopper-v5_3", "Hopper-v5", "TRPO (sb3_trpo)"), ("CartPole-v1_1", "CartPole-v1", "TRPO"), ("TRPO_1", "", "TRPO_1")],
)
def test_describe_runs_knows_other_layouts(run: str, env: str, algorithm: str) -> None:
    described = plots.describe_runs(pd.DataFrame({"run": [run]}))
    assert (described["env"][0], described["algorithm"][0]) == (env, algorithm)


def test_draw_trust_region_has_a_column_for_each_environment_with_mean_and_range() -> None:
    figure = plots.draw_trust_region(trust_region_updates())
    assert len(figure.axes) == 4 * 2
    kl, kl_of_one_run = figure.axes[:2]
    mean, target = kl.lines
    assert list(mean.get_xdata()) == [10, 20]
    assert list(mean.get_ydata()) == pytest.approx([0.015, 0.0])
    assert list(target.get_ydata()) == [0.02, 0.02]
    (band,) = kl.collections
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(0.02)
    assert [list(line.get_ydata()) for line in kl_of_one_run.lines] == [[0.005], [0.01]]
    assert not kl_of_one_run.collections
    assert figure.axes[4].get_ylim()[0] < 0  # points at zero backtracks are not cut
    assert figure.axes[6].get_yscale() == "log"
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["CartPole-v1", "Pendulum-v1"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["TRPO (sb3_trpo)", "NPG (sb3_trpo)", "δ (target_kl)"]
    assert figure.legends[0].get_title().get_text() == "mean and range of 2 runs"


def test_draw_learning_shows_evaluations_and_names_the_window(folder: Path) -> None:
    run = folder / "trpo" / "CartPole-v1_1"
    np.savez(run / "evaluations.npz", timesteps=[128, 256], results=[[1.0, 3.0], [5.0, 7.0]])
    evaluations = plots.read_evaluations(folder)
    assert list(evaluations["return"]) == [2.0, 6.0]
    figure = plots.draw_learning(plots.read_episodes(folder), evaluations)
    steps, seconds = figure.axes
    assert [2.0, 6.0] in [list(line.get_ydata()) for line in steps.lines]
    assert steps.get_title("left") == "CartPole-v1"
    assert not seconds.get_title("left")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "training episode"
    assert labels[1].startswith("mean of the last ")
    assert labels[2] == "evaluation, deterministic policy"


def test_learning_curves_show_each_environment_against_steps_and_seconds() -> None:
    rows = [
        {
            "env": env,
            "algorithm": name,
            "seed": seed,
            "steps": steps,
            "seconds": steps / 10 + seed,
            "mean_return": steps + seed,
        }
        for env in ("CartPole-v1", "Pendulum-v1")
        for name in ("trpo", "ppo")
        for seed in (0, 2)
        for steps in (100, 200)
    ]
    figure = plots.compare_learning(pd.DataFrame(rows))
    assert len(figure.axes) == 4
    for row in range(2):
        steps, seconds = figure.axes[2 * row : 2 * row + 2]
        for axes, x in ((steps, [100, 200]), (seconds, [11, 21])):  # seconds: mean over the seeds
            lines = [line for line in axes.lines if len(line.get_xdata())]
            assert [list(line.get_xdata()) for line in lines] == [x, x]
            assert [list(line.get_ydata()) for line in lines] == [[101, 201], [101, 201]]


def test_pictures_of_a_folder_and_of_a_results_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = plots.plot(folder, tmp_path / "pictures")
    assert [path.name for path in pictures] == ["learning_curves", "trust_region"]
    assert all(path.with_suffix(ending).stat().st_size > 0 for path in pictures for ending in (".png", ".svg"))
    assert "δ (target_kl)" in (tmp_path / "pictures" / "trust_region.svg").read_text(encoding="utf-8")
    assert str(tmp_path / "pictures" / "learning_curves.png") in capsys.readouterr().out

    rows = {
        "env": "CartPole-v1",
        "algorithm": "trpo",
        "seed": [0, 1],
        "steps": 100,
        "seconds": 1.0,
        "cpu_seconds": 0.5,
        "mean_return": [9.0, 11.0],
    }
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    assert plots.plot(tmp_path / "results.csv") == [tmp_path / "learning_curves"]
    assert list(plots.read_results(tmp_path / "results.csv")["seconds"]) == [1.0, 1.0]
    assert list(plots.read_results(tmp_path / "results.csv", clock="cpu")["seconds"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a results file"),
        ("a,b\n1,2\n", "it has no column env, algorithm, seed, steps, seconds, cpu_seconds, mean_return"),
        ("env,algorithm,seed,steps,seconds,cpu_seconds,mean_return\n", "no results in it yet"),
    ],
)
def test_a_file_without_results_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        plots.plot(path)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results there"):
        plots.plot(tmp_path)
