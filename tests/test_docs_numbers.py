"""Measured numbers in README and docs are those of the committed results, rounded."""

import csv
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")


def numbers(text: str) -> list[tuple[float, float]]:
    """Return the numbers of a text, each with half a unit of its last digit."""
    found = [number.replace("−", "-").replace(",", "") for number in NUMBER.findall(text)]
    return [(float(number), 0.5 * 10.0 ** -len(number.partition(".")[2])) for number in found]


def row(page: str, *first: str) -> str:
    """Return the rest of the only table row that begins with these cells."""
    begin = "| " + " | ".join(first) + " |"
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith(begin)]
    assert len(lines) == 1, f"{page}: {len(lines)} rows begin with {begin}"
    return lines[0].removeprefix(begin)


def assert_shows(text: str, values: Iterable[float]) -> None:
    """The numbers of the text are these values, rounded to the digits shown."""
    shown, expected = numbers(text), list(values)
    assert len(shown) == len(expected), f"{text}: expected {expected}"
    for (number, half), value in zip(shown, expected, strict=True):
        assert abs(number - value) <= 1.001 * half + 1e-9, f"{text}: {number}, expected {value}"


@cache
def read_json(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def read_csv(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_seeds(name: str, cell: str, env: str, key: str) -> np.ndarray:
    """Return a column of a study's rows, one number for each seed."""
    values = [float(one[key]) for one in read_csv(name) if (one["cell"], one["env"]) == (cell, env)]
    assert values, f"{name}.csv has no {cell} on {env}"
    return np.array(values)


def mean_std(name: str, cell: str, env: str, key: str = "final_return") -> list[float]:
    values = of_seeds(name, cell, env, key)
    return [values.mean(), values.std()]


def mean(name: str, cell: str, env: str, key: str = "cpu_seconds") -> float:
    return float(of_seeds(name, cell, env, key).mean())


def speed(scenario: str, who: str, part: str = "total") -> float:
    return float(read_json("throughput")["scenarios"][scenario]["contenders"][who][f"{part}_steps_per_second"])


def joint_kls(env: str, algorithm: str, key: str = "joint_kl") -> list[float]:
    updates = read_json("trust_region")["updates"]
    return [update[key] for update in updates if (update["env"], update["algorithm"]) == (env, algorithm)]


def test_readme_numbers_above_the_fold() -> None:
    who = ("ours", "sb3-contrib")
    first = "Speed: steps per CPU second on HalfCheetah-v5, updates included"
    assert_shows(row("README.md", first), [speed("halfcheetah_2", one) for one in who])
    first = "Trust region: largest joint KL of an update on Humanoid-v5, as a multiple of `target_kl`"
    target = read_json("trust_region")["settings"]["target_kl"]
    largest = [max(joint_kls("Humanoid-v5", one)) / target for one in ("sb3_trpo", "sb3_contrib")]
    assert_shows(row("README.md", first), largest)
    first = "Returns: HalfCheetah-v5 after a million steps, with each one's tuned settings; 5 and 3 seeds"
    returns = [mean_std("returns", one, "HalfCheetah-v5") for one in ("tuned", "sb3_contrib")]
    assert_shows(row("README.md", first), np.ravel(returns))


@pytest.mark.parametrize("env", sorted(path.name for path in (RESULTS / "agents").iterdir() if path.is_dir()))
def test_readme_returns_of_the_agents(env: str) -> None:
    score = read_json(f"agents/{env}/score")
    tuned = of_seeds("returns", "tuned", env, "final_return")
    cells = row("README.md", env)
    assert_shows(cells, [score["final_return"], score["final_std"], tuned.mean(), tuned.std(), len(tuned)])
    best = mean("returns", "tuned", env, "best_return")
    of_docs = [len(tuned), tuned.mean(), tuned.std(), best, mean("returns", "tuned", env)]
    assert_shows(row("docs/settings.md", env), of_docs)


PEERS = {"sb3-contrib's TRPO": "sb3_contrib", "PPO": "ppo"}


@pytest.mark.parametrize(
    ("first", "cell"),
    [
        *(((f"{env}-v5",), "tuned") for env in ("Ant", "InvertedPendulum", "InvertedDoublePendulum")),
        *(((env, name), cell) for env in ("HalfCheetah", "Hopper", "Walker2d") for name, cell in PEERS.items()),
    ],
)
def test_settings_returns(first: tuple[str, ...], cell: str) -> None:
    env = f"{first[0].removesuffix('-v5')}-v5"
    final, best = of_seeds("returns", cell, env, "final_return"), mean("returns", cell, env, "best_return")
    expected = [len(final), final.mean(), final.std(), best, mean("returns", cell, env)]
    assert_shows(row("docs/settings.md", *first), expected)


def evaluation(cell: str, env: str, steps: int) -> float:
    """Return the evaluation of seed 100 at so many steps: the first one from there on."""
    curve = [one for one in read_csv("returns_curves") if (one["cell"], one["env"], one["seed"]) == (cell, env, "100")]
    return next(float(one["mean_return"]) for one in curve if int(one["at"]) >= steps)


@pytest.mark.parametrize(
    ("first", "cell"),
    [
        (["−0.5"], "8x256_kl.03"),
        (["−1"], "8x256_kl.03_std-1"),
        (["−2"], "8x256_kl.03_std-2"),
        (["0.05, 0 (before)"], "1x2048_kl.05_std0"),
        (["**0.03, −0.5** (now)"], "1x2048_kl.03_std-.5"),
        (["0.03, −1"], "1x2048_kl.03_std-1"),
    ],
)
def test_settings_tables(first: list[str], cell: str) -> None:
    tasks = [("HalfCheetah-v5", 300_000), ("Ant-v5", 300_000), ("Walker2d-v5", 400_000), ("Hopper-v5", 400_000)]
    ran = {one["env"] for one in read_csv("returns_curves") if one["cell"] == cell}
    expected = [evaluation(cell, env, steps) for env, steps in tasks if env in ran]
    assert_shows(row("docs/settings.md", *first), expected)


@pytest.mark.parametrize("env", ["Humanoid-v5", "HalfCheetah-v5"])
def test_trust_region_table(env: str) -> None:
    ours = joint_kls(env, "sb3_trpo", "logged_kl")
    np.testing.assert_allclose(ours, joint_kls(env, "sb3_trpo"), rtol=1e-5)  # "equal"
    theirs = [*joint_kls(env, "sb3_contrib", "logged_kl"), *joint_kls(env, "sb3_contrib")]
    pages = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    (line,) = [one for one in pages if one.startswith(f"| {env} |") and "equal" in one]
    assert_shows(line.removeprefix(f"| {env} |"), [*ours, *theirs])


@pytest.mark.parametrize(
    ("first", "env"),
    [
        (["CartPole-v1", "Discrete", "30k"], "CartPole-v1"),
        (["Pendulum-v1", "Box, gSDE", "60k"], "Pendulum-v1"),
        (["Chase", "MultiDiscrete", "30k"], "Chase-v0"),
        (["Hover", "MultiBinary", "30k"], "Hover-v0"),
        (["Errands", "Box, Dict observations", "30k"], "Errands-v0"),
    ],
)
def test_spaces_table(first: list[str], env: str) -> None:
    cells = [[*mean_std("spaces", who, env), mean("spaces", who, env)] for who in ("sb3_trpo", "sb3_contrib")]
    assert_shows(row("docs/benchmarks.md", *first), np.ravel(cells))


@pytest.mark.parametrize(
    ("first", "cell"),
    [
        ("sb3_trpo, one each", "sb3_trpo, one each"),
        (
            'sb3_trpo, one each, `target_kl=0.02`, `critic_method="minibatch"`',
            "sb3_trpo, one each, small steps, minibatches",
        ),
        ("sb3_trpo, shared", "sb3_trpo, shared"),
        ("sb3-contrib, shared", "sb3_contrib, shared"),
    ],
)
def test_pixels_table(first: str, cell: str) -> None:
    explained = mean_std("pixels", cell, "Catch-v0", "explained_variance")
    values = [*mean_std("pixels", cell, "Catch-v0"), *explained, mean("pixels", cell, "Catch-v0")]
    assert_shows(row("docs/benchmarks.md", first), values)


@pytest.mark.parametrize("env", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"])
@pytest.mark.parametrize("shape", ["2 × 1024", "16 × 64"])
def test_critic_table(env: str, shape: str) -> None:
    values: list[float] = []
    for method in ("gauss_newton", "minibatch"):
        cell = f"{method} {shape.replace(' × ', 'x')}"
        seconds = [mean("critic", cell, env), mean("critic", cell, env, "train_seconds")]
        values += [*mean_std("critic", cell, env), *seconds]
    values.append(len(of_seeds("critic", cell, env, "seed")))
    assert_shows(row("docs/benchmarks.md", env, shape), values)


@pytest.mark.parametrize("study", ["options", "maskable", "recurrent"])
def test_tables_of_variants(study: str) -> None:
    for cell, env in {(one["cell"], one["env"]) for one in read_csv(study)}:
        values = [*mean_std(study, cell, env), mean(study, cell, env)]
        if study == "options":
            shown = cell.replace("action_bound", "`action_bound") + "`" * ("action_bound" in cell)
            assert_shows(row("docs/benchmarks.md", env, shown), values)
            continue
        page = {"maskable": "docs/algorithms/trpo_mask.md", "recurrent": "docs/algorithms/trpo_lstm.md"}[study]
        name = f"`{env}`" if "(" not in env else f"`{env.replace('), ', ')`, ')}"
        cells = [one.strip() for one in row(page, name).strip("|").split("|")]
        if study == "recurrent":
            place = 0 if cell == "RecurrentTRPO" else 2
            n_seeds = len(of_seeds(study, cell, env, "seed"))
            assert_shows(cells[place], values if n_seeds > 1 else [values[0], values[2]])
            assert_shows(cells[place + 1], [n_seeds])
        else:
            assert_shows(cells[0 if cell == "MaskableTRPO" else 1], values)


@pytest.mark.parametrize(
    ("first", "case"),
    [
        ("HalfCheetah-v5, 64 × 64", "halfcheetah"),
        ("Humanoid-v5, 64 × 64", "humanoid"),
        ("HalfCheetah-v5, 256 × 256", "halfcheetah_256"),
        ("CartPole-v1, 64 × 64", "cartpole"),
        ("HalfCheetah-v5, 16 × 64 steps, against Tianshou", "tianshou"),
    ],
)
def test_update_table(first: str, case: str) -> None:
    data = read_json("update")["cases"][case]
    times = [data["ours"][f"{part}_ms"] for part in ("actor", "critic", "total")]
    gains = [data["speed_up"]["actor"], data["speed_up"]["total"], data["gain_ratio"]]
    assert_shows(row("docs/benchmarks.md", first), [*times, *gains])


@pytest.mark.parametrize(("first", "algorithm"), [("sb3_trpo, DoorKey", "sb3_trpo"), ("SB3's PPO, DoorKey", "PPO")])
def test_doorkey_table(first: str, algorithm: str) -> None:
    runs = [run for run in read_json("doorkey") if run["algorithm"] == algorithm]
    returns, seconds = (np.array([run[key] for run in runs]) for key in ("mean_return", "cpu_seconds"))
    assert_shows(row("docs/benchmarks.md", first), [returns.mean(), returns.std(), seconds.mean()])


@pytest.mark.parametrize(
    ("first", "case"),
    [
        *((f"{size} × {size}, {n:,}", f"mlp_{size}, {n}") for size in (64, 256) for n in (2048, 32768)),
        ("Nature-CNN, 1,024", "frames, 1024"),
    ],
)
def test_card_table(first: str, case: str) -> None:
    rows = [
        read_json("gpu")["NVIDIA H200"][f"{case}, {who}"]
        for who in ("sb3_trpo TRPO", "sb3_contrib TRPO", "stable_baselines3 PPO")
    ]
    seconds = [one["seconds"] for one in rows]
    memory = [one["peak_mib"] for one in rows[:2]]
    shown = [*seconds, *(one / seconds[0] for one in seconds[1:]), *memory, rows[0]["waits"]]
    assert_shows(row("docs/benchmarks.md", first), shown)


@pytest.mark.parametrize("task", ["CartPole-v1", "HalfCheetah-v5", "Humanoid-v5"])
@pytest.mark.parametrize("suffix", ["2", "2_normalized", "8"])
def test_throughput_table(task: str, suffix: str) -> None:
    scenario = f"{task.partition('-')[0].lower()}_{suffix}"
    first = f"{task}, {suffix.replace('_normalized', ', `VecNormalize`')}"
    parts = ("collect", "total")
    both = [[speed(scenario, who, part) for part in parts] for who in ("ours", "sb3-contrib")]
    ppo = [speed(scenario, "ppo")] if "2" in suffix else []
    ratios = [ours / theirs for ours, theirs in zip(*both, strict=True)]
    assert_shows(row("docs/benchmarks.md", first), [*both[0], *both[1], *ppo, speed(scenario, "bare"), *ratios])


@pytest.mark.parametrize("task", ["CartPoleNoVel-v1", "HalfCheetahNoVel-v5"])
def test_recurrent_speed(task: str) -> None:
    scenario = f"recurrent_{task.partition('NoVel')[0].lower()}"
    collecting = [speed(scenario, who, "collect") for who in ("ours", "ours, acting in torch", "RecurrentPPO", "bare")]
    shown = [*collecting, *(speed(scenario, who) for who in ("ours", "RecurrentPPO"))]
    assert_shows(row("docs/algorithms/trpo_lstm.md", task), shown)


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Humanoid-v5"])
def test_table_of_bare_environments(task: str) -> None:
    names = [f"{task} x {n_envs}{more}" for more in ("", ", VecNormalize") for n_envs in (1, 2, 8)]
    pages = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("### Beside bare environments")[2]
    line = next(one for one in pages.splitlines() if one.startswith(f"| {task} |"))
    assert_shows(line.removeprefix(f"| {task} |"), [read_json("collecting")["over_bare"][name]["ratio"] for name in names])


def test_tables_of_costs() -> None:
    """Time of a step, threads, processes, noise of gradients, frames."""
    steps = read_json("collecting")["microseconds"]
    tasks = [(task, who) for task in ("HalfCheetah-v5", "CartPole-v1") for who in ("sb3-contrib", "sb3_trpo")]
    names = {"environments": "environments", "vectorization": "vectorising", "sampling actions": "acting"}
    names |= {"values, log-probabilities": "evaluating", "buffer": "buffer", "other": "rest"}
    for name, key in names.items():
        assert_shows(row("docs/benchmarks.md", name), [steps[task][who][key] for task, who in tasks])
    assert_shows(row("docs/benchmarks.md", "sum"), [sum(steps[task][who].values()) for task, who in tasks])

    for first, case in {"MLP 64 × 64, Half": "mlp_64", "MLP 256 × 256, Half": "mlp_256", "Nature-CNN, im": "cnn"}.items():
        page = (ROOT / "docs" / "threads.md").read_text(encoding="utf-8").splitlines()
        (line,) = [one for one in page if one.startswith(f"| {first}")]
        one, two = (read_json("threads")["cases"][case][n] for n in ("1", "2"))
        speeds = [one["steps_per_second"], one["cpu_seconds"], two["steps_per_second"], two["cpu_seconds"]]
        load = np.mean([one["load_before"], two["load_before"]])
        assert_shows(line.split("|", 2)[2], [*speeds, load])

    both = [read_json("distributed")[f"HalfCheetah-v5 x {n}"] for n in (2, 8)]
    ours = {"one process": "one", "two processes together": "two", "two independent processes at the same time": "apart"}
    for name, key in ours.items():
        assert_shows(row("docs/distributed.md", name), [one["steps_per_second"][key] for one in both])
    ratios = {"weak scaling: two together / one": "weak_scaling", "two together / two independent": "two_of_apart"}
    ratios["strong scaling: two together / one with all environments"] = "strong_scaling"
    for name, key in ratios.items():
        values = [[one[key]["median"], min(one[key]["all"]), max(one[key]["all"])] for one in both]
        assert_shows(row("docs/distributed.md", name), np.ravel(values))
    assert_shows(row("docs/distributed.md", "sums per update"), [one["sums_per_update"] for one in both])

    for gae_lambda in (0.95, 0.9, 0.8, 0.5):
        noise = {
            one["seed"]: one
            for one in read_json("gradient_noise")
            if one["gae_lambda"] == gae_lambda and one["n_directions"] == 8
        }
        values = [noise[seed][key] for seed in (100, 101) for key in ("own", "others")]
        assert_shows(row("docs/algorithms/trpo_lstm.md", f"{gae_lambda}"), values)

    frames = read_json("frames")["updates"]["trained, separate"]["ours, tolerance 0.01"]
    shown = row("docs/benchmarks.md", "trained, one each", "sb3_trpo")
    assert_shows(shown, [frames["seconds"], frames["cg_iterations"], frames["gain"]])
