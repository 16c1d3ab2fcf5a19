"""The Gauss-Newton regression of the values, on value functions whose solution is known, without SB3 around them."""

import copy
import math
from itertools import pairwise

import pytest
import torch as th
from support.models import value_model
from torch import nn
from torch.nn import functional as F

from sb3_trpo.optim.batch import RolloutBatch, map_inputs
from sb3_trpo.optim.critic import ValueRegression, fit_gauss_newton
from sb3_trpo.optim.distributions import without_validation
from sb3_trpo.optim.kfac import kfac_layers
from sb3_trpo.optim.mlp import as_mlp
from sb3_trpo.optim.parameters import Snapshot, flatten

NAN, INF = math.nan, math.inf
N_STATES, N_INPUTS = 40, 4


def network(*hidden, activation=nn.Tanh, dtype=th.float64):
    th.manual_seed(0)
    sizes = [N_INPUTS, *hidden, 1]
    modules = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), activation())]
    return nn.Sequential(*modules[:-1]).to(dtype)


def images():
    th.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)).double()


class OwnParameters(nn.Module):
    """No layer with factors in it: V(s) = w·s + c."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(th.ones(N_INPUTS)), nn.Parameter(th.zeros(1))

    def forward(self, x):
        return (x @ self.weight + self.shift).unsqueeze(1)


def rollout(*shape, n_states=N_STATES, dtype=th.float64, scale=1.0):
    generator = th.Generator().manual_seed(1)
    inputs = th.randn(n_states, *(shape or (N_INPUTS,)), generator=generator, dtype=th.float64)
    noise = th.randn(n_states, generator=generator, dtype=th.float64)
    returns = scale * (1.0 + inputs.flatten(start_dim=1).sum(dim=1).sin() + 0.1 * noise)
    unused = th.zeros(n_states, dtype=th.float64)
    weights = th.full((n_states,), 1.0 / n_states, dtype=th.float64)
    return RolloutBatch(*(tensor.to(dtype) for tensor in (inputs, unused, unused, returns, weights)))


def values_of(net):
    return lambda inputs: net(inputs).flatten()


def error(net, data):
    with th.no_grad():
        return F.mse_loss(net(data.inputs).flatten(), data.returns).item()


def fit(net, data, *, fast=True, values=None, critic=None, damping=0.1, n_steps=1, cg_max_steps=200, tol=1e-12, chunk=None):
    critic = list(net.parameters()) if critic is None else critic
    mlp = as_mlp(list(net)) if fast and isinstance(net, nn.Sequential) else None
    model = value_model(values_of(net) if values is None else values, critic, kfac_layers(net, critic), mlp)
    return fit_gauss_newton(model, data, chunk, damping=damping, n_steps=n_steps, max_iter=cg_max_steps, rtol=tol)


def ridge(net, data, damping):
    """argmin ½E[(w·ā − R̂)²] + ½λ‖w − w₀‖², for V(s) = w·ā."""
    a = F.pad(data.inputs, (0, 1), value=1.0)
    start = flatten(net.parameters()).detach()
    matrix = a.T @ a / len(a) + damping * th.eye(a.shape[1], dtype=a.dtype)
    return th.linalg.solve(matrix, a.T @ data.returns / len(a) + damping * start)


@pytest.mark.parametrize("fast", [True, False], ids=["chain", "general"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
def test_linear_values_reach_the_ridge_regression_in_one_step(damping, chunk, fast):
    net, data = network(), rollout()
    expected = ridge(net, data, damping)
    assert fit(net, data, damping=damping, chunk=chunk, fast=fast).succeeded
    th.testing.assert_close(flatten(net.parameters()).detach(), expected, atol=1e-9, rtol=0.0)


def test_linear_values_reach_least_squares_in_a_few_steps():
    """Each step is a proximal step; without much damping they end at the minimum."""
    net, data = network(), rollout()
    a = F.pad(data.inputs, (0, 1), value=1.0)
    best = th.linalg.lstsq(a, data.returns[:, None]).solution.flatten()
    result = fit(net, data, damping=1e-3, n_steps=6)
    th.testing.assert_close(flatten(net.parameters()).detach(), best, atol=1e-7, rtol=0.0)
    assert result.value_loss == pytest.approx(F.mse_loss(a @ best, data.returns).item(), rel=1e-9)


def test_parameters_outside_of_layers_are_regressed_too():
    net, data = OwnParameters().double(), rollout()
    expected = ridge(net, data, 0.1)
    assert fit(net, data, damping=0.1).succeeded
    th.testing.assert_close(flatten(net.parameters()).detach(), expected, atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("hidden", [(5,), (6, 5)], ids=["one_hidden", "two_hidden"])
def test_step_solves_the_damped_normal_equations(hidden, activation):
    """With strong damping the whole step is taken: (JᵀJ/n + λI) s = Jᵀ(R̂ − V)/n, J by autograd."""
    net, data = network(*hidden, activation=activation), rollout()
    critic = list(net.parameters())
    predicted = values_of(net)(data.inputs)
    J = th.stack([flatten(th.autograd.grad(value, critic, retain_graph=True)) for value in predicted])
    matrix = J.T @ J / len(J) + 5.0 * th.eye(J.shape[1], dtype=J.dtype)
    step = th.linalg.solve(matrix, J.T @ (data.returns - predicted.detach()) / len(J))
    before = flatten(critic).detach()
    fit(net, data, damping=5.0)
    th.testing.assert_close(flatten(critic).detach() - before, step, atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_loss_falls_and_is_reported(n_steps, damping, scale):
    net, data = network(16, 16), rollout(scale=scale)
    before = error(net, data)
    result = fit(net, data, damping=damping, n_steps=n_steps, cg_max_steps=8, tol=0.1)
    assert result.succeeded
    assert result.value_loss == pytest.approx(error(net, data), rel=1e-9)
    assert result.value_loss < 0.9 * before


def test_more_steps_end_lower():
    losses = [fit(network(8), rollout(), n_steps=n, damping=0.01, cg_max_steps=20).value_loss for n in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_more_damping_moves_less():
    moves = []
    for damping in (1e-3, 1e-1, 10.0):
        net = network(16, 16)
        before = flatten(net.parameters()).detach()
        fit(net, rollout(), damping=damping)
        moves.append(float((flatten(net.parameters()).detach() - before).norm()))
    assert moves == sorted(moves, reverse=True)


@pytest.mark.parametrize("chunk", [1, 7, 39, 100])
@pytest.mark.parametrize("name", ["chain", "images", "own_parameters"])
def test_chunks_add_up(name, chunk):
    nets = {"chain": lambda: network(6, 5), "images": images, "own_parameters": lambda: OwnParameters().double()}
    data = rollout(1, 4, 4) if name == "images" else rollout()
    whole, cut = nets[name](), nets[name]()
    first = fit(whole, data, n_steps=2, cg_max_steps=8, tol=0.1)
    second = fit(cut, data, n_steps=2, cg_max_steps=8, tol=0.1, chunk=chunk)
    assert second.value_loss == pytest.approx(first.value_loss, rel=1e-10)
    th.testing.assert_close(flatten(cut.parameters()), flatten(whole.parameters()), atol=1e-10, rtol=0.0)


def test_chain_and_general_path_agree():
    fast, general = network(6, 5), network(6, 5)
    for net, is_fast in ((fast, True), (general, False)):
        fit(net, rollout(), n_steps=3, cg_max_steps=8, tol=0.1, fast=is_fast)
    th.testing.assert_close(flatten(fast.parameters()), flatten(general.parameters()), atol=1e-10, rtol=0.0)


def test_weights_of_the_states_count():
    """A state of weight 0 is not there."""
    data = rollout()
    weights = th.where(th.arange(N_STATES) < 10, 0.1, 0.0).double()
    weighted, fewer = network(6), network(6)
    fit(weighted, RolloutBatch(data.inputs, data.actions, data.advantages, data.returns, weights))
    fit(fewer, rollout_of(data, slice(0, 10)))
    # Not bit for bit: the random signs of the preconditioner meet other states.
    th.testing.assert_close(flatten(weighted.parameters()), flatten(fewer.parameters()), atol=1e-8, rtol=0.0)


def rollout_of(data, index):
    part = data.select(index)
    return RolloutBatch(
        part.inputs, part.actions, part.advantages, part.returns, th.full_like(part.weights, 1 / part.n_states)
    )


def test_single_precision_is_near_double():
    nets = {dtype: network(16, 16, dtype=dtype) for dtype in (th.float32, th.float64)}
    nets[th.float32].load_state_dict(nets[th.float64].state_dict())
    losses = [fit(nets[dtype], rollout(dtype=dtype), cg_max_steps=8, tol=0.1).value_loss for dtype in nets]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# What must not happen.


@pytest.mark.parametrize("chunk", [None, 7])
def test_other_parameters_never_move(chunk):
    """Frozen ones, ones of other networks that share the inputs, and ones that the values depend on but may not train."""
    features, head = network(6, 5), nn.Linear(1, 1).double()
    values = lambda inputs: head(th.tanh(features(inputs))).flatten()  # noqa: E731
    before = copy.deepcopy(list(features.parameters()))
    critic = list(head.parameters())
    result = fit(head, rollout(), values=values, critic=critic, chunk=chunk, fast=False)
    assert result.succeeded
    assert all(th.equal(p, q) for p, q in zip(features.parameters(), before, strict=True))
    assert all(p.grad is None for p in [*features.parameters(), *critic])


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_returns_that_are_not_finite_leave_the_critic_bit_for_bit(bad, chunk):
    net, data = network(6, 5), rollout()
    before = copy.deepcopy(list(net.parameters()))
    data.returns[3] = bad
    with without_validation():
        result = fit(net, data, n_steps=3, chunk=chunk)
    assert not result.succeeded
    assert not math.isfinite(result.value_loss)
    assert all(th.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["parameter", "input"])
def test_values_that_are_not_finite_leave_the_critic_bit_for_bit(where, bad):
    net, data = network(6, 5), rollout()
    if where == "parameter":
        with th.no_grad():
            net[2].weight[0, 0] = bad
    else:
        data.inputs[3, 0] = bad
    before = flatten(net.parameters()).detach()
    with without_validation():
        result = fit(net, data, n_steps=2)
    assert not result.succeeded
    th.testing.assert_close(flatten(net.parameters()).detach(), before, atol=0.0, rtol=0.0, equal_nan=True)


@pytest.mark.parametrize("chunk", [None, 7])
def test_step_that_helps_nowhere_is_taken_back_bit_for_bit(chunk):
    net, data = network(6, 5), rollout()
    start = flatten(net.parameters()).detach()

    def values(inputs):
        away = bool((flatten(net.parameters()).detach() != start).any())
        return values_of(net)(inputs) + (1e6 if away else 0.0)

    result = fit(net, data, values=values, n_steps=3, chunk=chunk)
    assert not result.succeeded
    assert th.equal(flatten(net.parameters()).detach(), start)
    assert result.value_loss == pytest.approx(error(net, data))


def test_failure_of_a_later_step_keeps_the_earlier_ones():
    net, data = network(6, 5), rollout()
    expected = network(6, 5)
    first = fit(expected, data)
    goal = flatten(expected.parameters()).detach()

    def values(inputs):
        there = th.allclose(flatten(net.parameters()).detach(), goal)
        at_start = th.equal(flatten(net.parameters()).detach(), start)
        return values_of(net)(inputs) + (0.0 if there or at_start else 1e6)

    start = flatten(net.parameters()).detach()
    result = fit(net, data, values=values, n_steps=3)
    assert result.succeeded
    assert result.value_loss == pytest.approx(first.value_loss)
    th.testing.assert_close(flatten(net.parameters()).detach(), goal)


def test_step_too_long_is_halved():
    """V = tanh(10 w·s): from a flat place the full step overshoots, and a shorter one is taken."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(N_INPUTS, 1)

        def forward(self, x):
            return th.sin(10.0 * self.layer(x))

    th.manual_seed(0)
    net, data = Steep().double(), rollout(scale=5.0)
    before, start = error(net, data), flatten(net.parameters()).detach()
    predicted = values_of(net)(data.inputs)
    critic = list(net.parameters())
    J = th.stack([flatten(th.autograd.grad(value, critic, retain_graph=True)) for value in predicted])
    matrix = J.T @ J / len(J) + 1e-3 * th.eye(J.shape[1], dtype=J.dtype)
    step = th.linalg.solve(matrix, J.T @ (data.returns - predicted.detach()) / len(J))
    result = fit(net, data, damping=1e-3)
    assert result.succeeded
    moved = flatten(critic).detach() - start
    fraction = float(moved.norm() / step.norm())
    th.testing.assert_close(moved, fraction * step, atol=1e-9, rtol=1e-6)
    assert -math.log2(fraction) == pytest.approx(round(-math.log2(fraction)), abs=1e-6)
    assert 0.0 < fraction < 1.0
    assert result.value_loss < before


