"""A training that is resumed from a checkpoint is the uninterrupted one, bit for bit."""

import copy
import functools
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from support.arguments import effective
from support.tasks import needs_v5, v5

from sb3_trpo import (
    NPG,
    TRPO,
    CheckpointCallback,
    MaskableTRPO,
    RecurrentTRPO,
    ResumableEnv,
    UntrustedFileError,
    WatchedSubprocVecEnv,
    latest_checkpoint,
)
from sb3_trpo.callbacks import checkpoints
from sb3_trpo.errors import MismatchError, UsageError
from sb3_trpo.saving.env_state import capture, restore

N_STEPS, N_ENVS = 48, 2
PER_UPDATE = N_STEPS * N_ENVS
FORK = {"start_method": "fork"}  # the others import everything anew
TOTAL = 6 * PER_UPDATE - 10  # the last rollout goes beyond the horizon


class Memory(KVWriter):
    """Keeps what is logged, but for the clock."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        clocks = ("time/fps", "time/time_elapsed", "time/train_seconds")
        self.rows.append({key: value for key, value in key_values.items() if key not in clocks})

    def close(self) -> None:
        pass


def make_env(task: Any, normalize: bool = True) -> VecEnv:
    env: VecEnv = make_vec_env(task, N_ENVS)
    return VecNormalize(env, gamma=0.98) if normalize else env


def make(env: VecEnv, **kwargs: Any) -> TRPO:
    kwargs = {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "critic_method": "minibatch", "n_critic_updates": 2, **kwargs}
    return TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=3, device="cpu", **effective({"batch_size": N_STEPS, **kwargs}))


class Writes(BaseCallback):
    """Writes a checkpoint at the start of one of the rollouts."""

    def __init__(self, path: Path, before: int) -> None:
        super().__init__()
        self.path, self.before, self.rollouts = path, before, 0

    def _on_rollout_start(self) -> None:
        if self.rollouts == self.before:
            self.model.save_checkpoint(self.path)
        self.rollouts += 1

    def _on_step(self) -> bool:
        return True


def run(model: TRPO, callback: BaseCallback | None = None, resumed: bool = False) -> list[dict[str, Any]]:
    memory = Memory()
    model.set_logger(Logger(None, [memory]))
    total = model.remaining_timesteps if resumed else TOTAL
    model.learn(total, callback, reset_num_timesteps=not resumed)
    model.logger.dump()
    return memory.rows


def assert_same_model(first: TRPO, second: TRPO) -> None:
    for a, b in zip(states(first.get_parameters()), states(second.get_parameters()), strict=True):
        assert th.equal(a, b) if isinstance(a, th.Tensor) else a == b
    for name in ("num_timesteps", "_total_timesteps", "_n_updates", "_current_progress_remaining"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.action_space.sample() == pytest.approx(second.action_space.sample())
    for x, y in zip(first.ep_info_buffer, second.ep_info_buffer, strict=True):
        assert (x["r"], x["l"]) == (y["r"], y["l"])
    one, two = first.get_vec_normalize_env(), second.get_vec_normalize_env()
    if one is not None and two is not None:
        assert np.array_equal(one.obs_rms.mean, two.obs_rms.mean)
        assert np.array_equal(one.ret_rms.var, two.ret_rms.var)
        assert np.array_equal(one.returns, two.returns)


def states(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in states(value[key])]
    return [leaf for item in value for leaf in states(item)] if isinstance(value, (list, tuple)) else [value]


def scramble() -> None:
    """Leave the global generators in a state that no run has left them in."""
    random.seed(99), np.random.seed(99), th.manual_seed(99)  # noqa: NPY002


def assert_resumes(make_one: Callable[[], TRPO], env: Callable[[], VecEnv], path: Path, **kwargs: Any) -> TRPO:
    whole = make_one()
    whole.action_space.sample()
    rows = run(whole, Writes(path, before=3))
    scramble()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = type(whole).resume(path, env(), device="cpu", **kwargs)
    assert model.num_timesteps == 3 * PER_UPDATE
    again = run(model, resumed=True)
    assert again == rows[-len(again) :]
    assert len(again) == 4
    assert_same_model(model, whole)
    return model


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1", v5("HalfCheetah")])
def test_a_resumed_training_is_the_uninterrupted_one(task: str, normalize: bool, tmp_path: Path) -> None:
    def env() -> VecEnv:
        return make_env(task, normalize)

    model = assert_resumes(lambda: make(env()), env, tmp_path / "checkpoint.zip")
    assert model.remaining_timesteps == 0


@pytest.mark.parametrize(
    "kwargs", [{"use_sde": True, "sde_sample_freq": 4}, {"critic_method": "gauss_newton"}, {"curvature_batch_size": 9}]
)
def test_noise_and_the_other_critic_are_resumed(kwargs: dict[str, Any], tmp_path: Path) -> None:
    def env() -> VecEnv:
        return make_env("Pendulum-v1")

    assert_resumes(lambda: make(env(), **kwargs), env, tmp_path / "checkpoint.zip")


@pytest.mark.parametrize(
    ("algorithm", "policy", "env_id", "kwargs"),
    [
        (NPG, "MlpPolicy", "Pendulum-v1", {"actor_step_size": 0.1}),
        (TRPO, "MlpPolicy", "Pendulum-v1", {"return_scaling": True, "policy_batch_size": 20}),
        (RecurrentTRPO, "MlpLstmPolicy", "Pendulum-v1", {}),
        (MaskableTRPO, "MlpPolicy", lambda: InvalidActionEnvDiscrete(8, n_invalid_actions=3), {}),
    ],
    ids=["npg", "options", "recurrent", "maskable"],
)
def test_every_algorithm_is_resumed(
    algorithm: type[TRPO], policy: str, env_id: Any, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    def env() -> VecEnv:
        return make_env(env_id, normalize=env_id == "Pendulum-v1")

    def make_one() -> TRPO:
        return algorithm(policy, env(), n_steps=N_STEPS, seed=3, device="cpu", **kwargs)

    assert_resumes(make_one, env, tmp_path / "checkpoint.zip")


def test_schedules_that_are_functions_are_resumed_with_trust(tmp_path: Path) -> None:
    rates: dict[str, Any] = {name: (lambda progress: 0.01 + 0.01 * progress) for name in ("learning_rate", "target_kl")}

    def env() -> VecEnv:
        return make_env("CartPole-v1")

    assert_resumes(lambda: make(env(), **rates), env, tmp_path / "a.zip", trust=True)
    assert_resumes(lambda: make(env(), **rates), env, tmp_path / "b.zip", custom_objects=rates)
    with pytest.raises(UntrustedFileError, match="learning_rate"):
        TRPO.resume(tmp_path / "a.zip", env())


def test_stacked_frames_are_resumed(tmp_path: Path) -> None:
    def env() -> VecEnv:
        bare = DummyVecEnv([lambda: gym.make("CartPole-v1")] * N_ENVS)
        return VecMonitor(VecFrameStack(VecNormalize(bare), 3))

    assert_resumes(lambda: make(env()), env, tmp_path / "checkpoint.zip")


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(
            lambda: make_vec_env("HalfCheetah-v5", N_ENVS, vec_env_cls=WatchedSubprocVecEnv, vec_env_kwargs=FORK),
            marks=needs_v5,
        ),
        lambda: make_vec_env(
            "Pendulum-v1", N_ENVS, vec_env_cls=SubprocVecEnv, vec_env_kwargs=FORK, wrapper_class=ResumableEnv
        ),
    ],
)
def test_environments_in_processes_of_their_own_are_resumed(env: Callable[[], VecEnv], tmp_path: Path) -> None:
    made: list[VecEnv] = []

    def normalized() -> VecEnv:
        made.append(env())
        return VecNormalize(made[-1])

    assert_resumes(lambda: make(normalized()), normalized, tmp_path / "checkpoint.zip")
    for venv in made:
        venv.close()


@pytest.mark.parametrize("task", [*map(v5, ("HalfCheetah", "Hopper", "Ant", "Humanoid")), "Acrobot-v1", "MountainCar-v0"])
def test_an_environments_state_is_exact(task: str) -> None:
    first, second = gym.make(task), gym.make(task)
    first.reset(seed=1), second.reset(seed=2)
    first.action_space.seed(0)
    for _ in range(40):
        first.step(first.action_space.sample())
    restore(second, capture(first))

    for _ in range(40):  # on through ends of episodes
        action = first.action_space.sample()
        (obs, reward, *ends, _), (same_obs, same_reward, *same_ends, _) = first.step(action), second.step(action)
        assert np.array_equal(obs, same_obs)
        assert reward == same_reward
        assert ends == same_ends
    assert np.array_equal(first.reset()[0], second.reset()[0])


class Walk(gym.Env):
    """An environment with a state where attributes do not show it, or cannot be pickled."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self) -> None:
        self.place = (value for value in range(10**6))  # a generator cannot be pickled

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.float32([next(self.place) % 7]), float(action), bool(self.np_random.random() < 0.1), False, {}


