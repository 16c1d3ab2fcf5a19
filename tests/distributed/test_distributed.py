"""Several processes that take one common step: the same as one process with all environments."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from support.tasks import needs_v5

import sb3_trpo.distributed.process_group
from sb3_trpo import NPG, TRPO, CheckpointCallback, MaskableTRPO, RankError, RecurrentTRPO, latest_checkpoint
from sb3_trpo.distributed.moments import merged
from sb3_trpo.distributed.process_group import (
    SINGLE_PROCESS,
    SINGLE_RANK,
    RankInfo,
    _agree_on_prefix,
    detect_rank,
    join,
    local_device,
)
from sb3_trpo.distributed.synchronization import check_fingerprints
from sb3_trpo.optim.moments import moments
from sb3_trpo.optim.parameters import flatten

N_STEPS = 24
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


# ---- processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(rank: int, size: int, port: int) -> None:
    os.environ.update(zip(LAUNCHED, map(str, (rank, size, rank, "127.0.0.1", port)), strict=True))


def be_rank(place: tuple[int, int, int], results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    launch(*place)
    th.set_num_threads(1)
    try:
        results.put((place[0], function(*args), None))
    except BaseException:  # noqa: BLE001 - whatever it is, the first process has to know
        results.put((place[0], None, traceback.format_exc()))


def together(function: Callable[..., Any], *args: Any, size: int = 2, fails: tuple[int, ...] = ()) -> list[Any]:
    """Call a function in several processes, of which this one is the first; results by rank, tracebacks of those to fail."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sb3_trpo", "pytest", "stable_baselines3.common.env_util", "gymnasium.envs.classic_control"]
    )
    results, port = context.Queue(), free_port()
    others = [
        context.Process(target=be_rank, args=((rank, size, port), results, function, args), daemon=True)
        for rank in range(1, size)
    ]
    for process in others:
        process.start()
    before = {name: os.environ.get(name) for name in LAUNCHED}
    launch(0, size, port)
    try:
        found = {0: (function(*args), None)}
        for _ in others:
            rank, result, error = results.get(timeout=120)
            found[rank] = (result, error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sb3_trpo.distributed.process_group._trace = None
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for process in others:
            process.join(timeout=10)
            process.kill()
    for rank, (_, error) in found.items():
        assert (error is not None) == (rank in fails), error
    return [error if rank in fails else result for rank, (result, error) in sorted(found.items())]


def rank() -> int:
    return int(os.environ["RANK"])


# ---- the update


class Cast(FlattenExtractor):
    """SB3 makes every observation float32; this gives it the type of the policy."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space)
        self.register_buffer("like", th.zeros(1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).to(self.like.dtype)


class Normed(Cast):
    """Normalizes by running statistics."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


class Masked(gym.Env):
    """Short episodes; an action that depends on the step is forbidden."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation = self.np_random.normal(size=3).astype(np.float32)
        return observation, float(action + observation[0]), self.steps == 5, self.steps == 7, {}

    def action_masks(self) -> np.ndarray:
        return np.arange(4) != self.steps % 4


UPDATES: dict[str, tuple[type[TRPO], Any, dict[str, Any]]] = {
    "trpo": (TRPO, "Pendulum-v1", {}),
    "sample": (TRPO, "Pendulum-v1", {"curvature_batch_size": 10**6}),
    "chunks": (TRPO, "Pendulum-v1", {"max_batch_size": 20, "target_kl": 0.01}),
    "discrete": (TRPO, "CartPole-v1", {"ent_coef": 0.01, "normalize_advantage": False}),
    "several_steps": (TRPO, "Pendulum-v1", {"n_policy_updates": 2, "line_search_accept_ratio": 0.1}),
    "state_kl": (TRPO, "Pendulum-v1", {"max_state_kl": 0.02}),
    "gsde": (TRPO, "Pendulum-v1", {"use_sde": True, "cg_preconditioner": None}),
    "scaled_returns": (TRPO, "Pendulum-v1", {"return_scaling": True, "n_critic_steps": 2}),
    "minibatches": (TRPO, "Pendulum-v1", {"critic_method": "minibatch", "batch_size": 10**6, "n_critic_updates": 3}),
    "npg": (NPG, "Pendulum-v1", {}),
    "recurrent": (RecurrentTRPO, "CartPole-v1", {}),
    "maskable": (MaskableTRPO, Masked, {}),
    "batch_norm": (TRPO, "Pendulum-v1", {"max_batch_size": 20}),
}
LSTM = {"lstm_hidden_size": 6, "net_arch": [5]}


def alone(algorithm: type[TRPO]) -> type[TRPO]:
    """The algorithm, trained in its own process."""
    return type("Alone", (algorithm,), {"distributed": False})


def make(name: str, n_envs: int, seed: int = 0, *, is_alone: bool = False, **kwargs: Any) -> TRPO:
    algorithm, env, arguments = UPDATES[name]
    recurrent = algorithm is RecurrentTRPO
    extractor = Normed if name == "batch_norm" else Cast
    algorithm = alone(algorithm) if is_alone else algorithm
    return algorithm(
        "MlpLstmPolicy" if recurrent else "MlpPolicy",
        make_vec_env(env, n_envs),
        n_steps=N_STEPS,
        seed=seed,
        device="cpu",
        policy_kwargs={"features_extractor_class": extractor, **(LSTM if recurrent else {"net_arch": [8]})},
        **{**arguments, **kwargs},
    )


def cut(buffer: Any, whole: Any, envs: slice, dtype: Any) -> None:
    """Fill a buffer with what another has of some environments."""
    for name, array in vars(whole).items():
        if isinstance(array, np.ndarray):
            axis = 2 if "_states_" in name else 1  # (step, layer, env, ...), or (step, env, ...)
            part = array[(slice(None),) * axis + (envs,)]
            setattr(buffer, name, part.astype(dtype) if part.dtype.kind == "f" else part)
    buffer.full, buffer.pos = True, whole.pos


def numbers(policy: th.nn.Module) -> th.Tensor:
    """Parameters and running statistics."""
    return flatten([tensor for tensor in policy.state_dict().values() if tensor.is_floating_point()])


def update(name: str, shares: list[int], dtype: th.dtype) -> dict[str, np.ndarray]:
    """One update by all processes with their shares, and one by a single process with all environments."""
    numpy_dtype = np.float64 if dtype == th.float64 else np.float32
    whole = make(name, sum(shares), is_alone=True).learn(2 * N_STEPS * sum(shares))
    own = make(name, shares[rank()])
    own.policy.load_state_dict(whole.policy.state_dict())
    own._kl_ratio = whole._kl_ratio
    if whole.use_sde:
        own.policy.action_dist.exploration_mat = whole.policy.action_dist.exploration_mat
    before = sum(shares[: rank()])
    cut(own.rollout_buffer, whole.rollout_buffer, slice(before, before + shares[rank()]), numpy_dtype)
    cut(whole.rollout_buffer, whole.rollout_buffer, slice(None), numpy_dtype)
    own._ranks = join(own._place, own.n_envs, own.device, 60.0)
    logs = {}
    for kind, model in (("own", own), ("whole", whole)):
        model.policy.to(dtype)
        model.policy.optimizer = th.optim.Adam(model.policy.parameters(), 1e-3)
        model.return_moments = RunningMeanStd(epsilon=0.0)
        model.set_logger(Logger(None, []))
        model.train()
        log = model.logger.name_to_value
        logs[kind] = np.array([log[f"train/{key}"] for key in COMPARED])
    moved = numbers(whole.policy) - numbers(make(name, 1).policy).to(dtype)
    return {
        "own": numbers(own.policy).detach().numpy(),
        "whole": numbers(whole.policy).detach().numpy(),
        "moved": moved.detach().numpy(),
        "own_log": logs["own"],
        "whole_log": logs["whole"],
        "return_moments": np.array([[m.return_moments.mean, m.return_moments.var] for m in (own, whole)]),
    }


COMPARED = ("kl_divergence_loss", "policy_objective", "value_loss", "explained_variance", "entropy", "cg_iterations")


#: The others, without a preconditioner or with two steps of the critic, enlarge the rounding errors of single precision.
SINGLE_PRECISION = [name for name in UPDATES if name not in ("gsde", "scaled_returns")]


@pytest.mark.filterwarnings("ignore:batch_size=1000000 does not divide")  # one minibatch of all states
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, th.float64) for name in UPDATES), *((name, th.float32) for name in SINGLE_PRECISION)]
)
def test_the_common_step_is_that_of_one_process_with_all_environments(name: str, dtype: th.dtype) -> None:
    tolerance = 1e-10 if dtype == th.float64 else 3e-5
    first, second = together(update, name, [1, 3], dtype)
    np.testing.assert_array_equal(first["own"], second["own"])
    np.testing.assert_allclose(first["own"], first["whole"], rtol=tolerance, atol=tolerance)
    assert np.abs(first["moved"]).max() > 1e-3
    np.testing.assert_allclose(first["own_log"], first["whole_log"], rtol=100 * tolerance, atol=tolerance)
    np.testing.assert_array_equal(first["own_log"], second["own_log"])
    np.testing.assert_allclose(*first["return_moments"], rtol=1e-6)


@pytest.mark.parametrize("n_envs", [[2, 1, 1], [1, 1, 1, 1]], ids=["three", "four"])
def test_more_processes_take_the_step_of_one(n_envs: list[int]) -> None:
    results = together(update, "trpo", n_envs, th.float64, size=len(n_envs))
    for result in results:
        np.testing.assert_array_equal(result["own"], results[0]["own"])
        np.testing.assert_allclose(result["own"], results[0]["whole"], rtol=0.0, atol=1e-10)


# ---- statistics


def seen_by(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).normal(1e3 * rank, 2.0 + rank, size=(5 + 7 * rank, 3))


def gathered_moments() -> list[Any]:
    ranks = join(detect_rank(None), 1, th.device("cpu"), 60.0)
    return [value.tolist() if isinstance(value, th.Tensor) else value for value in moments(th.tensor(seen_by(rank())), ranks)]


def test_moments_are_those_of_all_values() -> None:
    values = np.concatenate([seen_by(0), seen_by(1), seen_by(2)])
    for mean, variance, count in together(gathered_moments, size=3):
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(variance, values.var(axis=0), rtol=1e-12)
        assert count == len(values)


def merged_moments() -> list[list[Any]]:
    ranks = join(detect_rank(None), 1, th.device("cpu"), 60.0)
    vector, number, idle = RunningMeanStd(shape=(3,)), RunningMeanStd(), RunningMeanStd(shape=(2,))
    vector.update(1e4 + seen_by(0))
    number.update(seen_by(0)[:, 0])
    before = {name: np.copy(value) for name, value in vars(idle).items()}
    with merged([vector, number, idle], ranks):
        for row in seen_by(rank()):
            vector.update(1e4 + row[None])
            number.update(row[:1])
    assert all(np.array_equal(value, before[name]) for name, value in vars(idle).items())
    return [[rms.mean, rms.var, rms.count] for rms in (vector, number)]


def test_running_moments_are_those_of_all_processes() -> None:
    own = np.concatenate([seen_by(0), seen_by(0), seen_by(1)])
    vector, number = RunningMeanStd(shape=(3,)), RunningMeanStd()
    vector.update(1e4 + own)
    number.update(own[:, 0])
    for found in together(merged_moments):
        for (mean, var, count), expected in zip(found, (vector, number), strict=True):
            np.testing.assert_allclose(mean, expected.mean, rtol=1e-12)
            np.testing.assert_allclose(var, expected.var, rtol=1e-9)
            assert count == pytest.approx(expected.count)


# ---- whole trainings


class Recorder(BaseCallback):
    """What callbacks see, and whether they are called."""

    def __init__(self, on_every_rank: bool = False, stop_at: int | None = None) -> None:
        super().__init__()
        self.on_every_rank, self.stop_at = on_every_rank, stop_at
        self.observations: list[np.ndarray] = []
        self.ended = 0

    def _on_step(self) -> bool:
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None:
            self.observations.append(normalizer.get_original_obs())
        return self.stop_at is None or self.n_calls < self.stop_at

    def _on_rollout_end(self) -> None:
        self.ended += 1


def train(folder: Path, n_envs: list[int], n_updates: int = 3, **kwargs: Any) -> dict[str, Any]:
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs[rank()]), gamma=0.9)
    arguments = {"n_steps": 200, "seed": 3, "device": "cpu", "policy_kwargs": {"net_arch": [16]}, **kwargs}
    model = TRPO("MlpPolicy", env, verbose=1, tensorboard_log=str(folder / f"log_{rank()}"), **arguments)
    model._kl_ratio = 1.0 + 0.1 * rank()  # the first one's counts
    everywhere, first = Recorder(on_every_rank=True), Recorder()
    begun = [env.reset()]
    model.learn(n_updates * 200 * sum(n_envs), callback=CallbackList([everywhere, first]), progress_bar=False)
    model.save(folder / f"model_{rank()}")
    return {
        "parameters": flatten(model.policy.parameters()).detach().numpy(),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "calls": (everywhere.n_calls, first.n_calls),
        "observations": np.concatenate(begun + everywhere.observations),
        "original": np.stack(everywhere.observations),
        "moments": [(rms.mean, rms.var, rms.count) for rms in (env.obs_rms, env.ret_rms)],
        "episodes": [episode["r"] for episode in model.ep_info_buffer],
        "logged": (folder / f"log_{rank()}").exists(),
    }


def test_a_training_is_one_training(tmp_path: Path) -> None:
    a, b = together(train, tmp_path, [2, 1])
    np.testing.assert_array_equal(a["parameters"], b["parameters"])
    assert a["num_timesteps"] == b["num_timesteps"] == 3 * 200 * 3
    assert a["n_updates"] == b["n_updates"] == 3
    assert a["calls"] == (600, 600)
    assert b["calls"] == (600, 0)
    assert len(a["episodes"]) == 9  # three of 200 steps in each of three environments
    assert a["episodes"] == b["episodes"]
    assert len(set(a["episodes"])) == 9
    assert (a["logged"], b["logged"]) == (True, False)
    assert sorted(path.name for path in tmp_path.glob("*.zip")) == ["model_0.zip"]
    for ours, theirs in zip(a["moments"], b["moments"], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)
    # Every observation of all environments has been counted once: those of all steps, and those of the resets.
    assert a["moments"][0][2] == pytest.approx(3 * 600 + 2 * 3 + 1e-4, abs=4)
    seen = np.concatenate([r["original"].reshape(-1, 3) for r in (a, b)])
    np.testing.assert_allclose(a["moments"][0][0], seen.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(a["moments"][0][1], seen.var(axis=0), rtol=0.02)


def evaluate() -> int:
    callback = EvalCallback(make_vec_env("CartPole-v1", 1), eval_freq=10, n_eval_episodes=1, verbose=0)
    TRPO("MlpPolicy", make_vec_env("CartPole-v1", 1), n_steps=32, device="cpu").learn(64, callback=callback)
    return callback.n_calls


def test_the_first_process_evaluates() -> None:
    assert together(evaluate) == [32, 0]


def stop(stopper: int) -> tuple[int, int, int, bool]:
    recorder = Recorder(on_every_rank=True, stop_at=40 if rank() == stopper else None)
    model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", 1), n_steps=32, device="cpu").learn(320, callback=recorder)
    return model._n_updates, model.num_timesteps, recorder.ended, model.rollout_was_broken_off


@pytest.mark.parametrize("stopper", [0, 1])
def test_a_callback_stops_all_processes(stopper: int) -> None:
    results = together(stop, stopper)
    assert [(n_updates, steps, broken_off) for n_updates, steps, _, broken_off in results] == 2 * [(1, 64 + 8 + 32, True)]


def seeds(seed: int | None) -> tuple[float, int]:
    model = make("trpo", 2, seed=seed) if seed is not None else TRPO("MlpPolicy", "Pendulum-v1", device="cpu")
    return float(th.rand(1)), model.env._seeds[0] if hasattr(model.env, "_seeds") else -1


def test_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for seed in (0, None):
        for place in (RankInfo(0, 2), RankInfo(1, 2)):
            monkeypatch.setattr(TRPO, "_place", place)
            th.manual_seed(5)
            drawn[seed, place.rank] = seeds(seed)
    assert len({noise for noise, _ in drawn.values()}) == 4
    assert [drawn[0, rank][1] for rank in (0, 1)] == [0, 10_000]


# ---- what goes wrong


def disagree(what: dict[str, Any]) -> None:
    arguments: dict[str, Any] = what if rank() == 1 else {}
    model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", 1), **{"n_steps": 32, "device": "cpu", **arguments})
    model.rank_timeout = 60.0
    with pytest.raises(ValueError, match="rank 1 is not allowed: rank 0 has") as error:
        model.learn(64)
    assert next(iter(what)).split("_")[0] in str(error.value)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("what", [{"n_steps": 16}, {"target_kl": 0.01}, {"policy_kwargs": {"net_arch": [3]}}])
def test_arguments_must_agree(what: dict[str, Any]) -> None:
    together(disagree, what)


class Acts(BaseCallback):
    """Does something to the model or the process at a rollout of one process."""

    on_every_rank = True

    def __init__(self, what: Callable[[Any], Any], at_rank: int = 1, at_rollout: int = 3) -> None:
        super().__init__()
        self.what, self.at_rank, self.left = what, at_rank, at_rollout

    def _on_rollout_start(self) -> None:
        self.left -= 1
        if self.left == 0 and rank() == self.at_rank:
            self.what(self.model)

    def _on_step(self) -> bool:
        return True


def moves(model: Any) -> None:
    with th.no_grad():
        next(model.policy.parameters()).flatten()[0] += 1e-6


def dies(model: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(model: Any) -> None:
    time.sleep(600)


def fail(what: Callable[[Any], Any], message: str, timeout: float, folder: Path) -> None:
    model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", 1), n_steps=32, device="cpu")
    model.rank_timeout = timeout
    callbacks: list[BaseCallback] = [Acts(what), CheckpointCallback(folder, save_freq=64)]
    with pytest.raises(RankError, match=message) as error:
        model.learn(640, callback=callbacks)
    assert error.value.ranks == (1,)


def test_a_process_that_comes_to_other_parameters_is_named(tmp_path: Path) -> None:
    together(fail, moves, "rank 1 diverged from the other ranks in: parameters", 60.0, tmp_path)


def be_killed(what: Callable[[Any], Any], timeout: float, folder: Path) -> None:
    ready = folder / "ready"
    if rank() == 0:
        while not ready.exists():  # the time-out is for what comes later
            time.sleep(0.05)
        message = r"rank 1 does not answer any more.*rank 0 of 2.*last checkpoint"
        fail(what, message, timeout, folder)
    else:
        model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", 1), n_steps=32, device="cpu")
        model.rank_timeout = timeout
        ready.touch()
        model.learn(640, callback=[Acts(what), CheckpointCallback(folder, save_freq=64)])


@pytest.mark.parametrize(("what", "timeout"), [(dies, 60.0), (hangs, 10.0)])
def test_a_process_that_dies_or_hangs_is_named_and_the_checkpoint_is_whole(
    what: Callable[[Any], Any], timeout: float, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    results, port = context.Queue(), free_port()
    other = context.Process(target=be_rank, args=((1, 2, port), results, be_killed, (what, timeout, tmp_path)), daemon=True)
    other.start()
    launch(0, 2, port)
    try:
        be_killed(what, timeout, tmp_path)
    finally:
        dist.destroy_process_group()
        sb3_trpo.distributed.process_group._trace = None
        for name in LAUNCHED:
            del os.environ[name]
        other.kill()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint_64_steps.zip"  # the death was before the next
    with pytest.warns(UserWarning, match="of 2 processes is resumed in 1"):
        assert TRPO.resume(checkpoint, make_vec_env("CartPole-v1", 1), device="cpu").num_timesteps == 64


def test_fingerprints_name_the_odd_ones() -> None:
    prints = [{"parameters": name} for name in "aabaa"]
    with pytest.raises(RankError, match="rank 2 diverged from the other ranks in: parameters") as error:
        check_fingerprints(prints)
    assert error.value.ranks == (2,)
    with pytest.raises(RankError) as error:
        check_fingerprints([{"x": "b"}, {"x": "a"}, {"x": "a"}])
    assert error.value.ranks == (0,)
    check_fingerprints([{"x": "a"}] * 3)


def test_processes_that_do_not_come_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHED, ("0", "2", "0", "127.0.0.1", str(free_port())), strict=True):
        monkeypatch.setenv(name, value)
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=32, device="cpu")
    model.rank_timeout = 1.0
    with pytest.raises(RankError, match=r"2 processes could not meet \(time-out: 1\.0 seconds\)"):
        model.learn(64)


def test_processes_that_died_leave_nothing_that_matters() -> None:
    """The launcher's store is the same after a restart, with the names of the processes before in it."""
    store = dist.HashStore()
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            places = [RankInfo(rank, 3) for rank in (1, 0, 2)]
            meetings = [pool.submit(_agree_on_prefix, store, place, time.monotonic() + 10.0) for place in places]
            (name,) = {meeting.result() for meeting in meetings}
        names.append(name)
    assert len(set(names)) == 3
    for place in (RankInfo(1, 3), RankInfo(0, 3)):  # one alone, with what the others have left
        with pytest.raises(TimeoutError, match="not all of them have come"):
            _agree_on_prefix(store, place, time.monotonic() + 0.1)


# ---- checkpoints


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def end(model: TRPO) -> list[Any]:
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    moments = [value for rms in (normalizer.obs_rms, normalizer.ret_rms) for value in (rms.mean, rms.var, rms.count)]
    return [
        flatten(model.policy.parameters()).detach().numpy(),
        *moments,
        normalizer.returns,
        model._last_obs,
        th.rand(2).numpy(),
    ]


def go_on(name: str, folder: Path) -> tuple[bool, bool]:
    def env() -> VecEnv:
        return VecNormalize(make_vec_env(UPDATES[name][1], 1 + rank()))

    algorithm, _, arguments = UPDATES[name]
    policy = "MlpLstmPolicy" if algorithm is RecurrentTRPO else "MlpPolicy"
    model = algorithm(policy, env(), n_steps=N_STEPS, seed=1, device="cpu", **arguments)
    model.learn(6 * 3 * N_STEPS, callback=CheckpointCallback(folder, save_freq=3 * N_STEPS))
    path = folder / f"checkpoint_{4 * 3 * N_STEPS}_steps.zip"
    resumed = algorithm.resume(path, env(), device="cpu")
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    return resumed.num_timesteps == model.num_timesteps, same(end(model)[:-1], end(resumed)[:-1])


@pytest.mark.parametrize("name", ["trpo", "recurrent", "maskable"])
def test_a_checkpoint_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert together(go_on, name, tmp_path) == [(True, True)] * 2


def save(folder: Path) -> list[Any]:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=1, device="cpu").learn(4 * N_STEPS)
    model.save_checkpoint(folder / "checkpoint.zip")
    return end(model)


