"""Bad numbers: what environments return, and what an update comes to."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from support.arguments import effective
from torch import nn

from sb3_trpo import TRPO, NonFiniteError
from sb3_trpo.rollouts.checks import is_finite

N_STEPS, N_ENVS = 16, 2
BOX = spaces.Box(-1.0, 1.0, (3,))
DICT = spaces.Dict({"place": BOX, "gear": spaces.Discrete(3)})


class Faulty(gym.Env):
    """Returns one number as told at one of its steps; steps count from 1 and through the ends of episodes."""

    def __init__(
        self,
        at: int = 0,
        reward: float | None = None,
        observation: float | None = None,
        space: spaces.Space = BOX,
        action_space: spaces.Space = BOX,
        length: int = 5,
        truncates: bool = True,
    ) -> None:
        self.at, self.reward, self.observation = at, reward, observation
        self.observation_space, self.action_space = space, action_space
        self.length, self.truncates, self.count = length, truncates, 0

    def observe(self, faulty: bool) -> Any:
        observation = np.sin(self.count + np.arange(3)).astype(np.float32)
        if faulty and self.observation is not None:
            observation[1] = self.observation
        return {"place": observation, "gear": self.count % 3} if self.observation_space == DICT else observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observe(self.at == self.count == 0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = float(np.mean(action))
        if self.count == self.at and self.reward is not None:
            reward = self.reward
        return self.observe(self.count == self.at), reward, False, self.truncates and self.count % self.length == 0, {}


def envs(normalize: bool = False, **kwargs: Any) -> VecEnv:
    """Two environments; the second one is faulty."""
    quiet = {name: value for name, value in kwargs.items() if name not in ("at", "reward", "observation")}
    env: VecEnv = DummyVecEnv([lambda: Faulty(**quiet), lambda: Faulty(**kwargs)])
    return VecNormalize(env, norm_obs_keys=["place"] if kwargs.get("space") == DICT else None) if normalize else env


def make(env: VecEnv, policy: Any = None, **kwargs: Any) -> TRPO:
    policy = policy or ("MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy")
    return TRPO(policy, env, n_steps=N_STEPS, seed=0, device="cpu", **effective({"batch_size": 8, **kwargs}))


def tensors(model: TRPO) -> list[th.Tensor]:
    state = [value for entry in model.policy.optimizer.state.values() for value in entry.values()]
    return [tensor.clone() for tensor in (*model.policy.state_dict().values(), *state)]


def unchanged(model: TRPO, before: list[th.Tensor]) -> bool:
    after = tensors(model)
    return len(after) == len(before) and all(th.equal(a, b) for a, b in zip(after, before, strict=True))


class OwnForward(ActorCriticPolicy):
    """A policy that must be asked at every step, by SB3's own loop."""

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


# ---- rewards and observations


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("policy", [None, OwnForward])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_reward_that_is_not_finite_stops_before_an_update(value: float, policy: Any, normalize: bool) -> None:
    env = envs(normalize, at=N_STEPS + 7, reward=value)
    model = make(env, policy).learn(1)
    before = tensors(model)

    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteError, match=r"of environment 1 is -?(nan|inf) at step 6 of"):
        model.learn(2 * N_STEPS, reset_num_timesteps=False)
    assert unchanged(model, before)
    if normalize:
        assert np.isfinite(env.obs_rms.mean).all()
        assert np.isfinite(env.ret_rms.var).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("space", "name"), [(BOX, "observation "), (DICT, "observation 'place' ")])
@pytest.mark.parametrize(("at", "when"), [(7, "at step 6"), (5, "at step 4"), (0, "before the first step")])
def test_an_observation_that_is_not_finite_stops_before_an_update(
    value: float, normalize: bool, space: spaces.Space, name: str, at: int, when: str
) -> None:
    if normalize and at == 5 and np.isinf(value):
        pytest.skip("VecNormalize clips an episode's last observation, and adds it to no statistics")
    model = make(envs(normalize, at=at, observation=value, space=space))
    before = tensors(model)

    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteError, match=rf"{name}.*element \[1\].*environment 1.*{when}"):
        model.learn(2 * N_STEPS)
    assert unchanged(model, before)


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("space", [BOX, DICT])
def test_the_normalizer_is_not_poisoned_by_an_observation(at: int, space: spaces.Space) -> None:
    env = envs(normalize=True, at=at, observation=np.nan, space=space)

    with pytest.raises(NonFiniteError):
        make(env).learn(2 * N_STEPS)
    statistics = env.obs_rms if space == BOX else env.obs_rms["place"]
    assert np.isfinite(statistics.mean).all()