class SelfDescribed(Walk):
    def get_state(self) -> Any:
        self.place = iter(range(next(self.place), 10**6))
        return {"place": next(copy.copy(self.place)), "random": self.np_random}

    def set_state(self, state: Any) -> None:
        self.place, self.np_random = iter(range(state["place"], 10**6)), state["random"]


@pytest.mark.parametrize("vec_env", [DummyVecEnv, functools.partial(SubprocVecEnv, start_method="fork")])
def test_an_environment_may_say_itself_what_its_state_is(vec_env: type[Any], tmp_path: Path) -> None:
    made: list[VecEnv] = []

    def env() -> VecEnv:
        made.append(vec_env([SelfDescribed] * N_ENVS))
        return made[-1]

    assert_resumes(lambda: make(env()), env, tmp_path / "checkpoint.zip")
    for venv in made:
        venv.close()


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (lambda: DummyVecEnv([Walk] * N_ENVS), "'place' of Walk"),
        (lambda: make_vec_env("CartPole-v1", N_ENVS, vec_env_cls=SubprocVecEnv, vec_env_kwargs=FORK), "ResumableEnv"),
    ],
)
def test_environments_out_of_reach_are_reset_with_one_warning(env: Callable[[], VecEnv], reason: str, tmp_path: Path) -> None:
    venv, other = env(), env()
    model = make(venv).learn(PER_UPDATE)
    model.save_checkpoint(tmp_path / "checkpoint.zip")

    with pytest.warns(UserWarning, match=reason) as caught:
        resumed = TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    assert len(caught) == 1
    assert resumed._last_obs is None
    assert resumed.learn(PER_UPDATE, reset_num_timesteps=False).num_timesteps == 2 * PER_UPDATE
    venv.close(), other.close()


