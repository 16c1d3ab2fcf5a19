"""
How long an update takes: ours, sb3-contrib's and Tianshou's on the same weights and the same rollout, in alternation.

    python benchmarks/update.py                             # everything; each case is written when it ends
    python benchmarks/update.py --case halfcheetah scaling  # some of it
    python benchmarks/update.py --quick                     # a few minutes: does it run? Writes no file

Ours trains a policy first, so that the curvature is a realistic one; its weights and its next rollout then go to both.
Weights, optimizer and buffer are put back before each repetition. ``target_kl`` and ``cg_damping`` are the peer's, in
terms of the joint KL for ours. Times are medians in milliseconds on one thread. The gain is gᵀx − ½xᵀ(F + λI)x of the
direction x, with g and F in float64. The floor is the time that the matrix products and convolutions of our update take
by themselves, each measured at its sizes. Memory is the peak of a fresh process during the update, over what it held before.
"""

import peers  # isort: skip  (first: one thread)
import timing  # isort: skip

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import memory
import numpy as np
import torch as th
from gymnasium import spaces
from matrix_products import MatrixProducts
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import VecEnv
from update_contenders import BUFFER_ARRAYS, Clock, Contender, Contrib, Ours, Tianshou, Times, copy_rollout

from sb3_trpo.adapters.models import actor_model
from sb3_trpo.optim.batch import RolloutBatch, normalize_advantages
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.rollouts.buffers import read_rollout

FRAMES = spaces.Box(0, 255, (4, 84, 84), np.uint8)


class Case(NamedTuple):
    """
    What is updated.

    :param task: registered name
    :param n_envs: number of environments
    :param n_steps: steps of each
    :param hidden: widths of the hidden layers
    :param train_steps: steps of training before
    :param peer: whose update ours is compared with
    :param settings: sb3-contrib's settings that differ from RL Zoo's for MuJoCo
    :param targets: speed-ups to reach, of actor and of the whole
    """

    task: str
    n_envs: int
    n_steps: int
    hidden: tuple[int, ...]
    train_steps: int
    peer: str
    settings: dict[str, Any]
    targets: tuple[float, float]


CASES = {
    "halfcheetah": Case("HalfCheetah-v5", 2, 1024, (64, 64), 60_000, "sb3-contrib", {}, (5.0, 7.0)),
    "humanoid": Case("Humanoid-v5", 2, 1024, (64, 64), 40_000, "sb3-contrib", {}, (5.0, 6.0)),
    "halfcheetah_256": Case("HalfCheetah-v5", 2, 1024, (256, 256), 40_000, "sb3-contrib", {}, (4.0, 5.0)),
    "cartpole": Case("CartPole-v1", 2, 1024, (64, 64), 20_000, "sb3-contrib", {"target_kl": 0.01}, (3.0, 6.0)),
    # Tianshou stops after 10 iterations: as much of the gain as theirs needs no better tolerance.
    "tianshou": Case("HalfCheetah-v5", 16, 64, (64, 64), 60_000, "tianshou", {"cg_residual_tol": 0.2}, (2.5, 2.5)),
}
OTHERS = ("frames", "memory", "scaling")


def prepare(case: Case, quick: bool, clock: Clock) -> tuple[Ours, Contender | Tianshou]:
    """Train, collect one more rollout, and give it to both."""
    env, policy, settings, policy_kwargs = _setting(case)
    action_space = env.action_space
    if case.peer == "tianshou":
        own = {**peers.TIANSHOU_AS_OURS, "n_steps": case.n_steps, **case.settings}
    else:
        own = peers.as_ours(settings, action_space) | {"policy_kwargs": policy_kwargs}
    model = peers.ours(env, policy, **own)
    model.learn(2 * case.n_envs * case.n_steps if quick else case.train_steps)
    _, callback = model._setup_learn(10**9, None, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)

    if case.peer == "tianshou":
        return Ours(model, clock), Tianshou(model, clock)
    other = peers.contrib(env, policy, **settings, policy_kwargs=policy_kwargs)
    other.policy.load_state_dict(model.policy.state_dict())
    copy_rollout(model, other)
    return Ours(model, clock), Contrib(other, clock)


