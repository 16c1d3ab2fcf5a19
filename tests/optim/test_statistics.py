"""What an update says about itself, against figures by hand and against the log."""

import math
import statistics
from dataclasses import fields
from typing import Any

import pytest
import torch as th
from support.arguments import effective
from test_trpo import N_STEPS, HookedTRPO, ScriptedEnv, make

from sb3_trpo import TRPO
from sb3_trpo.optim.conjugate_gradient import CGResult, CGStatus
from sb3_trpo.optim.line_search import Evaluation, LineSearchResult, LineSearchStatus
from sb3_trpo.optim.statistics import PolicyStep, Summary, UpdateStats

STATISTICS = ("mean", "std", "min", "max", "last")


def test_summary_by_hand() -> None:
    assert Summary.of([2.0, 8.0, 2.0, 4.0]) == Summary(mean=4.0, std=math.sqrt(6.0), min=2.0, max=8.0, last=4.0, count=4)
    assert Summary.of([3]) == Summary(3.0, 0.0, 3.0, 3.0, 3.0, 1)


def test_summary_hides_no_nan() -> None:
    summary = Summary.of([1.0, math.nan])
    assert all(math.isnan(getattr(summary, name)) for name in STATISTICS)


def solution(iterations: int, residual: float) -> CGResult:
    return CGResult(th.zeros(1), CGStatus.CONVERGED, iterations, residual, 0.0)


def test_figures_of_two_steps_by_hand() -> None:
    """The first step goes half of its way, the second is refused."""
    start, middle = Evaluation(1.0, 0.0), Evaluation(1.3, 0.02, 0.4)
    steps = [
        PolicyStep(start, 2.0, solution(5, 0.1), 0.4, 0.8, LineSearchResult(LineSearchStatus.ACCEPTED, 0.5, 1, middle)),
        PolicyStep(middle, 3.0, solution(7, 0.3), 0.2, 0.1, LineSearchResult(LineSearchStatus.REJECTED, 0.0, 10, middle)),
    ]
    stats = UpdateStats.of(steps, [4.0, 2.0], 0.5)
    by_hand = {
        "policy_objective": [1.3, 1.3],
        "kl_divergence_loss": [0.02, 0.02],
        "max_state_kl": [0.4, 0.4],
        "step_length": [0.5 * 0.4, 0.0],
        "expected_improvement": [0.5 * 0.8, 0.0],
        "actual_improvement": [0.3, 0.0],
        "gradient_norm": [2.0, 3.0],
        "backtracks": [1.0, 10.0],
        "cg_iterations": [5.0, 7.0],
        "cg_residual": [0.1, 0.3],
        "value_loss": [4.0, 2.0],
    }
    assert set(stats.summaries) == set(by_hand)
    for name, values in by_hand.items():
        summary = getattr(stats, name)
        assert stats.summaries[name] is summary
        assert summary.mean == pytest.approx(statistics.fmean(values)), name
        assert summary.std == pytest.approx(statistics.pstdev(values)), name
        assert (summary.min, summary.max) == pytest.approx((min(values), max(values))), name
        assert summary.last == pytest.approx(values[-1]), name
        assert summary.count == 2
    assert stats.train_seconds == 0.5


def stats_of(backtracks: list[float], value_losses: list[float]) -> UpdateStats:
    """Statistics that are 1 but for the backtracks of the steps and the losses of the critic."""
    ones = Summary.of([1.0] * len(backtracks))
    values = dict.fromkeys((field.name for field in fields(UpdateStats)), ones)
    of_update = {"policy_objective": Summary.of([3.0, 2.0]), "kl_divergence_loss": Summary.of([0.25, 0.5])}
    critic = {"backtracks": Summary.of(backtracks), "value_loss": Summary.of(value_losses), "train_seconds": 0.25}
    return UpdateStats(**(values | of_update | critic))


def test_update_stats_logs_the_last_value_of_the_update_and_means_of_steps() -> None:
    logged = stats_of([1.0, 3.0], [4.0, 2.0, 0.0]).logged
    assert (logged["policy_objective"], logged["kl_divergence_loss"]) == (2.0, 0.5)
    assert (logged["backtracks"], logged["value_loss"]) == (2.0, 2.0)


def test_update_stats_prints_a_table_with_the_spread_of_several_steps() -> None:
    lines = repr(stats_of([1.0, 3.0], [123456.0])).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["UpdateStats"] == ["value", "std", "min", "max", "count"]
    assert cells["kl_divergence_loss"] == ["0.5", "0.125", "0.25", "0.5", "2"]
    assert cells["backtracks"] == ["2", "1", "1", "3", "2"]
    assert cells["value_loss"] == ["1.23e+05"]
    assert cells["train_seconds"] == ["0.25"]
    assert list(cells)[1:] == [field.name for field in fields(UpdateStats)]
    assert max(map(len, lines)) <= 80


