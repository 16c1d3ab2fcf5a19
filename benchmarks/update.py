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

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import sb3_contrib.trpo.trpo as contrib_module
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import VecEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

import sb3_trpo.trpo as our_module
from sb3_trpo.adapters.models import actor_model
from sb3_trpo.optim.batch import RolloutBatch, normalize_advantages
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.rollouts.buffers import read_rollout
from sb3_trpo.saving.sb3_contrib import kl_dimensions
from sb3_trpo.zoo.tianshou_peer import tianshou_trpo

FRAMES = spaces.Box(0, 255, (4, 84, 84), np.uint8)
BUFFER_ARRAYS = ("observations", "actions", "rewards", "advantages", "returns", "episode_starts", "log_probs", "values")


#: ``--clock``; CPU seconds are those of this process alone, which is what counts where other work takes turns on the core.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = time.perf_counter


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


class Times(NamedTuple):
    """Seconds of one update."""

    actor: float
    critic: float


class Contender:
    """
    An update that can be repeated.

    :param model: an SB3 algorithm with a full rollout buffer
    """

    def __init__(self, model: OnPolicyAlgorithm) -> None:
        self.model = model
        model.set_logger(Logger(None, []))
        self._buffer = {name: getattr(model.rollout_buffer, name).copy() for name in BUFFER_ARRAYS}
        self._start = copy.deepcopy(model.policy.state_dict())
        # Adam's state is there in every update but the first one.
        model.train()
        self._optimizer = copy.deepcopy(model.policy.optimizer.state_dict())
        self.restore()

    def restore(self) -> None:
        """Put everything back to before the update."""
        self.model.policy.load_state_dict(self._start)
        self.model.policy.optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        buffer = self.model.rollout_buffer
        for name, array in self._buffer.items():
            setattr(buffer, name, array.copy())
        buffer.generator_ready, buffer.full, buffer.pos = False, True, buffer.buffer_size

    def time(self) -> Times:
        """Update, and say how long the two parts took."""
        self.restore()
        gc.collect()
        started = CLOCK()
        turned = self._train()
        ended = CLOCK()
        return Times(turned - started, ended - turned)

    def _train(self) -> float:
        """Update; return the moment at which the critic's turn came."""
        raise NotImplementedError

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        """The direction x that the update finds, in terms of the joint KL, and what else is to be told."""
        raise NotImplementedError


class Ours(Contender):
    def _train(self) -> float:
        turned: list[float] = []
        fit = type(self.model)._fit_critic

        def marked(*args: Any) -> Any:
            turned.append(CLOCK())
            return fit(self.model, *args)

        with mock.patch.object(self.model, "_fit_critic", marked):
            self.model.train()
        return turned[0]

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        self.restore()
        solver, solutions = our_module.conjugate_gradient, []

        def solve(*args: Any, **kwargs: Any) -> Any:
            solutions.append(solver(*args, **kwargs))
            return solutions[-1]

        with mock.patch.object(our_module, "conjugate_gradient", solve):
            self.model.train()
        values = self.model.logger.name_to_value
        told = {
            "cg_iterations": solutions[0].iterations,
            "kl": float(values["train/kl_divergence_loss"]),
            "objective": float(values["train/policy_objective"]),
            "value_loss": float(values["train/value_loss"]),
        }
        return solutions[0].x, told


class Contrib(Contender):
    def _train(self) -> float:
        turned: list[float] = []
        get = self.model.rollout_buffer.get

        def marked(batch_size: int | None = None) -> Any:
            if batch_size is not None and not turned:
                turned.append(CLOCK())
            return get(batch_size)

        with mock.patch.object(self.model.rollout_buffer, "get", marked):
            self.model.train()
        return turned[0]

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        self.restore()
        solver, products, found = contrib_module.conjugate_gradient_solver, [], []

        def solve(product: Callable[[th.Tensor], th.Tensor], b: th.Tensor, **kwargs: Any) -> th.Tensor:
            def counted(v: th.Tensor) -> th.Tensor:
                products.append(1)
                return product(v)

            found.append(solver(counted, b, **kwargs))
            return found[-1]

        with mock.patch.object(contrib_module, "conjugate_gradient_solver", solve):
            self.model.train()
        # Its Fisher matrix and damping are the joint ones over d, so its direction is d times ours.
        d = kl_dimensions(self.model.action_space)
        values = self.model.logger.name_to_value
        told = {
            "cg_iterations": len(products) - 1,
            "kl": float(values["train/kl_divergence_loss"]) * d,
            "objective": float(values["train/policy_objective"]),
            "value_loss_mean_over_epochs": float(values["train/value_loss"]),
        }
        return found[0] / d, told


