"""
What collecting costs beyond the environments, and where the time of a collected step goes.

    python benchmarks/collecting.py                     # all tables
    python benchmarks/collecting.py --table over_bare   # one of them
    python benchmarks/collecting.py --quick             # does it run? Writes no file

The table over_bare has the CPU time of ``collect_rollouts`` over that of stepping as many bare environments by random
actions, in alternation; the table parts is beside sb3-contrib's TRPO.

Parts are timed by a clock around the functions that do them; a part inside another is taken out of it. The overlap runs the
critic's fit in a thread of its own while the next rollout is collected, which needs a second core to pay at all.
"""

import peers  # isort: skip  (first: one thread)
import timing  # isort: skip

import argparse
import copy
import itertools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from contenders import bare_contender
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo.adapters.models import actor_parameters
from sb3_trpo.optim.parameters import Snapshot
from sb3_trpo.rollouts import actor, fast_step, loop, samplers
from sb3_trpo.rollouts.buffers import read_rollout

N_STEPS, N_ENVS = 1024, 2
N_STATES = 2048
TABLES = ("over_bare", "parts", "overlap")
BOOKS = "callbacks, episode statistics"
PARTS = ["environments", "vectorising", "normalising", "acting", "evaluating", "buffer", BOOKS, "rest"]
Patch = tuple[Any, str, str]
PEER: list[Patch] = [
    (DummyVecEnv, "step_wait", "vectorising"),
    (VecNormalize, "step_wait", "normalising"),
    (ActorCriticPolicy, "forward", "acting"),
    (ActorCriticPolicy, "predict_values", "evaluating"),
    (RolloutBuffer, "add", "buffer"),
    (RolloutBuffer, "compute_returns_and_advantage", "evaluating"),
    (CallbackList, "on_step", BOOKS),
    (OnPolicyAlgorithm, "_update_info_buffer", BOOKS),
]
OURS: list[Patch] = [
    (fast_step, "step_dummy", "vectorising"),
    (fast_step, "step_normalize", "normalising"),
    (samplers.NumpyActionSampler, "__call__", "acting"),
    (samplers.NumpyActionSampler, "__init__", "acting"),
    (actor.RolloutActor, "finish", "evaluating"),
    (loop, "write_step", "buffer"),
    (CallbackList, "on_step", BOOKS),
    (OnPolicyAlgorithm, "_update_info_buffer", BOOKS),
]


