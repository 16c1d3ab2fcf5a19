import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo.rollouts.collect import generalized_advantages


def column(*values):
    return np.array(values, dtype=np.float32)[:, None]


def test_by_hand():
    """
    γ = 1/2, λ = 1/2; the third observation begins an episode, so the second step ended one.

    δ_3 = 4 + 8/2 − 2 = 6         Â_3 = 6
    δ_2 = 3 + 2/2 − 1 = 3         Â_2 = 3 + 6/4 = 4.5
    δ_1 = 2 − 4 = −2              Â_1 = −2          (an end: neither V nor Â of what follows)
    δ_0 = 1 + 4/2 − 2 = 1         Â_0 = 1 − 2/4 = 0.5
    """
    advantages = generalized_advantages(
        rewards=column(1, 2, 3, 4),
        values=column(2, 4, 1, 2),
        episode_starts=column(1, 0, 1, 0),
        last_values=np.array([8.0], dtype=np.float32),
        last_dones=np.array([False]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    np.testing.assert_array_equal(advantages, column(0.5, -2.0, 4.5, 6.0))


def test_the_values_after_an_end_do_not_count():
    arguments = {"rewards": column(5), "values": column(2), "episode_starts": column(0), "gamma": 0.9, "gae_lambda": 0.9}
    last_values = np.array([100.0], dtype=np.float32)
    for done, expected in [(True, 3.0), (False, 93.0)]:
        advantages = generalized_advantages(last_values=last_values, last_dones=np.array([done]), **arguments)
        np.testing.assert_allclose(advantages, column(expected), rtol=1e-6)


@pytest.mark.parametrize("n_steps", [1, 2, 40])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.7)])
def test_like_sb3s_buffer(n_steps, gamma, gae_lambda):
    n_envs = 3
    generator = np.random.default_rng(0)
    buffer = RolloutBuffer(
        n_steps,
        spaces.Box(-1.0, 1.0, (2,)),
        spaces.Discrete(2),
        device="cpu",
        gamma=gamma,
        gae_lambda=gae_lambda,
        n_envs=n_envs,
    )
    buffer.rewards[:] = generator.normal(size=(n_steps, n_envs))
    buffer.values[:] = generator.normal(size=(n_steps, n_envs))
    buffer.episode_starts[:] = generator.random((n_steps, n_envs)) < 0.2
    last_values = generator.normal(size=n_envs).astype(np.float32)
    last_dones = np.array([True, False, False])
    inputs = [buffer.rewards.copy(), buffer.values.copy(), buffer.episode_starts.copy(), last_values.copy()]
    advantages = generalized_advantages(
        buffer.rewards, buffer.values, buffer.episode_starts, last_values, last_dones, gamma, gae_lambda
    )
    for before, after in zip(inputs, [buffer.rewards, buffer.values, buffer.episode_starts, last_values], strict=True):
        np.testing.assert_array_equal(after, before)
    buffer.compute_returns_and_advantage(th.as_tensor(last_values), last_dones)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, buffer.advantages, atol=1e-6)