class Tianshou:
    """
    Tianshou's update on the rollout of an SB3 algorithm.

    :param model: algorithm with a full rollout buffer and a policy of two equal networks
    """

    def __init__(self, model: OnPolicyAlgorithm) -> None:
        from tianshou.data import Batch

        self.algorithm = tianshou_trpo(model.observation_space, model.action_space)
        peers.load_into_tianshou(model.policy, self.algorithm)
        rollout = normalize_advantages(read_rollout(model.rollout_buffer, model.action_space))
        observations = np.asarray(rollout.inputs)
        self._batch = Batch(
            obs=observations,
            act=rollout.actions,
            adv=rollout.advantages,
            returns=rollout.returns,
            info=np.array([{}] * len(observations)),
        )
        with th.no_grad():
            self._batch.logp_old = self.algorithm.policy(self._batch).dist.log_prob(self._batch.act)
        self._start = copy.deepcopy(self._state())
        self._update()
        self._start["optimizer"] = copy.deepcopy(self.algorithm.optim._optim.state_dict())
        self.restore()

    def _state(self) -> dict[str, Any]:
        return {"actor": self.algorithm.policy.state_dict(), "critic": self.algorithm.critic.state_dict()}

    def restore(self) -> None:
        self.algorithm.policy.load_state_dict(self._start["actor"])
        self.algorithm.critic.load_state_dict(self._start["critic"])
        self.algorithm.optim._optim.load_state_dict(copy.deepcopy(self._start["optimizer"]))

    def _update(self) -> None:
        self.algorithm._update_with_batch(self._batch, batch_size=None, repeat=1)

    def time(self) -> Times:
        self.restore()
        gc.collect()
        turned: list[float] = []

        def mark(*_: Any) -> None:
            if not turned:
                turned.append(CLOCK())

        handle = self.algorithm.critic.register_forward_pre_hook(mark)
        started = CLOCK()
        self._update()
        ended = CLOCK()
        handle.remove()
        return Times(turned[0] - started, ended - turned[0])

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        self.restore()
        solve, found = self.algorithm._conjugate_gradients, []

        def remember(*args: Any, **kwargs: Any) -> th.Tensor:
            found.append(-solve(*args, **kwargs))  # it descends
            return -found[-1]

        with mock.patch.object(self.algorithm, "_conjugate_gradients", remember):
            self._update()
        return found[0], {"cg_iterations": 10}


def prepare(case: Case, quick: bool) -> tuple[Ours, Contender | Tianshou]:
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
        return Ours(model), Tianshou(model)
    other = peers.contrib(env, policy, **settings, policy_kwargs=policy_kwargs)
    other.policy.load_state_dict(model.policy.state_dict())
    copy_rollout(model, other)
    return Ours(model), Contrib(other)


def _setting(case: Case) -> tuple[VecEnv, str, dict[str, Any], dict[str, Any]]:
    """Environment, policy, sb3-contrib's settings, and arguments of the policy."""
    settings = {**peers.ZOO_TRPO, "n_steps": case.n_steps, **case.settings}
    env = peers.make_env(case.task, case.n_envs, normalize=case.task != "CartPole-v1")
    return env, "MlpPolicy", settings, {"net_arch": list(case.hidden)}


def copy_rollout(source: OnPolicyAlgorithm, target: OnPolicyAlgorithm) -> None:
    for name in BUFFER_ARRAYS:
        setattr(target.rollout_buffer, name, getattr(source.rollout_buffer, name).copy())
    target.rollout_buffer.full, target.rollout_buffer.pos = True, target.rollout_buffer.buffer_size


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


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products and convolutions of what runs inside, by what they are applied to."""

    OPERATIONS: ClassVar[dict[Any, Any]] = {
        getattr(th.ops.aten, name).default: getattr(th.ops.aten, counted)
        for name, counted in [
            ("mm", "mm"),
            ("addmm", "addmm"),
            ("addmm_", "addmm"),
            ("bmm", "bmm"),
            ("convolution", "convolution"),
            ("convolution_backward", "convolution_backward"),
        ]
    }

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.arguments: dict[Any, tuple[Any, Any, dict[str, Any]]] = {}
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.OPERATIONS:
            self.operations += flop_registry[self.OPERATIONS[function]](*args, **(kwargs or {}), out_val=result)
            described = tree_map(_describe, (args, kwargs or {}))
            key = (function, repr(described))
            self.calls[key] += 1
            self.arguments[key] = (function, *described)
        return result

    def seconds(self) -> float:
        """Time of all of them by themselves, each the best of several runs on numbers in the same layout."""
        total = 0.0
        for key, count in self.calls.items():
            function, described, options = self.arguments[key]
            arguments = tree_map(_make, described)
            options = tree_map(_make, options)
            best = float("inf")
            began = CLOCK()
            for repetition in range(200):
                started = CLOCK()
                function(*arguments, **options)
                best = min(best, CLOCK() - started)
                if repetition >= 4 and CLOCK() - began > 0.1:
                    break
            total += count * best
        return total


class _Described(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Leaf:
    """Keeps a description from being taken for a tuple of numbers."""

    def __init__(self, described: _Described) -> None:
        self.described = described

    def __repr__(self) -> str:
        return repr(self.described)


def _describe(value: Any) -> Any:
    return _Leaf(_Described(tuple(value.shape), value.stride())) if isinstance(value, th.Tensor) else value


def _make(value: Any) -> Any:
    if not isinstance(value, _Leaf):
        return value
    return th.empty_strided(value.described.shape, value.described.strides).normal_()


def floor(contender: Ours) -> dict[str, float]:
    contender.restore()
    with MatrixProducts() as products:
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


def run_case(name: str, case: Case, repeats: int, quick: bool) -> dict[str, Any]:
    own, other = prepare(case, quick)
    samples: dict[str, list[Times]] = {"ours": [], case.peer: []}
    for repetition in range(-1, repeats):  # making the contenders has updated each once already
        for who, contender in (("ours", own), (case.peer, other)):
            times = contender.time()
            if repetition >= 0:
                samples[who].append(times)
    clock = next(key for key, function in CLOCKS.items() if function is CLOCK)
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


#: Makes glibc give freed blocks of a MiB and more back at once, so that the peak is memory in use and not in its store.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


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


def status(field: str) -> float:
    """A field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{field} is not in /proc/self/status")


