import copy
import math
from dataclasses import replace
from itertools import chain

import pytest
import torch as th
from support.models import value_model
from torch.nn import functional as F

from sb3_trpo.adapters.models import critic_parameters
from sb3_trpo.optim.critic import ValueRegression, fit_gauss_newton, fit_minibatches
from sb3_trpo.optim.distributions import without_validation
from sb3_trpo.optim.kfac import kfac_layers
from sb3_trpo.optim.parameters import flatten

NAN, INF = float("nan"), float("inf")


def critic_of(case):
    return critic_parameters(case.policy, case.values, case.rollout.inputs, case.actor)


def fit(case, *, values=None, returns=None, critic=None, optimizer=None, batch_size=5, n_epochs=2):
    return fit_minibatches(
        case.values if values is None else values,
        case.rollout if returns is None else replace(case.rollout, returns=returns),
        critic=critic_of(case) if critic is None else critic,
        optimizer=case.policy.optimizer if optimizer is None else optimizer,
        batch_size=batch_size,
        n_epochs=n_epochs,
    )


def error(case):
    with th.no_grad():
        return F.mse_loss(case.values(case.rollout.inputs), case.rollout.returns).item()


def everything(case):
    """Copies of all parameters and of the optimizer's state."""
    return copy.deepcopy((list(case.policy.parameters()), case.policy.optimizer.state_dict()))


def assert_equal(actual, expected):
    """Bit for bit, through lists and dictionaries."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_equal(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    else:
        assert th.equal(actual, expected) if isinstance(actual, th.Tensor) else actual == expected


def warm_up(case):
    """Give every parameter, the actor's too, optimizer momentum and a stale gradient."""
    for _ in range(2):
        for parameter in case.policy.parameters():
            parameter.grad = th.randn_like(parameter)
        case.policy.optimizer.step()


def test_full_batch_is_gradient_descent_on_the_squared_error(case):
    critic = critic_of(case)
    optimizer = th.optim.SGD(critic, lr=0.05)
    before = flatten(critic).detach()
    loss = F.mse_loss(case.values(case.rollout.inputs), case.rollout.returns)
    slope = flatten(th.autograd.grad(loss, critic))
    result = fit(case, optimizer=optimizer, batch_size=100, n_epochs=1)
    th.testing.assert_close(flatten(critic).detach(), before - 0.05 * slope, atol=1e-12, rtol=0.0)
    assert result.value_loss == pytest.approx(loss.item())
    assert result.succeeded


def test_regression_reduces_the_error(case):
    before = error(case)
    assert fit(case, n_epochs=30).succeeded
    assert error(case) < 0.8 * before


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 4]), (5, [5, 5, 2]), (12, [12]), (100, [12]), (1, [1] * 12)])
def test_every_pass_sees_every_state_once_in_a_new_order(make_case, batch_size, sizes):
    case = make_case("box")
    batches = []

    def values(inputs):
        batches.append(inputs[:, 0].tolist())
        return case.values(inputs)

    result = fit(case, values=values, batch_size=batch_size)
    first, second = batches[: len(sizes)], batches[len(sizes) :]
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == sizes
    first, second = list(chain(*first)), list(chain(*second))
    assert sorted(first) == sorted(second) == sorted(case.rollout.inputs[:, 0].tolist())
    assert first != second
    assert result.succeeded