def test_resuming_runs_no_code(tmp_path: Path) -> None:
    class Tool:
        """A user's own class in an environment."""

    class Own(gym.Wrapper):
        def __init__(self, env: gym.Env) -> None:
            super().__init__(env)
            self.tool = OwnTool()

    def env() -> VecEnv:
        return DummyVecEnv([lambda: Own(gym.make("CartPole-v1"))] * N_ENVS)

    path = tmp_path / "checkpoint.zip"
    make(env()).learn(PER_UPDATE).save_checkpoint(path)

    with pytest.raises(UntrustedFileError, match=r"environments.*OwnTool.*trust=True"):
        TRPO.resume(path, env(), device="cpu")
    assert TRPO.resume(path, env(), device="cpu", trust=True).num_timesteps == PER_UPDATE


class OwnTool:
    """A user's own class."""


def test_a_model_without_a_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    make(make_env("CartPole-v1")).save(tmp_path / "model.zip")

    with pytest.raises(UsageError, match=r"call TRPO\.load\('.*model\.zip', env=env\)\.learn"):
        TRPO.resume(tmp_path / "model.zip", make_env("CartPole-v1"))


def test_another_environment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.zip"
    make(make_env("CartPole-v1")).learn(PER_UPDATE).save_checkpoint(path)

    with pytest.raises(MismatchError, match="wrappers"):
        TRPO.resume(path, make_env("CartPole-v1", normalize=False))
    with pytest.raises(MismatchError, match="3 environments, the checkpoint 2"):
        TRPO.resume(path, VecNormalize(make_vec_env("CartPole-v1", 3)))
    with pytest.raises(MismatchError, match="made of"):
        TRPO.resume(path, VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)))


def test_a_checkpoint_is_a_models_file(tmp_path: Path) -> None:
    model = make(make_env("CartPole-v1")).learn(PER_UPDATE)
    model.save_checkpoint(tmp_path / "checkpoint")

    with pytest.warns(UserWarning, match="trained with VecNormalize, and is loaded without"):
        loaded = TRPO.load(tmp_path / "checkpoint.zip", device="cpu")
    assert th.equal(loaded.policy.value_net.weight, model.policy.value_net.weight)


# ---- the callback


class StopsAt(BaseCallback):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.steps


def test_checkpoints_are_written_between_updates_and_the_newest_kept(tmp_path: Path) -> None:
    callback = CheckpointCallback(tmp_path / "run", save_freq=PER_UPDATE + 1, keep_last=2, verbose=0)
    make(make_env("CartPole-v1")).learn(6 * PER_UPDATE, callback)

    counts = [int(path.stem.split("_")[1]) for path in checkpoints(tmp_path / "run")]
    assert counts == [5 * PER_UPDATE, 6 * PER_UPDATE]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / f"checkpoint_{6 * PER_UPDATE}_steps.zip"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_rollout_that_was_broken_off_is_in_no_checkpoint(tmp_path: Path) -> None:
    callback = CheckpointCallback(tmp_path, save_freq=PER_UPDATE)
    model = make(make_env("CartPole-v1"))
    model.learn(6 * PER_UPDATE, [callback, StopsAt(2 * PER_UPDATE + 10)])

    assert model.num_timesteps == 2 * PER_UPDATE + 10
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint_{n * PER_UPDATE}_steps.zip" for n in (1, 2)]
    whole = make(make_env("CartPole-v1"))
    run(whole)
    resumed = TRPO.resume(tmp_path / f"checkpoint_{2 * PER_UPDATE}_steps.zip", make_env("CartPole-v1"), device="cpu")
    assert resumed.remaining_timesteps == 4 * PER_UPDATE
    resumed._total_timesteps = TOTAL
    assert resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False).num_timesteps == whole.num_timesteps


