"""What callbacks draw does not change the training, and an interrupted training resumes whatever they draw."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps, LogEveryNTimesteps
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor

from sb3_trpo import TRPO, CheckpointCallback, RecurrentTRPO
from sb3_trpo.saving.random_state import random_state
from sb3_trpo.saving.random_streams import CallbackStream, TorchCalls

N_STEPS = 16
UPDATES = 6


class Noisy(gym.Wrapper):
    """An environment that draws from the global generators, as it should not."""

    def step(self, action: Any) -> Any:
        observation, _, *rest = super().step(action)
        return observation, random.random() + np.random.rand() + float(th.rand(())), *rest  # noqa: NPY002


def noisy() -> gym.Env:
    return Monitor(Noisy(gym.make("CartPole-v1", max_episode_steps=10)))


class Draws(BaseCallback):
    """A user's callback that draws from torch's generator in each of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def _draw(self, *_: Any) -> bool:
        self.drawn.append(float(th.rand(())))
        return True

    _init_callback = _on_training_start = _on_rollout_start = _on_rollout_end = _on_step = _on_training_end = _draw  # type: ignore[assignment]


class EvaluatesAtRolloutEnd(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        evaluate_policy(self.model, noisy(), 2, deterministic=False, warn=False)


def evaluates(freq: int) -> EvalCallback:
    return EvalCallback(noisy(), n_eval_episodes=2, eval_freq=freq, deterministic=False, verbose=0)


class Writes(BaseCallback):
    def __init__(self, path: Path, at: int) -> None:
        super().__init__()
        self.path, self.at = path, at

    def _on_rollout_start(self) -> None:
        if self.num_timesteps == self.at:
            self.model.save_checkpoint(self.path)

    def _on_step(self) -> bool:
        return True


CALLBACKS: dict[str, Callable[[], BaseCallback]] = {
    "eval": lambda: evaluates(7),
    "nested": lambda: EveryNTimesteps(20, evaluates(1)),
    "drawing": Draws,
    "own_evaluation": EvaluatesAtRolloutEnd,
}
KINDS: dict[str, tuple[type[TRPO], str, dict[str, Any]]] = {
    "numpy_actor": (TRPO, "MlpPolicy", {"critic_method": "minibatch", "batch_size": 8, "n_critic_updates": 2}),
    "torch_actor": (TRPO, "MlpPolicy", {"policy_kwargs": {"activation_fn": th.nn.ELU}}),
    "recurrent": (RecurrentTRPO, "MlpLstmPolicy", {}),
}


def make(kind: str) -> TRPO:
    algorithm, policy, kwargs = KINDS[kind]
    return algorithm(policy, noisy(), n_steps=N_STEPS, seed=0, device="cpu", **kwargs)


def weights(model: TRPO) -> np.ndarray:
    return np.concatenate([value.detach().numpy().ravel() for value in model.policy.state_dict().values()])


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_depend_on_what_callbacks_draw(kind: str) -> None:
    alone = weights(make(kind).learn(UPDATES * N_STEPS))
    for name, callback in CALLBACKS.items():
        assert np.array_equal(weights(make(kind).learn(UPDATES * N_STEPS, callback())), alone), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_resumed_training_equals_the_uninterrupted_one_whatever_callbacks_draw(kind: str, name: str, tmp_path: Path) -> None:
    whole = make(kind)
    whole.learn(UPDATES * N_STEPS, [CALLBACKS[name](), Writes(tmp_path / "checkpoint.zip", 3 * N_STEPS)])
    resumed = type(whole).resume(tmp_path / "checkpoint.zip", noisy(), device="cpu")
    resumed.learn(resumed.remaining_timesteps, CALLBACKS[name](), reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert np.array_equal(weights(resumed), weights(whole))


def test_callbacks_draw_other_numbers_each_time_and_the_same_ones_with_a_seed() -> None:
    drawn = []
    for _ in range(2):
        callback = Draws()
        make("numpy_actor").learn(2 * N_STEPS, callback)
        drawn.append(callback.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == len(drawn[0]) == 2 * N_STEPS + 7


def test_callbacks_draw_on_after_a_resume(tmp_path: Path) -> None:
    first, second = Draws(), Draws()
    whole = make("numpy_actor").learn(UPDATES * N_STEPS, [Writes(tmp_path / "checkpoint.zip", 3 * N_STEPS), first])
    resumed = TRPO.resume(tmp_path / "checkpoint.zip", noisy(), device="cpu")
    resumed.learn(resumed.remaining_timesteps, second, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert len(set(second.drawn)) == len(second.drawn) > N_STEPS
    assert not set(first.drawn[: len(first.drawn) // 2]) & set(second.drawn)


@pytest.mark.parametrize(
    ("function", "is_seen"),
    [
        (lambda layer: th.rand(()), True),
        (lambda layer: layer.weight.data, True),
        (lambda layer: layer.weight.normal_(), True),
        (lambda layer: layer.weight.numpy(), True),
        (lambda layer: th.randperm(3), True),
        (lambda layer: layer(th.zeros(1, 2)), True),
        (lambda layer: (random.random(), np.zeros(3), layer.in_features), False),
    ],
)
@th.no_grad()
def test_torch_calls_are_seen_and_draw_from_the_callbacks_generator(function: Callable[..., Any], is_seen: bool) -> None:
    stream, layer = CallbackStream(), th.nn.Linear(2, 2)
    calls = TorchCalls(stream)
    for _ in range(2):
        calls.seen, before = False, th.get_rng_state()
        with calls:
            function(layer)
        assert th.equal(th.get_rng_state(), before)
        assert (calls.seen, stream.states()[1] is not None) == (is_seen, is_seen)


def test_a_callback_may_seed_torch_for_itself() -> None:
    calls = TorchCalls(CallbackStream())
    expected = th.rand(3, generator=th.Generator().manual_seed(1))
    before = th.get_rng_state()
    with calls:
        th.manual_seed(1)
    assert th.equal(th.get_rng_state(), before)
    with calls, th.random.fork_rng():
        th.manual_seed(1)
        drawn = th.rand(3)
    assert th.equal(drawn, expected)
    assert th.equal(th.get_rng_state(), before)


def test_generators_are_those_of_the_training_after_an_error_in_a_callback() -> None:
    class Fails(Draws):
        def _on_step(self) -> bool:
            raise RuntimeError("the end")

    model = make("numpy_actor")
    with pytest.raises(RuntimeError, match="the end"):
        model.learn(N_STEPS, Fails())
    states = [random_state()["torch"], model._callback_stream.states()[0]["torch"]]
    assert np.array_equal(*states)


def test_callbacks_that_draw_nothing_are_called_directly(tmp_path: Path) -> None:
    model = make("numpy_actor")
    for callback in (None, CheckpointCallback(tmp_path, N_STEPS), [LogEveryNTimesteps(10)]):
        assert "Isolated" not in type(model._setup_learn(N_STEPS, callback)[1]).__name__
    assert "Isolated" in type(model._setup_learn(N_STEPS, CallbackList([Draws()]))[1]).__name__


class Keeps(KVWriter):
    """Keep the steps and iterations that are logged."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        if "time/iterations" in key_values:
            self.seen.append((step, key_values["time/iterations"]))

    def close(self) -> None:
        pass


def iterations(model: TRPO, callback: Any, log_interval: int | None, **kwargs: Any) -> list[tuple[int, int]]:
    keeps = Keeps()
    model.set_logger(Logger(None, [keeps]))
    model.learn(log_interval=log_interval, callback=callback, **kwargs)  # type: ignore[arg-type]
    return keeps.seen


@pytest.mark.parametrize("log_interval", [1, None])
def test_iterations_go_on_after_a_resume_whoever_writes_the_log(log_interval: int | None, tmp_path: Path) -> None:
    def callbacks() -> Any:
        return [LogEveryNTimesteps(5), Writes(tmp_path / "checkpoint.zip", 3 * N_STEPS)]

    whole = make("numpy_actor")
    rows = iterations(whole, callbacks(), log_interval, total_timesteps=UPDATES * N_STEPS)
    resumed = TRPO.resume(tmp_path / "checkpoint.zip", noisy(), device="cpu")
    again = iterations(
        resumed,
        callbacks(),
        log_interval,
        total_timesteps=resumed.remaining_timesteps,
        reset_num_timesteps=False,
    )
    assert again == rows[-len(again) or len(rows) :]
    assert [number for _, number in again] == ([4, 5, 6] if log_interval else [])
    further = TRPO.resume(tmp_path / "checkpoint.zip", noisy(), device="cpu")
    assert iterations(further, None, 1, total_timesteps=N_STEPS, reset_num_timesteps=False) == [(4 * N_STEPS, 4)]