def test_states_keep_their_returns_and_the_loss_is_the_mean_over_minibatches(make_case):
    """With the states' returns as values, shifted by two, every minibatch's error is four."""
    case = make_case("box")
    returns = case.rollout.inputs.sum(dim=1).double()
    optimizer = th.optim.SGD(case.policy.parameters(), lr=0.0)
    values = lambda inputs: inputs.sum(dim=1).double() + 2.0 + 0.0 * case.values(inputs)  # noqa: E731
    assert fit(case, values=values, returns=returns, optimizer=optimizer).value_loss == pytest.approx(4.0)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: th.optim.Adam(parameters, lr=0.01),
        lambda parameters: th.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        lambda parameters: th.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
        lambda parameters: th.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
    ],
    ids=["adam", "adamw", "sgd_momentum", "rmsprop"],
)
def test_actor_stays_whatever_the_optimizer_remembers(case, make_optimizer):
    """Momentum, weight decay and stale gradients of the actor are in the optimizer, and must not act."""
    case.policy.optimizer = make_optimizer(case.policy.parameters())
    warm_up(case)
    critic = critic_of(case)
    actor_before, critic_before = flatten(case.actor).detach(), flatten(critic).detach()
    assert fit(case).succeeded
    assert th.equal(flatten(case.actor), actor_before)
    assert not th.equal(flatten(critic), critic_before)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_shared_extractor_stays_and_the_critics_own_is_trained(make_case, learned_extractor, share):
    case = make_case("box", share_features_extractor=share, **learned_extractor)
    warm_up(case)
    own = case.policy.vf_features_extractor.layer.weight
    own_before, actor_before = own.detach().clone(), flatten(case.actor).detach()
    assert fit(case).succeeded
    assert th.equal(flatten(case.actor), actor_before)
    assert th.equal(own, own_before) == share


