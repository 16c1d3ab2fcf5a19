"""Comparing runs whose figures are known by hand."""

from pathlib import Path

import pytest

pytest.importorskip("rliable", reason="needs the extra [zoo]")

import numpy as np
import pandas as pd

from sb3_trpo.errors import UsageError
from sb3_trpo.zoo import report as compare

ENVS = ["CartPole-v1", "Pendulum-v1"]
#: Return of random actions, and of the last evaluation of each seed. Evaluations are at 100 and 200 steps.
RANDOM = {"CartPole-v1": 20.0, "Pendulum-v1": -1200.0}
FINAL = {
    "trpo": {"CartPole-v1": [500.0, 500.0, 500.0], "Pendulum-v1": [-200.0, -200.0, -200.0]},
    "ppo": {"CartPole-v1": [260.0, 260.0, 260.0], "Pendulum-v1": [-700.0, -700.0, -700.0]},
}


@pytest.fixture(autouse=True)
def _few_bootstrap_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "N_BOOTSTRAP", 200)


def results(final: dict[str, dict[str, list[float]]] = FINAL) -> pd.DataFrame:
    rows = [
        {"env": env, "algorithm": "random", "seed": 0, "steps": 0, "seconds": 0.0, "mean_return": RANDOM[env]} for env in ENVS
    ]
    for algorithm, envs in final.items():
        for env, returns in envs.items():
            for seed, last in enumerate(returns):
                run = {"env": env, "algorithm": algorithm, "seed": seed}
                rows.append({**run, "steps": 200, "seconds": 2.0 + seed, "mean_return": last})
                rows.append({**run, "steps": 100, "seconds": 1.0 + seed, "mean_return": (last + RANDOM[env]) / 2})
    return pd.DataFrame(rows)


def test_the_last_evaluation_of_each_run_counts() -> None:
    final = compare.final_returns(results())
    assert len(final) == 2 * 2 * 3
    assert set(final["steps"]) == {200}
    assert set(final["mean_return"]) == {500.0, -200.0, 260.0, -700.0}


def test_scores_are_0_at_random_and_1_at_the_best() -> None:
    scores = compare.scores(results())
    assert list(scores) == ["trpo", "ppo"]
    np.testing.assert_allclose(scores["trpo"], np.ones((3, 2)))
    np.testing.assert_allclose(scores["ppo"], np.full((3, 2), 0.5))


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    # Sorted: 0 .5 .5 | .5 .5 .5 .6 .7 | .8 ...: of 8 scores, the middle four count.
    runs = {"a": np.array([[0.0, 0.5], [0.5, 0.6], [0.7, 0.8], [1.0, 9.0]]), "b": np.zeros((4, 2))}
    estimates = compare.estimate(runs)
    assert estimates.iqm["a"] == pytest.approx((0.5 + 0.6 + 0.7 + 0.8) / 4)
    low, high = estimates.iqm_interval["a"]
    assert low < estimates.iqm["a"] < high
    assert estimates.iqm_interval["b"] == pytest.approx([0.0, 0.0])


def test_the_probability_of_improvement_counts_pairs_of_runs() -> None:
    runs = {"a": np.array([[1.0], [3.0]]), "b": np.array([[2.0], [0.0]])}
    assert compare.estimate(runs).better == {("a", "b"): pytest.approx(0.75)}


def test_performance_profiles_are_shares_of_runs() -> None:
    runs = {"a": np.array([[0.0], [1.0]]), "b": np.array([[1.0], [1.0]])}
    estimates = compare.estimate(runs)
    middle = np.searchsorted(estimates.taus, 0.5)
    assert estimates.profile["a"][middle] == 0.5
    assert estimates.profile["b"][middle] == 1.0


def test_time_to_threshold_is_that_of_the_first_evaluation_there() -> None:
    times = compare.time_to_threshold(results(), {"CartPole-v1": 250.0, "Pendulum-v1": None})
    assert tuple(times.loc[("CartPole-v1", "trpo")]) == (2.0, 3, 3)  # at 100 steps already: 1, 2, 3 s
    assert tuple(times.loc[("CartPole-v1", "ppo")]) == (3.0, 3, 3)  # at 200 steps: 2, 3, 4 s
    assert times.loc[("Pendulum-v1", "trpo")]["reached"] == 0


def test_thresholds_are_the_users_or_gymnasiums() -> None:
    assert compare.thresholds(ENVS, {}) == {"CartPole-v1": 475.0, "Pendulum-v1": None}
    assert compare.thresholds(ENVS, {"Pendulum-v1": -200}) == {"CartPole-v1": 475.0, "Pendulum-v1": -200}


@pytest.mark.parametrize(
    ("final", "words"),
    [
        ({**FINAL, "ppo": {env: returns[:1] for env, returns in FINAL["ppo"].items()}}, "ppo: one run only"),
        ({**FINAL, "ppo": {"CartPole-v1": [1.0, 2.0, 3.0]}}, "ppo: needs the same seeds for every environment"),
        (
            {**FINAL, "ppo": {"CartPole-v1": [1.0, 2.0], "Pendulum-v1": [-1.0, -2.0, -3.0]}},
            "ppo: needs the same seeds for every environment",
        ),
        ({"trpo": {"CartPole-v1": [20.0, 20.0], "Pendulum-v1": [0.0, 0.0]}}, "CartPole-v1: no algorithm ends above random"),
    ],
)
def test_runs_that_do_not_suffice_are_refused(final: dict[str, dict[str, list[float]]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare.scores(results(final))


def test_the_report_has_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.csv"
    results().assign(cpu_seconds=0.0).to_csv(path, index=False)
    compare.report(path, {"Pendulum-v1": -300.0})
    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "Thresholds: 475 on CartPole-v1, -300 on Pendulum-v1" in text
    assert "500.0 ± 0.0" in text
    assert "- (0 of 3)" in text  # ppo on CartPole-v1
    assert (tmp_path / "comparison.png").stat().st_size > 0
    assert "probability of improvement" in (tmp_path / "comparison.svg").read_text()


def test_estimates_are_reproducible_and_leave_the_global_generator_alone() -> None:
    runs = {name: np.random.default_rng(seed).uniform(size=(4, 3)) for seed, name in enumerate("ab")}
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = compare.estimate(runs), compare.estimate(runs)
    np.testing.assert_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
