from dataclasses import replace

import numpy as np
import pytest
import torch as th
from scipy import stats
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from support.models import policy_model
from torch import nn

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.distributions import outputs, without_validation
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import assign, flatten

EXACT = {"atol": 1e-12, "rtol": 0.0}


def move(case, step=None):
    """Take a step from θ_old, a random one unless given."""
    theta = flatten(case.actor).detach()
    assign(case.actor, theta + (0.2 * th.randn_like(theta) if step is None else step))


def weigh_unevenly(case):
    weights = case.rollout.weights
    weights.copy_(th.rand_like(weights))
    weights /= weights.sum()


def evaluate_actions(case):
    """Log-probabilities and entropy by SB3's own method."""
    with th.no_grad():
        _, log_prob, entropy = case.policy.evaluate_actions(case.rollout.inputs, case.rollout.actions)
    return log_prob, entropy


@pytest.fixture
def by_hand():
    """Two states, two actions; the parameters are the logits themselves. π_old is uniform."""
    logits = nn.Parameter(th.zeros(2, 2, dtype=th.float64))
    rollout = RolloutBatch(
        inputs=th.tensor([0, 1]),
        actions=th.tensor([0, 1]),
        advantages=th.tensor([2.0, -1.0], dtype=th.float64),
        returns=th.zeros(2, dtype=th.float64),
        weights=th.tensor([0.25, 0.75], dtype=th.float64),
    )
    distribution = CategoricalDistribution(2)
    model = policy_model(lambda states: distribution.proba_distribution(logits[states]), [logits])
    return logits, Surrogate(model, rollout)


def test_values_by_hand(by_hand):
    logits, surrogate = by_hand
    with th.no_grad():
        logits.copy_(th.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=th.float64).log())
    point = surrogate.evaluate()
    assert point.objective == pytest.approx(0.25 * (0.8 / 0.5) * 2.0 + 0.75 * (0.6 / 0.5) * -1.0)
    expected_kl = 0.25 * stats.entropy([0.5, 0.5], [0.8, 0.2]) + 0.75 * stats.entropy([0.5, 0.5], [0.4, 0.6])
    assert point.kl == pytest.approx(expected_kl)
    assert point.max_state_kl == pytest.approx(stats.entropy([0.5, 0.5], [0.8, 0.2]))


def test_gradient_and_start_by_hand(by_hand):
    _logits, surrogate = by_hand
    # ∂ log softmax / ∂ logits = (1, 0) − p, times the weight and the advantage
    assert surrogate.gradient().tolist() == pytest.approx([0.25, -0.25, 0.375, -0.375])
    assert surrogate.start() == pytest.approx((0.25 * 2.0 + 0.75 * -1.0, 0.0, 0.0))
    assert surrogate.entropy == pytest.approx(np.log(2.0))


def test_start_is_the_point_at_theta_old_exactly(case):
    surrogate = case.surrogate()
    assert surrogate.evaluate().objective == surrogate.start().objective
    assert surrogate.evaluate().kl == pytest.approx(0.0, abs=1e-15)


def test_objective_is_the_weighted_mean_of_ratio_times_advantage(case):
    weigh_unevenly(case)
    surrogate = case.surrogate()
    old_log_prob, _ = evaluate_actions(case)
    move(case)
    new_log_prob, _ = evaluate_actions(case)
    expected = (case.rollout.weights * (new_log_prob - old_log_prob).exp() * case.rollout.advantages).sum()
    assert surrogate.evaluate().objective == pytest.approx(float(expected), rel=1e-12)


def test_objective_and_kl_of_a_users_own_policy(user_case):
    surrogate = user_case.surrogate()
    old_log_prob, _ = evaluate_actions(user_case)
    hessian, step = user_case.mean_kl_hessian(), 1e-3 * th.randn_like(flatten(user_case.actor)).detach()
    move(user_case, step)
    new_log_prob, _ = evaluate_actions(user_case)
    point = surrogate.evaluate()
    assert point.objective == pytest.approx(float(((new_log_prob - old_log_prob).exp() * user_case.rollout.advantages).mean()))
    assert point.kl == pytest.approx(float(0.5 * step.dot(hessian @ step)), rel=2e-2)


def test_kl_is_from_the_old_to_the_new_policy(make_case):
    case = make_case("discrete")
    surrogate = case.surrogate()
    old = case.distribution(case.rollout.inputs).distribution.probs.detach().numpy()
    move(case)
    new = case.distribution(case.rollout.inputs).distribution.probs.detach().numpy()
    assert surrogate.evaluate().kl == pytest.approx(stats.entropy(old, new, axis=1).mean(), rel=1e-9)
    assert stats.entropy(new, old, axis=1).mean() != pytest.approx(stats.entropy(old, new, axis=1).mean(), rel=1e-3)


