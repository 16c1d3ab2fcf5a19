"""
Aggregate statistics of a benchmark with their uncertainty, computed by rliable (Agarwal et al. 2021).

https://arxiv.org/abs/2108.13264: interquartile mean over runs and tasks, performance profiles and probability of
improvement, with stratified bootstrap intervals of 95%.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pytablewriter import MarkdownTableWriter
from rliable import library, metrics, plot_utils

from sb3_trpo.errors import UsageError
from sb3_trpo.zoo.plots import algorithm_name, read_results, save

#: Bootstrap samples of each interval.
N_BOOTSTRAP = 2000
#: Random actions, the zero of the normalized scores.
RANDOM = "random"


class Estimates(NamedTuple):
    """
    rliable's estimates. An interval is an array of its two ends.

    :param iqm: algorithm -> interquartile mean of the normalized scores
    :param iqm_interval: algorithm -> its interval
    :param better: pair of algorithms -> probability that a run of the first ends above a run of the second
    :param better_interval: pair -> its interval
    :param taus: normalized scores
    :param profile: algorithm -> share of its runs above each of ``taus``
    :param profile_interval: algorithm -> its interval, of shape (2, number of ``taus``)
    """

    iqm: dict[str, float]
    iqm_interval: dict[str, np.ndarray]
    better: dict[tuple[str, str], float]
    better_interval: dict[tuple[str, str], np.ndarray]
    taus: np.ndarray
    profile: dict[str, np.ndarray]
    profile_interval: dict[str, np.ndarray]


def final_returns(results: pd.DataFrame) -> pd.DataFrame:
    """
    Take the last evaluation of each run.

    :param results: a results file
    :return: one row for each run
    """
    trained = results[results["algorithm"] != RANDOM]
    return trained.sort_values("steps").groupby(["env", "algorithm", "seed"], as_index=False).last()


def scores(results: pd.DataFrame) -> dict[str, np.ndarray]:
    """
    Normalize the final returns: 0 is the return of random actions, 1 the mean of the environment's best algorithm.

    :param results: a results file, random actions included
    :return: algorithm -> scores of shape (seeds, environments)
    :raises UsageError: an algorithm has a single run, or lacks runs that others have; or none is better than random
    """
    final = final_returns(results)
    zero = results[results["algorithm"] == RANDOM].groupby("env")["mean_return"].mean()
    best = final.groupby(["env", "algorithm"])["mean_return"].mean().groupby("env").max()
    for env_id in best.index[best <= zero[best.index]]:
        raise UsageError(f"{env_id}: no algorithm ends above random actions, so scores cannot be normalized")
    final["score"] = (final["mean_return"] - final["env"].map(zero)) / (final["env"].map(best) - final["env"].map(zero))
    tables = {name: rows.pivot(index="seed", columns="env", values="score") for name, rows in final.groupby("algorithm")}
    for name, table in tables.items():
        if len(table) < 2:
            raise UsageError(f"{name}: one run only, and an interval needs at least 2")
        if table.isna().any(axis=None) or len(table.columns) < final["env"].nunique():
            raise UsageError(f"{name}: needs the same seeds for every environment")
    return {name: tables[name].to_numpy() for name in results["algorithm"].unique() if name in tables}


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Seed NumPy's global generator, the only one that rliable's bootstrap uses, and restore its state afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def interquartile_means(runs: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """
    Compute interquartile means over seeds and environments, with stratified bootstrap intervals of 95%.

    :param runs: algorithm -> scores of shape (seeds, environments)
    :return: algorithm -> mean, and algorithm -> both ends of its interval
    """
    with fixed_seed():
        means, intervals = library.get_interval_estimates(
            runs, lambda scores: np.array([metrics.aggregate_iqm(scores)]), reps=N_BOOTSTRAP
        )
    return {name: float(mean[0]) for name, mean in means.items()}, {name: ends[:, 0] for name, ends in intervals.items()}


def estimate(runs: Mapping[str, np.ndarray]) -> Estimates:
    """
    Aggregate over runs and environments.

    :param runs: algorithm -> scores of shape (seeds, environments)
    :return: the estimates
    """
    iqm, iqm_interval = interquartile_means(runs)
    pairs = {f"{a},{b}": (runs[a], runs[b]) for a, b in combinations(runs, 2)}
    everything = np.concatenate([x.ravel() for x in runs.values()])
    taus = np.linspace(min(0.0, everything.min()), everything.max(), 101)
    with fixed_seed():
        better, better_interval = library.get_interval_estimates(
            pairs, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=N_BOOTSTRAP
        )
        profile, profile_interval = library.create_performance_profile(runs, taus, reps=N_BOOTSTRAP)

    def pair(name: str) -> tuple[str, str]:
        first, second = name.split(",")
        return first, second

    return Estimates(
        iqm=iqm,
        iqm_interval=iqm_interval,
        better={pair(name): float(value[0]) for name, value in better.items()},
        better_interval={pair(name): ends[:, 0] for name, ends in better_interval.items()},
        taus=taus,
        profile=profile,
        profile_interval=profile_interval,
    )


def thresholds(env_ids: list[str], given: Mapping[str, float]) -> dict[str, float | None]:
    """
    Choose the threshold of each environment.

    :param env_ids: environment ids
    :param given: the user's
    :return: the user's, or Gymnasium's ``reward_threshold``, or None
    """
    return {env_id: given.get(env_id, gym.spec(env_id).reward_threshold) for env_id in env_ids}


def time_to_threshold(results: pd.DataFrame, levels: Mapping[str, float | None]) -> pd.DataFrame:
    """
    Return when the evaluations first reach the threshold.

    :param results: a results file
    :param levels: environment -> threshold, or None
    :return: by environment and algorithm: ``seconds``, the median over the runs that reach it, ``reached``, their
        number, and ``runs``
    """
    trained = results[results["algorithm"] != RANDOM]
    # A threshold of None becomes NaN, which no return reaches.
    there = trained[trained["mean_return"] >= trained["env"].map(levels).astype(float)]
    keys = ["env", "algorithm"]
    first = there.sort_values("steps").groupby([*keys, "seed"])["seconds"].first().groupby(keys)
    runs = trained.groupby(keys)["seed"].nunique()
    table = pd.DataFrame({"seconds": first.median(), "reached": first.size(), "runs": runs})
    return table.assign(reached=table["reached"].fillna(0).astype(int))


def tables(results: pd.DataFrame, estimates: Estimates, levels: Mapping[str, float | None]) -> str:
    """
    Format the tables.

    :param results: a results file
    :param estimates: of its scores
    :param levels: environment -> threshold, or None
    :return: Markdown
    """
    final = final_returns(results).groupby(["env", "algorithm"])
    times = time_to_threshold(results, levels)
    rows = []
    for (env, algorithm), runs in final:
        time = times.loc[(env, algorithm)]
        seconds = f"{time['seconds']:.1f} s" if time["reached"] else "-"
        level = "no threshold" if levels[env] is None else f"{seconds} ({time['reached']:.0f} of {time['runs']:.0f})"
        returns = f"{runs['mean_return'].mean():.1f} ± {runs['mean_return'].std():.1f}"
        rows.append(
            [env, algorithm_name(algorithm), f"{runs['steps'].mean():,.0f}", returns, f"{runs['seconds'].mean():.1f}", level]
        )
    named = ", ".join(f"{level:g} on {env}" for env, level in levels.items() if level is not None)
    parts = [
        MarkdownTableWriter(
            table_name="Final returns",
            headers=["Environment", "Algorithm", "Steps", "Return", "Seconds", "Time to threshold"],
            value_matrix=rows,
        ).dumps(),
        "Mean ± standard deviation over the seeds, of the last evaluation; seconds of training without evaluations; median "
        f"seconds until an evaluation reaches the threshold, of the runs that do. Thresholds: {named or 'none'}.\n\n",
        MarkdownTableWriter(
            table_name="Interquartile mean of normalized scores",
            headers=["Algorithm", "IQM, 95% interval"],
            value_matrix=[
                [algorithm_name(name), f"{x:.3f} ({_ends(estimates.iqm_interval[name])})"] for name, x in estimates.iqm.items()
            ],
        ).dumps(),
        "A score is 0 at the return of random actions and 1 at the mean return of the environment's best algorithm.\n\n",
        MarkdownTableWriter(
            table_name="Probability of improvement",
            headers=["X", "Y", "P(X > Y), 95% interval"],
            value_matrix=[
                [*map(algorithm_name, pair), f"{p:.3f} ({_ends(estimates.better_interval[pair])})"]
                for pair, p in estimates.better.items()
            ],
        ).dumps(),
    ]
    return "\n".join(parts)


def _ends(interval: np.ndarray) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def draw(estimates: Estimates) -> Figure:
    """
    Plot the estimates.

    :param estimates: what to plot
    :return: interquartile means, performance profiles, probabilities of improvement
    """
    sns.set_theme(style="whitegrid")
    names = {name: algorithm_name(name) for name in estimates.iqm}
    colors = dict(zip(names.values(), sns.color_palette("colorblind", len(names)), strict=True))
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    means, profiles, better = figure.subplots(1, 3)
    for name, label in names.items():
        means.errorbar(
            estimates.iqm[name],
            label,
            xerr=np.abs(estimates.iqm_interval[name] - estimates.iqm[name])[:, None],
            fmt="o",
            lw=6,
            ms=9,
            mfc="white",
            color=colors[label],
        )
    means.set(xlabel="interquartile mean of the scores\n(95% interval)", ylim=(len(names) - 0.5, -0.5))
    plot_utils.plot_performance_profiles(
        {names[name]: profile for name, profile in estimates.profile.items()},
        estimates.taus,
        {names[name]: interval for name, interval in estimates.profile_interval.items()},
        ax=profiles,
        colors=colors,
        xlabel="score τ",
        ylabel="share of runs with score > τ",
        labelsize=means.xaxis.label.get_size(),
        ticklabelsize=means.xaxis.get_ticklabels()[0].get_size(),
        wrect=0,
        hrect=0,
    )
    profiles.tick_params(pad=8)
    profiles.set(xlim=(estimates.taus[0], estimates.taus[-1]), ylim=(0, 1.03))
    figure.legend(*profiles.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    for (first, second), p in estimates.better.items():
        label = f"{names[first]}\nover {names[second]}"
        interval = np.abs(estimates.better_interval[first, second] - p)[:, None]
        better.errorbar(p, label, xerr=interval, fmt="o", lw=6, ms=9, mfc="white", color="tab:gray")
    better.axvline(0.5, color="k", ls="--", lw=1)
    better.set(xlabel="probability of improvement\n(95% interval)", xlim=(-0.02, 1.02))
    better.set_ylim(len(estimates.better) - 0.5, -0.5)
    return figure


def report(path: Path, given: Mapping[str, float], clock: str = "wall") -> None:
    """
    Print the tables of a results file, and write tables and figure beside it.

    :param path: the CSV file
    :param given: environment -> threshold, instead of Gymnasium's
    :param clock: ``"wall"``, or ``"cpu"`` for seconds of the process alone
    :raises UsageError: there are too few runs
    """
    results = read_results(path, clock)
    estimates = estimate(scores(results))
    text = tables(results, estimates, thresholds(sorted(results["env"].unique()), given))
    print(text)
    path.with_name("summary.md").write_text(text, encoding="utf-8")
    if len(estimates.iqm) > 1:
        save(draw(estimates), path.with_name("comparison"))
