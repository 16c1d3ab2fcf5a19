"""The commands behind the committed figures import."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
OPTIONAL = {"rliable", "tianshou", "rl_zoo3", "pandas", "matplotlib", "yaml", "optuna", "mujoco"}


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_script_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    finally:
        for module in FOLDER.glob("*.py"):
            sys.modules.pop(module.stem, None)