@pytest.mark.parametrize("warm", [False, True], ids=["fresh_optimizer", "used_optimizer"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_return_that_is_not_finite_leaves_everything_bit_for_bit(case, warm, bad):
    if warm:
        warm_up(case)
    before = everything(case)
    returns = case.rollout.returns.clone()
    returns[-1] = bad
    result = fit(case, returns=returns)
    assert not result.succeeded
    assert math.isnan(result.value_loss)
    assert_equal(everything(case), before)


def test_failure_in_the_last_minibatch_undoes_the_ones_before(make_case):
    case = make_case("box")
    before, calls = everything(case), []

    def values(inputs):
        calls.append(len(inputs))
        return case.values(inputs) * (NAN if len(calls) == 6 else 1.0)

    assert not fit(case, values=values).succeeded
    assert len(calls) == 6
    assert_equal(everything(case), before)


def test_parameters_that_diverge_with_the_last_step_are_put_back(make_case):
    """Every loss was finite; the step after the last one was not."""
    case = make_case("box")
    before = everything(case)
    optimizer = th.optim.SGD(case.policy.parameters(), lr=INF)
    assert not fit(case, optimizer=optimizer, batch_size=12, n_epochs=1).succeeded
    assert_equal(everything(case), before)


def test_optimizer_state_that_is_not_finite_is_put_back(make_case):
    """Adam's second moment overflows, which makes the step zero: loss and parameters are finite, and the fit is not."""
    case = make_case("box")
    before = everything(case)
    steep = lambda inputs: 1e10 * case.values(inputs)  # noqa: E731
    assert not fit(case, values=steep, returns=case.rollout.returns * 1e150, batch_size=12, n_epochs=1).succeeded
    assert_equal(everything(case), before)


def test_fit_after_a_failure_is_as_if_that_never_happened(make_case):
    ended = []
    for fails_before in (False, True):
        case = make_case("box")
        if fails_before:
            assert not fit(case, returns=case.rollout.returns * NAN).succeeded
        th.manual_seed(1)
        assert fit(case).succeeded
        ended.append(everything(case))
    assert_equal(*ended)


def test_nothing_to_train(make_case):
    case = make_case("box")
    before, random_state = everything(case), th.get_rng_state()
    result = fit(case, critic=[])
    assert math.isnan(result.value_loss)
    assert result.succeeded
    assert_equal(everything(case), before)
    assert th.equal(th.get_rng_state(), random_state)


@pytest.mark.parametrize("spoil", [1.0, NAN], ids=["success", "failure"])
def test_no_gradients_are_left_behind(make_case, spoil):
    case = make_case("box")
    warm_up(case)
    fit(case, returns=case.rollout.returns * spoil)
    assert all(parameter.grad is None for parameter in case.policy.parameters())


def fit_newton(case, *, values=None, critic=None, chunk_size=None, damping=0.1, n_steps=1, cg_max_steps=100):
    critic = critic_of(case) if critic is None else critic
    model = value_model(case.values if values is None else values, critic, kfac_layers(case.policy, critic))
    return fit_gauss_newton(
        model, case.rollout, chunk_size, damping=damping, n_steps=n_steps, max_iter=cg_max_steps, rtol=1e-12
    )


def test_regression_has_the_squared_error_and_half_its_downhill_slope(case):
    critic = critic_of(case)
    loss = F.mse_loss(case.values(case.rollout.inputs), case.rollout.returns)
    downhill = -0.5 * flatten(th.autograd.grad(loss, critic))
    for chunk_size in (None, 5):
        regression = ValueRegression(value_model(case.values, critic), case.rollout, chunk_size)
        assert regression.loss == pytest.approx(loss.item(), rel=1e-12)
        th.testing.assert_close(regression.gradient(), downhill, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_gauss_newton_step_is_the_dense_solution(case, chunk_size):
    """One step: (JᵀJ/n + λI) s = Jᵀ(R̂ − V)/n."""
    critic = critic_of(case)
    values = case.values(case.rollout.inputs)
    J = th.stack([flatten(th.autograd.grad(value, critic, retain_graph=True)) for value in values])
    matrix = J.T @ J / len(values) + 10.0 * th.eye(J.shape[1], dtype=th.float64)  # strong enough for a full step
    step = th.linalg.solve(matrix, J.T @ (case.rollout.returns - values.detach()) / len(values))
    before = flatten(critic).detach()
    result = fit_newton(case, damping=10.0, chunk_size=chunk_size)
    th.testing.assert_close(flatten(critic).detach() - before, step, atol=1e-8, rtol=0.0)
    assert result.succeeded
    assert result.value_loss == pytest.approx(error(case), rel=1e-9)


def test_every_gauss_newton_step_lowers_the_error_and_leaves_the_actor(case):
    warm_up(case)
    actor_before, optimizer_before = flatten(case.actor).detach(), copy.deepcopy(case.policy.optimizer.state_dict())
    errors = [error(case)]
    for _ in range(4):
        assert fit_newton(case).succeeded
        errors.append(error(case))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
    assert th.equal(flatten(case.actor), actor_before)
    assert_equal(case.policy.optimizer.state_dict(), optimizer_before)


def test_several_gauss_newton_steps_are_as_many_fits(make_case):
    case, other = make_case("box"), make_case("box")
    result = fit_newton(case, n_steps=3)
    for _ in range(3):
        last = fit_newton(other)
    assert result.value_loss == pytest.approx(last.value_loss, rel=1e-9)
    th.testing.assert_close(flatten(critic_of(case)), flatten(critic_of(other)))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_gauss_newton_trains_only_the_critics_own_extractor(make_case, learned_extractor, share):
    case = make_case("box", share_features_extractor=share, **learned_extractor)
    own = case.policy.vf_features_extractor.layer.weight
    own_before, actor_before = own.detach().clone(), flatten(case.actor).detach()
    assert fit_newton(case).succeeded
    assert th.equal(flatten(case.actor), actor_before)
    assert th.equal(own, own_before) == share


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gauss_newton_leaves_everything_where_a_return_is_not_finite(case, bad):
    before = everything(case)
    case.rollout.returns[-1] = bad
    with without_validation():
        result = fit_newton(case, n_steps=2)
    assert not result.succeeded
    assert not math.isfinite(result.value_loss)
    assert_equal(everything(case), before)


def test_gauss_newton_step_that_helps_nowhere_is_taken_back(make_case):
    """Every step makes it worse: the values at any other parameters are far off."""
    case = make_case("box")
    critic = critic_of(case)
    start = flatten(critic).detach()
    before = everything(case)

    def values(inputs):
        distance = (flatten(critic).detach() - start).norm()
        return case.values(inputs) + 1e6 * distance.sign()

    result = fit_newton(case, values=values, n_steps=2)
    assert not result.succeeded
    assert result.value_loss == pytest.approx(error(case))
    assert_equal(everything(case), before)


def test_gauss_newton_with_nothing_to_train(make_case):
    case = make_case("box")
    before = everything(case)
    result = fit_newton(case, critic=[])
    assert result.succeeded
    assert result.value_loss == pytest.approx(error(case))
    assert_equal(everything(case), before)
