"""Bounded actions and users' distributions: against torch's own transforms, dense matrices, and what the environment saw."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from support.arguments import effective
from support.models import policy_model
from torch import nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torch.nn import functional as F

from sb3_trpo import TRPO, MlpPolicy
from sb3_trpo.actions import BoundedActionPolicy, CustomDistribution, TanhGaussianDistribution, log_tanh_slope, raw_actions
from sb3_trpo.adapters.models import actor_mlp, components, policy_output
from sb3_trpo.optim.distributions import has_closed_form, joint_kl
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.rollouts.samplers import NumpyActionSampler, action_transform, make_sampler

VECTOR = spaces.Box(-2.0, 2.0, (3,))
ASYMMETRIC = {
    dtype.__name__: spaces.Box(np.array([-0.3, 0.1], dtype), np.array([0.7, 123.456], dtype), dtype=dtype)
    for dtype in (np.float32, np.float64)
}
BOUNDS = ("clip", "tanh")


# ---- distributions of the users' own


def beta(outputs: th.Tensor) -> TransformedDistribution:
    """Beta on [-1, 1]."""
    alpha, beta = (1.0 + F.softplus(outputs)).chunk(2, dim=-1)
    return TransformedDistribution(Beta(alpha, beta), [AffineTransform(-1.0, 2.0)])


def state_dependent_normal(outputs: th.Tensor) -> Normal:
    loc, log_scale = outputs.chunk(2, dim=-1)
    return Normal(loc, log_scale.exp())


def independent_normal(outputs: th.Tensor) -> Independent:
    return Independent(state_dependent_normal(outputs), 1)


def full_normal(outputs: th.Tensor) -> MultivariateNormal:
    loc, log_scale = outputs.chunk(2, dim=-1)
    factor = th.diag_embed(log_scale.exp()) + 0.5 * th.ones(loc.shape[-1], loc.shape[-1]).to(loc).tril(-1)
    return MultivariateNormal(loc, scale_tril=factor)


def categorical(outputs: th.Tensor) -> Categorical:
    return Categorical(logits=outputs)


def sharp_bernoulli(outputs: th.Tensor) -> Bernoulli:
    return Bernoulli(logits=3.0 * outputs)


def three_dice(outputs: th.Tensor) -> Categorical:
    return Categorical(logits=outputs.view(len(outputs), 2, 3))


#: Name ↦ action space, its function, n_dist_outputs.
FUNCTIONS: dict[str, tuple[spaces.Space, Callable[[th.Tensor], Any], int | None]] = {
    "beta": (spaces.Box(-1.0, 1.0, (2,)), beta, None),
    "state_dependent_normal": (spaces.Box(-1.0, 1.0, (2,)), state_dependent_normal, None),
    "independent_normal": (spaces.Box(-1.0, 1.0, (2,)), independent_normal, 4),
    "full_normal": (spaces.Box(-1.0, 1.0, (2,)), full_normal, None),
    "matrix": (spaces.Box(-1.0, 1.0, (2, 2)), state_dependent_normal, None),
    "categorical": (spaces.Discrete(4), categorical, 4),
    "multi_discrete": (spaces.MultiDiscrete([3, 3]), three_dice, 6),
    "multi_binary": (spaces.MultiBinary(3), sharp_bernoulli, 3),
}
by_function = pytest.mark.parametrize("name", FUNCTIONS)


class Spy(gym.Env):
    """Keeps every action that it gets; random observations, short episodes, a reward for large actions."""

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space, self.observation_space = action_space, VECTOR
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-2.0, 2.0, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)), action
        self.actions.append(action)
        observation = self.np_random.uniform(-2.0, 2.0, 3).astype(np.float32)
        return observation, float(np.mean(action)), False, len(self.actions) % 7 == 0, {}


def make_policy(action_space: spaces.Space = ASYMMETRIC["float32"], scale: float = 1.0, **kwargs: Any) -> MlpPolicy:
    """A policy whose every parameter matters; ``scale`` makes its actions large."""
    th.manual_seed(0)
    policy = MlpPolicy(VECTOR, action_space, lambda _: 1e-3, **({"net_arch": [5]} | kwargs))
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
        policy.action_net.weight.mul_(scale)
    policy.set_training_mode(False)
    return policy


def make_user_policy(name: str, **kwargs: Any) -> MlpPolicy:
    action_space, dist_fn, n_dist_outputs = FUNCTIONS[name]
    return make_policy(action_space, dist_fn=dist_fn, n_dist_outputs=n_dist_outputs, **kwargs)


def make_model(action_space: spaces.Space, policy: Any = "MlpPolicy", **kwargs: Any) -> TRPO:
    return TRPO(policy, Spy(action_space), **effective({"n_steps": 32, "batch_size": 16, "seed": 0, "device": "cpu"} | kwargs))


def states(n_states: int = 16) -> th.Tensor:
    return th.rand(n_states, 3, generator=th.Generator().manual_seed(1)) * 4.0 - 2.0


# ---- tanh: densities


def test_slope_of_tanh_is_autograds() -> None:
    u = th.linspace(-3.0, 3.0, 61, dtype=th.float64, requires_grad=True)
    (slope,) = th.autograd.grad(u.tanh().sum(), u)
    th.testing.assert_close(log_tanh_slope(u), slope.log(), rtol=1e-12, atol=1e-12)


def test_tanh_log_prob_is_torchs() -> None:
    loc, scale, noise = 0.7 * th.randn(3, 50, 2, dtype=th.float64, generator=th.Generator().manual_seed(0)).clip(-2.0, 2.0)
    base = Normal(loc, scale.exp())
    u = (loc + scale.exp() * noise).clip(-5.0, 5.0)  # torch goes back by atanh, which forgets larger ones
    ours = TanhGaussianDistribution(2).proba_distribution(loc, scale)
    expected = TransformedDistribution(base, [TanhTransform()]).log_prob(u.tanh()).sum(dim=1)
    assert ours.log_prob(u).shape == (50,)
    th.testing.assert_close(ours.log_prob(u), expected, rtol=1e-7, atol=1e-7)
    assert not th.allclose(ours.log_prob(u), base.log_prob(u).sum(dim=1), atol=0.1)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("u", [0.0, 1.0, 20.0, 100.0, 1e3, -20.0, -1e3])
def test_tanh_log_prob_is_finite_and_exact_where_tanh_is_saturated(u: float, dtype: th.dtype) -> None:
    action = th.tensor([[u]], dtype=dtype)
    log_prob = (
        TanhGaussianDistribution(1).proba_distribution(th.zeros(1, 1, dtype=dtype), th.zeros(1, dtype=dtype)).log_prob(action)
    )
    # 1 - tanh² = 4 e^(-2|u|) / (1 + e^(-2|u|))²
    log_slope = math.log(4.0) - 2.0 * abs(u) - 2.0 * math.log1p(math.exp(-2.0 * abs(u)))
    expected = -0.5 * u * u - 0.5 * math.log(2.0 * math.pi) - log_slope
    assert float(log_prob) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dist_fn", [None, state_dependent_normal])
def test_the_density_of_a_bounded_action_adds_up_to_one(dist_fn: Any) -> None:
    """The log-probability is that of a = tanh(u): integrated over a."""
    policy = make_policy(spaces.Box(-1.0, 1.0, (1,)), action_bound="tanh", dist_fn=dist_fn).double()
    a = th.linspace(-1.0, 1.0, 20_003, dtype=th.float64)[1:-1]
    latent = policy.mlp_extractor.forward_actor(states(1).double().expand(len(a), -1))
    density = policy._get_action_dist_from_latent(latent).log_prob(a.atanh().unsqueeze(1)).exp()
    assert float(density.detach().sum() * (a[1] - a[0])) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dist_fn", [None, state_dependent_normal])
def test_kl_is_that_before_the_bijection(dist_fn: Any) -> None:
    bounded, free = (make_policy(action_bound=bound, dist_fn=dist_fn) for bound in ("tanh", None))
    parts = [[components(policy.get_distribution(states()))] for policy in (bounded, free)]
    for policy, found in zip((bounded, free), parts, strict=True):
        assert policy.action_net.weight.equal(free.action_net.weight)
        with th.no_grad():
            policy.action_net.weight *= 1.3
        found.append(components(policy.get_distribution(states())))
    kls = [joint_kl(*found) for found in parts]
    assert th.equal(*kls)
    assert has_closed_form(parts[0][0])
    # Monte Carlo, with the densities of the bounded actions: E[log π_old(a) - log π(a)] is the KL.
    (old,), (new,) = parts[0]
    u = old.sample((20_000,))
    log_ratio = sum(sign * (part.log_prob(u) - log_tanh_slope(u)).sum(dim=-1) for sign, part in ((1.0, old), (-1.0, new)))
    assert float(log_ratio.detach().mean()) == pytest.approx(float(kls[0].detach().mean()), rel=0.05)


def test_entropy_under_tanh_is_estimated() -> None:
    policy = make_policy(action_bound="tanh")
    inputs = states(1).expand(20_000, -1)
    distribution = policy.get_distribution(inputs)
    u = distribution.sample()
    assert distribution.entropy() is None
    (base,) = components(distribution)
    # H(tanh u) = H(u) + E[log d tanh/du], by another sample
    other = base.sample()
    expected = base.entropy().sum(dim=1).mean() + log_tanh_slope(other).sum(dim=1).mean()
    assert float(-distribution.log_prob(u).mean().detach()) == pytest.approx(float(expected.detach()), abs=0.05)
    assert policy.evaluate_actions(inputs, u)[2] is None
    assert make_policy(action_bound="tanh", dist_fn=state_dependent_normal).get_distribution(inputs).entropy() is None
    assert make_policy(action_bound="clip").get_distribution(inputs).entropy() is not None


# ---- what the environment gets


@pytest.mark.parametrize("space", ASYMMETRIC.values(), ids=ASYMMETRIC)
@pytest.mark.parametrize("action_bound", BOUNDS)
def test_actions_are_within_the_bounds_exactly_and_reach_them(action_bound: str, space: spaces.Box) -> None:
    policy = make_policy(space, scale=100.0, action_bound=action_bound)
    with th.no_grad():
        policy.action_net.weight *= 1e3
    for deterministic in (True, False):
        actions, _ = policy.predict(states(2000).numpy(), deterministic=deterministic)
        assert actions.shape == (2000, 2)
        assert (actions >= space.low).all()
        assert (actions <= space.high).all()
        assert (actions.min(axis=0) == space.low).all()
        assert (actions.max(axis=0) == space.high).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_does_not_leave_the_bounds(dtype: type[Any]) -> None:
    """low + ½ (1 + 1) (high − low) need not be high, to the last bit."""
    low, width = np.random.default_rng(0).uniform(0.1, 10.0, (2, 200)).astype(dtype)
    space = spaces.Box(-low, width, dtype=dtype)
    policy = make_policy(space, action_bound="clip")
    ends = np.stack([np.full(200, -1.0, np.float32), np.full(200, 1.0, np.float32)])
    assert (ActorCriticPolicy.unscale_action(policy, ends) > space.high).any()
    actions = policy.unscale_action(ends)
    assert (actions >= space.low).all()
    assert (actions <= space.high).all()
    np.testing.assert_allclose(actions, [space.low, space.high], rtol=1e-5)


@pytest.mark.parametrize("action_bound", BOUNDS)
def test_predictions_are_the_scaled_modes(action_bound: str) -> None:
    policy = make_policy(action_bound=action_bound)
    with th.no_grad():
        mode = policy.get_distribution(states()).mode().numpy().astype(np.float64)
    bounded = np.tanh(mode) if action_bound == "tanh" else np.clip(mode, -1.0, 1.0)
    low, high = (bound.astype(np.float64) for bound in (policy.action_space.low, policy.action_space.high))
    predicted, _ = policy.predict(states().numpy(), deterministic=True)
    np.testing.assert_allclose(predicted, low + 0.5 * (bounded + 1.0) * (high - low), rtol=1e-5)
    assert len({tuple(action) for action in predicted}) == len(predicted)


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ELU], ids=["lean", "general"])
@pytest.mark.parametrize("action_bound", [*BOUNDS, None])
def test_the_environment_gets_scaled_actions_and_the_buffer_raw_ones(
    action_bound: str | None, activation_fn: type[nn.Module], shape: tuple[int, ...]
) -> None:
    space = spaces.Box(np.full(shape, -0.3, np.float32), np.full(shape, 5.7, np.float32))
    model = make_model(space, action_bound=action_bound, policy_kwargs={"activation_fn": activation_fn, "log_std_init": 0.0})
    model.learn(32)
    raw = model.rollout_buffer.actions.reshape(32, *shape)
    bounded = {"tanh": np.tanh, "clip": partial(np.clip, a_min=-1.0, a_max=1.0)}
    if action_bound is None:
        expected = np.clip(raw, space.low, space.high)
    else:
        expected = space.low + 0.5 * (bounded[action_bound](raw) + 1.0) * (space.high - space.low)
    np.testing.assert_allclose(np.stack(model.env.envs[0].unwrapped.actions), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(raw).max() > 1.5
    # and the evaluation gets them too
    spy = Spy(space)
    evaluate_policy(model, spy, n_eval_episodes=1, deterministic=False, warn=False)
    assert len(spy.actions) == 7


@pytest.mark.parametrize("action_bound", BOUNDS)
def test_lean_and_general_actors_agree(action_bound: str) -> None:
    policy = make_policy(action_bound=action_bound)
    actor = make_sampler(policy, actor_mlp(policy), 1, 4000, -1)
    assert isinstance(actor, NumpyActionSampler)
    observation = states(1).expand(4000, -1)
    raw = actor(observation.numpy(), 0)
    distribution = policy.get_distribution(states(1))
    np.testing.assert_allclose(raw.mean(axis=0), distribution.distribution.mean.detach().numpy()[0], atol=0.1)
    np.testing.assert_allclose(raw.std(axis=0), distribution.distribution.stddev.detach().numpy()[0], rtol=0.05)
    to_env = action_transform(policy)
    with th.no_grad():
        bounded = policy.bounded(th.as_tensor(raw)).numpy()
    np.testing.assert_array_equal(to_env(raw), policy.unscale_action(bounded))


def test_fast_product_and_preconditioner_serve_bounded_actions(make_case: Any) -> None:
    case = make_case("box", policy_class=BoundedActionPolicy, action_bound="tanh")
    fisher = FisherOperator(case.surrogate(), 0.0)
    dense = case.mean_kl_hessian()
    for v in th.randn(3, len(dense), dtype=th.float64):
        th.testing.assert_close(fisher(v), dense @ v, rtol=1e-8, atol=1e-10)
    model = make_model(ASYMMETRIC["float32"], action_bound="tanh").learn(32)
    assert model.last_update.kl_divergence_loss.last > 0.0


class OwnBuffer(RolloutBuffer):
    """A class of the user's own, for which SB3's loop collects."""


class OwnForward(MlpPolicy):
    """A policy that SB3's loop must ask at every step."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("arguments", [{"rollout_buffer_class": OwnBuffer}, {"policy": OwnForward}], ids=["buffer", "forward"])