def test_update_stats_of_one_step_prints_one_column() -> None:
    model = make().learn(N_STEPS)
    lines = repr(model.last_update).splitlines()
    assert lines[0] == "UpdateStats"
    assert all(len(line.split()) == 2 for line in lines[1:])


SPLITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "passes": {"n_policy_updates": 3},
    "minibatches": {"policy_batch_size": 10, "critic_method": "minibatch"},
}


@pytest.mark.parametrize("arguments", SPLITS.values(), ids=SPLITS)
def test_the_log_has_the_figures_of_last_update(arguments: dict[str, Any]) -> None:
    kept: list[dict[str, Any]] = []

    class Kept(HookedTRPO):
        def train(self) -> None:
            super().train()
            kept.append(dict(self.logger.name_to_value))

    model = Kept(
        "MlpPolicy", ScriptedEnv(), **effective({"n_steps": N_STEPS, "batch_size": 8, "seed": 0, "device": "cpu"} | arguments)
    )
    model.learn(N_STEPS)
    stats, (log,) = model.last_update, kept
    n_steps = {"plain": 1, "passes": 3, "minibatches": 4}[next(name for name, given in SPLITS.items() if given is arguments)]
    for name, summary in stats.summaries.items():
        assert log[f"train/{name}"] == stats.logged[name], name
        if name == "value_loss":
            assert summary.count == (1 if "critic_method" not in arguments else 10 * N_STEPS / 8)
        else:
            assert summary.count == n_steps
        spread = {statistic: f"train/{name}_{statistic}" for statistic in ("std", "min", "max")}
        assert all((key in log) == (summary.count > 1) for key in spread.values())
        if summary.count > 1:
            assert all(log[key] == getattr(summary, statistic) for statistic, key in spread.items())
            assert summary.min <= summary.mean <= summary.max
    assert 0.0 < stats.train_seconds == log["time/train_seconds"] < 60.0
    assert stats.policy_objective.max == pytest.approx(stats.policy_objective.last)  # each step improves it
    total = stats.actual_improvement.mean * n_steps
    assert stats.policy_objective.last == pytest.approx(total, abs=1e-6)  # from 0, advantages being normalised


def printed_keys(output: str) -> set[str]:
    """The train/ keys of the last printed table."""
    table = output.rpartition("| train/")[2]
    return {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|    ")}


EVERY_TABLE = {
    "entropy",
    "explained_variance",
    "is_line_search_success",
    "kl_divergence_loss",
    "n_updates",
    "policy_objective",
    "std",
    "target_kl",
    "value_loss",
}


def test_printed_table_has_sb3_contribs_keys_and_what_is_unusual(capsys: pytest.CaptureFixture[str]) -> None:
    make(verbose=1).learn(2 * N_STEPS)
    assert printed_keys(capsys.readouterr().out) == EVERY_TABLE
    model = make(ScriptedEnv(lambda step, action: 1.0), gamma=0.0, verbose=1)  # no advantage, no step
    model.before_train = lambda trained: trained.rollout_buffer.advantages.fill(0.0)
    model.learn(2 * N_STEPS)
    assert printed_keys(capsys.readouterr().out) == EVERY_TABLE | {"line_search"}


def test_only_the_means_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    make(n_policy_updates=2, verbose=1).learn(2 * N_STEPS)
    printed = capsys.readouterr().out
    assert "kl_divergence_loss " in printed
    assert "_std" not in printed
    assert "_max" not in printed


def test_a_critic_that_could_not_be_fitted_is_nan() -> None:
    model = make(critic_method="minibatch", learning_rate=1e30)
    model.learn(N_STEPS)
    assert math.isnan(model.last_update.value_loss.mean)
    assert model.logs[0]["train/is_critic_fit_success"] == 0.0


def test_there_is_nothing_before_the_first_update_and_one_for_each() -> None:
    model = make()
    assert model.last_update is None
    model.learn(N_STEPS)
    first = model.last_update
    assert isinstance(first, UpdateStats)
    model.learn(N_STEPS, reset_num_timesteps=False)
    assert model.last_update is not first
    assert model.last_update != first


def test_figures_are_not_saved(tmp_path: Any) -> None:
    model = make().learn(N_STEPS)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", device="cpu", trust=True)
    assert loaded.last_update is None
    assert "last_update" in model._excluded_save_params()
