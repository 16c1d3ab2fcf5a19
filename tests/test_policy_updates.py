"""Several steps of the policy on one rollout, on all of it or in parts: one trust region, around the policy that collected."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from test_trpo import BOX, N_STEPS, HookedTRPO, ScriptedEnv, actor_of, is_critics, make, same
from torch import nn
from torch.distributions import kl_divergence

import sb3_trpo.trpo
from sb3_trpo import TRPO
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.conjugate_gradient import CGResult
from sb3_trpo.optim.line_search import LineSearchResult, LineSearchStatus
from sb3_trpo.optim.parameters import flatten

TARGET_KL = 0.05
CASES: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "box": (BOX, {}),
    "gsde": (BOX, {"use_sde": True}),
    "tanh": (BOX, {"action_bound": "tanh"}),
    "discrete": (spaces.Discrete(4), {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), {}),
    "multi_binary": (spaces.MultiBinary(3), {}),
}


def make_case(name: str, before_train: Any = None, **kwargs: Any) -> HookedTRPO:
    action_space, arguments = CASES[name]
    env = ScriptedEnv(lambda step, action: float(np.mean(action)) * np.sin(step), action_space=action_space)
    return make(env, before_train=before_train, **({"n_steps": 64, "target_kl": TARGET_KL} | arguments | kwargs))


def observations_and_actions(model: TRPO) -> tuple[th.Tensor, th.Tensor]:
    buffer = model.rollout_buffer
    n_states = buffer.buffer_size * buffer.n_envs
    actions = th.as_tensor(buffer.actions).reshape(n_states, -1).float()
    actions = actions.long().flatten() if isinstance(model.action_space, spaces.Discrete) else actions
    return th.as_tensor(buffer.observations).reshape(n_states, -1), actions


def distributions(model: TRPO) -> list[Any]:
    """The policy's on the rollout, without a graph."""
    with th.no_grad():
        found = model.policy.get_distribution(observations_and_actions(model)[0]).distribution
    return found if isinstance(found, list) else [found]


def joint_kl(old: list[Any], new: list[Any], n_states: int) -> float:
    """Independent of the package's own."""
    return float(sum(kl_divergence(p, q).reshape(n_states, -1).sum(dim=1) for p, q in zip(old, new, strict=True)).mean())