@pytest.mark.parametrize("action_bound", BOUNDS)
def test_bounds_hold_in_sb3s_own_loop(action_bound: str, arguments: dict[str, Any]) -> None:
    space = ASYMMETRIC["float32"]
    model = make_model(space, action_bound=action_bound, **arguments).learn(32)
    raw = next(model.rollout_buffer.get(None)).actions.numpy()
    bounded = np.tanh(raw) if action_bound == "tanh" else np.clip(raw, -1.0, 1.0)
    expected = space.low + 0.5 * (bounded + 1.0) * (space.high - space.low)
    seen = np.stack(model.env.envs[0].unwrapped.actions)
    np.testing.assert_allclose(np.sort(seen, axis=0), np.sort(expected, axis=0), rtol=1e-5, atol=1e-5)
    assert not model.policy.squash_output
    assert model.last_update.kl_divergence_loss.last <= 0.05
    assert bool((np.abs(raw) > 1.0).any())


# ---- the policy's methods use the environment's actions

by_bound_and_shape = pytest.mark.parametrize(
    ("action_bound", "dist_fn", "shape"),
    [
        ("tanh", None, (2,)),
        ("clip", None, (2,)),
        ("tanh", state_dependent_normal, (2,)),
        ("clip", None, (2, 2)),
        ("tanh", None, (2, 2)),
    ],
)


