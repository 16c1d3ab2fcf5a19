"""
Draw the README's picture from the committed results: the trust region and the speed, beside sb3-contrib's TRPO.

    python benchmarks/overview.py
"""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

RESULTS = Path(__file__).parent / "results"
COLORS = {"sb3_trpo": "#0173b2", "sb3_contrib": "#de8f05"}
LABELS = {"sb3_trpo": "sb3_trpo", "sb3_contrib": "sb3-contrib TRPO"}
SCENARIOS = {"cartpole_2": "CartPole-v1", "halfcheetah_2": "HalfCheetah-v5", "humanoid_2": "Humanoid-v5"}


def draw_kl(axes: Axes) -> None:
    """Joint KL of the first updates, as a multiple of target_kl."""
    data = json.loads((RESULTS / "trust_region.json").read_text(encoding="utf-8"))
    target = data["settings"]["target_kl"]
    updates = max(row["update"] for row in data["updates"])
    for env, marker in (("Humanoid-v5", "s"), ("HalfCheetah-v5", "o")):
        for name, color in COLORS.items():
            rows = [row for row in data["updates"] if row["env"] == env and row["algorithm"] == name]
            x, y = [row["update"] for row in rows], [row["joint_kl"] / target for row in rows]
            axes.plot(x, y, marker=marker, ms=6, lw=1.5, color=color)
            if name == "sb3_contrib":
                axes.annotate(env, (x[0], y[0]), xytext=(10, 2), textcoords="offset points", fontsize=9)
    axes.axhline(1.0, color="black", ls="--", lw=1.2)
    axes.annotate("δ = target_kl", (updates, 1.0), xytext=(0, 5), textcoords="offset points", ha="right", fontsize=9)
    axes.set(xlabel="update", ylabel="joint KL / δ", xticks=range(1, updates + 1))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0.0)
    axes.set_title("The trust region is respected")


def draw_speed(axes: Axes) -> None:
    """Environment steps per second of training, on one thread."""
    scenarios = json.loads((RESULTS / "throughput.json").read_text(encoding="utf-8"))["scenarios"]
    for place, name in enumerate(SCENARIOS):
        rows = scenarios[name]["contenders"]
        speeds = {"sb3_trpo": rows["ours"], "sb3_contrib": rows["sb3-contrib"]}
        ours, theirs = (row["total_steps_per_second"] for row in speeds.values())
        for offset, (who, row) in zip((-0.2, 0.2), speeds.items(), strict=True):
            axes.bar(place + offset, row["total_steps_per_second"], 0.36, color=COLORS[who])
        axes.annotate(
            f"{ours / theirs:.1f}×", (place - 0.2, ours), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=10
        )
    axes.set_xticks(range(len(SCENARIOS)), SCENARIOS.values())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    axes.set(ylabel="steps per second, updates included")
    axes.margins(y=0.12)
    axes.set_title("Faster on the same core")


def main() -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_kl(left)
    draw_speed(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles = [Patch(color=color, label=LABELS[name]) for name, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(RESULTS / "overview.png", dpi=120)
    print(RESULTS / "overview.png")


if __name__ == "__main__":
    main()
