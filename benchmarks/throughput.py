"""
How many steps a second: ours and other libraries, in alternation, on one thread.

    python benchmarks/throughput.py                            # everything; each scenario is written when it ends
    python benchmarks/throughput.py --scenario halfcheetah_2   # some of it
    python benchmarks/throughput.py --scenario libraries --clock cpu --cleanrl ppo_continuous_action.py
    python benchmarks/throughput.py --chart                    # draw the charts from the finished scenarios
    python benchmarks/throughput.py --quick                    # a few minutes: does it run? Writes no file

Both TRPOs have RL Zoo's MuJoCo settings (trust region in terms of the joint KL for ours) on rollouts of 2,048 steps; PPO
has RL Zoo's for the task, its number of environments included; Tianshou has its MuJoCo example's, and so has ours beside
it. The floor steps the same Monitor-wrapped environments with random actions and does nothing else. Every round collects a
rollout and updates, contender after contender; figures are steps over the median time of a round.

The scenario "libraries" needs ``pip install -r benchmarks/requirements.txt``; CleanRL is a file to download from
``contenders.CLEANRL_URL``. Each library has the settings of its own example or its defaults, on rollouts of 2,048 steps
(Tianshou 1,024). Libraries that are not installed are left out.
"""

import peers  # isort: skip  (first: one thread)
import timing  # isort: skip

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import stable_baselines3
import torch as th
from contenders import (
    Contender,
    Round,
    bare_contender,
    cleanrl_contender,
    sb3_contender,
    sbx_contender,
    skrl_contender,
    tianshou_contender,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from studies import recurrent

N_STATES = 2048


class Scenario(NamedTuple):
    """
    Who runs against whom.

    :param task: registered name
    :param n_envs: number of environments
    :param normalize: whether VecNormalize is around them
    :param kind: "sb3" against sb3-contrib (and PPO), "tianshou" against Tianshou, "envpool" ours on EnvPool and without,
        "libraries" against all libraries, "recurrent" RecurrentTRPO against RecurrentPPO
    """

    task: str
    n_envs: int
    normalize: bool
    kind: str = "sb3"


def scenarios() -> dict[str, Scenario]:
    found = {}
    for task in ("CartPole-v1", "HalfCheetah-v5", "Humanoid-v5"):
        for n_envs in (2, 8):
            for normalize in (False, True):
                name = f"{task.split('-')[0].lower()}_{n_envs}{'_normalized' if normalize else ''}"
                found[name] = Scenario(task, n_envs, normalize)
    found["tianshou"] = Scenario("HalfCheetah-v5", peers.TIANSHOU_SHAPE["n_envs"], True, "tianshou")
    for task, n_envs in (("Hopper-v5", 8), ("Hopper-v5", 16), ("HalfCheetah-v5", 16)):
        found[f"envpool_{task.split('-')[0].lower()}_{n_envs}"] = Scenario(task, n_envs, False, "envpool")
    found["libraries"] = Scenario("HalfCheetah-v5", 8, False, "libraries")
    for task in ("CartPoleNoVel-v1", "HalfCheetahNoVel-v5"):
        found[f"recurrent_{task.partition('NoVel')[0].lower()}"] = Scenario(task, 8, True, "recurrent")
    return found


def make_libraries(task: str, cleanrl: Path | None, clock: Callable[[], float]) -> dict[str, Contender]:
    """Every library that is installed, by name and number of environments."""

    def ours(n_envs: int) -> Contender:
        env = peers.make_env(task, n_envs)
        settings = {**peers.ZOO_TRPO, "n_steps": N_STATES // n_envs}
        return sb3_contender(peers.ours(env, **peers.as_ours(settings, env.action_space)), clock)

    def contrib() -> Contender:
        return sb3_contender(peers.contrib(peers.make_env(task, 2), **{**peers.ZOO_TRPO, "n_steps": N_STATES // 2}), clock)

    def ppo() -> Contender:
        return sb3_contender(stable_baselines3.PPO("MlpPolicy", peers.make_env(task, 1), seed=0, device="cpu"), clock)

    makers: dict[str, Callable[[], Contender]] = {
        **{f"sb3_trpo × {n_envs}": partial(ours, n_envs) for n_envs in (8, 2, 1)},
        "SBX PPO × 8": lambda: sbx_contender(peers.make_env(task, 8), N_STATES // 8, clock),
        "SBX PPO × 8, batch_size=256": lambda: sbx_contender(peers.make_env(task, 8), N_STATES // 8, clock, 256),
        "SBX PPO × 1": lambda: sbx_contender(peers.make_env(task, 1), N_STATES, clock),
        "Tianshou TRPO × 16": lambda: tianshou_contender(task, clock),
        "skrl TRPO × 8": lambda: skrl_contender(task, 8, N_STATES // 8, clock),
        "skrl TRPO × 1": lambda: skrl_contender(task, 1, N_STATES, clock),
        "sb3-contrib TRPO × 2": contrib,
        "SB3 PPO × 1": ppo,
        "bare": lambda: bare_contender(peers.make_env(task, 8), N_STATES, clock),
    }
    if cleanrl is not None:
        makers["CleanRL PPO × 1"] = lambda: cleanrl_contender(cleanrl, task, clock)
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    return found


def make_recurrent(scenario: Scenario, clock: Callable[[], float]) -> dict[str, Contender]:
    """RecurrentTRPO, the same without the sampler that does without torch, and RecurrentPPO, by ``studies.recurrent``."""
    task, n_envs, *_ = scenario
    cases = {name: case for (name, env), case in recurrent().items() if env == task}
    make = cases["RecurrentTRPO"].make

    def learner(name: str, n_envs: int) -> Contender:
        env = VecNormalize(make_vec_env(make, n_envs, seed=0))
        # A call of ``learn`` is one rollout, after which a schedule would be at its end.
        settings = {key: value for key, value in cases[name].settings.items() if not callable(value)}
        return sb3_contender(cases[name].algorithm(env=env, seed=0, device="cpu", **settings), clock)

    general = learner("RecurrentTRPO", n_envs)

    def without_sampler() -> Round:
        with mock.patch("sb3_trpo.adapters.recurrent.serves_lstm", return_value=False):
            return general()

    return {
        "ours": learner("RecurrentTRPO", n_envs),
        "ours, acting in torch": without_sampler,
        "RecurrentPPO": learner("RecurrentPPO", cases["RecurrentPPO"].n_envs),
        "bare": bare_contender(make_vec_env(make, n_envs, seed=0), N_STATES, clock),
    }


def make_contenders(scenario: Scenario, threads: int, clock: Callable[[], float]) -> dict[str, Contender]:
    """Whoever takes part, by name, each with environments of its own."""
    task, n_envs, normalize, kind = scenario
    if kind == "recurrent":
        return make_recurrent(scenario, clock)
    if kind == "tianshou":
        env = peers.make_env(task, n_envs, normalize=True)
        return {
            "ours": sb3_contender(peers.ours(env, **peers.TIANSHOU_AS_OURS), clock),
            "tianshou": tianshou_contender(task, clock),
            "bare": bare_contender(peers.make_env(task, n_envs), n_envs * peers.TIANSHOU_SHAPE["n_steps"], clock),
        }
    settings = {**peers.ZOO_TRPO, "n_steps": N_STATES // n_envs}
    env = peers.make_env(task, n_envs, normalize=normalize)
    own = peers.as_ours(settings, env.action_space)
    contenders = {"ours": sb3_contender(peers.ours(env, **own), clock)}
    if kind == "envpool":
        from sb3_trpo.vec_env.envpool import make_envpool

        def pool(n_threads: int) -> VecEnv:
            pooled: VecEnv = make_envpool(task, n_envs, seed=0, num_threads=n_threads)
            return VecNormalize(pooled) if normalize else pooled

        for n_threads in sorted({1, threads}):
            name = f"envpool, {n_threads} thread{'s' if n_threads > 1 else ''}"
            contenders[f"ours on {name}"] = sb3_contender(peers.ours(pool(n_threads), **own), clock)
            contenders[f"bare {name}"] = bare_contender(pool(n_threads), N_STATES, clock)
    else:
        contrib = peers.contrib(peers.make_env(task, n_envs, normalize=normalize), **settings)
        contenders["sb3-contrib"] = sb3_contender(contrib, clock)
        if n_envs == 2:
            ppo_env = peers.make_env(task, peers.ZOO_PPO[task][0], normalize=normalize)
            contenders["ppo"] = sb3_contender(peers.ppo(ppo_env, task), clock)
    contenders["bare"] = bare_contender(peers.make_env(task, n_envs), N_STATES, clock)
    return contenders


def run(scenario: Scenario, rounds: int, threads: int, clock_name: str, cleanrl: Path | None) -> dict[str, Any]:
    if scenario.kind == "libraries":
        contenders = make_libraries(scenario.task, cleanrl, timing.CLOCKS[clock_name])
    else:
        contenders = make_contenders(scenario, threads, timing.CLOCKS[clock_name])
    samples = timing.alternate(contenders, rounds, warmup=1 if scenario.kind == "libraries" else 2)
    rows = {name: _row(played) for name, played in samples.items()}
    return {"scenario": scenario._asdict(), "rounds": rounds, "clock": clock_name, "contenders": rows}


def _row(played: Sequence[Round]) -> dict[str, Any]:
    steps = played[0].steps
    row: dict[str, Any] = {"steps_per_round": steps}
    for part in ("collect", "update", "total"):
        seconds = statistics.median(getattr(one, part) for one in played)
        row[f"{part}_steps_per_second"] = round(steps / seconds, 1) if seconds else None
        row[f"{part}_seconds"] = [round(getattr(one, part), 5) for one in played]
    return row


def print_result(name: str, result: dict[str, Any]) -> None:
    rows = result["contenders"]
    own, bare = rows["ours"], rows["bare"]
    for who, row in rows.items():
        columns = [row[f"{part}_steps_per_second"] for part in ("collect", "update", "total")]
        if who.startswith("bare"):
            columns[1:] = [None, None]
        cells = "".join(f"{'' if column is None else f'{column:,.0f}':>12}" for column in columns)
        ratios = ""
        if not who.startswith("bare"):
            over_floor = bare["collect_steps_per_second"] / row["collect_steps_per_second"]
            ratios = f"{over_floor:11.2f}"
            if who != "ours":
                gained = [own[key] / row[key] for key in ("collect_steps_per_second", "total_steps_per_second")]
                ratios += "".join(f"{ratio:13.2f}×" for ratio in gained)
        print(f"{name if who == 'ours' else '':26}{who:28}{cells}{ratios}")
    print(flush=True)


def print_libraries(result: dict[str, Any]) -> None:
    for who, row in sorted(result["contenders"].items(), key=lambda item: -item[1]["total_steps_per_second"]):
        print(f"{'libraries':26}{who:28}{row['total_steps_per_second']:36,.0f}")
    print(flush=True)


def draw(path: Path) -> None:
    """Bars of collecting and of the whole, without VecNormalize, as shares of the environments' own speed."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sb3_trpo"  # the same ids every time
    from matplotlib import pyplot as plt

    results = json.loads(path.read_text(encoding="utf-8"))["scenarios"]
    shown = [
        name
        for name, scenario in scenarios().items()
        if name in results and scenario.kind in ("sb3", "tianshou") and not name.endswith("_normalized")
    ]
    if not shown:
        return
    colors = {"ours": "#1b6ca8", "sb3-contrib": "#e08e45", "ppo": "#9aa5b1", "tianshou": "#7fb069"}
    labels = {"ours": "sb3_trpo", "sb3-contrib": "sb3-contrib TRPO", "ppo": "SB3 PPO", "tianshou": "Tianshou TRPO"}
    figure, axes = plt.subplots(2, 1, figsize=(8.5, 6.5), sharex=True, constrained_layout=True)
    for axis, part, title in zip(
        axes, ("collect", "total"), ("collecting rollouts", "training, updates included"), strict=True
    ):
        for place, name in enumerate(shown):
            rows = results[name]["contenders"]
            alone = rows["bare"]["collect_steps_per_second"]
            present = [who for who in colors if who in rows]
            for number, who in enumerate(present):
                x = place + 0.27 * (number - (len(present) - 1) / 2)
                axis.bar(x, 100.0 * rows[who][f"{part}_steps_per_second"] / alone, 0.25, color=colors[who])
        axis.axhline(100.0, color="black")
        drawn = [results[name]["scenario"] for name in shown]
        ticks = ["{}\n× {}".format(scenario["task"].partition("-")[0], scenario["n_envs"]) for scenario in drawn]
        axis.set_xticks(range(len(shown)), ticks, fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    handles.append(plt.Line2D([], [], color="black"))
    figure.supylabel("steps per second, % of the environments alone", fontsize=10)
    names = [*labels.values(), "environments alone"]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    _save(figure, path)


def draw_libraries(path: Path) -> None:
    """Bars of steps per second, updates included."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sb3_trpo"
    from matplotlib import pyplot as plt

    result = json.loads(path.read_text(encoding="utf-8"))["scenarios"].get("libraries")
    if result is None:
        return
    speeds = {name: row["total_steps_per_second"] for name, row in result["contenders"].items() if name != "bare"}
    names = sorted(speeds, key=speeds.__getitem__)
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(names) + 0.9), constrained_layout=True)
    colors = ["#1b6ca8" if name.startswith("sb3_trpo") else "#9aa5b1" for name in names]
    bars = axis.barh(names, [speeds[name] for name in names], color=colors)
    axis.bar_label(bars, [f"{speeds[name]:,.0f}" for name in names], padding=4, fontsize=9)
    axis.margins(x=0.1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    axis.set_xlabel("steps per CPU second, updates included" if result["clock"] == "cpu" else "steps per second")
    axis.set_title("{}: library × environments".format(result["scenario"]["task"]), fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path.with_name("throughput_libraries.json"))


def _save(figure: Any, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    print(f"drawn: {path.with_suffix('.png').name}, {path.with_suffix('.svg').name}")


def main() -> None:
    every = scenarios()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=every, default=list(every), metavar="SCENARIO", help=", ".join(every))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each, after two for warm-up")
    parser.add_argument(
        "--cleanrl", type=Path, metavar="FILE", help="its ppo_continuous_action.py; without it, it is left out"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of EnvPool")
    parser.add_argument(
        "--clock", choices=timing.CLOCKS, default="wall", help="cpu: on a machine with other work (not for EnvPool)"
    )
    parser.add_argument("--chart", action="store_true", help="draw the chart of the finished scenarios, and run nothing")
    parser.add_argument("--quick", action="store_true", help="three rounds; writes no file unless --out")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/throughput.json")
    args = parser.parse_args()
    out = args.out or (None if args.quick else peers.RESULTS / "throughput.json")
    th.manual_seed(0)

    if not args.chart:
        print(f"{'':54}{'steps per second:':>17}")
        print(
            f"{'scenario':26}{'':28}{'collecting':>12}{'updating':>12}{'end to end':>12}{'floor/coll.':>11}"
            f"{'ours: coll.':>14}{'end to end':>14}"
        )
        for name in args.scenario:
            try:
                result = run(every[name], 3 if args.quick else args.rounds, args.threads, args.clock, args.cleanrl)
            except ImportError as error:
                print(f"{name:26}left out: {error}\n", flush=True)
                continue
            (print_libraries if every[name].kind == "libraries" else partial(print_result, name))(result)
            peers.update_json(out, "scenarios", name, result)
    if out is not None and out.exists():
        draw(out)
        draw_libraries(out)


if __name__ == "__main__":
    main()