def box(shape: tuple[int, ...]) -> spaces.Box:
    return spaces.Box(np.full(shape, -0.3, np.float32), np.full(shape, 5.7, np.float32))


@by_bound_and_shape
def test_policy_forward_returns_actions_that_evaluate_actions_takes(action_bound: str, dist_fn: Any, shape: Any) -> None:
    policy = make_policy(box(shape), action_bound=action_bound, dist_fn=dist_fn)
    actions, values, log_prob = policy(states())
    assert actions.shape == (16, *shape)
    assert all(policy.action_space.contains(action) for action in actions.detach().numpy())
    inside = ((actions > -0.3) & (actions < 5.7)).flatten(1).all(dim=1)
    assert bool(inside.any()) or action_bound == "clip"
    for given in (actions, actions.flatten(1)):  # as the environment has them, or as a buffer does
        again = policy.evaluate_actions(states(), given)
        th.testing.assert_close(again[0], values)
        th.testing.assert_close(again[1][inside], log_prob[inside], rtol=1e-3, atol=1e-3)
    th.testing.assert_close(
        policy(states(), deterministic=True)[0].detach().numpy(), policy.predict(states().numpy(), deterministic=True)[0]
    )


@by_bound_and_shape
def test_policy_converts_actions_both_ways(action_bound: str, dist_fn: Any, shape: Any) -> None:
    policy = make_policy(box(shape), action_bound=action_bound, dist_fn=dist_fn)
    low, high = (th.as_tensor(bound) for bound in (policy.action_space.low, policy.action_space.high))
    actions = th.stack([low, high, 0.5 * (low + high), low - 1.0, high + 1.0])
    raw = policy.from_env(actions)
    assert raw.shape == (5, math.prod(shape))
    assert bool(raw.isfinite().all())
    th.testing.assert_close(policy.to_env(raw).reshape(actions.shape), actions.clip(low, high), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action_bound", [*BOUNDS, None])
def test_policy_cloned_from_actions_predicts_them(action_bound: str | None) -> None:
    """Behavior cloning as in the package imitation: maximize log π(a|s) of the expert's actions."""
    for low, high, action in ((-1.0, 1.0, 0.9), (-0.3, 5.7, 5.0)):
        space = spaces.Box(low, high, (1,))
        policy = make_policy(space, action_bound=action_bound, log_std_init=-1.0)
        optimizer = th.optim.Adam(policy.parameters(), 1e-2)
        for _ in range(300):
            loss = -policy.evaluate_actions(states(), th.full((16, 1), action))[1].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        predicted, _ = policy.predict(states().numpy(), deterministic=True)
        np.testing.assert_allclose(predicted, action, atol=0.03 * (high - low))


@pytest.mark.parametrize("action_bound", BOUNDS)
def test_policy_serves_sb3s_ppo(action_bound: str) -> None:
    """What its loop sends to the environment is what it stores."""
    spy = Spy(box((2,)))
    model = PPO(
        MlpPolicy,
        spy,
        n_steps=32,
        batch_size=32,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"action_bound": action_bound},
    )
    model.learn(32)
    stored = model.rollout_buffer.actions.reshape(32, 2)
    np.testing.assert_allclose(np.sort(np.stack(spy.actions), axis=0), np.sort(stored, axis=0), rtol=1e-5)
    assert np.isfinite(model.logger.name_to_value["train/loss"])


