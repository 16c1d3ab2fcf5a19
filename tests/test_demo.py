from pathlib import Path

import pytest

from examples.demo import main


def test_demo_trains_evaluates_saves_loads_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two updates do not solve CartPole, and the demo says so by its exit status.
    assert main(["--timesteps", "2048", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "learning_curve.png").stat().st_size > 0
    assert list(tmp_path.glob("*.zip"))
    assert "mean return" in capsys.readouterr().out.lower()