def _setting(case: Case) -> tuple[VecEnv, str, dict[str, Any], dict[str, Any]]:
    """Environment, policy, sb3-contrib's settings, and arguments of the policy."""
    settings = {**peers.ZOO_TRPO, "n_steps": case.n_steps, **case.settings}
    env = peers.make_env(case.task, case.n_envs, normalize=case.task != "CartPole-v1")
    return env, "MlpPolicy", settings, {"net_arch": list(case.hidden)}


class Quadratic:
    """
    q(x) = gᵀx − ½xᵀ(F + λI)x in float64, by the path that knows no chains.

    :param contender: ours, restored
    """

    def __init__(self, contender: Ours) -> None:
        contender.restore()
        model = contender.model
        rollout = normalize_advantages(read_rollout(model.rollout_buffer, model.action_space))
        policy = copy.deepcopy(model.policy).double()
        space = model.observation_space
        floats = preprocess_obs(rollout.inputs, space).double()
        actions = rollout.actions.double() if rollout.actions.is_floating_point() else rollout.actions
        doubles = [tensor.double() for tensor in (rollout.advantages, rollout.returns, rollout.weights)]
        rollout = RolloutBatch(floats, actions, *doubles)

        def distribution(inputs: th.Tensor) -> Any:
            latent = policy.mlp_extractor.forward_actor(policy.pi_features_extractor(inputs))
            return policy._get_action_dist_from_latent(latent)

        actor = actor_model(policy, distribution, floats[:1])
        surrogate = Surrogate(actor, rollout)
        self._gradient = surrogate.gradient()
        self._fisher = FisherOperator(surrogate, model.cg_damping)

    def gain(self, x: th.Tensor) -> float:
        x = x.double()
        return float(self._gradient.dot(x) - 0.5 * x.dot(self._fisher(x)))

    def attainable(self) -> float:
        """The maximum, by many iterations of plain conjugate gradients."""
        return 0.5 * conjugate_gradient(self._fisher, self._gradient, max_iter=1000, rtol=1e-8).curvature


def floor(contender: Ours) -> dict[str, float]:
    contender.restore()
    with MatrixProducts(contender.clock) as products:
        contender.model.train()
    seconds = products.seconds()
    return {
        "operations": products.operations,
        "products": sum(products.calls.values()),
        "ms": 1e3 * seconds,
        "gigaflops_per_second": 1e-9 * products.operations / seconds,
    }


def milliseconds(samples: list[Times]) -> dict[str, Any]:
    columns = {
        "actor": [t.actor for t in samples],
        "critic": [t.critic for t in samples],
        "total": [t.actor + t.critic for t in samples],
    }
    return {
        **{f"{name}_ms": round(1e3 * statistics.median(values), 3) for name, values in columns.items()},
        **{f"{name}_ms_samples": [round(1e3 * value, 3) for value in values] for name, values in columns.items()},
    }


def run_case(case: Case, repeats: int, quick: bool, clock: str) -> dict[str, Any]:
    own, other = prepare(case, quick, timing.CLOCKS[clock])
    # Making the contenders has updated each once already.
    samples = timing.alternate({"ours": own.time, case.peer: other.time}, repeats, warmup=1)
    result: dict[str, Any] = {"case": case._asdict(), "repeats": repeats, "clock": clock}
    quadratic = Quadratic(own)
    for who, contender in (("ours", own), (case.peer, other)):
        x, told = contender.direction()
        result[who] = {**milliseconds(samples[who]), **told, "gain": quadratic.gain(x)}
    mine, peer = result["ours"], result[case.peer]
    result["gain_ratio"] = mine["gain"] / peer["gain"]
    result["attainable_gain"] = quadratic.attainable()
    result["speed_up"] = {part: peer[f"{part}_ms"] / mine[f"{part}_ms"] for part in ("actor", "critic", "total")}
    result["floor"] = floor(own)
    result["over_floor"] = mine["total_ms"] / result["floor"]["ms"]
    return result