def test_policy_raw_actions_end_with_the_block() -> None:
    policy = make_policy(action_bound="tanh")
    with raw_actions(policy):
        with raw_actions(policy):
            pass
        assert policy.squash_output
        th.manual_seed(1)
        raw = policy(states())[0]
    assert not policy.squash_output
    th.manual_seed(1)
    th.testing.assert_close(policy(states())[0], policy.to_env(raw))
    plain = make_policy()
    with raw_actions(plain):
        assert not plain.squash_output


@pytest.mark.parametrize("action_bound", BOUNDS)
def test_update_reads_raw_actions(action_bound: str) -> None:
    """The buffer's log-probabilities are those of the raw actions in it."""
    model = make_model(ASYMMETRIC["float32"], action_bound=action_bound)
    seen: list[th.Tensor] = []

    class Read(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            rollout = next(self.model.rollout_buffer.get(None))
            distribution = self.model.policy.get_distribution(rollout.observations)
            seen.append(distribution.log_prob(rollout.actions) - rollout.old_log_prob)

    model.learn(64, Read())
    assert len(seen) == 2
    assert all(float(difference.detach().abs().max()) < 1e-4 for difference in seen)


# ---- users' distributions


@by_function
def test_log_prob_is_one_number_a_state_the_joint_one(name: str) -> None:
    policy = make_user_policy(name)
    policy_distribution = policy.get_distribution(states())
    assert isinstance(policy_distribution, CustomDistribution)
    actions = policy_distribution.sample()
    with th.no_grad():
        latent = policy.mlp_extractor.forward_actor(states())
        expected = FUNCTIONS[name][1](policy.action_net(latent)).log_prob(actions)
    log_prob = policy_distribution.log_prob(actions)
    assert log_prob.shape == (16,)
    th.testing.assert_close(log_prob, expected.reshape(16, -1).sum(dim=1))
    entropy = policy_distribution.entropy()
    assert entropy is None if name == "beta" else entropy.shape == (16,)
    assert joint_kl(components(policy_distribution), components(policy_distribution)).shape == (16,)


@pytest.mark.parametrize("name", ["state_dependent_normal", "full_normal", "categorical", "multi_discrete", "multi_binary"])
def test_entropy_is_that_of_the_joint_action(name: str) -> None:
    policy = make_user_policy(name)
    distribution = policy.get_distribution(states(1).expand(20_000, -1))
    surprise = -distribution.log_prob(distribution.sample())
    assert float(distribution.entropy()[0].detach()) == pytest.approx(
        float(surprise.detach().mean()), abs=4.0 * float(surprise.detach().std()) / 20_000**0.5
    )


@by_function
def test_learning_fills_the_buffer_with_the_functions_log_probs(name: str) -> None:
    action_space, dist_fn, n_dist_outputs = FUNCTIONS[name]
    policy_kwargs = {"dist_fn": dist_fn, "n_dist_outputs": n_dist_outputs, "net_arch": [8]}
    model = make_model(action_space, policy_kwargs=policy_kwargs)
    before = flatten(model.policy.parameters()).detach().clone()
    log_probs = []

    def recompute() -> None:
        buffer = model.rollout_buffer
        inputs = th.as_tensor(buffer.observations.reshape(32, -1))
        actions = th.as_tensor(buffer.actions.reshape(32, -1)).float()
        actions = actions.flatten() if isinstance(action_space, spaces.Discrete) else actions
        with th.no_grad():
            outputs = model.policy.action_net(model.policy.mlp_extractor.forward_actor(inputs))
        log_probs.append((buffer.log_probs.flatten(), dist_fn(outputs).log_prob(actions).reshape(32, -1).sum(dim=1)))

    update = model.train
    model.train = lambda: (recompute(), update())  # type: ignore[method-assign, return-value]
    model.learn(64)
    for stored, expected in log_probs:
        np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-5)
    assert model.last_update.kl_divergence_loss.last > 0.0
    assert model.last_update.kl_divergence_loss.max <= 0.05
    assert bool(th.isfinite(flatten(model.policy.parameters())).all())
    assert not th.equal(before, flatten(model.policy.parameters()).detach())