SPLITS = {
    "three_passes": {"n_policy_updates": 3},
    "four_parts": {"policy_batch_size": 16},
    "two_passes_of_three_parts": {"n_policy_updates": 2, "policy_batch_size": 25},
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_the_kl_logged_is_from_the_policy_that_collected_and_within_the_bound(name: str, split: dict[str, int]) -> None:
    kls: list[float] = []

    class Measured(HookedTRPO):
        def train(self) -> None:
            before = distributions(self)
            super().train()
            kls.append(joint_kl(before, distributions(self), 64))

    env = ScriptedEnv(lambda step, action: float(np.mean(action)) * np.sin(step), action_space=CASES[name][0])
    arguments = {"n_steps": 64, "target_kl": TARGET_KL, "seed": 0, "device": "cpu"}
    model = Measured("MlpPolicy", env, **arguments, **split, **CASES[name][1])
    model.learn(4 * 64)

    logged = [log["train/kl_divergence_loss"] for log in model.logs]
    assert logged == pytest.approx(kls, rel=1e-3, abs=1e-6)
    assert max(logged) <= TARGET_KL
    assert np.mean(logged) > 0.15 * TARGET_KL
    assert all(log["train/kl_divergence_loss_max"] <= TARGET_KL for log in model.logs)


class Watched:
    """Everything that goes into conjugate gradients and comes out of them, and θ at that time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model: TRPO
        self.gradients: list[th.Tensor] = []
        self.thetas: list[dict[str, th.Tensor]] = []
        self.products: list[th.Tensor] = []
        self.solutions: list[CGResult] = []
        self.parts: list[Any] = []
        solve, parts = sb3_trpo.trpo.conjugate_gradient, TRPO._policy_minibatches

        def conjugate_gradient(A: Callable[[th.Tensor], th.Tensor], b: th.Tensor, **kwargs: Any) -> CGResult:
            self.gradients.append(b.clone())
            self.thetas.append(copy.deepcopy(self.model.policy.state_dict()))
            self.products.append(A(b))
            self.solutions.append(solve(A, b, **kwargs))
            return self.solutions[-1]

        def keep_parts(model: TRPO, rollout: RolloutBatch) -> list[th.Tensor | None]:
            self.parts = parts(model, rollout)
            return self.parts

        monkeypatch.setattr(sb3_trpo.trpo, "conjugate_gradient", conjugate_gradient)
        monkeypatch.setattr(TRPO, "_policy_minibatches", keep_parts)


@pytest.mark.parametrize("ent_coef", [0.0, 0.05])
@pytest.mark.parametrize("policy_batch_size", [None, 25])
@pytest.mark.parametrize("name", ["box", "tanh", "discrete", "multi_discrete", "multi_binary"])
def test_each_step_is_computed_from_the_objective_where_it_starts(
    name: str, policy_batch_size: int | None, ent_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """∇ E[π_θ(a|s) / π_old(a|s) · Â + c H] and the Fisher matrix, both at the θ that the step before has reached."""
    watched = Watched(monkeypatch)
    split = {"n_policy_updates": 3 if policy_batch_size is None else 1, "policy_batch_size": policy_batch_size}
    model = watched.model = make_case(name, seed=1, target_kl=0.3, ent_coef=ent_coef, normalize_advantage=False, **split)
    model.learn(64)
    assert len(watched.gradients) == 3
    assert model.last_update.kl_divergence_loss.min > 0.0

    observations, actions = observations_and_actions(model)
    advantages = th.as_tensor(model.rollout_buffer.advantages).flatten()
    policy = copy.deepcopy(model.policy)
    theta = [p for parameter, p in policy.named_parameters() if not is_critics(parameter)]
    policy.load_state_dict(watched.thetas[0])
    old_log_prob = policy.get_distribution(observations).log_prob(actions).detach()
    for part, state, gradient, product in zip(watched.parts, watched.thetas, watched.gradients, watched.products, strict=True):
        policy.load_state_dict(state)
        chosen = slice(None) if part is None else part
        seen = observations[chosen]
        distribution = policy.get_distribution(seen)
        log_prob = distribution.log_prob(actions[chosen])
        ratio = (log_prob - old_log_prob[chosen]).exp()
        entropy = -ratio * log_prob if distribution.entropy() is None else distribution.entropy()
        objective = (ratio * advantages[chosen] + ent_coef * entropy).mean()
        expected = flatten(th.autograd.grad(objective, theta, retain_graph=True))
        assert float((gradient - expected).norm()) < 1e-4 * float(expected.norm())

        new = distribution.distribution
        pairs = new if isinstance(new, list) else [new]
        kl = sum(kl_divergence(constant(p), p).sum() for p in pairs) / len(seen)
        slope = flatten(th.autograd.grad(kl, theta, create_graph=True))
        curved = flatten(th.autograd.grad(slope.dot(gradient), theta, materialize_grads=True))
        th.testing.assert_close(product, curved + model.cg_damping * gradient, rtol=1e-3, atol=1e-5)
    assert not same(watched.thetas[1], watched.thetas[0])
    assert not same(watched.thetas[2], watched.thetas[1])


def constant(p: Any) -> Any:
    if isinstance(p, th.distributions.Normal):
        return th.distributions.Normal(p.loc.detach(), p.scale.detach())
    return type(p)(logits=p.logits.detach())


@pytest.mark.parametrize(("passes", "parts"), [(1, 1), (4, 1), (1, 4), (2, 3)])
def test_lengths_add_up_to_the_radius_of_the_trust_region(passes: int, parts: int) -> None:
    """Along one ray in every pass, and at right angles within it, they go as far as one step with √(2δ / sᵀFs)."""
    curvature = 2.0
    model = make(target_kl=0.08, n_policy_updates=passes)
    length = model._step_size(curvature, passes * parts)
    radius = (2.0 * 0.08 / curvature) ** 0.5
    assert passes * (parts * length**2) ** 0.5 == pytest.approx(radius)


# ---- parts


def states(n_states: int) -> RolloutBatch:
    """A rollout that is all zeros."""
    zeros = th.zeros(n_states)
    return RolloutBatch(zeros, zeros, zeros, zeros, zeros)


@pytest.mark.parametrize(
    ("n_states", "size", "n_parts"), [(64, 64, 1), (64, 16, 4), (64, 25, 3), (64, 63, 2), (7, 1, 7), (10, 4, 3)]
)
@pytest.mark.parametrize("n_passes", [1, 3])
def test_parts_cover_every_state_once_a_pass_and_are_of_nearly_equal_size(
    n_states: int, size: int, n_parts: int, n_passes: int
) -> None:
    model = make(n_policy_updates=n_passes, n_steps=n_states, policy_batch_size=size, batch_size=n_states)
    parts = model._policy_minibatches(states(n_states))
    assert len(parts) == n_passes * n_parts
    sizes = [len(part) for part in parts]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    passes = [th.cat(parts[i * n_parts : (i + 1) * n_parts]).tolist() for i in range(n_passes)]
    assert all(sorted(one) == list(range(n_states)) for one in passes)
    if n_states == 64:
        assert all(one != sorted(one) for one in passes)
        assert len({tuple(one) for one in passes}) == n_passes


def test_without_a_batch_nothing_is_shuffled() -> None:
    model = make(n_policy_updates=3)
    state = th.get_rng_state()
    assert model._policy_minibatches(states(64)) == [None] * 3
    assert th.equal(th.get_rng_state(), state)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_without_a_batch_is_the_plain_update(name: str) -> None:
    plain = make_case(name).learn(2 * 64)
    told = make_case(name, n_policy_updates=1, policy_batch_size=None).learn(2 * 64)
    assert same(told.policy.state_dict(), plain.policy.state_dict())
    assert told.logs == plain.logs
    # All states in another order: the same up to rounding, in one update.
    whole = make_case(name, policy_batch_size=64, cg_max_steps=3).learn(64)
    again = make_case(name, cg_max_steps=3).learn(64)
    step, expected = (flatten(actor_of(model).values()) - flatten(model.actor_before.values()) for model in (whole, again))
    assert float((step - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("split", [{"n_policy_updates": 2}, {"policy_batch_size": 25}])
@pytest.mark.parametrize("arguments", [{}, {"max_batch_size": 7}, {"sub_sampling_factor": 3}, {"cg_preconditioner": None}])
def test_the_update_has_its_other_options_too(arguments: dict[str, Any], split: dict[str, int]) -> None:
    model = make_case("box", **arguments, **split).learn(2 * 64)
    assert all(0.0 < log["train/kl_divergence_loss"] <= TARGET_KL for log in model.logs)
    if "max_batch_size" in arguments:
        usual = make_case("box", **split).learn(64)
        chunked = make_case("box", **arguments, **split).learn(64)
        for key in ("train/kl_divergence_loss", "train/policy_objective"):
            assert chunked.logs[0][key] == pytest.approx(usual.logs[0][key], rel=1e-2)


def test_more_steps_reach_a_better_objective_in_the_same_trust_region() -> None:
    gains = [
        np.mean(
            [make_case("box", seed=seed, n_policy_updates=n).learn(64).logs[0]["train/policy_objective"] for seed in range(4)]
        )
        for n in (1, 5)
    ]
    assert gains[1] > gains[0]


# ---- steps that are not taken


class CountingPolicy(ActorCriticPolicy):
    """With a buffer that every evaluation of the policy changes."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.register_buffer("n_calls", th.zeros(1))

    def get_distribution(self, obs: Any) -> Any:
        self.n_calls += 1
        return super().get_distribution(obs)


@pytest.mark.parametrize("refused", [LineSearchStatus.REJECTED, LineSearchStatus.SKIPPED])
@pytest.mark.parametrize("split", [{}, {"n_policy_updates": 2}, {"policy_batch_size": 16}])
def test_buffers_are_put_back_where_no_step_is_taken(
    split: dict[str, int], refused: LineSearchStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward: Callable[[int, Any], float] = (lambda step, action: 0.0) if refused is LineSearchStatus.SKIPPED else np.sin  # type: ignore[assignment]
    env = ScriptedEnv(lambda step, action: float(reward(step)) if refused is LineSearchStatus.REJECTED else 0.0)
    calls: list[float] = []
    arguments = {"normalize_advantage": False, "gamma": 0.0, "line_search_max_iter": 1, "target_kl": 1e9}
    model = make(
        env, CountingPolicy, before_train=lambda model: calls.append(float(model.policy.n_calls)), **arguments, **split
    )
    if refused is LineSearchStatus.SKIPPED:
        nn.init.zeros_(model.policy.value_net.weight)
    model.learn(N_STEPS)
    assert model.logs[0]["train/line_search"] == refused.value
    assert same(actor_of(model), model.actor_before)
    # Only `critic_parameters` and the like come after the last step; none of them asks for the distribution.
    assert float(model.policy.n_calls) == calls[0]


def test_a_step_that_is_refused_leaves_the_ones_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    search = TRPO._line_search
    thetas: list[dict[str, th.Tensor]] = []

    def refuse_the_second(model: Any, *args: Any) -> LineSearchResult:
        thetas.append(actor_of(model))
        if len(thetas) == 2:
            model.line_search_max_iter, kept = 1, model.line_search_max_iter
            model.line_search_accept_ratio = 1e9
            try:
                return search(model, *args)
            finally:
                model.line_search_max_iter, model.line_search_accept_ratio = kept, 0.0
        return search(model, *args)

    monkeypatch.setattr(TRPO, "_line_search", refuse_the_second)
    model = make_case("box", n_policy_updates=3).learn(64)
    assert not same(thetas[1], thetas[0])
    assert same(thetas[2], thetas[1])
    assert not same(actor_of(model), thetas[2])
    (log,) = model.logs
    assert log["train/is_line_search_success"] == pytest.approx(2.0 / 3.0)
    assert log["train/step_length_min"] == log["train/actual_improvement_min"] == 0.0
    assert log["train/line_search"] == "accepted"


# ---- what is refused


@pytest.mark.parametrize(("size", "n_envs"), [(33, 1), (10**6, 1)])
def test_a_batch_larger_than_the_rollout_is_refused_before_anything_is_changed(size: int, n_envs: int) -> None:
    state = th.get_rng_state()
    words = rf"policy_batch_size={size} is not allowed: it must be at most the rollout's n_steps=32 \* n_envs=1 = 32 states"
    with pytest.raises(ValueError, match=words):
        make(policy_batch_size=size, seed=123)
    assert th.equal(th.get_rng_state(), state)
    assert make(policy_batch_size=32).learn(N_STEPS).num_timesteps == 32


# ---- entropy bonus, accept ratio


def test_an_entropy_bonus_keeps_the_policy_wider() -> None:
    entropies = []
    for ent_coef in (0.0, 0.5):
        env = ScriptedEnv(lambda step, action: -float(np.square(action).sum()))
        model = make(env, n_steps=128, gamma=0.0, ent_coef=ent_coef).learn(8 * 128)
        entropies.append(model.logs[-1]["train/entropy"])
    assert entropies[1] > entropies[0] + 0.3


def test_the_objective_has_the_entropy_in_it() -> None:
    log = make(ent_coef=0.5, normalize_advantage=True).learn(N_STEPS).logs[0]
    start = log["train/policy_objective"] - log["train/actual_improvement"]
    assert start == pytest.approx(0.5 * log["train/entropy"], abs=1e-5)
    assert log["train/actual_improvement"] == pytest.approx(log["train/expected_improvement"], rel=0.3)


def test_an_entropy_bonus_alone_makes_the_policy_wider() -> None:
    model = make(ScriptedEnv(lambda step, action: 0.0), ent_coef=0.1, gamma=0.0, normalize_advantage=False)
    for parameter in model.policy.value_net.parameters():
        nn.init.zeros_(parameter)
    model.learn(2 * N_STEPS)
    assert model.logs[0]["train/line_search"] == "accepted"
    assert model.logs[1]["train/entropy"] > model.logs[0]["train/entropy"]


def test_the_accept_ratio_is_that_of_actual_to_expected_improvement() -> None:
    shorter = 0
    for seed in range(6):
        plain, strict = (
            make_case("box", seed=seed, target_kl=0.5, line_search_accept_ratio=ratio, line_search_shrinking_factor=0.5).learn(
                64
            )
            for ratio in (0.0, 0.9)
        )
        log = strict.logs[0]
        if log["train/line_search"] == "accepted":
            assert log["train/actual_improvement"] >= 0.9 * log["train/expected_improvement"]
        shorter += log["train/step_length"] < plain.logs[0]["train/step_length"]
    assert shorter >= 1


# ---- bound on the KL in each state


@pytest.mark.parametrize("bound", [None, 0.01, 0.04])
def test_kl_in_each_state_keeps_its_bound(bound: float | None) -> None:
    before: dict[str, list[Any]] = {}

    def keep_distributions(model: HookedTRPO) -> None:
        before["last"] = distributions(model)

    model = make_case("box", keep_distributions, max_state_kl=bound).learn(3 * 64)
    pairs = zip(before["last"], distributions(model), strict=True)
    largest = float(sum(kl_divergence(p, q).sum(dim=-1) for p, q in pairs).max())
    assert largest == pytest.approx(model.last_update.max_state_kl.last, rel=1e-3)
    assert largest > 0.04 if bound is None else 0.9 * bound < largest <= bound * (1 + 1e-3)
