"""
Pictures of a training: learning curves, and the trust region over time.

``python -m sb3_trpo plot logs/trpo/CartPole-v1_1`` draws what it finds below a folder (Monitor files, evaluations and
TensorBoard logs) or in the results file of ``benchmark``, as PNG and SVG.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from stable_baselines3.common.monitor import LoadMonitorResultsError, load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_trpo.errors import UsageError

#: Columns of a results file: one row for each evaluation of each run.
RESULT_COLUMNS = ["env", "algorithm", "seed", "steps", "seconds", "cpu_seconds", "mean_return"]
#: What the log says about an update ↦ what the picture calls it. ``target_kl`` is in the logs of our algorithms only.
UPDATE_TAGS = {
    "train/kl_divergence_loss": "kl",
    "train/target_kl": "target_kl",
    "train/cg_iterations": "cg_iterations",
    "train/backtracks": "backtracks",
    "train/step_length": "step_length",
}
#: What is counted is drawn as points.
COUNTS = ("cg_iterations", "backtracks")
#: Runs beyond which a legend would be longer than the picture.
LEGEND_RUNS = 12


def read_results(path: Path, clock: str = "wall") -> pd.DataFrame:
    """
    Read the results file of ``benchmark``.

    :param path: the CSV file
    :param clock: ``"wall"``, or ``"cpu"`` for seconds of the process alone, where the machine did other work
    :return: one row for each evaluation
    :raises UsageError: the file is none, or has no row
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
    :return: one row for each episode: run, environment, steps and seconds of the run until its end, its return
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
    Read what our algorithms logged about their updates, of all runs below a folder.

    :param folder: where to look for TensorBoard logs
    :return: one row for each update: run, steps, and the columns named in :data:`UPDATE_TAGS`
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


def _name(run: Path, folder: Path) -> str:
    return run.name if run == folder else str(run.relative_to(folder))


def compare_learning(results: pd.DataFrame) -> Figure:
    """
    Draw the evaluations of a benchmark: mean return over the seeds with its 95 % bootstrap interval.

    :param results: a results file
    :return: a row for each environment, against steps and against seconds (their mean over the seeds)
    """
    runs = results.groupby(["env", "algorithm", "steps"])
    results = results.assign(seconds=runs["seconds"].transform("mean"))
    curves = results.melt(
        id_vars=["env", "algorithm", "seed", "mean_return"], value_vars=["steps", "seconds"], var_name="axis", value_name="x"
    )
    grid = sns.relplot(
        data=curves,
        kind="line",
        x="x",
        y="mean_return",
        hue="algorithm",
        row="env",
        col="axis",
        errorbar=("ci", 95),
        seed=0,
        height=3,
        aspect=1.5,
        facet_kws={"sharex": False, "sharey": "row", "margin_titles": True},
    )
    grid.set_titles(row_template="{row_name}", col_template="")
    grid.set_ylabels("return")
    for column, label in enumerate(["environment steps", "seconds of training"]):
        for axes in grid.axes[:, column]:
            axes.set(xlabel=label, xlim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    grid.tight_layout()
    return grid.figure


def draw_learning(episodes: pd.DataFrame) -> Figure:
    """
    Draw training episodes and their rolling mean.

    :param episodes: from :func:`read_episodes`
    :return: return against steps, and against seconds
    """
    envs = list(episodes["env"].unique())
    colors = _colors(episodes)
    figure = Figure(figsize=(10, 1 + 3 * len(envs)), layout="constrained")
    for row, env in zip(figure.subplots(len(envs), 2, sharey="row", squeeze=False), envs, strict=True):
        for axes, x, label in zip(row, ["steps", "seconds"], ["environment steps", "seconds"], strict=True):
            for run, rows in episodes[episodes["env"] == env].groupby("run"):
                window = min(100, max(1, len(rows) // 5))
                mean = rows["return"].rolling(window, min_periods=1).mean()
                axes.plot(rows[x], rows["return"], ".", ms=2, color=colors[run], alpha=0.3)
                axes.plot(rows[x], mean, color=colors[run], label=run)
            axes.set(title=env, xlabel=label, xlim=(0, None))
        row[0].set_ylabel("return of training episodes")
    _legend(figure, colors)
    return figure


def draw_trust_region(updates: pd.DataFrame) -> Figure:
    """
    Draw how the updates used the trust region.

    :param updates: from :func:`read_updates`
    :return: KL against δ, share of δ used, CG iterations, backtracks and step length, over the steps
    """
    updates = updates.assign(share=updates["kl"] / updates["target_kl"])
    panels = {
        "kl": "KL and δ (dashed)",
        "share": "share of δ used",
        "cg_iterations": "CG iterations",
        "backtracks": "backtracks",
        "step_length": "step length",
    }
    colors = _colors(updates)
    figure = Figure(figsize=(8, 10), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(len(panels), 1, sharex=True), panels.items(), strict=True):
        for run, rows in updates.groupby("run"):
            style = "." if column in COUNTS else ".-"
            axes.plot(rows["steps"], rows[column], style, ms=4, lw=0.8, color=colors[run])
            if column == "kl":
                axes.plot(rows["steps"], rows["target_kl"], "--", lw=1.5, color=colors[run])
        axes.set_ylabel(label)
        if column == "step_length" and (updates[column] > 0).any():
            axes.set_yscale("log", nonpositive="mask")
        else:
            axes.set_ylim(0, 1.1 * max(updates[column].max(), updates["target_kl"].max() if column == "kl" else 1.0))
        if column in COUNTS:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[-1].set(xlabel="environment steps", xlim=(0, None))
    _legend(figure, colors)
    return figure


def _colors(frame: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    runs = sorted(frame["run"].unique())
    return dict(zip(runs, sns.color_palette("colorblind" if len(runs) <= 10 else "husl", len(runs)), strict=True))


def _legend(figure: Figure, colors: dict[str, tuple[float, float, float]]) -> None:
    if len(colors) <= LEGEND_RUNS:
        handles = [Line2D([], [], color=color, label=run) for run, color in colors.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, 90 // (8 + max(map(len, colors)))))


def save(figure: Figure, path: Path) -> None:
    """
    Save a picture as PNG and SVG, and say so.

    :param figure: the picture
    :param path: without ending
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".png", ".svg"):
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sb3_trpo"}):
            figure.savefig(path.with_name(path.name + ending), dpi=120, metadata={"Date": None} if ending == ".svg" else None)
        print(path.with_name(path.name + ending))


def plot(path: Path, output: Path | None = None, clock: str = "wall") -> list[Path]:
    """
    Draw what there is: learning curves from a results file or from Monitor files, the trust region from TensorBoard logs.

    :param path: results file, or a folder with runs below it
    :param output: folder for the pictures; None for ``path``, or the folder it is in
    :param clock: of a results file, as for :func:`read_results`
    :return: the pictures, without ending
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
        figures["learning_curves"] = draw_learning(episodes)
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