@by_function
def test_predictions_are_the_spaces_own(name: str) -> None:
    """In the space's shape, and of a type that its environments take."""
    policy = make_user_policy(name)
    for deterministic in (True, False):
        actions, _ = policy.predict(states().numpy(), deterministic=deterministic)
        assert actions.shape == (16, *policy.action_space.shape)
        one, _ = policy.predict(states(1).numpy()[0], deterministic=deterministic)
        if isinstance(policy.action_space, spaces.Discrete):
            assert policy.action_space.contains(one), one
        assert policy.action_space.contains(np.asarray(one).astype(policy.action_space.dtype))


@by_function
def test_the_policy_has_no_parameter_without_a_use(name: str) -> None:
    policy = make_user_policy(name)
    assert not hasattr(policy, "log_std")
    held = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in policy.parameters()}
    assert policy.action_net.weight.norm() > 0.0
    fresh = MlpPolicy(
        VECTOR, policy.action_space, lambda _: 1e-3, dist_fn=policy.dist_fn, n_dist_outputs=policy.n_dist_outputs
    )
    assert float(fresh.action_net.weight.detach().norm(dim=1).max()) == pytest.approx(0.01, rel=1e-4)  # as SB3's first actions


def test_mode_of_beta_is_the_formulas() -> None:
    policy = make_user_policy("beta")
    with th.no_grad():
        outputs = policy.action_net(policy.mlp_extractor.forward_actor(states()))
        alpha, beta = (1.0 + F.softplus(outputs)).chunk(2, dim=-1)
        expected = 2.0 * (alpha - 1.0) / (alpha + beta - 2.0) - 1.0
        th.testing.assert_close(policy.get_distribution(states()).mode(), expected)


