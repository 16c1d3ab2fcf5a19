"""
Training loops that the speed benchmarks run in turn: ours, those of other libraries, and environments alone.

The other libraries are no dependencies of this package: ``pip install -r benchmarks/requirements.txt``.
"""

import peers  # isort: skip  (first: one thread)

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_trpo.zoo.tianshou_peer import tianshou_trpo

#: The file of CleanRL that is measured, as it is at this commit.
CLEANRL_URL = "https://raw.githubusercontent.com/vwxyzjn/cleanrl/fe8d8a03c41a7ef5b523e2e354bd01c363e786bb/cleanrl/ppo_continuous_action.py"


class Round(NamedTuple):
    """
    One rollout and its update.

    :param steps: environment steps
    :param collect: seconds of collecting; 0 if they are not known
    :param update: seconds of updating; 0 for the floor, or if they are not known
    :param total: seconds of both and of what is around them
    """

    steps: int
    collect: float
    update: float
    total: float


Contender = Callable[[], Round]


def sb3_contender(model: OnPolicyAlgorithm, clock: Callable[[], float]) -> Contender:
    """``learn`` for one rollout and its update."""
    n_steps = model.n_steps * model.n_envs
    seconds = {"collect_rollouts": 0.0, "train": 0.0}

    def timed(name: str) -> None:
        method = getattr(model, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = clock()
            result = method(*args, **kwargs)
            seconds[name] += clock() - started
            return result

        setattr(model, name, wrapper)

    for name in seconds:
        timed(name)

    def play() -> Round:
        seconds.update(dict.fromkeys(seconds, 0.0))
        started = clock()
        model.learn(n_steps, reset_num_timesteps=False)
        return Round(n_steps, seconds["collect_rollouts"], seconds["train"], clock() - started)

    return play


def sbx_contender(env: VecEnv, n_steps: int, clock: Callable[[], float], batch_size: int = 64) -> Contender:
    """SBX's PPO with its default settings, but for the length of a rollout and perhaps the size of a minibatch."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    from sbx import PPO

    return sb3_contender(PPO("MlpPolicy", env, n_steps=n_steps, batch_size=batch_size, seed=0), clock)


def tianshou_contender(task: str, clock: Callable[[], float]) -> Contender:
    """What its trainer does, without its logs."""
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv, VectorEnvNormObs
    from tianshou.utils.torch_utils import policy_within_training_step

    n_envs, n_steps = peers.TIANSHOU_SHAPE["n_envs"], peers.TIANSHOU_SHAPE["n_steps"]
    env = VectorEnvNormObs(DummyVectorEnv([lambda: gym.make(task) for _ in range(n_envs)]))
    env.seed(0)
    single = gym.make(task)
    algorithm = tianshou_trpo(single.observation_space, single.action_space)
    collector = Collector(algorithm, env, VectorReplayBuffer(4096, n_envs), exploration_noise=True)
    collector.reset()

    def play() -> Round:
        started = clock()
        with policy_within_training_step(algorithm.policy):
            collector.collect(n_step=n_envs * n_steps)
            collected = clock()
            algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)
        collector.reset_buffer(keep_statistics=True)
        ended = clock()
        return Round(n_envs * n_steps, collected - started, ended - collected, ended - started)

    return play


def skrl_contender(task: str, n_envs: int, n_steps: int, clock: Callable[[], float]) -> Contender:
    """skrl's TRPO with the settings of its Gymnasium example, but for the length of a rollout; without its logs."""
    from skrl.agents.torch.trpo import TRPO, TRPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.trainers.torch import SequentialTrainer

    env = wrap_env(gym.make(task) if n_envs == 1 else gym.make_vec(task, n_envs, vectorization_mode="sync"))
    spaces_of_env = {"observation_space": env.observation_space, "state_space": env.state_space}
    spaces_of_env |= {"action_space": env.action_space, "device": env.device}

    def network(n_outputs: int) -> nn.Sequential:
        hidden = [nn.Linear(env.observation_space.shape[0], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(64, n_outputs))

    class Policy(GaussianMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces_of_env)
            GaussianMixin.__init__(self)
            self.net = network(self.num_actions)
            self.log_std = nn.Parameter(th.zeros(self.num_actions))

        def compute(self, inputs: dict[str, Any], role: str) -> tuple[th.Tensor, dict[str, Any]]:
            return self.net(inputs["observations"]).tanh(), {"log_std": self.log_std}

    class Value(DeterministicMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces_of_env)
            DeterministicMixin.__init__(self)
            self.net = network(1)

        def compute(self, inputs: dict[str, Any], role: str) -> tuple[th.Tensor, dict[str, Any]]:
            return self.net(inputs["observations"]), {}

    config = TRPO_CFG(rollouts=n_steps, learning_epochs=10, mini_batches=32)
    config.observation_preprocessor = config.value_preprocessor = RunningStandardScaler
    config.observation_preprocessor_kwargs = {"size": env.observation_space, "device": env.device}
    config.value_preprocessor_kwargs = {"size": 1, "device": env.device}
    config.experiment.write_interval = config.experiment.checkpoint_interval = 0
    memory = RandomMemory(memory_size=n_steps, num_envs=n_envs, device=env.device)
    agent = TRPO(models={"policy": Policy(), "value": Value()}, memory=memory, cfg=config, **spaces_of_env)
    trainer = SequentialTrainer(
        cfg={"timesteps": n_steps, "headless": True, "disable_progressbar": True, "close_environment_at_exit": False},
        env=env,
        agents=agent,
    )

    def play() -> Round:
        started = clock()
        trainer.train()
        return Round(n_envs * n_steps, 0.0, 0.0, clock() - started)

    return play


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class _Marks:
    """Stands in for TensorBoard's writer, and notes when CleanRL's script has ended an update."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds: list[float] = []

    def __call__(self, folder: str) -> "_Marks":
        return self

    def add_text(self, *args: Any) -> None:
        """Write nothing."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "charts/SPS":
            self.seconds.append(self._clock())

    def close(self) -> None:
        """Close nothing."""


def cleanrl_contender(script: Path, task: str, clock: Callable[[], float]) -> Contender:
    """
    CleanRL's PPO: two updates of its own script, of which the second is timed, without its logs.

    The script is written for Gymnasium 0.29, whose ``TransformObservation`` takes two arguments; those of Gymnasium 1 three.

    :param script: ``ppo_continuous_action.py``, downloaded from :data:`CLEANRL_URL`
    :param task: registered name
    :param clock: seconds
    """
    transform: Any = gym.wrappers.TransformObservation
    n_steps = 2048  # its default

    def play() -> Round:
        marks = _Marks(clock)
        arguments = [str(script), "--env-id", task, "--total-timesteps", str(2 * n_steps), "--no-cuda"]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch("torch.utils.tensorboard.SummaryWriter", marks),
            mock.patch.object(gym.wrappers, "TransformObservation", lambda env, function: transform(env, function, None)),
            _silenced(),
        ):
            runpy.run_path(str(script), run_name="__main__")
        first, second = marks.seconds
        return Round(n_steps, 0.0, 0.0, second - first)

    return play


def random_actions(space: spaces.Space, n_steps: int, n_envs: int) -> np.ndarray:
    """What an untrained policy does: clipped Gaussian noise, or anything."""
    rng = np.random.default_rng(0)
    if isinstance(space, spaces.Box):
        return rng.normal(size=(n_steps, n_envs, *space.shape)).astype(np.float32).clip(space.low, space.high)
    return rng.integers(space.n, size=(n_steps, n_envs))  # type: ignore[attr-defined]


def bare_contender(env: VecEnv, n_states: int, clock: Callable[[], float]) -> Contender:
    """Steps single environments one after the other, or the pool that has them all."""
    actions = random_actions(env.action_space, n_states // env.num_envs, env.num_envs)
    env.reset()
    singles = env.unwrapped.envs if isinstance(env.unwrapped, DummyVecEnv) else None

    def play() -> Round:
        started = clock()
        for row in actions:
            if singles is None:
                env.step(row)
                continue
            for single, action in zip(singles, row, strict=True):
                _, _, terminated, truncated, _ = single.step(action)
                if terminated or truncated:
                    single.reset()
        seconds = clock() - started
        return Round(len(actions) * env.num_envs, seconds, 0.0, seconds)

    return play
