"""Environments in worker processes, with errors that name the worker and a time-out."""

import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper

from sb3_trpo.errors import WorkerError
from sb3_trpo.saving.env_state import ResumableEnv
from sb3_trpo.vec_env.channel import Channel, NoAnswerError

GONE = (EOFError, ConnectionError)


class Failure(NamedTuple):
    """
    An exception in a worker, sent instead of an answer.

    :param error: its class and message
    :param trace: its traceback
    """

    error: str
    trace: str


class WatchedSubprocVecEnv(SubprocVecEnv):
    """
    SB3's ``SubprocVecEnv`` with errors that name the worker and its exception, a time-out, and state for checkpoints.

    An error ends all workers. The model is not affected and can be saved.

    :param env_fns: functions that make the environments
    :param start_method: start method of the processes, as in ``SubprocVecEnv``
    :param timeout: seconds for a worker to receive a request, and to send its whole answer; None for no limit
    :raises ValueError: ``timeout`` is not positive
    :raises WorkerError: an environment cannot be made
    """

    def __init__(
        self, env_fns: list[Callable[[], gym.Env[Any, Any]]], start_method: str | None = None, timeout: float | None = None
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout!r} is not allowed: it must be a number of seconds above 0, or None")
        self._timeout = timeout
        self._deadline: float | None = None
        super().__init__([_ReportingMaker(make) for make in env_fns], start_method)

    @property
    def remotes(self) -> tuple["_Watched", ...]:
        """The connections to the workers."""
        return self._remotes

    @remotes.setter
    def remotes(self, connections: tuple[Connection, ...]) -> None:
        self._remotes = tuple(_Watched(self, index, connection) for index, connection in enumerate(connections))

    def fail(self, index: int, reason: str) -> WorkerError:
        """
        Kill all workers.

        :param index: the worker that failed
        :param reason: what happened to it
        :return: the error to raise
        """
        self.closed, self.waiting = True, False
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for remote in self.remotes:
            remote.close()
        return WorkerError([index], reason)

    def exit_code(self, index: int) -> int | None:
        """
        Return the exit status of a worker.

        :param index: the worker
        :return: the status, negative for the signal that killed it; None if it is still running
        """
        self.processes[index].join(timeout=1.0)
        return self.processes[index].exitcode

    def seconds_left(self) -> float | None:
        """
        Return the time left for an answer.

        :return: seconds; None for no limit
        """
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def start_clock(self) -> None:
        """Restart the time-out."""
        if self._timeout is not None:
            self._deadline = time.monotonic() + self._timeout

    @property
    def timeout(self) -> float | None:
        """Seconds for an answer."""
        return self._timeout

    def close(self) -> None:
        """Stop the workers; kill those that do not exit within the time-out."""
        if self.closed:
            return
        if self.waiting:
            for remote in self.remotes:
                remote.recv()
        for remote in self.remotes:
            remote.send(("close", None))
        for process in self.processes:
            process.join(self.seconds_left())
            process.kill()
            process.join()
        for remote in self.remotes:
            remote.close()
        self.closed = True


class _Watched:
    """A connection to a worker that raises an error if the worker is silent, dies or fails."""

    def __init__(self, venv: WatchedSubprocVecEnv, index: int, connection: Connection) -> None:
        self._venv, self._index, self._connection = venv, index, connection
        self._channel: Channel | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a worker gets the bare connection, to close it
        return _itself, (self._connection,)

    def send(self, message: Any) -> None:
        self._venv.start_clock()
        try:
            self._open().send(message, self._venv.seconds_left)
        except (*GONE, NoAnswerError) as error:
            raise self._failure(error) from error
        self._venv.start_clock()

    def recv(self) -> Any:
        try:
            answer = self._open().recv(self._venv.seconds_left)
        except (*GONE, NoAnswerError) as error:
            raise self._failure(error) from error
        failure = answer[0] if isinstance(answer, tuple) and answer else answer
        if isinstance(failure, Failure):
            raise self._venv.fail(self._index, f"raised {failure.error}\n\n{failure.trace}")
        return answer

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._connection.close()

    def _open(self) -> Channel:
        if self._channel is None:  # the process is started after the connection is made
            self._channel = Channel(self._connection, self._venv.processes[self._index].sentinel)
        return self._channel

    def _failure(self, error: Exception) -> WorkerError:
        if isinstance(error, NoAnswerError):
            return self._venv.fail(self._index, f"did not answer within {self._venv.timeout} seconds")
        code = self._venv.exit_code(self._index)
        killed = code is not None and code < 0
        how = f"was killed by {signal.Signals(-code).name}" if killed and code else f"ended with status {code}"
        return self._venv.fail(self._index, how)


def _itself(connection: Connection) -> Connection:
    return connection


class _ReportingMaker:
    """Make the environment in the worker; the main process handles Ctrl-C."""

    def __init__(self, make: Callable[[], gym.Env[Any, Any]]) -> None:
        self._make = CloudpickleWrapper(make)

    def __call__(self) -> gym.Env[Any, Any]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return ReportingEnv(ResumableEnv(self._make.var()))
        except Exception as error:  # noqa: BLE001 - reported to the main process
            return _FailedEnv(_failure(error))


class ReportingEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Return the exceptions of an environment as values, to report them in the main process.

    :param env: the environment
    """

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """
        Start an episode.

        :param kwargs: as for any environment
        :return: as for any environment, or a failure as the observation
        """
        try:
            return self.env.reset(**kwargs)
        except Exception as error:  # noqa: BLE001 - reported to the main process
            return _failure(error), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        Take a step.

        :param action: the action
        :return: as for any environment, or a failure as the observation
        """
        try:
            return self.env.step(action)
        except Exception as error:  # noqa: BLE001 - reported to the main process
            return _failure(error), 0.0, False, False, {}


class _FailedEnv(gym.Env[Any, Any]):
    """Stand-in for an environment that cannot be made: SB3 requests the spaces of a worker first."""

    def __init__(self, failure: Failure) -> None:
        self.observation_space: Any = failure
        self.action_space: Any = spaces.Discrete(1)


def _failure(error: BaseException) -> Failure:
    return Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