def test_the_mean_stands_in_where_there_is_no_mode() -> None:
    class NoMode(Normal):
        @property
        def mode(self) -> th.Tensor:
            raise NotImplementedError

    class UndefinedMode(Normal):
        @property
        def mode(self) -> th.Tensor:
            return self.loc.new_tensor([math.nan, 7.0]).expand_as(self.loc)

    loc = th.tensor([[1.0, 2.0]])
    for family, expected in ((NoMode, [[1.0, 2.0]]), (UndefinedMode, [[1.0, 7.0]])):
        distribution = CustomDistribution(lambda outputs, family=family: family(outputs, 1.0), 2, (2,), False)
        assert distribution.proba_distribution(loc).mode().tolist() == expected


def test_the_mode_of_an_even_chance_is_an_action() -> None:
    distribution = CustomDistribution(sharp_bernoulli, 3, (3,), False).proba_distribution(th.tensor([[0.0, 1.0, -1.0]]))
    assert distribution.mode().tolist() == [[0.0, 1.0, 0.0]]


@by_function
def test_fisher_product_is_exact(name: str) -> None:
    """Whether by Gauss-Newton or by the exact fall-back: against the dense Hessian of the KL."""
    policy = make_user_policy(name).double()
    inputs = states(6).double()
    policy.features_extractor.forward = lambda observations: observations.flatten(1).double()
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    rollout = make_rollout(policy, inputs)
    from sb3_trpo.optim.objective import Surrogate

    surrogate = Surrogate(policy_model(policy.get_distribution, actor), rollout)
    assert surrogate.has_closed_form == (name not in ("beta", "full_normal"))
    fisher = FisherOperator(surrogate, 0.0)
    old = FUNCTIONS[name][1](outputs_at(policy, inputs, [p.detach() for p in actor]))

    def mean_kl(*theta: th.Tensor) -> th.Tensor:
        new = FUNCTIONS[name][1](outputs_at(policy, inputs, theta))
        return th.distributions.kl_divergence(old, new).reshape(6, -1).sum(dim=1).mean()

    blocks = th.autograd.functional.hessian(mean_kl, tuple(p.detach() for p in actor))
    sizes = [p.numel() for p in actor]
    dense = th.cat(
        [th.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1) for row, m in zip(blocks, sizes, strict=True)]
    )
    assert float(dense.norm()) > 0.1
    for v in th.randn(2, len(dense), dtype=th.float64):
        th.testing.assert_close(fisher(v), dense @ v, rtol=1e-7, atol=1e-9)