def print_case(name: str, result: dict[str, Any]) -> None:
    peer = result["case"]["peer"]
    for who in ("ours", peer):
        row = result[who]
        print(
            f"{name if who == 'ours' else '':16}{who:12}{row['actor_ms']:10.2f}{row['critic_ms']:10.2f}{row['total_ms']:10.2f}"
            f"{row['cg_iterations']:5}{row['gain']:12.5f}"
        )
    speed, targets = result["speed_up"], result["case"]["targets"]
    print(
        f"{'':16}{'speed-up':12}{speed['actor']:9.2f}×{speed['critic']:9.2f}×{speed['total']:9.2f}×{'':5}"
        f"{result['gain_ratio']:12.4f}   (targets ≥ {targets[0]:g}×, ≥ {targets[1]:g}×)"
    )
    found = result["floor"]
    share = f", best gain {result['attainable_gain']:.5f}"
    print(
        f"{'':16}floor {found['ms']:.2f} ms = {1e-9 * found['operations']:.2f} Gflop in {found['products']} products at "
        f"{found['gigaflops_per_second']:.1f} Gflop/s; ours {result['over_floor']:.2f}× the floor{share}",
        flush=True,
    )


# Memory: each figure from a process of its own.

MEMORY_SHAPES: dict[str, tuple[int, ...] | int] = {"frames": (4, 84, 84), "halfcheetah": 17, "humanoid": 348}
MEMORY_ACTIONS = {"frames": 6, "halfcheetah": 6, "humanoid": 17}