def test_gradient_is_the_slope_of_the_objective(case):
    weigh_unevenly(case)
    case.differentiate_everything()
    surrogate = case.surrogate()
    gradient = surrogate.gradient()
    theta, eps = flatten(case.actor).detach(), 1e-6
    slopes = []
    for direction in th.eye(len(theta), dtype=th.float64):
        points = []
        for sign in (1.0, -1.0):
            assign(case.actor, theta + sign * eps * direction)
            points.append(surrogate.evaluate().objective)
        slopes.append((points[0] - points[1]) / (2 * eps))
    assert gradient.norm() > 1e-2
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-7)


def test_gradient_is_the_policy_gradient(user_case):
    log_prob = user_case.distribution(user_case.rollout.inputs).log_prob(user_case.rollout.actions)
    expected = flatten(th.autograd.grad((log_prob * user_case.rollout.advantages).mean(), user_case.actor))
    th.testing.assert_close(user_case.surrogate().gradient(), expected, **EXACT)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_chunks_add_up(case, chunk_size):
    weigh_unevenly(case)
    whole, chunked = case.surrogate(), case.surrogate(chunk_size)
    assert chunked.is_one_graph == (chunk_size == 100)
    th.testing.assert_close(chunked.gradient(), whole.gradient(), **EXACT)
    assert chunked.start() == pytest.approx(whole.start(), abs=1e-12)
    assert chunked.entropy == pytest.approx(whole.entropy, abs=1e-12)
    move(case)
    assert chunked.evaluate() == pytest.approx(whole.evaluate(), abs=1e-12)


def test_entropy_is_sb3s(case):
    weigh_unevenly(case)
    log_prob, entropy = evaluate_actions(case)
    expected = case.rollout.weights.dot(-log_prob if entropy is None else entropy)
    assert case.surrogate().entropy == pytest.approx(float(expected), rel=1e-12)


def test_squashed_entropy_is_estimated(make_case):
    case = make_case("gsde_squashed")
    log_prob, entropy = evaluate_actions(case)
    assert entropy is None
    assert case.surrogate().entropy == pytest.approx(-float(log_prob.mean()), rel=1e-12)


@pytest.mark.parametrize(("name", "n_passes"), [("box", 1), ("beta", 2)], ids=["closed_form", "users_own"])
def test_single_graph_is_built_once(make_case, name, n_passes):
    calls = []
    case = make_case(name)

    def counted(inputs):
        calls.append(len(inputs))
        return case.distribution(inputs)

    model = policy_model(counted, case.actor)
    surrogate = Surrogate(model, case.rollout)
    surrogate.gradient()
    surrogate.gradient()
    assert calls == [12] * n_passes  # a family of unknown parameters is evaluated anew for π_old
    chunked = Surrogate(model, case.rollout, 5)
    calls.clear()
    chunked.gradient()
    chunked.gradient()
    assert calls == [5, 5, 2, 5, 5, 2]


def test_no_gradients_are_left_behind(case):
    surrogate = case.surrogate()
    gradient = surrogate.gradient()
    surrogate.evaluate()
    assert not gradient.requires_grad
    assert all(p.grad is None for p in case.policy.parameters())


def test_parameter_that_the_objective_does_not_reach_has_slope_zero(make_case):
    case = make_case("box")
    idle = nn.Parameter(th.ones(2, dtype=th.float64))
    assert case.surrogate(actor=[idle, *case.actor]).gradient()[:2].tolist() == [0.0, 0.0]


def test_old_policy_is_cut_off_from_the_graph(case):
    ((_, old, new),) = case.surrogate().linearized()
    assert new.log_prob.requires_grad
    entropies = [] if old.entropy is None else [old.entropy]
    assert not any(tensor.requires_grad for tensor in (*outputs(old.components), old.log_prob, *entropies))


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_calls_of_layers_are_recorded_with_the_graph(make_case, chunk_size):
    case = make_case("box")
    layer = case.policy.action_net
    for chunk, _, new in case.surrogate(chunk_size, layers=[layer]).linearized():
        (call,) = new.calls
        assert call.layer is layer
        th.testing.assert_close(layer(call.input), call.output)
        assert len(call.output) == chunk.n_states
        assert call.output.requires_grad
    assert not layer._forward_hooks


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_give_nan_without_raising(case, bad):
    surrogate = case.surrogate()
    move(case, th.full_like(flatten(case.actor), bad).detach())
    with without_validation():
        point = surrogate.evaluate()
    assert np.isnan(point.objective)
    assert np.isnan(point.kl)


class LogProbOfEachDimension(DiagGaussianDistribution):
    def log_prob(self, actions):
        return self.distribution.log_prob(actions)


def test_log_prob_of_each_dimension_is_refused(make_case):
    case = make_case("box")
    case.policy.action_dist = LogProbOfEachDimension(2)
    with pytest.raises(
        ValueError, match=r"LogProbOfEachDimension has shape \(12, 2\); it must be one number a state: \(12,\)"
    ):
        case.surrogate()


# ---- entropy bonus

C = 0.7


def with_entropy(case, chunk_size=None, rollout=None):
    return case.surrogate(chunk_size, rollout=rollout, ent_coef=C)