def outputs_at(policy: MlpPolicy, inputs: th.Tensor, theta: Any) -> th.Tensor:
    """The network's outputs by hand: one hidden tanh layer."""
    w1, b1, w2, b2 = theta
    return (inputs @ w1.T + b1).tanh() @ w2.T + b2


def make_rollout(policy: MlpPolicy, inputs: th.Tensor) -> Any:
    from sb3_trpo.optim.batch import RolloutBatch

    n = len(inputs)
    with th.no_grad():
        actions = policy.get_distribution(inputs).sample()
    return RolloutBatch(inputs, actions, th.randn(n).double(), th.zeros(n).double(), th.full((n,), 1.0 / n).double())


# ---- files


@pytest.mark.parametrize(
    "kwargs",
    [
        {"action_bound": "tanh"},
        {"action_bound": "clip"},
        {"dist_fn": beta},
        {"dist_fn": full_normal, "n_dist_outputs": 4, "action_bound": "clip"},
    ],
)
def test_a_policy_saved_alone_keeps_its_options(kwargs: dict[str, Any], tmp_path: Path) -> None:
    policy = make_policy(**kwargs)
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    for name in ("action_bound", "dist_fn", "n_dist_outputs"):
        assert getattr(loaded, name) == kwargs.get(name)
    assert not loaded.squash_output
    for deterministic in (True, False):
        predictions = []
        for one in (policy, loaded):
            th.manual_seed(3)
            predictions.append(one.predict(states().numpy(), deterministic=deterministic)[0])
        np.testing.assert_array_equal(*predictions)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"action_bound": "tanh"},
        {"action_bound": "clip"},
        {"policy_kwargs": {"action_bound": "tanh"}},
        {"policy_kwargs": {"dist_fn": beta}},
    ],
)
def test_a_saved_model_keeps_its_options_and_trains_on(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(ASYMMETRIC["float32"], **kwargs).learn(32)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=Spy(ASYMMETRIC["float32"]), device="cpu", trust=True)
    assert loaded.action_bound == kwargs.get("action_bound")
    assert loaded.policy.action_bound == (kwargs.get("action_bound") or kwargs.get("policy_kwargs", {}).get("action_bound"))
    assert type(loaded.policy.action_dist) is type(model.policy.action_dist)
    predictions = [one.predict(states().numpy(), deterministic=True)[0] for one in (model, loaded)]
    np.testing.assert_array_equal(*predictions)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64


# ---- what is refused