def random_model(who: str, shape: str, n_states: int) -> OnPolicyAlgorithm:
    """An algorithm with a full buffer of random numbers."""
    n_envs = 8
    if shape == "frames":
        env = peers.random_env(FRAMES, spaces.Discrete(MEMORY_ACTIONS[shape]), n_envs)
        policy, policy_kwargs = "CnnPolicy", {"share_features_extractor": True}
    else:
        observation_space = spaces.Box(-np.inf, np.inf, (MEMORY_SHAPES[shape],))
        env = peers.random_env(observation_space, spaces.Box(-1.0, 1.0, (MEMORY_ACTIONS[shape],)), n_envs)
        policy, policy_kwargs = "MlpPolicy", {"net_arch": [64, 64]}
    settings = {**peers.ZOO_TRPO, "n_steps": n_states // n_envs, "policy_kwargs": policy_kwargs}
    if who == "ours":
        model: OnPolicyAlgorithm = peers.ours(env, policy, **peers.as_ours(settings, env.action_space))
    else:
        # The peak is reached in the first product and the first minibatch; more of them only take time.
        model = peers.contrib(env, policy, **{**settings, "cg_max_steps": 2, "n_critic_updates": 1})
    model.set_logger(Logger(None, []))
    fill(model)
    return model


def fill(model: OnPolicyAlgorithm) -> None:
    """Random numbers in place of a rollout, with the policy's own actions."""
    buffer, rng = model.rollout_buffer, np.random.default_rng(0)
    for step in range(buffer.buffer_size):
        row = buffer.observations[step]
        row[...] = rng.integers(0, 256, row.shape, np.uint8) if row.dtype == np.uint8 else rng.normal(size=row.shape)
        with th.no_grad():
            actions, _, log_probs = model.policy(th.as_tensor(row))
        buffer.actions[step] = actions.numpy().reshape(buffer.actions[step].shape)
        buffer.log_probs[step] = log_probs.numpy()
    for name in ("advantages", "returns", "values"):
        setattr(buffer, name, rng.normal(size=buffer.rewards.shape).astype(np.float32))
    buffer.full, buffer.pos = True, buffer.buffer_size


def print_memory(who: str, shape: str, n_states: int) -> None:
    """In the process of its own: update, and print the figures as JSON."""
    model = random_model(who, shape, n_states)
    found = memory.peak_of(model.train)
    rollout = sum(getattr(model.rollout_buffer, name).nbytes for name in BUFFER_ARRAYS) / 2**20
    print(json.dumps({**found, "rollout_mib": rollout}))


def run_memory(quick: bool, write: Callable[[str, Any], None]) -> None:
    grid = [("frames", n) for n in ((256, 512) if quick else (2048, 4096))]
    grid += [(shape, n) for shape in ("halfcheetah", "humanoid") for n in (2048, 4096)]
    print(f"\n{'memory of an update':22}{'states':>8}{'rollout MiB':>13}{'ours MiB':>11}{'sb3-contrib MiB':>17}{'ratio':>8}")
    for shape, n_states in grid:
        whose = ("ours", "sb3-contrib")
        found = {who: memory.in_own_process(__file__, "--one-memory", who, shape, str(n_states)) for who in whose}
        own, other = (found[who].get("peak_over_before_mib", float("nan")) for who in whose)
        rollout = found["ours"].get("rollout_mib", float("nan"))
        print(f"{shape:22}{n_states:8}{rollout:13.1f}{own:11.1f}{other:17.1f}{own / other:8.3f}", flush=True)
        write(f"{shape}_{n_states}", found)


def run_scaling(repeats: int, quick: bool, clock: Clock) -> dict[str, Any]:
    """Our update on ever more states: copies of one rollout, so that the problem stays the same."""
    sizes = [1024 * 2**k for k in range(4 if quick else 6)]
    own, _ = prepare(CASES["halfcheetah"], quick, clock)
    arrays = {name: array.copy() for name, array in own._buffer.items()}
    rows: dict[int, dict[str, Any]] = {}
    contenders: dict[int, Ours] = {}
    for size in sizes:
        n_envs = own.model.n_envs
        n_steps = size // n_envs
        env = peers.random_env(own.model.observation_space, own.model.action_space, n_envs)
        settings = peers.as_ours({**peers.ZOO_TRPO, "n_steps": n_steps}, env.action_space)
        model = peers.ours(env, **settings, policy_kwargs={"net_arch": [64, 64]})
        model.policy.load_state_dict(own._start)
        for name, array in arrays.items():
            tiled = np.concatenate([array] * -(-n_steps // len(array)))[:n_steps]
            setattr(model.rollout_buffer, name, tiled.copy())
        model.rollout_buffer.full, model.rollout_buffer.pos = True, n_steps
        contenders[size] = Ours(model, clock)
    samples = timing.alternate({size: contender.time for size, contender in contenders.items()}, repeats, warmup=1)
    for size in sizes:
        rows[size] = {**milliseconds(samples[size]), "cg_iterations": contenders[size].direction()[1]["cg_iterations"]}
    exponents = {
        part: float(np.polyfit(np.log(sizes), np.log([rows[size][f"{part}_ms"] for size in sizes]), 1)[0])
        for part in ("actor", "critic", "total")
    }
    return {"states": rows, "exponents": exponents}


def print_scaling(result: dict[str, Any]) -> None:
    print(f"\n{'states':>8}{'actor ms':>12}{'critic ms':>12}{'total ms':>12}{'CG':>5}")
    for size, row in result["states"].items():
        print(f"{size:8}{row['actor_ms']:12.2f}{row['critic_ms']:12.2f}{row['total_ms']:12.2f}{row['cg_iterations']:5}")
    exponents = ", ".join(f"{part} {exponent:.3f}" for part, exponent in result["exponents"].items())
    print(f"time ∝ states^p, p: {exponents}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, *OTHERS]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--repeats", type=int, default=9, help="timed repetitions, after two for warm-up")
    parser.add_argument(
        "--quick", action="store_true", help="little training and few repetitions; writes no file unless --out"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/update.json")
    parser.add_argument("--one-memory", nargs=3, metavar=("WHO", "SHAPE", "STATES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_memory:
        who, shape, n_states = args.one_memory
        print_memory(who, shape, int(n_states))
        return
    out = args.out or (None if args.quick else peers.RESULTS / "update.json")
    repeats = 2 if args.quick else args.repeats

    print(f"{'case':16}{'':12}{'actor ms':>10}{'critic ms':>10}{'total ms':>10}{'CG':>5}{'gain':>12}")
    for name, case in CASES.items():
        if name in args.case:
            result = run_case(case, repeats, args.quick, args.clock)
            print_case(name, result)
            peers.update_json(out, "cases", name, result)
    if "frames" in args.case and out is not None:  # there is no quick one
        import frames  # needs ale-py

        frames.run(frames.parse(["--out", str(out.with_name("frames.json"))]))
    if "scaling" in args.case:
        result = run_scaling(repeats, args.quick, timing.CLOCKS[args.clock])
        print_scaling(result)
        peers.update_json(out, "others", "scaling", result)
    if "memory" in args.case:
        run_memory(args.quick, lambda name, found: peers.update_json(out, "memory", name, found))


if __name__ == "__main__":
    main()
