"""The commands, from training to a GIF, and what they say to bad input."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from sb3_trpo import __main__ as command_line
from sb3_trpo import __version__

with_zoo = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs the extra [zoo]")
TINY = ["--hyperparams", "n_envs:1", "n_steps:32", "batch_size:32"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a folder of its own; give the exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sb3_trpo"])

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = command_line.main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capfd.readouterr()

    return call


def test_help_and_version(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in command_line.COMMANDS)
    assert run("--version") == (0, f"{__version__}\n", "")


@with_zoo
def test_from_training_to_a_gif(run: Run, tmp_path: Path) -> None:
    train = ["train", "--env", "CartPole-v1", "--seed", "0", "--eval-freq", "32", "--eval-episodes", "1", *TINY, "-n"]
    status, out, err = run(*train, "96")
    assert status == 0, err
    first = tmp_path / "logs" / "trpo" / "CartPole-v1_1"
    assert "zoo_hyperparams/trpo.yml" in out
    assert (first / "CartPole-v1.zip").exists()

    status, out, err = run(*train, "64", "--trained-agent", str(first / "CartPole-v1.zip"))
    assert status == 0, err
    assert "Loading pretrained agent" in out
    assert (tmp_path / "logs" / "trpo" / "CartPole-v1_2" / "CartPole-v1.zip").exists()

    status, out, err = run("enjoy", "--env", "CartPole-v1", "--no-render", "-n", "200")
    assert status == 0, err
    assert "Mean reward" in out

    status, out, err = run("record-video", "--env", "CartPole-v1", "--exp-id", "1", "-n", "10")
    assert status == 0, err
    (video,) = (first / "videos").glob("*.mp4")
    status, out, err = run("gif", str(video), "--width", "100")
    assert status == 0, err
    assert video.with_suffix(".gif").read_bytes().startswith(b"GIF8")

    status, out, err = run("plot", str(first))
    assert status == 0, err
    pictures = {path.name for path in first.iterdir() if path.suffix in {".png", ".svg"}}
    assert pictures == {"learning_curves.png", "learning_curves.svg", "trust_region.png", "trust_region.svg"}


@with_zoo
def test_optimize(run: Run, tmp_path: Path) -> None:
    budget = ["-n", "64", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--n-startup-trials", "1"]
    status, out, err = run("optimize", "--env", "CartPole-v1", "--seed", "1", "--no-optim-plots", *budget)
    assert status == 0, err
    assert "Number of finished trials:  2" in out
    assert list((tmp_path / "logs" / "trpo").glob("report_CartPole-v1*.csv"))


@with_zoo
def test_the_zoos_own_algorithms_and_plots_are_there(run: Run) -> None:
    assert run("train", "--algo", "a2c", "--env", "CartPole-v1", "-n", "16", "--eval-freq", "-1")[0] == 0
    status, out, _ = run("all-plots", "--algos", "a2c", "--env", "CartPole", "--exp-folders", "logs", "--no-display")
    assert status == 0
    assert "results_table" in out  # --env is part of a folder's name there


@with_zoo
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --env CartPole-v11", "CartPole-v11: unknown environment; did you mean 'CartPole-v1'?"),
        ("enjoy --env CartPol-v1", "CartPol-v1: unknown environment; did you mean 'CartPole-v1'?"),
        ("train --env CartPole-v1 --conf-file no.yml", "no.yml: cannot be read"),
        ("train --env CartPole-v1 --conf-file broken.yml", "broken.yml, line 2: not valid YAML"),
        ("train --env CartPole-v1 --conf-file misspelt.yml", "misspelt.yml, line 4: unknown hyperparameter 'target_kll'"),
        ("train --env CartPole-v1 --hyperparams gamma:2", "--hyperparams: gamma=2 is not allowed"),
        ("train --env CartPole-v1 --trained-agent no.zip", "The trained_agent must be a valid path"),
        ("enjoy --env CartPole-v1", "The logs/trpo folder was not found"),
        ("record-video --env CartPole-v1", "The logs/trpo folder was not found"),
        ("gif no.mp4", "no.mp4: no such video"),
        ("plot .", "no results there"),
        ("plot no", "no: no such file or folder"),
        ("convert no.yml", "no.yml: cannot be read"),
        ("benchmark --env CartPole-v11", "CartPole-v11: unknown environment"),
        ("benchmark --env CartPole-v1 --seeds 1", "an interval needs at least 2 runs"),
        ("benchmark --env CartPole-v1 --algo trop", "trop: unknown algorithm; did you mean 'trpo'?"),
        ("benchmark --env CartPole-v1 --jobs 0", "--jobs 0: must be at least 1"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(run: Run, tmp_path: Path, arguments: str, words: str) -> None:
    (tmp_path / "broken.yml").write_text("CartPole-v1: {n_timesteps: 1\npolicy: x")
    (tmp_path / "misspelt.yml").write_text("CartPole-v1:\n  n_timesteps: 1\n  policy: MlpPolicy\n  target_kll: 1\n")
    status, _, err = run(*arguments.split())
    assert status == 2
    assert words in err
    assert f"sb3_trpo {arguments.split()[0]}: error: " in err
    assert "Traceback" not in err


def test_an_unknown_command_is_refused(run: Run) -> None:
    status, _, err = run("tran")
    assert status == 2
    assert "invalid choice: 'tran'" in err


def test_without_the_extra_the_commands_say_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3.import_envs", None)
    status, _, err = run("train", "--env", "CartPole-v1")
    assert status == 2
    assert "pip install 'sb3_trpo[zoo]'" in err


def test_other_errors_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setitem(command_line.COMMANDS, "train", command_line.Command(broken, ""))
    with pytest.raises(ValueError, match="a fault of ours"):
        run("train")
