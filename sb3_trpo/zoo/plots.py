"""
Plots of training runs: learning curves, and how the updates used the trust region.

``python -m sb3_trpo plot logs/trpo/CartPole-v1_1`` plots what it finds below a folder (Monitor files, evaluations and
TensorBoard logs) or in the results file of ``benchmark``, as PNG and SVG.
"""

import argparse
import json
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from stable_baselines3.common.monitor import LoadMonitorResultsError, load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_trpo.errors import UsageError

#: Columns of a results file: one row for each evaluation of each run.
RESULT_COLUMNS = ["env", "algorithm", "seed", "steps", "seconds", "cpu_seconds", "mean_return"]
#: Log key of an update -> column. ``target_kl`` is in the logs of this package only.
UPDATE_TAGS = {
    "train/kl_divergence_loss": "kl",
    "train/target_kl": "target_kl",
    "train/cg_iterations": "cg_iterations",
    "train/backtracks": "backtracks",
    "train/step_length": "step_length",
}
#: Rows of the trust-region plot: column -> label.
PANELS = {
    "kl": "KL in nats",
    "cg_iterations": "CG iterations",
    "backtracks": "backtracks",
    "step_length": "step length",
}
#: Columns that are counts.
COUNTS = ("cg_iterations", "backtracks")
#: Maximum number of legend entries.
LEGEND_ENTRIES = 12
#: Names of algorithms for legends and tables.
NAMES = {
    "trpo": "TRPO (sb3_trpo)",
    "npg": "NPG (sb3_trpo)",
    "trpo_lstm": "RecurrentTRPO",
    "trpo_mask": "MaskableTRPO",
    "sb3_contrib_trpo": "TRPO (sb3-contrib)",
    "tianshou_trpo": "TRPO (Tianshou)",
    "ppo_lstm": "RecurrentPPO",
}
#: A run's folder in RL Zoo's layout, below a folder named after the algorithm.
RUN_FOLDER = re.compile(r"(?P<env>.+-v\d+)_\d+")


def read_results(path: Path, clock: str = "wall") -> pd.DataFrame:
    """
    Read the results file of ``benchmark``.

    :param path: the CSV file
    :param clock: ``"wall"``, or ``"cpu"`` for seconds of the process alone
    :return: one row per evaluation
    :raises UsageError: it is not a results file, or has no rows
    """
    try:
        results = pd.read_csv(path)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UsageError(f"{path}: not a results file: {error}") from error
    missing = [name for name in RESULT_COLUMNS if name not in results]
    if missing:
        raise UsageError(f"{path}: not a results file: it has no column {', '.join(missing)}")
    if results.empty:
        raise UsageError(f"{path}: no results in it yet")
    return results.assign(seconds=results["cpu_seconds"]) if clock == "cpu" else results


def read_episodes(folder: Path) -> pd.DataFrame:
    """
    Read the training episodes of all runs below a folder.

    :param folder: where to look for Monitor files
    :return: one row per episode: run, environment, steps and seconds until its end, return
    """
    frames = []
    for run in sorted({path.parent for path in folder.rglob("*monitor.csv")}):
        try:
            episodes = load_results(str(run))
        except LoadMonitorResultsError:
            continue
        with next(run.glob("*monitor.csv")).open(encoding="utf-8") as file:
            env_id = json.loads(file.readline().removeprefix("#"))["env_id"]
        steps = episodes["l"].cumsum()
        columns = {"steps": steps, "seconds": episodes["t"], "return": episodes["r"], "run": _name(run, folder), "env": env_id}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run"])