def test_no_steps_leave_everything():
    net, data = network(6), rollout()
    before = flatten(net.parameters()).detach()
    result = fit(net, data, n_steps=0)
    assert result.value_loss == pytest.approx(error(net, data))
    assert th.equal(flatten(net.parameters()).detach(), before)


def test_perfect_values_stay():
    net, data = network(6), rollout()
    with th.no_grad():
        data.returns.copy_(values_of(net)(data.inputs))
    before = flatten(net.parameters()).detach()
    result = fit(net, data)
    assert result.value_loss == 0.0
    assert th.equal(flatten(net.parameters()).detach(), before)


def test_nothing_random_and_nothing_drawn():
    ended = []
    for seed in (0, 1):
        net = network(6, 5)
        th.manual_seed(seed)
        state = th.get_rng_state()
        fit(net, rollout(), n_steps=2)
        assert th.equal(th.get_rng_state(), state)
        ended.append(flatten(net.parameters()).detach())
    assert th.equal(*ended)


# The regression as a model.


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_gradient_and_loss_are_autograds(chunk):
    net, data = network(6, 5), rollout()
    critic = list(net.parameters())
    loss = F.mse_loss(values_of(net)(data.inputs), data.returns)
    downhill = -0.5 * flatten(th.autograd.grad(loss, critic))
    regression = ValueRegression(value_model(values_of(net), critic), data, chunk)
    assert regression.loss == pytest.approx(loss.item(), rel=1e-12)
    th.testing.assert_close(regression.gradient(), downhill, atol=1e-14, rtol=1e-12)