def print_memory(who: str, shape: str, n_states: int) -> None:
    """In the process of its own: update, and print the figures as JSON."""
    model = random_model(who, shape, n_states)
    gc.collect()
    # Writing 5 resets the peak to what is held now.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    model.train()
    rollout = sum(getattr(model.rollout_buffer, name).nbytes for name in BUFFER_ARRAYS) / 2**20
    print(json.dumps({"before_mib": before, "peak_over_before_mib": status("VmHWM") - before, "rollout_mib": rollout}))


def run_memory(quick: bool, write: Callable[[str, Any], None]) -> None:
    grid = [("frames", n) for n in ((256, 512) if quick else (2048, 4096))]
    grid += [(shape, n) for shape in ("halfcheetah", "humanoid") for n in (2048, 4096)]
    print(f"\n{'memory of an update':22}{'states':>8}{'rollout MiB':>13}{'ours MiB':>11}{'sb3-contrib MiB':>17}{'ratio':>8}")
    for shape, n_states in grid:
        found: dict[str, Any] = {}
        for who in ("ours", "sb3-contrib"):
            command = [sys.executable, __file__, "--one-memory", who, shape, str(n_states)]
            process = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **RETURN_MEMORY})
            # Killed for want of memory: that is a figure, too.
            found[who] = json.loads(process.stdout) if process.returncode == 0 else {"failed": process.returncode}
        own, other = (found[who].get("peak_over_before_mib", float("nan")) for who in ("ours", "sb3-contrib"))
        rollout = found["ours"].get("rollout_mib", float("nan"))
        print(f"{shape:22}{n_states:8}{rollout:13.1f}{own:11.1f}{other:17.1f}{own / other:8.3f}", flush=True)
        write(f"{shape}_{n_states}", found)


def run_scaling(repeats: int, quick: bool) -> dict[str, Any]:
    """Our update on ever more states: copies of one rollout, so that the problem stays the same."""
    sizes = [1024 * 2**k for k in range(4 if quick else 6)]
    own, _ = prepare(CASES["halfcheetah"], quick)
    arrays = {name: array.copy() for name, array in own._buffer.items()}
    rows: dict[int, dict[str, Any]] = {}
    contenders = {}
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
        contenders[size] = Ours(model)
    samples: dict[int, list[Times]] = {size: [] for size in sizes}
    for repetition in range(-1, repeats):
        for size, contender in contenders.items():
            times = contender.time()
            if repetition >= 0:
                samples[size].append(times)
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
    global CLOCK
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, *OTHERS]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine with other work")
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
    CLOCK = CLOCKS[args.clock]
    out = args.out or (None if args.quick else peers.RESULTS / "update.json")
    repeats = 2 if args.quick else args.repeats

    print(f"{'case':16}{'':12}{'actor ms':>10}{'critic ms':>10}{'total ms':>10}{'CG':>5}{'gain':>12}")
    for name, case in CASES.items():
        if name in args.case:
            result = run_case(name, case, repeats, args.quick)
            print_case(name, result)
            peers.update_json(out, "cases", name, result)
    if "frames" in args.case and out is not None:  # there is no quick one
        import frames  # needs ale-py

        frames.run(frames.parse(["--out", str(out.with_name("frames.json"))]))
    if "scaling" in args.case:
        result = run_scaling(repeats, args.quick)
        print_scaling(result)
        peers.update_json(out, "others", "scaling", result)
    if "memory" in args.case:
        run_memory(args.quick, lambda name, found: peers.update_json(out, "memory", name, found))


if __name__ == "__main__":
    main()
