"""Environments in processes of their own: what a failure says, and that the model outlives it."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_trpo import TRPO, WatchedSubprocVecEnv, WorkerError

N_STEPS = 16


class Fails(gym.Wrapper):
    """Fails at its tenth step, in one of several ways."""

    def __init__(self, env: gym.Env, how: Callable[[], Any], at: int = 10) -> None:
        super().__init__(env)
        self.how, self.left = how, at

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.how()
        return super().step(action)

    def reset(self, **kwargs: Any) -> Any:
        if self.left == -1:
            self.how()
        return super().reset(**kwargs)


def raises() -> None:
    raise KeyError("the spring is broken")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exits() -> None:
    os._exit(3)


def hangs() -> None:
    time.sleep(600)


def workers(how: Callable[[], Any], timeout: float | None = None, at: int = 10) -> WatchedSubprocVecEnv:
    def faulty() -> gym.Env:
        return Fails(gym.make("CartPole-v1"), how, at)

    return WatchedSubprocVecEnv([lambda: gym.make("CartPole-v1"), faulty], start_method="fork", timeout=timeout)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (raises, r"worker 1 raised KeyError: 'the spring is broken'(.|\n)*Traceback(.|\n)*in raises"),
        (dies, "worker 1 was killed by SIGKILL"),
        (exits, "worker 1 ended with status 3"),
        (hangs, "worker 1 did not answer within 1.0 seconds"),
    ],
)
def test_a_failure_names_the_worker_and_the_model_can_be_saved(how: Callable[[], Any], message: str, tmp_path: Path) -> None:
    env = workers(how, timeout=1.0)
    model = TRPO("MlpPolicy", env, n_steps=N_STEPS, device="cpu")

    with pytest.raises(WorkerError, match=message) as error:
        model.learn(4 * N_STEPS)
    assert error.value.indices == (1,)
    assert not any(process.is_alive() for process in env.processes)
    env.close()
    model.save(tmp_path / "model")
    assert TRPO.load(tmp_path / "model", device="cpu").n_steps == N_STEPS


def test_failures_outside_steps_are_named() -> None:
    with pytest.raises(WorkerError, match="worker 0 raised ZeroDivisionError"):
        WatchedSubprocVecEnv([lambda: 1 / 0], start_method="fork")  # type: ignore[list-item,return-value]
    env = workers(raises, at=-1)
    with pytest.raises(WorkerError, match="worker 1 raised KeyError"):
        env.reset()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_the_timeout_is_checked(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout="):
        WatchedSubprocVecEnv([lambda: gym.make("CartPole-v1")], timeout=timeout)


def test_healthy_workers_are_those_of_sb3() -> None:
    histories = []
    for kind in (SubprocVecEnv, WatchedSubprocVecEnv):
        env = make_vec_env("CartPole-v1", 2, seed=0, vec_env_cls=kind, vec_env_kwargs={"start_method": "fork"})
        history = [env.reset()]
        for step in range(30):
            history += env.step(np.array([step % 2, 1]))[:3]
        assert env.get_attr("_max_episode_steps") == [500, 500]
        assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
        env.close()
        env.close()
        histories.append(history)
    assert all(np.array_equal(a, b) for a, b in zip(*histories, strict=True))


def test_the_default_start_method_works_too() -> None:
    env = make_vec_env("CartPole-v1", 1, vec_env_cls=WatchedSubprocVecEnv)
    assert env.reset().shape == (1, 4)
    env.close()


def test_the_keyboard_is_left_to_the_main_process() -> None:
    env = workers(raises, at=10**6)
    env.reset()
    for process in env.processes:
        os.kill(process.pid, signal.SIGINT)  # type: ignore[arg-type]
    assert env.step(np.array([0, 1]))[0].shape == (2, 4)
    env.close()


# ---- time-outs in the middle of a message

LARGE = 80_000_000  # bytes, far more than a socket holds


class Large(gym.Env):
    """Answer with a large observation; something happens to the process while it is being sent."""

    observation_space = gym.spaces.Box(0, 255, (LARGE,), np.uint8)
    action_space = gym.spaces.Box(0, 255, (LARGE,), np.uint8)

    def __init__(self, how: int | None = None) -> None:
        self.how = how

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        if self.how is not None:
            threading.Timer(0.3, os.kill, (os.getpid(), self.how)).start()
        return np.zeros(LARGE, np.uint8), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.full(LARGE, action[-1], np.uint8), 0.0, False, False, {}


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
@pytest.mark.parametrize(
    ("how", "timeout", "message"),
    [
        (signal.SIGSTOP, 1.5, "worker 1 did not answer within 1.5 seconds"),
        (signal.SIGKILL, None, "worker 1 was killed by SIGKILL"),
    ],
)
def test_recv_ends_when_a_worker_stops_or_dies_in_the_middle_of_an_answer(
    how: int, timeout: float | None, message: str, start_method: str
) -> None:
    # The first worker is asked for nothing: it keeps the second one's connection open under "fork".
    makers = [lambda: gym.make("CartPole-v1"), functools.partial(Large, how)]
    env = WatchedSubprocVecEnv(makers, start_method=start_method, timeout=60.0)
    env._timeout = timeout
    env.remotes[1].send(("reset", (None, None)))
    time.sleep(0.6)  # part of the answer is in the socket, and there it stays
    with pytest.raises(WorkerError, match=message):
        env.remotes[1].recv()
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_send_ends_when_a_worker_does_not_take_the_message(how: int) -> None:
    env = WatchedSubprocVecEnv([lambda: gym.make("CartPole-v1"), Large], start_method="fork", timeout=60.0)
    env._timeout = 1.0
    os.kill(env.processes[1].pid, how)  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match="worker 1"):
        env.step([0, np.zeros(LARGE, np.uint8)])  # type: ignore[arg-type]
    assert not any(process.is_alive() for process in env.processes)


def test_large_messages_arrive_whole() -> None:
    env = WatchedSubprocVecEnv([Large], start_method="fork", timeout=60.0)
    assert env.reset().shape == (1, LARGE)
    observations, *_ = env.step(np.full((1, LARGE), 7, np.uint8))
    assert (observations == 7).all()
    env.close()


def test_close_ends_a_stopped_worker() -> None:
    env = WatchedSubprocVecEnv([lambda: gym.make("CartPole-v1")] * 2, start_method="fork", timeout=60.0)
    env._timeout = 1.0
    os.kill(env.processes[0].pid, signal.SIGSTOP)  # type: ignore[arg-type]
    env.close()
    assert not any(process.is_alive() for process in env.processes)