def objective_by_hand(case, old_log_prob, ratios=None):
    """E[ratio Â] + c E[H], by SB3's distribution; where it has no entropy, by −log π, weighted with the ratio."""
    rollout = case.rollout
    distribution = case.distribution(rollout.inputs)
    log_prob = distribution.log_prob(rollout.actions)
    ratio = (log_prob - old_log_prob).exp() * (1.0 if ratios is None else ratios)
    entropy = distribution.entropy()
    bonus = -ratio * log_prob if entropy is None else entropy
    return (rollout.weights * (ratio * rollout.advantages + C * bonus)).sum()


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_gradient_and_objective_with_an_entropy_bonus(case, chunk_size):
    weigh_unevenly(case)
    case.differentiate_everything()
    surrogate = with_entropy(case, chunk_size)
    old_log_prob, _ = evaluate_actions(case)
    expected = flatten(th.autograd.grad(objective_by_hand(case, old_log_prob), case.actor))
    th.testing.assert_close(surrogate.gradient(), expected, atol=1e-12, rtol=1e-10)
    assert (expected - case.surrogate().gradient()).norm() > 1e-2 * expected.norm()
    start = surrogate.start()
    assert start.objective == pytest.approx(objective_by_hand(case, old_log_prob).item(), rel=1e-12)
    assert start.objective == pytest.approx(case.surrogate().start().objective + C * surrogate.entropy, rel=1e-12)
    assert start == surrogate.evaluate()._replace(kl=0.0, max_state_kl=0.0)
    move(case)
    assert surrogate.evaluate().objective == pytest.approx(objective_by_hand(case, old_log_prob).item(), rel=1e-10)
    assert surrogate.evaluate().kl > 1e-3


def test_gradient_and_objective_with_an_entropy_bonus_of_users_own(user_case):
    surrogate = with_entropy(user_case)
    old_log_prob, _ = evaluate_actions(user_case)
    expected = flatten(th.autograd.grad(objective_by_hand(user_case, old_log_prob), user_case.actor))
    th.testing.assert_close(surrogate.gradient(), expected, atol=1e-12, rtol=1e-10)
    move(user_case)
    assert surrogate.evaluate().objective == pytest.approx(objective_by_hand(user_case, old_log_prob).item(), rel=1e-10)


def test_estimated_bonus_is_the_gradient_of_the_entropy_in_the_mean():
    """H = log σ + const of a Gaussian that keeps its entropy to itself; −π/π_old log π in the mean of many actions."""
    n = 100_000
    rate = nn.Parameter(th.zeros(1, dtype=th.float64))
    noise = th.randn(n, 1, dtype=th.float64, generator=th.Generator().manual_seed(0))

    class NoFormula(DiagGaussianDistribution):
        def entropy(self):
            return None

    def policy(inputs):
        return NoFormula(1).proba_distribution(th.zeros(len(inputs), 1, dtype=th.float64), rate)

    zeros = th.zeros(n, dtype=th.float64)
    rollout = RolloutBatch(noise, noise, zeros, zeros, th.full((n,), 1.0 / n, dtype=th.float64))
    surrogate = Surrogate(policy_model(policy, [rate]), rollout, ent_coef=1.0)
    assert surrogate.gradient().item() == pytest.approx(1.0, abs=0.05)
    with th.no_grad():
        rate += 0.1
    assert surrogate.evaluate().objective - surrogate.start().objective == pytest.approx(0.1, abs=0.01)


def test_no_entropy_is_asked_for_without_a_bonus(make_case):
    case = make_case("box")
    weigh_unevenly(case)
    plain, zero = case.surrogate(), case.surrogate(ent_coef=0.0)
    assert th.equal(plain.gradient(), zero.gradient())
    assert plain.start() == zero.start()


# ---- ratios


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_ratios_are_those_of_the_present_policy(case, chunk_size):
    surrogate = case.surrogate(chunk_size)
    assert surrogate.ratios().tolist() == [1.0] * case.rollout.n_states
    old_log_prob, _ = evaluate_actions(case)
    move(case)
    new_log_prob, _ = evaluate_actions(case)
    ratios = surrogate.ratios()
    assert not ratios.requires_grad
    th.testing.assert_close(ratios, (new_log_prob - old_log_prob).exp(), atol=0.0, rtol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_another_policys_objective_is_the_collecting_policys(case, chunk_size):
    """Made at θ_1 with the ratios of θ_1, L and ∇L are those of θ_old's surrogate, everywhere."""
    weigh_unevenly(case)
    case.differentiate_everything()
    first = with_entropy(case)
    old_log_prob, _ = evaluate_actions(case)
    move(case)
    second = with_entropy(case, chunk_size, replace(case.rollout, ratios=first.ratios()))
    expected = flatten(th.autograd.grad(objective_by_hand(case, old_log_prob), case.actor))
    th.testing.assert_close(second.gradient(), expected, atol=1e-12, rtol=1e-9)
    assert second.start().objective == pytest.approx(first.evaluate().objective, rel=1e-12)
    assert second.start().kl == 0.0
    move(case)
    assert second.evaluate().objective == pytest.approx(first.evaluate().objective, rel=1e-10)
    assert second.evaluate().kl != pytest.approx(first.evaluate().kl, rel=1e-2)