def read_updates(folder: Path) -> pd.DataFrame:
    """
    Read the logged statistics of updates of all runs below a folder.

    :param folder: where to look for TensorBoard logs
    :return: one row per update: run, steps, and the columns of :data:`UPDATE_TAGS`
    """
    frames = []
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        log = EventAccumulator(str(run), size_guidance={"scalars": 0})
        log.Reload()
        if set(UPDATE_TAGS) <= set(log.Tags()["scalars"]):
            columns = {
                name: pd.Series({event.step: event.value for event in log.Scalars(tag)}) for tag, name in UPDATE_TAGS.items()
            }
            frames.append(pd.DataFrame(columns).rename_axis("steps").reset_index().assign(run=_name(run, folder)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run"])


def read_evaluations(folder: Path) -> pd.DataFrame:
    """
    Read the evaluations that SB3's ``EvalCallback`` wrote, of all runs below a folder.

    :param folder: where to look for ``evaluations.npz``
    :return: one row per evaluation: run, steps, mean return
    """
    frames = []
    for path in sorted(folder.rglob("evaluations.npz")):
        with np.load(path) as data:
            columns = {"steps": data["timesteps"], "return": data["results"].mean(axis=1), "run": _name(path.parent, folder)}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run"])


def _name(run: Path, folder: Path) -> str:
    return run.name if run == folder else str(run.relative_to(folder))


def algorithm_name(algorithm: str) -> str:
    """
    Return the name of an algorithm for legends and tables.

    :param algorithm: its name on the command line
    :return: the name
    """
    return NAMES.get(algorithm, algorithm.upper())


def compare_learning(results: pd.DataFrame) -> Figure:
    """
    Plot the evaluations of a benchmark: mean return over the seeds with its 95% bootstrap interval.

    :param results: a results file
    :return: a row for each environment, against steps and against seconds (mean over the seeds)
    """
    seconds = results.groupby(["env", "algorithm", "steps"])["seconds"].transform("mean")
    results = results.assign(seconds=seconds, algorithm=results["algorithm"].map(algorithm_name))
    colors = _colors(results["algorithm"].unique())
    envs = list(results["env"].unique())
    figure = Figure(figsize=(10, 0.8 + 2.8 * len(envs)), layout="constrained")
    for row, env in zip(figure.subplots(len(envs), 2, sharey="row", squeeze=False), envs, strict=True):
        curves = results[results["env"] == env]
        for axes, x, label in zip(row, ["steps", "seconds"], ["environment steps", "seconds of training"], strict=True):
            sns.lineplot(
                curves,
                x=x,
                y="mean_return",
                hue="algorithm",
                palette=colors,
                errorbar=("ci", 95),
                seed=0,
                ax=axes,
                legend=False,
            )
            axes.set(xlabel=label, ylabel="return", xlim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        row[0].set_title(env, loc="left", fontweight="bold")
    seeds = results["seed"].nunique()
    _legend(
        figure,
        [Line2D([], [], color=color, label=name) for name, color in colors.items()],
        f"mean of {seeds} seeds, 95% interval",
    )
    return figure


def draw_learning(episodes: pd.DataFrame, evaluations: pd.DataFrame) -> Figure:
    """
    Plot training episodes, their rolling mean, and evaluations.

    :param episodes: from :func:`read_episodes`
    :param evaluations: from :func:`read_evaluations`; may be empty
    :return: a row for each environment, against steps and against seconds
    """
    envs = list(episodes["env"].unique())
    colors = _colors(episodes["run"].unique())
    windows = {run: min(100, max(1, len(rows) // 10)) for run, rows in episodes.groupby("run")}
    figure = Figure(figsize=(10, 1.2 + 3 * len(envs)), layout="constrained")
    for row, env in zip(figure.subplots(len(envs), 2, sharey="row", squeeze=False), envs, strict=True):
        for axes, x, label in zip(row, ["steps", "seconds"], ["environment steps", "seconds"], strict=True):
            for run, rows in episodes[episodes["env"] == env].groupby("run"):
                mean = rows["return"].rolling(windows[run], min_periods=1).mean()
                axes.plot(rows[x], rows["return"], ".", ms=2, color=colors[run], alpha=0.25)
                axes.plot(rows[x], mean, color=colors[run])
                if x == "steps":
                    seen = evaluations[evaluations["run"] == run]
                    axes.plot(seen.get("steps", []), seen.get("return", []), "o", ms=5, mfc="white", color=colors[run])
            axes.set(xlabel=label, xlim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        row[0].set_title(env, loc="left", fontweight="bold")
        row[0].set_ylabel("return")
    sizes = sorted(set(windows.values()))
    size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    kinds = [
        Line2D([], [], ls="", marker=".", color="gray", label="training episode"),
        Line2D([], [], color="gray", label=f"mean of the last {size} episodes"),
    ]
    if not evaluations.empty:
        kinds.append(Line2D([], [], ls="", marker="o", mfc="white", color="gray", label="evaluation, deterministic policy"))
    named = [Line2D([], [], color=color, label=run) for run, color in colors.items()] if len(colors) > 1 else []
    _legend(figure, [*kinds, *named])
    return figure


def describe_runs(updates: pd.DataFrame) -> pd.DataFrame:
    """
    Find environment and algorithm of each run from RL Zoo's folders.

    :param updates: from :func:`read_updates`
    :return: the same with columns ``env``, ``algorithm`` (the run's name for other folders) and ``update``, its number
    """

    def describe(run: str) -> tuple[str, str]:
        folders = Path(run).parts
        for parent, folder in zip(("", *folders), folders, strict=False):
            if match := RUN_FOLDER.fullmatch(folder):
                return match["env"], algorithm_name(parent) if parent else "TRPO"
        return "", run

    runs = {run: describe(run) for run in updates["run"].unique()}
    return updates.assign(
        env=updates["run"].map(lambda run: runs[run][0]),
        algorithm=updates["run"].map(lambda run: runs[run][1]),
        update=updates.groupby("run").cumcount(),
    )


def draw_trust_region(updates: pd.DataFrame) -> Figure:
    """
    Plot how the updates used the trust region: a column for each environment, mean and range over the runs.

    :param updates: from :func:`read_updates`
    :return: KL with δ, CG iterations, backtracks and step length, against the steps
    """
    updates = describe_runs(updates)
    envs, colors = sorted(updates["env"].unique()), _colors(updates["algorithm"].unique())
    figure = Figure(figsize=(max(6.5, 4.5 * len(envs)), 9), layout="constrained")
    grid = figure.subplots(len(PANELS), len(envs), sharex="col", sharey="row", squeeze=False)
    for column, env in enumerate(envs):
        rows = updates[updates["env"] == env]
        for axes, name in zip(grid[:, column], PANELS, strict=True):
            for algorithm, runs in rows.groupby("algorithm"):
                _draw_band(axes, runs, name, colors[algorithm])
            if name in COUNTS:
                axes.yaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_ylim(-0.3, max(1.3, 1.05 * updates[name].max()))  # a count of zero stays visible
        grid[0, column].set_title(env, loc="left", fontweight="bold")
        grid[-1, column].set(xlabel="environment steps", xlim=(0, None))
        grid[-1, column].xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes, (name, label) in zip(grid[:, 0], PANELS.items(), strict=True):
        axes.set_ylabel(label)
        if name == "kl":
            axes.set_ylim(0, 1.15 * updates[["kl", "target_kl"]].max(axis=None))
        if name == "step_length" and (updates[name] > 0).any():
            axes.set_yscale("log", nonpositive="mask")
    n_runs = int(updates.groupby(["env", "algorithm"])["run"].nunique().max())
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles.append(Line2D([], [], color="black", ls="--", label="δ (target_kl)"))
    _legend(figure, handles, f"mean and range of {n_runs} runs" if n_runs > 1 else None)
    return figure


def _draw_band(axes: Axes, runs: pd.DataFrame, name: str, color: tuple[float, float, float]) -> None:
    """Plot one column: points of a single run, or mean and range over runs."""
    updates = runs.groupby("update")
    steps, values = updates["steps"].mean(), updates[name]
    if runs["run"].nunique() == 1:
        axes.plot(steps, values.mean(), "." if name in COUNTS else ".-", ms=4, lw=0.8, color=color)
    else:
        axes.fill_between(steps, values.min(), values.max(), color=color, alpha=0.2, lw=0)
        axes.plot(steps, values.mean(), color=color, lw=1.2)
    if name == "kl":
        axes.plot(steps, updates["target_kl"].mean(), "--", lw=1.2, color="black")


def _colors(names: Iterable[Hashable]) -> dict[Hashable, tuple[float, float, float]]:
    names = list(names)
    return dict(zip(names, sns.color_palette("colorblind" if len(names) <= 10 else "husl", len(names)), strict=True))


def _legend(figure: Figure, handles: list[Line2D], title: str | None = None) -> None:
    """Draw a legend below the panels."""
    if len(handles) <= LEGEND_ENTRIES:
        width = max(len(str(handle.get_label())) for handle in handles)
        figure.legend(handles=handles, title=title, loc="outside lower center", ncols=max(1, 90 // (8 + width)), frameon=False)


def save(figure: Figure, path: Path) -> None:
    """
    Save a figure as PNG and SVG, and print the paths.

    :param figure: the picture
    :param path: path without suffix
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".png", ".svg"):
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sb3_trpo"}):
            figure.savefig(path.with_name(path.name + ending), dpi=120, metadata={"Date": None} if ending == ".svg" else None)
        print(path.with_name(path.name + ending))


def plot(path: Path, output: Path | None = None, clock: str = "wall") -> list[Path]:
    """
    Plot learning curves from a results file or Monitor files, and the trust region from TensorBoard logs.

    :param path: results file, or folder of runs
    :param output: folder for the pictures; None for ``path``, or its folder
    :param clock: of a results file, as for :func:`read_results`
    :return: paths of the pictures, without suffix
    :raises UsageError: nothing can be drawn
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    output = output or folder
    sns.set_theme(style="whitegrid", palette="colorblind")
    figures = {}
    results = path / "results.csv" if path.is_dir() else path
    if results.exists():
        figures["learning_curves"] = compare_learning(read_results(results, clock).query("steps > 0"))
    elif not (episodes := read_episodes(folder)).empty:
        figures["learning_curves"] = draw_learning(episodes, read_evaluations(folder))
    if path.is_dir() and not (updates := read_updates(folder)).empty:
        figures["trust_region"] = draw_trust_region(updates)
    if not figures:
        raise UsageError(f"{path}: no results there: neither Monitor files, nor TensorBoard logs of TRPO, nor a results.csv")
    for name, figure in figures.items():
        save(figure, output / name)
    return [output / name for name in figures]


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    :param argv: its arguments
    :raises UsageError: nothing can be drawn
    """
    parser = argparse.ArgumentParser(prog="sb3_trpo plot", description="Learning curves and trust region, as PNG and SVG.")
    parser.add_argument("path", type=Path, help="folder of a run, a folder of runs, or a results.csv")
    parser.add_argument("-o", "--output", type=Path, help="folder for the pictures (default: beside the results)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="seconds of a results file")
    arguments = parser.parse_args(argv)
    mpl.use("Agg")
    plot(arguments.path, arguments.output, arguments.clock)