def test_a_checkpoint_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    saved = together(save, tmp_path)[0]
    env = VecNormalize(make_vec_env("Pendulum-v1", 3))
    with pytest.warns(UserWarning, match="of 2 processes is resumed in 1") as caught:
        model = TRPO.resume(tmp_path / "checkpoint.zip", env, device="cpu")
    assert len(caught) == 1
    assert same(end(model)[:7], saved[:7])
    assert model.learn(3 * N_STEPS, reset_num_timesteps=False).num_timesteps == 7 * N_STEPS


# ---- alone


def test_alone_a_sum_is_the_number_itself() -> None:
    tensor = th.ones(3)
    assert SINGLE_PROCESS.sum(tensor) is tensor
    assert SINGLE_PROCESS.max(tensor) is tensor
    tensors = [tensor, tensor]
    assert SINGLE_PROCESS.sum_each(tensors) is tensors
    assert th.equal(SINGLE_PROCESS.gather(tensor), tensor[None])
    assert SINGLE_PROCESS.gather_objects("word") == ["word"]
    SINGLE_PROCESS.broadcast(tensors)
    assert join(SINGLE_RANK, 2, th.device("cpu"), 1.0) is SINGLE_PROCESS


def test_other_processes_must_be_there_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (True, "yes"):
        monkeypatch.setattr(TRPO, "distributed", value)
        with pytest.raises(ValueError, match=f"distributed={value!r} is not allowed"):
            TRPO("MlpPolicy", "CartPole-v1")
    monkeypatch.undo()
    with pytest.raises(TypeError, match=r"'distributed': set the class attribute"):
        TRPO("MlpPolicy", "CartPole-v1", distributed=False)  # type: ignore[call-arg]
    for name, value in zip(LAUNCHED, ("1", "2", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert detect_rank(None) == detect_rank(True) == RankInfo(1, 2)
    assert detect_rank(False) == SINGLE_RANK
    model = alone(TRPO)("MlpPolicy", "CartPole-v1", n_steps=8, device="cpu", verbose=1)
    assert model.learn(8).num_timesteps == 8
    assert model.verbose == 1


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("auto", RankInfo(3, 4)) == "auto"  # there is no card here
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
    assert local_device("auto", RankInfo(3, 4)) == th.device("cuda:1")
    assert local_device("cuda", RankInfo(3, 4)) == th.device("cuda:1")
    assert local_device("cpu", RankInfo(3, 4)) == "cpu"
    assert local_device("auto", SINGLE_RANK) == "auto"


# ---- torchrun


SCRIPT = """
import os, signal, sys
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from sb3_trpo import TRPO, CheckpointCallback, latest_checkpoint

th.set_num_threads(1)
folder, dies = sys.argv[1], len(sys.argv) > 2

class Dies(BaseCallback):
    on_every_rank = True
    def _on_step(self):
        first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if dies and first_time and os.environ["RANK"] == "1" and self.n_calls == 120:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

env = make_vec_env("HalfCheetah-v5", 1)
path = latest_checkpoint(folder)
print("begins at", path and path.name, flush=True)
model = TRPO.resume(path, env, device="cpu") if path else TRPO("MlpPolicy", env, n_steps=32, seed=0, device="cpu")
model.learn(6 * 64 - model.num_timesteps, callback=[Dies(), CheckpointCallback(folder, 64)], reset_num_timesteps=False)
print("ends with", model.num_timesteps, sum(p.double().abs().sum().item() for p in model.policy.parameters()), flush=True)
"""


def torchrun(*arguments: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ends(output: str) -> set[str]:
    return set(re.findall(r"ends with .*", output))


@needs_v5
@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint_after_a_kill(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    whole, _ = torchrun("--standalone", script, tmp_path / "whole").communicate(timeout=300)
    killed, _ = torchrun("--standalone", "--max-restarts=1", script, tmp_path / "killed", "dies").communicate(timeout=300)
    assert "begins at None" in killed
    # The kill comes near the end of the fourth rollout, with the checkpoint of its beginning just written, if it is.
    assert re.search(r"begins at checkpoint_(128|192)_steps\.zip", killed), killed
    assert len(ends(whole)) == 1, whole
    assert ends(whole) == ends(killed), killed


@needs_v5
@pytest.mark.slow
def test_two_nodes_on_loopback_are_as_one(tmp_path: Path) -> None:
    script, port = tmp_path / "train.py", free_port()
    script.write_text(SCRIPT)
    nodes = [
        torchrun(
            *(
                "--nnodes=2",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}",
                "--rdzv-id=1",
                "--local-addr=127.0.0.1",
            ),
            *(script, tmp_path / "checkpoints"),
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert len(ends(outputs[0])) == 1, outputs[0]
    assert ends(outputs[0]) == ends(outputs[1]), outputs[1]
    assert "ends with 384 " in outputs[0]
