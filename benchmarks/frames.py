"""
How long an update on Atari frames takes: ours, sb3-contrib's TRPO and SB3's PPO, on the same weights and rollout.

    python benchmarks/frames.py               # or: python benchmarks/update.py --case frames
    python benchmarks/frames.py --memory      # peak memory of our update, a fresh process for each length of rollout

Breakout through RL Zoo's wrappers, 8 environments of 128 steps, Nature-CNN, shared by actor and critic or one each; the policy
before any training, and after some. Times are CPU seconds on one thread, medians where repeated, in alternation.
sb3-contrib's TRPO has its defaults but for our ``target_kl``, PPO RL Zoo's settings for Atari. The gain is
gᵀx − ½xᵀ(F + λI)x of the actor's direction x, with g and F from all frames, as a share of what conjugate gradients reach that
have converged on all frames. The step's length is set by the trust region and not by x, so the *scaled* gain is that of the
best multiple of x.
"""

import peers  # isort: skip  (first: one thread)
import timing  # isort: skip

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import ale_py
import gymnasium as gym
import memory
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO as ContribTRPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

import sb3_trpo.trpo as our_module
from sb3_trpo import TRPO
from sb3_trpo.optim.batch import normalize_advantages
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.objective import Surrogate

gym.register_envs(ale_py)

N_ENVS, N_STEPS, TARGET_KL = 8, 128, 0.01
FRAMES = spaces.Box(0, 255, (4, 84, 84), np.uint8)
BUFFER_ARRAYS = ("observations", "actions", "rewards", "advantages", "returns", "episode_starts", "log_probs", "values")
RESULTS = peers.RESULTS / "frames.json"
TRPO_SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "target_kl": TARGET_KL}
#: RL Zoo's settings of PPO for Atari.
PPO_SETTINGS: dict[str, Any] = {
    "n_steps": N_STEPS,
    "n_epochs": 4,
    "batch_size": 256,
    "learning_rate": LinearSchedule(2.5e-4, 0.0, 1.0),
    "clip_range": LinearSchedule(0.1, 0.0, 1.0),
    "vf_coef": 0.5,
    "ent_coef": 0.01,
}
CONTENDERS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any]]] = {
    "ours": (TRPO, {**TRPO_SETTINGS, "cg_residual_tol": 0.05}),
    "ours, 512 states": (TRPO, {**TRPO_SETTINGS, "cg_residual_tol": 0.05, "curvature_batch_size": 512}),
    "ours, tolerance 0.01": (TRPO, {**TRPO_SETTINGS, "cg_residual_tol": 0.01}),
    "ours, all states": (TRPO, {**TRPO_SETTINGS, "cg_residual_tol": 0.05, "curvature_batch_size": 10**9}),
    "PPO": (PPO, PPO_SETTINGS),
    "sb3-contrib": (ContribTRPO, TRPO_SETTINGS),
}


def breakout() -> VecEnv:
    return VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", N_ENVS, seed=0), 4)


