"""What the scripts in benchmarks/ share, and the results that are committed with them."""

import csv
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STUDIES = ("spaces", "pixels", "options", "recurrent", "maskable", "critic")


#: Packages that some scripts need and not every installation has.
OPTIONAL = {"rliable", "ale_py", "minigrid", "cv2", "tianshou", "rl_zoo3", "pandas", "matplotlib", "yaml", "optuna", "mujoco"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script by its name; skips the test where a package is missing that not every installation has."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def import_script(name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
            pytest.skip(f"needs {error.name}")

    yield import_script
    for name in {script.stem for script in BENCHMARKS.glob("*.py")} - {"envs"}:  # envs registers its tasks once
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_script_imports(load: Any, name: str) -> None:
    load(name)


@pytest.mark.parametrize("name", STUDIES)
def test_committed_rows_are_runs_of_their_study(load: Any, name: str) -> None:
    cases = load("studies").STUDIES[name]()
    with (BENCHMARKS / "results" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = [(row["cell"], row["env"], int(row["steps"])) for row in rows]
    assert set(runs) == {(cell, env, case.steps) for (cell, env), case in cases.items()}
    assert len({(run, row["seed"]) for run, row in zip(runs, rows, strict=True)}) == len(rows)


@pytest.mark.parametrize(
    ("name", "cell"), [("maskable", "MaskableTRPO"), ("recurrent", "RecurrentTRPO"), ("pixels", "sb3_trpo, shared")]
)
def test_compare_writes_a_row_for_a_run(
    load: Any, name: str, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, studies = load("compare"), load("studies")
    env = {"maskable": "Placement-v0", "recurrent": "Recall-v0", "pixels": "Catch-v0"}[name]
    case = studies.STUDIES[name]()[cell, env]
    small = case._replace(settings={**case.settings, "n_steps": 16}, n_envs=2, n_eval_episodes=2)
    monkeypatch.setitem(studies.STUDIES, name, lambda: {(cell, env): small})
    monkeypatch.setattr(compare, "N_SAMPLED", 20)
    out = tmp_path / "rows.csv"
    arguments = ["compare.py", name, "--seeds", "0", "--steps", "32", "--out", str(out)]
    for _ in range(2):  # the second time there is nothing left to run
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit, match=r"^False$"):
            compare.main()
    with out.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["cell"], row["env"], row["seed"], row["steps"]) == (cell, env, "0", "32")
    assert row["invalid_actions"] == ("0" if name == "maskable" else "")
    assert np.isfinite([float(row[key]) for key in ("final_return", "cpu_seconds", "explained_variance")]).all()
    assert "0 runs are missing" in capsys.readouterr().out


def test_interquartile_means_are_those_of_rliable(load: Any) -> None:
    pytest.importorskip("rliable")
    scores = {"a": np.arange(8.0).reshape(4, 2), "b": np.ones((4, 2))}
    means = load("study").interquartile_means(scores)
    assert means["a"][0] == pytest.approx(3.5)  # of 2, 3, 4, 5
    assert means["a"][1] < 3.5 < means["a"][2]
    assert means["b"] == (1.0, 1.0, 1.0)


def test_alternate_calls_in_turn_and_drops_the_warm_up(load: Any) -> None:
    calls: list[str] = []

    def contender(name: str) -> Any:
        return lambda: calls.append(name) or len(calls)

    samples = load("timing").alternate({"a": contender("a"), "b": contender("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert samples == {"a": [3, 5], "b": [4, 6]}
    assert load("timing").medians([{"x": 1.0}, {"x": 5.0}, {"x": 2.0}]) == {"x": 2.0}
