import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

pytest.importorskip("yaml", reason="needs the extra [zoo]")

from sb3_trpo import TRPO
from sb3_trpo.errors import UsageError
from sb3_trpo.zoo import hyperparameters

ROOT = Path(__file__).parents[2]
FILE = """\
default:
  policy: MlpPolicy
Hopper-v5: &mujoco
  policy: MlpPolicy
  n_steps: 1024
  target_kl: 0.03
Ant-v5:
  <<: *mujoco
  target_kl: 0.08
"""


def test_entries_are_read_with_anchors(tmp_path: Path) -> None:
    path = tmp_path / "trpo.yml"
    path.write_text(FILE)
    assert hyperparameters.read(path)["Ant-v5"] == {"policy": "MlpPolicy", "n_steps": 1024, "target_kl": 0.08}


def test_lines_are_those_of_the_entry_or_of_its_anchor(tmp_path: Path) -> None:
    path = tmp_path / "trpo.yml"
    path.write_text(FILE)
    assert hyperparameters.lines(path, "Ant-v5") == {"policy": 4, "n_steps": 5, "target_kl": 9}
    assert hyperparameters.lines(path, "Swimmer-v5") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ant-v5: [1,\nHopper-v5: 2", "line 2: not valid YAML"),
        ("- Ant-v5", "must map environment ids to hyperparameters"),
        ("Ant-v5: 3", "Ant-v5 must be a mapping of hyperparameters, and is 3"),
        ("", "must map environment ids to hyperparameters"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trpo.yml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        hyperparameters.read(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.yml: cannot be read: No such file"):
        hyperparameters.read(tmp_path / "no.yml")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"target_kll": 0.1}, "here: unknown hyperparameter 'target_kll' of TRPO; did you mean 'target_kl'?"),
        ({"seed": 1}, "here: unknown hyperparameter 'seed' of TRPO"),  # the zoo gives it, on the command line
        ({"cg_damping": -1.0}, "here: cg_damping=-1.0 is not allowed"),
        ({"target_kl": "lin_"}, "here: target_kl='lin_' is not allowed"),
        ({"n_steps": "lin_5"}, "here: n_steps='lin_5' is not allowed"),
    ],
)
def test_wrong_names_and_values_are_refused_with_their_place(entry: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as error:
        hyperparameters.check(TRPO, entry, dict.fromkeys(entry, "here"))
    assert str(error.value).startswith(words)


def test_what_the_zoo_and_the_constructor_know_is_accepted() -> None:
    entry = {"n_envs": 2, "normalize": True, "n_timesteps": 1e6, "policy": "MlpPolicy", "target_kl": "lin_0.1", "gamma": 0.9}
    hyperparameters.check(TRPO, entry, {})


@pytest.mark.skipif(find_spec("pip") is None, reason="builds a wheel with pip")
def test_an_installed_wheel_has_the_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("sb3_trpo", "zoo_hyperparams"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        (scripts,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "sb3_trpo = sb3_trpo.__main__:main" in archive.read(scripts).decode()
    command = (
        "import sys; sys.path.insert(0, '.'); from sb3_trpo.zoo.hyperparameters import folder; print(*folder().glob('*.yml'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path / "installed", check=True, capture_output=True, text=True, env={}
    ).stdout
    assert {Path(path).name for path in found.split()} == {path.name for path in (ROOT / "zoo_hyperparams").glob("*.yml")}
    assert all("installed/sb3_trpo/zoo_hyperparams" in path for path in found.split())
