"""The trained agents in benchmarks/results/agents/, and the example that shows them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from examples.watch import AGENTS, load_agent, play, write_gif

RETURNS = AGENTS.parent / "returns.csv"
FOLDERS = sorted(path.parent for path in AGENTS.glob("*/model.zip"))


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_agent_has_the_score_of_its_run(folder: Path) -> None:
    score = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    with RETURNS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["cell"], row["env"]) == (score["cell"], folder.name)]
    (row,) = [row for row in rows if row["seed"] == str(score["seed"])]
    assert score["final_return"] == float(row["final_return"])
    assert score["steps"] == int(row["steps"])


def test_agent_acts_as_trained() -> None:
    pytest.importorskip("mujoco", minversion="2.3.3")
    pytest.importorskip("gymnasium", minversion="1.0", reason="it has no v5 of the task")
    model, env = load_agent(AGENTS / "Reacher-v5")
    returns = [sum(play(model, env)) for _ in range(5)]  # 50 steps each; random actions give about -43
    assert np.mean(returns) > -10.0
    assert model.num_timesteps >= 1_000_000


def test_write_gif_puts_recordings_side_by_side(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    frames = [np.full((28, 14, 3), shade, np.uint8) for shade in (0, 120, 250)]
    write_gif(tmp_path / "agents.gif", [frames, frames[:2]])
    with images.open(tmp_path / "agents.gif") as gif:
        assert gif.size == (140, 140)
        assert gif.n_frames == 2
