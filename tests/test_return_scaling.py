"""The critic learns returns in units of their own running standard deviation; nothing else may notice."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from test_trpo import BOX, N_STEPS, HookedTRPO, ScriptedEnv, actor_of, critic_of, make, same

import sb3_trpo.trpo
from sb3_trpo import TRPO, MlpPolicy
from sb3_trpo.optim.parameters import flatten


def noisy(step: int, action: Any) -> float:
    """Rewards of a size that no critic would like."""
    return 1000.0 * math.sin(step) + 300.0


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[th.Tensor]:
    """The critic's targets of every update."""
    kept: list[th.Tensor] = []
    fit = sb3_trpo.trpo.fit_gauss_newton

    def spy(critic: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(batch.returns.clone())
        return fit(critic, batch, *args, **kwargs)

    monkeypatch.setattr(sb3_trpo.trpo, "fit_gauss_newton", spy)
    return kept


def test_running_moments_are_those_of_all_returns(targets: list[th.Tensor]) -> None:
    """The divisor of an update is from the rollouts before it."""
    returns: list[np.ndarray] = []
    model = make(
        ScriptedEnv(noisy),
        before_train=lambda model: returns.append(model.rollout_buffer.returns.flatten().copy()),
        return_scaling=True,
    ).learn(3 * N_STEPS)
    np.testing.assert_array_equal(targets[0], returns[0] / np.float32(np.sqrt(1.0 + 1e-8)))
    for i in (1, 2):
        seen = np.concatenate(returns[:i]).astype(np.float64)
        np.testing.assert_allclose(targets[i], returns[i] / seen.std(), rtol=1e-5)
    seen = np.concatenate(returns).astype(np.float64)
    assert model.return_moments.mean == pytest.approx(seen.mean())
    assert model.return_moments.var == pytest.approx(seen.var())
    assert model.return_moments.count == len(seen)
    assert model._value_scale == pytest.approx(seen.std())


@pytest.mark.parametrize("max_batch_size", [None, 7])
def test_values_are_the_critics_outputs_scaled_back(max_batch_size: int | None) -> None:
    n_checked = 0

    def check(model: HookedTRPO) -> None:
        nonlocal n_checked
        buffer = model.rollout_buffer
        observations = th.as_tensor(buffer.observations).reshape(N_STEPS, -1)
        with th.no_grad():
            expected = model._value_scale * model.policy.predict_values(observations).flatten().numpy()
        np.testing.assert_allclose(buffer.values.flatten(), expected, rtol=1e-4, atol=1e-3)
        # SB3's own recursion, from the same values: bootstraps at the end of the rollout are scaled back as well.
        other = RolloutBuffer(N_STEPS, model.observation_space, model.action_space, gamma=0.9, gae_lambda=0.8)
        other.values, other.rewards, other.episode_starts = buffer.values, buffer.rewards, buffer.episode_starts
        with th.no_grad():
            last = model._value_scale * model.policy.predict_values(th.as_tensor(model._last_obs))
        other.compute_returns_and_advantage(last, model._last_episode_starts)
        np.testing.assert_allclose(buffer.advantages, other.advantages, rtol=1e-4, atol=1e-2)
        n_checked += model._value_scale > 100.0

    arguments = {"return_scaling": True, "gamma": 0.9, "gae_lambda": 0.8, "max_batch_size": max_batch_size}
    make(ScriptedEnv(noisy), before_train=check, **arguments).learn(3 * N_STEPS)
    assert n_checked == 2


def test_rewards_of_truncated_episodes_hold_scaled_values() -> None:
    env = ScriptedEnv(lambda step, action: 0.0)
    last: list[np.ndarray] = []
    step = env.step

    def remember(action: Any) -> Any:
        result = step(action)
        if result[3]:
            last.append(result[0])
        return result

    env.step = remember  # type: ignore[method-assign]

    def check(model: HookedTRPO) -> None:
        with th.no_grad():
            values = model.policy.predict_values(th.as_tensor(np.stack(last))).flatten().numpy()
        found = model.rollout_buffer.rewards.flatten()[9::10]
        np.testing.assert_allclose(found, 0.9 * 50.0 * values, rtol=1e-5)

    model = make(env, before_train=check, return_scaling=True, gamma=0.9)
    model.return_moments.var, model.return_moments.count = np.float64(2500.0 - 1e-8), 1.0
    model.learn(N_STEPS)


def test_without_it_nothing_is_scaled_or_counted(targets: list[th.Tensor]) -> None:
    returns: list[np.ndarray] = []
    model = make(ScriptedEnv(noisy), before_train=lambda m: returns.append(m.rollout_buffer.returns.flatten().copy()))
    model.learn(2 * N_STEPS)
    for target, expected in zip(targets, returns, strict=True):
        np.testing.assert_array_equal(target, expected)
    assert model._value_scale == 1.0
    assert model.return_moments.count == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rollout_that_is_not_finite_does_not_spoil_the_moments(bad: float) -> None:
    model = make(ScriptedEnv(noisy), return_scaling=True).learn(N_STEPS)
    moments, theta = vars(model.return_moments).copy(), flatten(model.policy.parameters()).detach().clone()

    def spoil(model: HookedTRPO) -> None:
        model.rollout_buffer.returns[3] = model.rollout_buffer.advantages[3] = bad

    model.before_train = spoil
    model.learn(N_STEPS, reset_num_timesteps=False)
    assert vars(model.return_moments) == moments
    assert th.equal(flatten(model.policy.parameters()), theta)
    model.before_train = lambda model: None
    model.learn(N_STEPS, reset_num_timesteps=False)
    assert model.logs[-1]["train/is_critic_fit_success"] == 1.0
    assert model.return_moments.count == 2 * N_STEPS


def test_returns_that_are_all_the_same_are_no_division_by_zero() -> None:
    model = make(ScriptedEnv(lambda step, action: 0.0), return_scaling=True, gamma=0.0)
    for parameter in model.policy.value_net.parameters():
        parameter.data.zero_()
    model.learn(3 * N_STEPS)
    assert model.return_moments.var == 0.0
    assert model._value_scale == pytest.approx(1e-4)
    assert all(log["train/is_critic_fit_success"] in (0.0, 1.0) and log["train/value_loss"] == 0.0 for log in model.logs)
    assert bool(th.isfinite(flatten(model.policy.parameters())).all())


def test_the_actor_is_not_touched_by_the_critics_units() -> None:
    first = [make(ScriptedEnv(noisy), return_scaling=scaled).learn(N_STEPS) for scaled in (False, True)]
    assert same(*map(actor_of, first))
    # In the first update the divisor is 1, up to its epsilon.
    critics = [flatten(critic_of(model).values()) for model in first]
    th.testing.assert_close(*critics, rtol=1e-2, atol=1e-3)


def test_moments_survive_a_file(tmp_path: Any) -> None:
    model = make(ScriptedEnv(noisy), return_scaling=True).learn(2 * N_STEPS)
    model.save(tmp_path / "model")
    loaded = HookedTRPO.load(tmp_path / "model", env=ScriptedEnv(noisy), device="cpu", trust=True)
    assert loaded.return_scaling is True
    assert loaded._value_scale == model._value_scale > 100.0
    assert vars(loaded.return_moments) == vars(model.return_moments)
    loaded.learn(N_STEPS, reset_num_timesteps=False)
    assert loaded.return_moments.count == 3 * N_STEPS


class OwnBuffer(RolloutBuffer):
    """A class of the user's own."""


class OwnForward(MlpPolicy):
    """With a forward method of its own."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("arguments", [{"rollout_buffer_class": OwnBuffer}, {"policy": OwnForward}], ids=["buffer", "forward"])
def test_it_is_refused_where_sb3s_loop_collects(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="return_scaling=True is not allowed with a policy that has a forward method"):
        make(ScriptedEnv(noisy, action_space=BOX), return_scaling=True, **arguments)
    assert isinstance(make(ScriptedEnv(noisy), **arguments), TRPO)