@pytest.mark.parametrize(("name", "value"), [("save_freq", 0), ("keep_last", 0), ("handle_signals", "yes")])
def test_the_callbacks_arguments_are_checked(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}"):
        CheckpointCallback(tmp_path, **{"save_freq": 1, name: value})


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint_96_steps.zip.1a2b3c4d.tmp").touch()
    (tmp_path / ".other.tmp").touch()
    make(make_env("CartPole-v1")).learn(PER_UPDATE, CheckpointCallback(tmp_path, save_freq=1))

    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp", "checkpoint_96_steps.zip"]


# ---- signals and kills, in processes of their own

TRAINING = """
import sys, torch
torch.set_num_threads(1)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from sb3_trpo import TRPO, CheckpointCallback, latest_checkpoint

folder, total, signals = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "signals"
env = VecNormalize(make_vec_env("CartPole-v1", 2))
latest = latest_checkpoint(folder)
if latest is None:
    model = TRPO("MlpPolicy", env, n_steps=64, seed=0, device="cpu")
    model._total_timesteps = total
else:
    model = TRPO.resume(latest, env, device="cpu")
print("begins", flush=True)
callback = CheckpointCallback(folder, save_freq=128, keep_last=2, handle_signals=signals)
model.learn(model.remaining_timesteps, callback, reset_num_timesteps=latest is None)
print("ends", flush=True)
"""


def train(folder: Path, total: int, mode: str = "plain") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAINING, str(folder), str(total), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_with_a_checkpoint(number: int, status: int, tmp_path: Path) -> None:
    with train(tmp_path, 10**7, "signals") as process:
        wait_for(lambda: latest_checkpoint(tmp_path))
        process.send_signal(number)
        assert process.wait(60) == status

    model = TRPO.resume(latest_checkpoint(tmp_path), make_env("CartPole-v1"), device="cpu")  # type: ignore[arg-type]
    assert model.num_timesteps % 128 == 0
    assert model._n_updates == model.num_timesteps // 128
    assert model.remaining_timesteps == 10**7 - model.num_timesteps


STUCK = """
import signal, sys, time
import gymnasium as gym
from sb3_trpo import TRPO, CheckpointCallback

class Stuck(gym.Wrapper):
    def step(self, action):
        print("stuck", flush=True)
        while True:
            time.sleep(0.01)

callback = CheckpointCallback(sys.argv[1], save_freq=128, handle_signals=True)
TRPO("MlpPolicy", Stuck(gym.make("CartPole-v1")), n_steps=16).learn(100, callback)
"""


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "stuck\n":
            pass
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143


def test_signals_are_treated_as_before_whatever_ended_the_training(tmp_path: Path) -> None:
    class Fails(BaseCallback):
        def _on_step(self) -> bool:
            assert signal.getsignal(signal.SIGTERM) is not before
            raise RuntimeError("the end")

    before = signal.getsignal(signal.SIGTERM)
    model = make(make_env("CartPole-v1"))
    with pytest.raises(RuntimeError, match="the end"):
        model.learn(PER_UPDATE, [CheckpointCallback(tmp_path, 1, handle_signals=True), Fails()])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_training_comes_to_the_same_end(tmp_path: Path) -> None:
    """Killed with SIGKILL at two moments; benchmarks/soak.py does this two hundred times."""
    total = 24 * 128
    with train(tmp_path / "whole", total) as process:
        assert process.wait(60) == 0
    kills, generator = 0, random.Random(0)
    for attempt in range(3):
        with train(tmp_path / "killed", total) as process:
            if attempt < 2:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(generator.uniform(0.0, 0.3))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
            else:
                assert process.wait(60) == 0
    assert kills > 0
    paths = [latest_checkpoint(tmp_path / name) for name in ("whole", "killed")]
    first, second = (TRPO.resume(path, make_env("CartPole-v1"), device="cpu") for path in paths)  # type: ignore[arg-type]
    assert_same_model(first, second)
    assert first.num_timesteps == total