REFUSED: dict[str, tuple[spaces.Space, dict[str, Any], str]] = {
    "discrete": (
        spaces.Discrete(2),
        {"action_bound": "tanh"},
        r"action_bound='tanh' is not allowed with the action space Disc",
    ),
    "multi_binary": (
        spaces.MultiBinary(2),
        {"action_bound": "clip"},
        r"action_bound='clip' .* must be a Box with finite bounds",
    ),
    "discrete_by_kwargs": (
        spaces.Discrete(2),
        {"policy_kwargs": {"action_bound": "clip"}},
        r"must be a Box with finite bounds",
    ),
    "unknown": (VECTOR, {"action_bound": "sigmoid"}, r"action_bound='sigmoid' is not allowed: it must be 'clip' or 'tanh'"),
    "unknown_by_kwargs": (
        VECTOR,
        {"policy_kwargs": {"action_bound": "sigmoid"}},
        r"action_bound='sigmoid' is not allowed: it must",
    ),
    "gsde": (VECTOR, {"action_bound": "tanh", "use_sde": True}, r"action_bound='tanh' is not allowed with use_sde=True"),
    "gsde_dist_fn": (VECTOR, {"policy_kwargs": {"dist_fn": beta}, "use_sde": True}, r"dist_fn=.* is not allowed with use_sde"),
    "sb3s_policy": (
        VECTOR,
        {"action_bound": "tanh", "policy": ActorCriticPolicy},
        r"policy=ActorCriticPolicy .* must derive from",
    ),
    "contradiction": (
        VECTOR,
        {"action_bound": "tanh", "policy_kwargs": {"action_bound": "clip"}},
        r"action_bound='tanh' is not allowed with policy_kwargs\['action_bound'\]='clip'",
    ),
    "no_function": (VECTOR, {"policy_kwargs": {"dist_fn": "beta"}}, r"dist_fn='beta' is not allowed: it must be a function"),
    "no_outputs": (
        VECTOR,
        {"policy_kwargs": {"dist_fn": beta, "n_dist_outputs": 0}},
        r"n_dist_outputs=0 is not allowed: it must be",
    ),
    "outputs_of_nothing": (
        VECTOR,
        {"policy_kwargs": {"n_dist_outputs": 4}},
        r"n_dist_outputs=4 is not allowed without dist_fn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_in_words_before_anything_changes(case: str) -> None:
    action_space, arguments, words = REFUSED[case]
    env = Spy(action_space)
    arguments = {"policy_kwargs": {}} | arguments
    given, state = dict(arguments["policy_kwargs"]), th.get_rng_state()
    with pytest.raises(ValueError, match=words):
        make_model(action_space, **(arguments | {"seed": 123}))
    assert arguments["policy_kwargs"] == given
    assert th.equal(th.get_rng_state(), state)
    assert env.actions == []


@pytest.mark.parametrize("action_bound", BOUNDS)
def test_a_box_without_a_bound_is_refused_by_the_policy_alone(action_bound: str) -> None:
    space = spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([1.0, 1.0], np.float32))
    with pytest.raises(ValueError, match=rf"action_bound='{action_bound}' .* must be a Box with finite bounds"):
        make_policy(space, action_bound=action_bound)


def test_the_users_policy_kwargs_are_left_alone() -> None:
    policy_kwargs: dict[str, Any] = {"net_arch": [4]}
    bounded = make_model(VECTOR, action_bound="tanh", policy_kwargs=policy_kwargs)
    assert policy_kwargs == {"net_arch": [4]}
    assert bounded.policy.action_bound == "tanh"
    assert make_model(VECTOR, policy_kwargs=policy_kwargs).policy.action_bound is None


WRONG_SHAPES: dict[str, tuple[spaces.Space, Callable[[th.Tensor], Any], str]] = {
    "no_states": (VECTOR, lambda z: Normal(z.mean(), 1.0), r"Normal with batch_shape=\(\)"),
    "dimensions_first": (VECTOR, lambda z: Normal(z[:, :3].T, 1.0), r"batch_shape=\(3, 32\)"),
    "one_event": (spaces.Discrete(2), lambda z: MultivariateNormal(z[:, 0], th.eye(len(z))), r"batch_shape=\(\) and event"),
    "too_many_dimensions": (VECTOR, lambda z: Normal(z, 1.0), r"batch_shape=\(32, 6\)"),
    "too_few_dimensions": (VECTOR, lambda z: Normal(z[:, :1], 1.0), r"batch_shape=\(32, 1\)"),
    "flat": (spaces.Box(-1.0, 1.0, (1,)), lambda z: Normal(z[:, 0], z[:, 1].exp()), r"batch_shape=\(32,\)"),
    "column": (spaces.Discrete(2), lambda z: Categorical(logits=z.unsqueeze(1)), r"batch_shape=\(32, 1\)"),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_wrong_shapes_are_refused_in_words(case: str) -> None:
    """A log-probability of (n,) against one of (n, 1) would broadcast to (n, n) and go unnoticed."""
    action_space, dist_fn, words = WRONG_SHAPES[case]
    policy = make_policy(action_space, dist_fn=dist_fn)
    with pytest.raises(ValueError, match=words):
        policy.get_distribution(states(32))


def test_something_that_is_no_distribution_is_refused_in_words() -> None:
    policy = make_policy(VECTOR, dist_fn=lambda outputs: outputs)
    with pytest.raises(ValueError, match="dist_fn returned a Tensor; it must be a torch distribution"):
        policy.get_distribution(states())


def test_a_family_without_a_kl_is_refused_in_words() -> None:
    model = make_model(VECTOR, policy_kwargs={"dist_fn": lambda z: th.distributions.StudentT(5.0, z[:, :3], z[:, 3:].exp())})
    with pytest.raises(ValueError, match="StudentT has no KL divergence in torch; register one"):
        model.learn(32)


@pytest.mark.parametrize(
    "name", ["box", "gsde", "gsde_squashed", "discrete", "multi_discrete", "multi_binary", "dict_observation"]
)
@pytest.mark.parametrize("n_states", [1, 2, 12])
def test_log_prob_of_every_distribution_is_one_number_a_state(name: str, n_states: int, make_case: Any) -> None:
    case = make_case(name, n_states=n_states)
    forward = policy_output(case.distribution, case.rollout)
    assert forward.log_prob.shape == (n_states,)
    assert forward.entropy is None or forward.entropy.shape == (n_states,)
