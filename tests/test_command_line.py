"""The commands, from training to a GIF, and what they say to bad input."""

import ast
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import sb3_trpo
from sb3_trpo import __main__ as command_line
from sb3_trpo import __version__
from sb3_trpo.errors import UsageError

with_zoo = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs the extra [zoo]")
TINY = ["--hyperparams", "n_envs:1", "n_steps:32"]

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


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, _ = run(*arguments)
    assert status == 0
    assert all(name in out for name in command_line.COMMANDS)


def test_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")


def test_help_imports_neither_torch_nor_gymnasium() -> None:
    script = (
        "import sys\nfrom sb3_trpo.__main__ import main\nmain([])\n"
        "print({'torch', 'gymnasium', 'stable_baselines3'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "set()"


def test_public_names_are_those_listed() -> None:
    assert dir(sb3_trpo) == sorted(sb3_trpo.__all__)
    assert all(getattr(sb3_trpo, name) is not None for name in sb3_trpo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trop'"):
        sb3_trpo.trop  # noqa: B018


def test_public_names_are_known_to_type_checkers() -> None:
    tree = ast.parse(Path(sb3_trpo.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    typed = {alias.asname: node.module for node in imports for alias in node.names if alias.asname}
    assert typed == {name: f"sb3_trpo.{module}" for name, module in sb3_trpo._MODULES.items()}


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


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs, of which the second has models, and the others have none, as after ``optimize``."""
    folder = tmp_path / "logs" / "trpo"
    for number in (1, 2, 10):
        (folder / f"CartPole-v1_{number}").mkdir(parents=True)
    for name in ("CartPole-v1", "best_model", "rl_model_64_steps"):
        (folder / "CartPole-v1_2" / f"{name}.zip").touch()
    return tmp_path / "logs"


@with_zoo
@pytest.mark.parametrize("model", [[], ["--load-best"], ["--load-checkpoint", "64"], ["--load-last-checkpoint"]])
def test_find_run_takes_the_latest_with_a_model(runs: Path, model: list[str]) -> None:
    from sb3_trpo.zoo.commands import find_run

    arguments = ["--folder", str(runs), *model]
    assert find_run(arguments) == [*arguments, "--exp-id", "2"]
    assert find_run([*arguments, "--exp-id", "2"]) == [*arguments, "--exp-id", "2"]
    with pytest.raises(UsageError, match=r"--exp-id 10: no model .*; --exp-id 2 would do"):
        find_run([*arguments, "--exp-id", "10"])


@with_zoo
def test_find_run_refuses_a_folder_without_a_model(runs: Path) -> None:
    from sb3_trpo.zoo.commands import find_run

    with pytest.raises(UsageError, match=r"no model of trpo on CartPole-v1 in .*trpo: train one first"):
        find_run(["--folder", str(runs), "--load-checkpoint", "65"])


@with_zoo
@pytest.mark.parametrize(
    ("arguments", "terminal", "shown"),
    [
        (["-n", "10"], True, True),
        (["-n", "10"], False, False),
        (["-n", "10", "--no-progress"], True, False),
        (["-n", "10", "-P"], False, True),
    ],
)
def test_train_shows_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], terminal: bool, shown: bool
) -> None:
    from sb3_trpo.zoo.commands import show_progress

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    complete = show_progress(arguments)
    assert ("--progress" in complete or "-P" in complete) == shown
    assert "--no-progress" not in complete


@with_zoo
def test_train_without_env_says_which_it_takes(run: Run) -> None:
    status, _, err = run("train", "-n", "32", "--eval-freq", "-1", *TINY)
    assert status == 0, err
    assert "no --env given: CartPole-v1" in err


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
        ("train --algo tpro --env CartPole-v1", "--algo tpro: unknown algorithm; did you mean 'trpo'? (known: a2c, ars, "),
        ("enjoy --env CartPole-v1", "no model of trpo on CartPole-v1 in logs/trpo: train one first"),
        ("enjoy --env CartPole-v1 --exp-id -1", "The logs/trpo folder was not found"),
        ("record-video --env CartPole-v1", "no model of trpo on CartPole-v1 in logs/trpo: train one first"),
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
    assert "pip install '.[zoo]'" in err


def test_other_errors_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setitem(command_line.COMMANDS, "train", command_line.Command(broken, ""))
    with pytest.raises(ValueError, match="a fault of ours"):
        run("train")