OPTIMIZED = """
import sys
sys.path[:0] = {folders!r}
from test_checks import *
model = make(envs(at=7, reward=float("nan")))
before = tensors(model)
try:
    model.learn(2 * N_STEPS)
except NonFiniteError as error:
    print(unchanged(model, before), error)
"""


@pytest.mark.slow  # Python compiles torch anew for -O
def test_the_same_without_assertions() -> None:
    command = [sys.executable, "-O", "-c", OPTIMIZED.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert answer.startswith("True reward of environment 1 is nan at step 6")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_numbers_are_finite(dtype: type[Any]) -> None:
    large = np.full((2, 3), min(np.finfo(dtype).max, np.finfo(np.float32).max), dtype)

    assert is_finite(large)
    assert is_finite(-large)
    large[1, 2] = np.inf
    assert not is_finite(large)
    assert is_finite(np.arange(3))


def test_is_finite_refuses_what_is_infinite_in_float32() -> None:
    assert not is_finite(np.array([1.0, 1e39]))
    assert not is_finite(np.array([1.0, -1e39]))


# ---- numbers that are finite and too large


@pytest.mark.parametrize("critic_method", ["gauss_newton", "minibatch"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_one_enormous_reward_is_survived(critic_method: str, normalize_advantage: bool) -> None:
    model = make(envs(at=7, reward=1e30), critic_method=critic_method, normalize_advantage=normalize_advantage)
    model.learn(2 * N_STEPS)
    assert all(bool(th.isfinite(tensor).all()) for tensor in tensors(model))
    before = model.policy.value_net.weight.clone()

    model.learn(2 * N_STEPS, reset_num_timesteps=False)
    assert model.logger.name_to_value["train/is_critic_fit_success"] == 1.0
    assert model.logger.name_to_value["train/failed_updates"] == 0
    assert 1e-6 < float((model.policy.value_net.weight - before).detach().abs().max()) < 10.0


def test_updates_that_come_to_nothing_are_undone_counted_and_end_the_training() -> None:
    model = make(envs(), normalize_advantage=False)
    before = tensors(model)
    model.max_failed_updates = 3
    record = []

    def infinite_returns(buffer: Any, *_: Any) -> None:
        buffer.advantages[:] = np.inf

    model._setup_learn(100)
    for update in range(3):
        model.collect_rollouts(model.env, Quiet(model), model.rollout_buffer, N_STEPS)
        infinite_returns(model.rollout_buffer)
        model.rollout_buffer.returns[:] = np.inf
        if update < 2:
            model.train()
        else:
            with pytest.raises(NonFiniteError, match=r"3 updates in a row.*the gradient"):
                model.train()
        record.append(model.logger.name_to_value["train/failed_updates"])
        assert unchanged(model, before)
    assert record == [1, 2, 3]

    model.collect_rollouts(model.env, Quiet(model), model.rollout_buffer, N_STEPS)
    model.train()
    assert model.logger.name_to_value["train/failed_updates"] == 0
    assert not unchanged(model, before)


def Quiet(model: TRPO) -> Any:
    return model._init_callback(None)


def test_parameters_that_an_update_leaves_infinite_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(envs())
    before = tensors(model)
    fit = model._fit_critic

    def overflows(*args: Any) -> Any:
        result = fit(*args)
        with th.no_grad():
            model.policy.value_net.bias.fill_(np.inf)
        return result

    monkeypatch.setattr(model, "_fit_critic", overflows)
    model.learn(2 * N_STEPS)
    assert unchanged(model, before)
    assert model.logger.name_to_value["train/failed_updates"] == 1


# ---- updates that have nothing to do, or must not do what they try


def actor(model: TRPO) -> list[th.Tensor]:
    names = ("mlp_extractor.policy_net", "action_net", "log_std")
    return [p.clone() for name, p in model.policy.named_parameters() if name.startswith(names)]


class Even(Faulty):
    """Every reward is 0, and so is every advantage of a critic that says 0."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, self.reward or 0.0, terminated, truncated, info


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_without_advantages_the_policy_stays(reward: float) -> None:
    model = make(DummyVecEnv([lambda: Even(reward=reward, truncates=False)] * N_ENVS), gamma=0.0)
    with th.no_grad():
        model.policy.value_net.weight.zero_()
        model.policy.value_net.bias.fill_(0.7)
    before = actor(model)
    model.learn(2 * N_STEPS)

    assert all(th.equal(a, b) for a, b in zip(actor(model), before, strict=True))
    assert model.logger.name_to_value["train/line_search"] == "skipped"
    assert model.logger.name_to_value["train/failed_updates"] == 0


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (BOX, spaces.Discrete(1)),
        pytest.param(spaces.Box(-1.0, 1.0, (2000,)), BOX, marks=pytest.mark.slow),
        (spaces.Box(-1.0, 1.0, (3,), dtype=np.float64), spaces.Box(-1.0, 1.0, (2,), dtype=np.float64)),
        (DICT, spaces.MultiBinary(3)),
        (spaces.MultiBinary(4), spaces.MultiDiscrete([2, 3])),
    ],
)
def test_odd_spaces_and_the_shortest_rollouts_stay_finite(observation_space: spaces.Space, action_space: Any) -> None:
    class Odd(gym.Env):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.observation_space.sample(), float(np.mean(action)), False, bool(self.np_random.random() < 0.2), {}

    Odd.observation_space, Odd.action_space = observation_space, action_space
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = TRPO(policy, Odd(), n_steps=2, seed=0, device="cpu").learn(40)

    assert model._n_updates == 20
    assert all(bool(th.isfinite(tensor).all()) for tensor in tensors(model))


@pytest.mark.parametrize("log_std", [-60.0, -20.0, 50.0])
@pytest.mark.parametrize("use_sde", [False, True])
def test_an_extreme_deviation_leaves_finite_parameters_or_a_clear_error(log_std: float, use_sde: bool) -> None:
    model = make(envs(), use_sde=use_sde, policy_kwargs={"log_std_init": log_std})
    try:
        model.learn(6 * N_STEPS)
    except NonFiniteError as error:
        assert "not finite" in str(error) or "environment" in str(error)  # noqa: PT017
    assert all(bool(th.isfinite(tensor).all()) for tensor in tensors(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("target_kl", value) for value in (0, -0.1, None, np.nan)],
        ("cg_damping", -0.1),
        ("gamma", 1.1),
        *[("batch_size", value) for value in (0, -1)],
        *[("n_steps", value) for value in (0.5, 2.0)],
        ("sub_sampling_factor", N_ENVS * N_STEPS + 1),
        ("n_critic_updates", 0),
        ("line_search_max_iter", 0),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}\b"):
        TRPO("MlpPolicy", envs(), **{"n_steps": N_STEPS, "batch_size": 8, "device": "cpu", name: value})


class Dropout(nn.Dropout):
    def __init__(self) -> None:
        super().__init__(0.5)


class Normed(nn.Module):
    """Batch normalisation in the place of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LazyBatchNorm1d()

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return th.tanh(self.norm(inputs))


@pytest.mark.parametrize("layer", [Dropout, Normed])
def test_dropout_and_batch_norm_keep_to_the_trust_region(layer: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    class WithLayer(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.mlp_extractor.policy_net.append(layer() if layer is Dropout else nn.BatchNorm1d(64))

    model = make(envs(), WithLayer, target_kl=0.01)
    outcomes = []
    for _ in range(5):
        model.learn(2 * N_STEPS, reset_num_timesteps=False)
        log = model.logger.name_to_value
        outcomes.append(log["train/is_line_search_success"])
        assert log["train/kl_divergence_loss"] <= 0.01
    assert sum(outcomes) >= 4

    buffers = [buffer.clone() for buffer in model.policy.buffers()]
    monkeypatch.setattr(TRPO, "_line_search", reject)
    before = actor(model)
    model.learn(2 * N_STEPS, reset_num_timesteps=False)
    assert all(th.equal(a, b) for a, b in zip(model.policy.buffers(), buffers, strict=True))
    assert all(th.equal(a, b) for a, b in zip(actor(model), before, strict=True))
    assert model.logger.name_to_value["train/is_line_search_success"] == 0


search = TRPO._line_search


def reject(model: TRPO, surrogate: Any, step: th.Tensor, start: Any, expected: float) -> Any:
    """Search along a step that leads downhill."""
    return search(model, surrogate, -step, start, expected)


def test_a_rejected_step_leaves_the_policy_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(envs())
    monkeypatch.setattr(TRPO, "_line_search", reject)
    before = actor(model)
    model.learn(2 * N_STEPS)

    assert all(th.equal(a, b) for a, b in zip(actor(model), before, strict=True))
    log = model.logger.name_to_value
    assert (log["train/line_search"], log["train/is_line_search_success"]) == ("rejected", 0)
    assert log["train/kl_divergence_loss"] == log["train/actual_improvement"] == log["train/step_length"] == 0