def test_regression_stays_at_its_parameters_and_anew_is_at_the_present_ones():
    net, data = network(6, 5), rollout()
    regression = ValueRegression(value_model(values_of(net), list(net.parameters())), data)
    old = regression.loss
    with th.no_grad():
        net[0].weight.add_(1.0)
    assert regression.loss == old
    assert regression.relinearize().loss == pytest.approx(error(net, data))


def test_dictionaries_of_observations():
    net, data = network(6, 5), rollout()
    inputs = {"a": data.inputs[:, :1], "b": data.inputs[:, 1:]}
    named = RolloutBatch(inputs, data.actions, data.advantages, data.returns, data.weights)
    other = network(6, 5)
    values = lambda x: values_of(net)(th.cat([x["a"], x["b"]], dim=1))  # noqa: E731
    assert map_inputs(len, inputs) == {"a": N_STATES, "b": N_STATES}
    fit(net, named, values=values, chunk=7)
    fit(other, data, chunk=7)
    th.testing.assert_close(flatten(net.parameters()), flatten(other.parameters()), atol=1e-12, rtol=0.0)


def test_few_iterations_give_nearly_all_of_the_exact_step():
    """The preconditioner is at work: plain conjugate gradients get 81 % with as many."""
    net, data = network(32, 32), rollout(n_states=100)
    fit(net, data, n_steps=4, damping=1e-2, cg_max_steps=8, tol=0.1)
    other = rollout(n_states=100, scale=1.5)
    before, start = Snapshot(net.parameters()), error(net, other)
    gains = []
    for iterations in (2, 100):
        before.restore()
        gains.append(start - fit(net, other, damping=0.1, cg_max_steps=iterations, tol=1e-6).value_loss)
    assert gains[0] > 0.9 * gains[1]


@pytest.mark.parametrize("damping", [0.03, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_iterations_beyond_attainable_accuracy_cost_no_fit(scale, damping):
    """Far more iterations than single precision can use, and no tolerance: the fit is that of the converged step."""
    data = rollout(dtype=th.float32, scale=scale)
    exact, endless = network(16, dtype=th.float32), network(16, dtype=th.float32)
    few = fit(exact, data, damping=damping, cg_max_steps=60, tol=1e-4)
    many = fit(endless, data, damping=damping, cg_max_steps=1000, tol=0.0)
    assert few.succeeded
    assert many.succeeded
    assert many.value_loss == pytest.approx(few.value_loss, rel=0.05)