class Stopwatch:
    """Seconds spent in each part, without those spent in parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = [0.0]

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self.seconds[part] += seconds - self._inside.pop()
                self._inside[-1] += seconds

        return timed


def profile(model: OnPolicyAlgorithm, patches: list[Patch], rounds: int) -> dict[str, float]:
    """Microseconds of each part in one step of all environments: medians over rollouts."""
    callback = peers.begin(model)
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, rounds):
        watch = Stopwatch()
        with ExitStack() as stack:
            for owner, name, part in patches:
                stack.enter_context(mock.patch.object(owner, name, watch.around(getattr(owner, name), part)))
            for env in model.env.unwrapped.envs:
                for name in ("step", "reset"):
                    stack.enter_context(mock.patch.object(env, name, watch.around(getattr(env, name), "environments")))
            watch.around(model.collect_rollouts, "rest")(model.env, callback, model.rollout_buffer, N_STEPS)
        for part in PARTS if number >= 0 else ():
            samples[part].append(1e6 * watch.seconds[part] / N_STEPS)
    return {part: round(statistics.median(values), 1) for part, values in samples.items()}


def over_bare(task: str, n_envs: int, normalize: bool, rounds: int) -> dict[str, Any]:
    """CPU seconds of collecting a rollout of 2,048 steps, of the bare environments, and their ratios in each round."""
    env = peers.make_env(task, n_envs, normalize=normalize)
    model = peers.ours(env, **peers.as_ours({**peers.ZOO_TRPO, "n_steps": N_STATES // n_envs}, env.action_space))
    callback = peers.begin(model)
    bare = bare_contender(peers.make_env(task, n_envs), N_STATES, time.process_time)

    def collect() -> float:
        started = time.process_time()
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        return time.process_time() - started

    seconds = timing.alternate({"collecting": collect, "bare": lambda: bare().total}, rounds, warmup=2)
    ratios = [collected / stepped for collected, stepped in zip(*seconds.values(), strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "extra_microseconds_per_step": round(
            1e6 * (statistics.median(seconds["collecting"]) - statistics.median(seconds["bare"])) / N_STATES, 1
        ),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def overlap(task: str, rounds: int) -> dict[str, float]:
    """Milliseconds of collecting, of the critic's fit, of one after the other and of both at once: medians."""
    env = peers.make_env(task, N_ENVS)
    settings = peers.as_ours({**peers.ZOO_TRPO, "n_steps": N_STEPS}, env.action_space)
    model, other = peers.ours(env, **settings), peers.ours(env, **settings)
    callback = peers.begin(model)

    def collect() -> None:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)

    collect()
    # The fit must not share its networks and rollout with the collecting beside it.
    rollout = copy.deepcopy(read_rollout(model.rollout_buffer, model.action_space))
    actor = actor_parameters(other.policy, other.adapter.distribution, rollout.select(slice(1)).inputs)
    start = Snapshot(other.policy.parameters())

    def fit() -> None:
        start.restore()
        other._fit_critic(other.adapter, rollout, actor)

    def both() -> None:
        thread = threading.Thread(target=fit)
        thread.start()
        collect()
        thread.join()

    work = {"collecting": collect, "fitting": fit, "at once": both}
    samples = timing.alternate({name: partial(timing.seconds_of, call) for name, call in work.items()}, rounds, warmup=2)
    medians = {name: round(1e3 * statistics.median(seconds), 1) for name, seconds in samples.items()}
    return {**medians, "saved": round(medians["collecting"] + medians["fitting"] - medians["at once"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rollouts of each, after warm-up")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="two rounds; writes no file unless --out")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/collecting.json")
    args = parser.parse_args()
    out = args.out or (None if args.quick else peers.RESULTS / "collecting.json")
    rounds = 2 if args.quick else args.rounds

    if "over_bare" in args.table:
        print_over_bare(rounds, out)
    if "parts" in args.table:
        print_parts(rounds, out)
    for task in ("HalfCheetah-v5", "CartPole-v1") if "overlap" in args.table else ():
        figures = overlap(task, rounds)
        print(f"\n{task}, ms: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
        peers.update_json(out, "critic_while_acting", task, figures)


def print_over_bare(rounds: int, out: Path | None) -> None:
    for task, n_envs, normalize in itertools.product(("HalfCheetah-v5", "Humanoid-v5"), (1, 2, 8), (False, True)):
        result = over_bare(task, n_envs, normalize, rounds)
        name = f"{task} x {n_envs}{', VecNormalize' if normalize else ''}"
        extra = result["extra_microseconds_per_step"]
        print(f"{name:40}{result['ratio']:8.2f} x bare stepping, {extra:6.1f} µs a step more", flush=True)
        peers.update_json(out, "over_bare", name, result)


def print_parts(rounds: int, out: Path | None) -> None:
    for task, normalize in itertools.product(("HalfCheetah-v5", "CartPole-v1"), (False, True)):
        settings = {**peers.ZOO_TRPO, "n_steps": N_STEPS}
        models = [make(peers.make_env(task, N_ENVS, normalize=normalize), **settings) for make in (peers.contrib, peers.ours)]
        columns = [profile(model, patches, rounds) for model, patches in zip(models, (PEER, OURS), strict=True)]
        name = f"{task}{', VecNormalize' if normalize else ''}"
        print(f"\n{name}: µs in a step of {N_ENVS} environments{'sb3-contrib':>20}{'sb3_trpo':>12}")
        for part in PARTS:
            print(f"  {part:60}{columns[0][part]:10.1f}{columns[1][part]:12.1f}")
        print(f"  {'sum':60}{sum(columns[0].values()):10.1f}{sum(columns[1].values()):12.1f}", flush=True)
        peers.update_json(out, "microseconds", name, dict(zip(("sb3-contrib", "sb3_trpo"), columns, strict=True)))


if __name__ == "__main__":
    main()