def collect(train_steps: int, share: bool, folder: Path) -> dict[str, Any]:
    """Weights after some training, and a rollout of that policy; kept in a file."""
    path = folder / f"{train_steps}_{'shared' if share else 'separate'}.pt"
    if path.exists():
        return th.load(path, weights_only=False)  # type: ignore[no-any-return]
    policy_kwargs = {"share_features_extractor": share}
    model = TRPO("CnnPolicy", breakout(), seed=0, device="cpu", policy_kwargs=policy_kwargs, **TRPO_SETTINGS)
    if train_steps:
        model.learn(train_steps)
    _, callback = model._setup_learn(10**9, None, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model.env.close()
    arrays = {name: getattr(model.rollout_buffer, name).copy() for name in BUFFER_ARRAYS}
    th.save({"state": model.policy.state_dict(), **arrays}, path)
    return collect(train_steps, share, folder)


class Contender:
    """
    An update that can be repeated.

    :param name: in ``CONTENDERS``
    :param rollout: from :func:`collect`
    :param share: whether actor and critic share the extractor
    """

    def __init__(self, name: str, rollout: dict[str, Any], share: bool) -> None:
        algorithm, settings = CONTENDERS[name]
        env = peers.random_env(FRAMES, spaces.Discrete(4), N_ENVS)
        policy_kwargs = {"share_features_extractor": share}
        self.model = algorithm("CnnPolicy", env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **settings)
        self.model.set_logger(Logger(None, []))
        self.rollout = rollout
        self.seconds: list[float] = []

    def update(self) -> None:
        """Put weights and rollout back, update, and note the CPU seconds."""
        self.model.policy.load_state_dict(self.rollout["state"])
        buffer = self.model.rollout_buffer
        for name in BUFFER_ARRAYS:
            setattr(buffer, name, self.rollout[name].copy())
        buffer.generator_ready, buffer.full, buffer.pos = False, True, buffer.buffer_size
        gc.collect()
        self.seconds.append(timing.seconds_of(self.model.train, timing.CLOCKS["cpu"]))

    def direction(self) -> th.Tensor:
        """x of our update."""
        found: list[Any] = []

        def solve(*args: Any, **kwargs: Any) -> Any:
            found.append(conjugate_gradient(*args, **kwargs))
            return found[-1]

        with mock.patch.object(our_module, "conjugate_gradient", solve):
            self.update()
        return found[0].x


class Quadratic:
    """gᵀx − ½xᵀ(F + λI)x from all frames, relative to its maximum."""

    def __init__(self, contender: Contender) -> None:
        model = contender.model
        assert isinstance(model, TRPO)
        self._restore = lambda: model.policy.load_state_dict(contender.rollout["state"])  # F follows the weights
        self._restore()
        model.policy.set_training_mode(False)
        batch = normalize_advantages(model.adapter.read())
        surrogate = Surrogate(model.adapter.actor(batch), batch, 256)
        self._gradient = surrogate.gradient()
        self._fisher = FisherOperator(surrogate, model.cg_damping)
        solution = conjugate_gradient(self._fisher, self._gradient, max_iter=40, rtol=2e-4)
        self.iterations, self.residual = solution.iterations, solution.residual
        self._best = 0.5 * float(self._gradient.dot(solution.x))

    def gains(self, x: th.Tensor) -> dict[str, float]:
        self._restore()
        slope, curvature = float(self._gradient.dot(x)), float(x.dot(self._fisher(x)))
        return {
            "gain": round((slope - 0.5 * curvature) / self._best, 4),
            "scaled_gain": round(0.5 * slope**2 / curvature / self._best, 4),
        }


def run(args: argparse.Namespace) -> None:
    """Time and judge the contenders; ours and PPO's are repeated."""
    repeats, train_steps = args.repeats, args.train_steps
    for policy in args.policies:
        for extractor in args.extractors:
            share = extractor == "shared"
            rollout = collect(train_steps if policy == "trained" else 0, share, args.rollouts)
            if args.collect:
                continue
            contenders = {name: Contender(name, rollout, share) for name in args.contenders}
            updates = {name: contender.update for name, contender in contenders.items()}
            timing.alternate(updates, 1)
            timing.alternate({name: update for name, update in updates.items() if name in ("ours", "PPO")}, repeats - 1)
            rows: dict[str, Any] = {"train_steps": train_steps}
            if "ours" in contenders:
                quadratic = Quadratic(contenders["ours"])
                rows["converged"] = {"cg_iterations": quadratic.iterations, "residual": quadratic.residual}
            for name, contender in contenders.items():
                rows[name] = {"seconds": round(statistics.median(contender.seconds), 3), "samples": contender.seconds}
                if isinstance(contender.model, TRPO):
                    rows[name] |= quadratic.gains(contender.direction())
                    values = contender.model.logger.name_to_value
                    for key in ("cg_iterations", "kl_divergence_loss", "expected_improvement", "value_loss"):
                        rows[name][key] = float(values[f"train/{key}"])
                shown = {key: value for key, value in rows[name].items() if key != "samples"}
                print(f"{policy:10}{extractor:10}{name:22}", shown, flush=True)
            key = f"{policy}, {extractor}"
            known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            peers.update_json(args.out, "updates", key, {**known.get("updates", {}).get(key, {}), **rows})


# ---- memory


def print_memory(n_states: int) -> None:
    """In a process of its own: update on random frames, and print the figures as JSON."""
    env = peers.random_env(FRAMES, spaces.Discrete(4), N_ENVS)
    model = TRPO("CnnPolicy", env, n_steps=n_states // N_ENVS, target_kl=TARGET_KL, seed=0, device="cpu")
    model.set_logger(Logger(None, []))
    buffer, rng = model.rollout_buffer, np.random.default_rng(0)
    for step in range(buffer.buffer_size):
        buffer.observations[step] = rng.integers(0, 256, buffer.observations.shape[1:], np.uint8)
    for name in ("advantages", "returns", "values"):
        setattr(buffer, name, rng.normal(size=buffer.rewards.shape).astype(np.float32))
    buffer.actions = rng.integers(0, 4, buffer.actions.shape).astype(buffer.actions.dtype)
    buffer.full, buffer.pos = True, buffer.buffer_size
    found = memory.peak_of(model.train)
    rollout = buffer.observations.nbytes / 2**20
    print(json.dumps({"rollout_mib": rollout, "peak_over_before_mib": found["peak_over_before_mib"]}))


def run_memory(out: Path | None) -> None:
    for n_states in (1024, 4096, 16384):
        found = memory.in_own_process(__file__, "--one-memory", str(n_states))
        print(n_states, found, flush=True)
        peers.update_json(out, "memory", str(n_states), found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=["untrained", "trained"], default=["untrained", "trained"])
    parser.add_argument("--extractors", nargs="+", choices=["separate", "shared"], default=["separate", "shared"])
    parser.add_argument("--train-steps", type=int, default=12_288)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--collect", action="store_true", help="only collect the rollouts")
    parser.add_argument("--rollouts", type=Path, default=Path(tempfile.gettempdir()), help="folder that keeps them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.one_memory:
        print_memory(args.one_memory)
    elif args.memory:
        run_memory(args.out)
    else:
        run(args)


if __name__ == "__main__":
    main()
