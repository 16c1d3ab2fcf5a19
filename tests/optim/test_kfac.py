"""Kronecker factors against sums over single states, and the preconditioner as a dense matrix."""

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch as th
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.conjugate_gradient import CGStatus, conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import (
    Factors,
    KFACPreconditioner,
    call_factors,
    damped_inverses,
    kfac_layers,
    pays,
    random_signs,
)
from sb3_trpo.optim.mlp import LayerCall, as_mlp, recorded_calls
from sb3_trpo.optim.objective import Model, ModelOutput, RolloutObjective
from sb3_trpo.optim.parameters import all_finite, flatten

DOUBLE = th.float64


def assert_same(actual, expected, tolerance=1e-12):
    th.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def dense(matrix_product, n, dtype=DOUBLE):
    return th.stack([matrix_product(v) for v in th.eye(n, dtype=dtype)], dim=1)


def forwards(net, family, inputs, *, actor=None, layers=None, mlp=None, chunk_size=None):
    """Forward passes of a network whose output parametrises a distribution; no SB3 in it."""
    zeros = th.zeros(len(inputs), dtype=inputs.dtype)
    weights = th.full_like(zeros, 1.0 / len(inputs))
    actor = list(net.parameters()) if actor is None else actor
    layers = kfac_layers(net, actor) if layers is None else layers

    def forward(rollout, recorded):
        with recorded_calls(recorded) as calls:
            parts = family(net(rollout.inputs))
        none = th.zeros_like(rollout.weights)
        return ModelOutput(parts, none, none, calls)

    batch = RolloutBatch(inputs, zeros, zeros, zeros, weights)
    return RolloutObjective(Model(forward, actor, layers, mlp), batch, chunk_size)


def precondition(net, family, inputs, damping, *, actor=None, chunk_size=None):
    return KFACPreconditioner(forwards(net, family, inputs, actor=actor, chunk_size=chunk_size), damping)


def gaussian(output, std=1.0):
    return (Normal(output, th.full_like(output, std)),)


def categorical(output):
    return (Categorical(logits=output),)


def bernoulli(output):
    return (Bernoulli(logits=output),)


FAMILIES = {"normal": partial(gaussian, std=0.5), "categorical": categorical, "bernoulli": bernoulli}


class WithLogStd(nn.Module):
    """A Gaussian policy: a network for the mean, and a free log σ."""

    def __init__(self, net, n_actions):
        super().__init__()
        self.log_std = nn.Parameter(th.linspace(-0.5, 0.5, n_actions))
        self.net = net

    def forward(self, x):
        return self.net(x)

    def family(self, output):
        return (Normal(output, self.log_std.exp().expand_as(output)),)


def mlp(*sizes, activation=nn.Tanh):
    th.manual_seed(0)
    modules = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), activation())]
    return nn.Sequential(*modules[:-1]).double()


def batch(n, *shape):
    return th.randn(n, *shape, dtype=DOUBLE, generator=th.Generator().manual_seed(1))


# Factors of one call.


def random_call(layer, inputs):
    """A call with a random slope at its output and random weights of the states."""
    layer = layer.double()
    output = layer(inputs).detach()
    return LayerCall(layer, inputs, output, None), th.randn_like(output), th.rand(len(inputs), dtype=DOUBLE)


def brute_force_linear(call, slope, weights):
    """Σ over states of w ā āᵀ, summed over whatever lies between states and inputs; g gᵀ averaged over that."""
    A, G = 0.0, 0.0
    for state, weight in enumerate(weights):
        inputs, slopes = call.input[state].reshape(-1, call.input.shape[-1]), slope[state].reshape(-1, slope.shape[-1])
        for a, g in zip(inputs, slopes, strict=True):
            a_bar = a if call.layer.bias is None else th.cat([a, th.ones(1, dtype=DOUBLE)])
            A = A + weight * th.outer(a_bar, a_bar)
            G = G + weight * th.outer(g, g) / len(inputs)
    return A, G


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=["states", "positions", "grid"])
def test_factors_of_a_linear_layer(shape, bias):
    call, slope, weights = random_call(nn.Linear(4, 3, bias=bias), batch(6, *shape))
    for actual, expected in zip(call_factors(call, slope, weights), brute_force_linear(call, slope, weights), strict=True):
        assert_same(actual, expected)


def test_which_layers_have_factors():
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 3),
            "frozen_bias": nn.Linear(3, 3),
            "norm": nn.LayerNorm(3),
            "embedding": nn.Embedding(3, 3),
            "no_bias": nn.Linear(3, 3, bias=False),
            "others": nn.Linear(3, 3),
        }
    )
    actor = [p for name, p in net.named_parameters() if not name.startswith("others") and name != "frozen_bias.bias"]
    assert kfac_layers(net, actor) == [net["linear"], net["no_bias"]]


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_no_layer_has_factors_beside_a_convolution(convolution):
    net = nn.ModuleDict({"convolution": convolution(2, 2, 3), "linear": nn.Linear(3, 3)})
    assert kfac_layers(net, list(net.parameters())) == []
    assert kfac_layers(net, list(net["linear"].parameters())) == [net["linear"]]


# The damped inverses.


@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_damped_inverses_by_the_formula(damping):
    """π² = (tr A / dim A) / (tr G / dim G), A + π√λ I and G + √λ/π I."""
    x, y = batch(20, 4), batch(30, 3) * 5.0
    A, G = x.T @ x, y.T @ y
    pi = math.sqrt((A.trace() / 4) / (G.trace() / 3))
    inverses = damped_inverses(Factors(A, G), damping)
    assert_same(inverses.A, th.linalg.inv(A + pi * math.sqrt(damping) * th.eye(4, dtype=DOUBLE)), 1e-9)
    assert_same(inverses.G, th.linalg.inv(G + math.sqrt(damping) / pi * th.eye(3, dtype=DOUBLE)), 1e-9)


def test_damping_is_shared_out_so_that_scaling_both_factors_inversely_changes_nothing():
    """A ⊗ G is the same matrix as 7A ⊗ G/7."""
    A, G = th.diag(th.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)), th.diag(th.tensor([0.5, 4.0], dtype=DOUBLE))
    one, other = damped_inverses(Factors(A, G), 0.1), damped_inverses(Factors(7.0 * A, G / 7.0), 0.1)
    assert_same(th.kron(one.G, one.A), th.kron(other.G, other.A), 1e-10)


@pytest.mark.parametrize("dtype", [th.float32, DOUBLE])
@pytest.mark.parametrize("damping", [0.0, 1e-20, 0.1])
@pytest.mark.parametrize("rank", [1, 2])
def test_inverses_of_singular_factors_are_positive_definite_and_bounded(rank, damping, dtype):
    """Rounding errors in the factors' zero eigenvalues must not be inverted."""
    rows = batch(rank, 5).to(dtype)
    factors = Factors(rows.T @ rows, 1e-3 * rows.T @ rows)
    for factor, inverse in zip(factors, damped_inverses(factors, damping), strict=True):
        assert th.linalg.cholesky_ex(inverse.double())[1] == 0
        largest = th.linalg.eigvalsh(inverse.double())[-1]
        assert largest * 50.0 * th.finfo(dtype).eps * factor.diagonal().mean() < 1.0


@pytest.mark.parametrize("zero", ["A", "G"])
def test_factor_of_zeros_leaves_the_damping(zero):
    eye = th.eye(3, dtype=DOUBLE)
    inverses = damped_inverses(Factors(eye, eye)._replace(**{zero: 0.0 * eye}), 0.04)
    assert_same(getattr(inverses, zero), eye / 0.2)


@pytest.mark.parametrize("zero", [("A",), ("G",), ("A", "G")], ids=["A", "G", "both"])
def test_inverses_are_positive_definite_without_damping_and_factors_of_zeros(zero):
    eye = th.eye(3, dtype=DOUBLE)
    for inverse in damped_inverses(Factors(eye, eye)._replace(**dict.fromkeys(zero, 0.0 * eye)), 0.0):
        assert th.linalg.cholesky_ex(inverse)[1] == 0


def test_numbers_that_are_not_finite_do_not_raise():
    """The update finds out and stops; it does not crash."""
    eye, nan = th.eye(3, dtype=DOUBLE), th.full((3, 3), math.nan, dtype=DOUBLE)
    for factors in (Factors(eye, nan), Factors(nan, eye), Factors(math.inf * eye, eye)):
        assert not all_finite(damped_inverses(factors, 0.1))


# The whole preconditioner.


@pytest.mark.parametrize("n_inputs", [1, 4])
def test_it_is_the_inverse_for_one_linear_layer_with_one_output(n_inputs):
    """F = E[ā āᵀ] ⊗ 1/σ², without any approximation but the damping's, which is next to nothing here."""
    net, x = mlp(n_inputs, 1), batch(50, n_inputs)
    a = th.cat([x, th.ones(50, 1, dtype=DOUBLE)], dim=1)
    fisher = a.T @ a / 50 / 0.5**2
    M = dense(precondition(net, FAMILIES["normal"], x, damping=1e-18), n_inputs + 1)
    assert_same(M, th.linalg.inv(fisher), 1e-6)


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_it_is_the_kronecker_product_of_the_inverses(damping, n_outputs):
    """θ is the weight row by row, then the bias; the block is G⁻¹ V A⁻¹ for V = (weight, bias)."""
    net, x = mlp(2, n_outputs), batch(9, 2)
    a = th.cat([x, th.ones(9, 1, dtype=DOUBLE)], dim=1)
    M = precondition(net, FAMILIES["normal"], x, damping)
    A_inverse, G_inverse = damped_inverses(Factors(a.T @ a / 9, M_factor_G(net, x)), damping)
    weight, bias = th.randn(n_outputs, 2, dtype=DOUBLE), th.randn(n_outputs, dtype=DOUBLE)
    block = G_inverse @ th.cat([weight, bias[:, None]], dim=1) @ A_inverse
    assert_same(M(flatten([weight, bias])), flatten([block[:, :2], block[:, 2]]), 1e-10)


def M_factor_G(net, x):
    """G of a single layer, with the signs of the preconditioner."""
    n_outputs = net[-1].out_features
    g = random_signs(th.arange(len(x)), 2 * n_outputs)[:, :n_outputs].double() / 0.5
    return g.T @ g / len(x)


@pytest.mark.parametrize("first", [0, 10**9])
def test_signs_are_fair_and_unrelated(first):
    """Means and correlations over 2¹⁴ states stay within four standard deviations, 2⁻⁷ each."""
    signs = random_signs(th.arange(first, first + 2**14), 9).double()
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert float(signs.mean(dim=0).abs().max()) < 4 * 2**-7
    assert float((signs.T @ signs / 2**14 - th.eye(9, dtype=DOUBLE)).abs().max()) < 4 * 2**-7
    for lag in (1, 2, 1024):
        assert float((signs[lag:].T @ signs[:-lag] / 2**14).abs().max()) < 5 * 2**-7


def test_signs_belong_to_the_state():
    assert th.equal(random_signs(th.arange(20), 3)[[7, 2]], random_signs(th.tensor([7, 2]), 3))


def test_constant_input_and_enough_states_give_the_damped_kronecker_inverse():
    """Exact factors: A = ā āᵀ, and G = 1/σ² I up to the signs' noise."""
    x = th.tensor([[0.3, -1.2]], dtype=DOUBLE).expand(20_000, 2)
    a = th.tensor([0.3, -1.2, 1.0], dtype=DOUBLE)
    A_inverse, G_inverse = damped_inverses(Factors(th.outer(a, a), 4.0 * th.eye(2, dtype=DOUBLE)), 0.1)
    M = precondition(mlp(2, 2), FAMILIES["normal"], x, damping=0.1)
    v = th.randn(2, 3, dtype=DOUBLE)
    expected = G_inverse @ v @ A_inverse
    assert_same(M(flatten([v[:, :2], v[:, 2]])), flatten([expected[:, :2], expected[:, 2]]), 0.03)


@pytest.mark.parametrize("name", FAMILIES)
def test_factor_G_of_the_last_layer_is_the_mean_metric(name):
    """E[B ε εᵀ Bᵀ] = M, whatever the family."""
    net, x = mlp(2, 3), batch(20_000, 2)
    layers = [net[0]]
    (parts,) = [new.components for _, _, new in forwards(net, FAMILIES[name], x).linearized()]
    M = precondition(net, FAMILIES[name], x, damping=1e-10)
    G = th.linalg.inv(M._inverses[0][1].G)
    if name == "normal":
        expected = 4.0 * th.eye(3, dtype=DOUBLE)
    else:
        p = parts[0].probs.detach()
        outer = p.T @ p / len(p)
        expected = th.diag(p.mean(dim=0)) - outer if name == "categorical" else th.diag((p * (1 - p)).mean(dim=0))
    assert M._inverses[0][0] is layers[0]
    th.testing.assert_close(G, expected, atol=0.03 * float(expected.max()), rtol=0.0)


@pytest.mark.parametrize("first", [True, False], ids=["log_std_first", "log_std_last"])
@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
def test_row_sums_are_exact_for_log_std(damping, first):
    """Its block of F is 2I and alone, so M there is 1/(2 + λ), whatever else is in θ."""
    policy = WithLogStd(mlp(3, 4, 2), 2).double()
    actor = [*policy.net.parameters()]
    actor.insert(0 if first else len(actor), policy.log_std)
    matrix = dense(precondition(policy, policy.family, batch(8, 3), damping, actor=actor), n := len(flatten(actor)))
    place = slice(0, 2) if first else slice(n - 2, n)
    expected = th.zeros(n, 2, dtype=DOUBLE)
    expected[place] = th.eye(2, dtype=DOUBLE) / (2.0 + damping)
    assert_same(matrix[:, place], expected)


class Scale(nn.Module):
    """Nothing with factors: an element-wise product, and a shift that adds to it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(th.tensor([0.5, 2.0]))
        self.shift = nn.Parameter(th.tensor([1.0, -1.0]))

    def forward(self, x):
        return self.scale * x + self.shift


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_without_factored_layers_it_is_the_diagonal_of_row_sums(chunk_size):
    """F by hand: each output has the block [[E x², E x], [E x, 1]] / σ² in its scale and shift."""
    net, x = Scale().double(), batch(5, 2) + 2.0
    M = precondition(net, FAMILIES["normal"], x, 0.1, chunk_size=chunk_size)
    row_sums = th.cat([x.square().mean(dim=0) + x.mean(dim=0), x.mean(dim=0) + 1.0]) / 0.5**2
    assert_same(dense(M, 4), th.diag(1.0 / (row_sums + 0.1)))


def test_negative_row_sums_leave_the_damping():
    net, x = Scale().double(), th.full((5, 2), -0.5, dtype=DOUBLE)
    M = precondition(net, FAMILIES["normal"], x, 0.1)
    row_sums = th.tensor([-1.0, -1.0, 2.0, 2.0], dtype=DOUBLE)
    assert_same(dense(M, 4), th.diag(1.0 / (row_sums.clamp(min=0.0) + 0.1)))


class Twice(nn.Module):
    """A layer that is called twice, as in a network with tied weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.out = nn.Linear(2, 1)

    def forward(self, x):
        return self.out(th.tanh(self.layer(th.tanh(self.layer(x)))))


def test_layer_called_twice_has_the_factors_of_both_calls():
    th.manual_seed(0)
    net, x = Twice().double(), batch(30, 2)
    M = precondition(net, gaussian, x, damping=0.1)
    with recorded_calls([net.layer]) as calls:
        output = net(x)
    slopes = th.autograd.grad(output.sum(), [call.output for call in calls])  # signs of one output do not matter to g gᵀ
    weights = th.full((30,), 1 / 30, dtype=DOUBLE)
    parts = [brute_force_linear(call, slope, weights) for call, slope in zip(calls, slopes, strict=True)]
    expected = damped_inverses(Factors(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]), 0.1)
    ((_, actual),) = [inverse for inverse in M._inverses if inverse[0] is net.layer]
    assert_same(actual.A, expected.A, 1e-10)
    assert_same(actual.G, expected.G, 1e-10)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(th.tanh(self.second(th.tanh(self.first(x)))))


class Unused(nn.Module):
    """A layer that is not called, and one that is called without effect."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.idle = nn.Linear(2, 1), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        self.idle(x)
        return self.used(x)


def test_layers_without_effect_have_the_damping_alone():
    net = Unused().double()
    M = precondition(net, gaussian, batch(6, 2), damping=0.1)
    n = sum(p.numel() for p in net.parameters())
    matrix = dense(M, n)
    assert_same(matrix[3:, 3:], th.eye(n - 3, dtype=DOUBLE) / 0.1)
    assert_same(matrix[3:, :3], th.zeros(n - 3, 3, dtype=DOUBLE))


def with_log_std(net, n_actions):
    policy = WithLogStd(net, n_actions).double()
    return policy, policy.family


def dead(net):
    """ReLU units none of which any state wakes."""
    with th.no_grad():
        net[0].bias.fill_(-100.0)
    return net


#: Name ↦ network, family, inputs.
MODELS = {
    "gaussian": (*with_log_std(mlp(3, 4, 2), 2), batch(9, 3)),
    "categorical": (mlp(3, 4, 3), categorical, batch(9, 3)),
    "bernoulli": (mlp(3, 4, 3), bernoulli, batch(9, 3)),
    "one_choice": (mlp(3, 4, 1), categorical, batch(9, 3)),
    "one_state": (mlp(3, 4, 2), gaussian, batch(1, 3)),
    "one_state_again_and_again": (mlp(3, 4, 2), gaussian, batch(1, 3).expand(6, 3)),
    "inputs_of_zero": (mlp(3, 4, 2), gaussian, th.zeros(6, 3, dtype=DOUBLE)),
    "dead_units": (dead(mlp(3, 4, 2, activation=nn.ReLU)), gaussian, batch(6, 3)),
    "certain": (mlp(3, 4, 2), lambda output: categorical(1e3 * output), batch(6, 3)),
    "narrow": (mlp(3, 4, 2), partial(gaussian, std=1e-4), batch(6, 3)),
    "wide": (mlp(3, 4, 2), partial(gaussian, std=1e4), batch(6, 3)),
    "inputs_of_very_different_size": (
        mlp(3, 4, 2, activation=nn.Identity),
        gaussian,
        batch(6, 3) * th.tensor([1e-5, 1.0, 1e5], dtype=DOUBLE),
    ),
    "no_factors": (Scale().double(), categorical, batch(6, 2)),
    "tied_weights": (Tied().double(), gaussian, batch(6, 2)),
    "layer_twice": (Twice().double(), gaussian, batch(6, 2)),
}


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_symmetric_and_positive_definite(name, damping):
    net, family, x = MODELS[name]
    M = precondition(net, family, x, damping)
    matrix = dense(M, sum(p.numel() for p in net.parameters()))
    scale = matrix.diagonal().abs().sqrt()
    matrix = matrix / th.outer(scale, scale)  # its diagonal is 1 then, so that sizes are comparable
    assert_same(matrix, matrix.T, 1e-9)
    if damping > 0.0:
        assert th.linalg.eigvalsh(matrix)[0] > 0.0
    else:  # as far as rounding lets one see it
        assert th.linalg.eigvalsh(matrix)[0] > -1e-9


@pytest.mark.parametrize("damping", [1e-6, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_products_stay_positive_in_single_precision(name, damping):
    net, family, x = MODELS[name]
    net = copy.deepcopy(net).float()
    family = net.family if isinstance(net, WithLogStd) else family
    M = precondition(net, family, x.float(), damping)
    for seed in range(5):
        v = th.randn(sum(p.numel() for p in net.parameters()), generator=th.Generator().manual_seed(seed))
        assert float(v.dot(M(v))) > 0.0


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_add_up(name, chunk_size):
    net, family, x = MODELS[name]
    v = th.randn(sum(p.numel() for p in net.parameters()), dtype=DOUBLE)
    whole = precondition(net, family, x, 0.1)(v)
    assert_same(precondition(net, family, x, 0.1, chunk_size=chunk_size)(v), whole, 1e-10)


def test_parameters_outside_of_theta_have_no_place():
    net, x = mlp(3, 4, 2), batch(6, 3)
    actor = list(net[2].parameters())
    whole = dense(precondition(net, gaussian, x, 0.1), 16 + 10)
    assert_same(dense(precondition(net, gaussian, x, 0.1, actor=actor), 10), whole[16:, 16:])


def test_order_of_theta_is_free():
    net, x = mlp(3, 4, 2), batch(6, 3)
    actor = list(net.parameters())
    v = [th.randn_like(p).detach() for p in actor]
    forward = precondition(net, gaussian, x, 0.1)(flatten(v)).split([p.numel() for p in actor])
    order = [3, 0, 2, 1]
    shuffled = precondition(net, gaussian, x, 0.1, actor=[actor[i] for i in order])(flatten(v[i] for i in order))
    assert_same(shuffled, th.cat([forward[i] for i in order]))


def test_nothing_is_drawn_from_the_global_generator_and_it_repeats_itself():
    net, family, x = MODELS["gaussian"]
    v = th.randn(sum(p.numel() for p in net.parameters()), dtype=DOUBLE)
    state = th.get_rng_state()
    first = precondition(net, family, x, 0.1)(v)
    assert th.equal(th.get_rng_state(), state)
    th.manual_seed(1234)
    assert th.equal(precondition(net, family, x, 0.1)(v), first)


def test_vector_is_not_written_to_and_no_gradients_are_left():
    net, family, x = MODELS["gaussian"]
    v = th.randn(sum(p.numel() for p in net.parameters()), dtype=DOUBLE)
    kept = v.clone()
    product = precondition(net, family, x, 0.1)(v)
    assert th.equal(v, kept)
    assert not product.requires_grad
    assert all(p.grad is None for p in net.parameters())


def realistic(seed=0):
    """A 32 × 32 policy on correlated inputs of different sizes, away from its initialisation."""
    th.manual_seed(seed)
    net = mlp(8, 32, 32, 3)
    with th.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    policy = WithLogStd(net, 3).double()
    x = th.randn(128, 8, dtype=DOUBLE) @ (th.randn(8, 8, dtype=DOUBLE) * th.logspace(-1, 0.5, 8, dtype=DOUBLE))
    target = th.randn(128, 3, dtype=DOUBLE) + x[:, :3]
    return policy, x, target


@pytest.mark.parametrize(("damping", "times"), [(0.1, 1.3), (0.01, 1.5)])
def test_fewer_iterations_to_nearly_all_of_the_gain(damping, times):
    """bᵀx − ½xᵀ(F + λI)x as a share of its maximum."""
    policy, x, target = realistic()
    actor = list(policy.parameters())
    model = forwards(policy, policy.family, x, mlp=as_mlp(list(policy.net)))
    fisher = FisherOperator(model, damping)
    log_prob = policy.family(policy(x))[0].log_prob(target).sum(dim=1)
    b = flatten(th.autograd.grad(log_prob.mean(), actor))
    M = KFACPreconditioner(model, damping)
    best = conjugate_gradient(fisher, b, max_iter=1000, rtol=1e-10, M=M)
    assert best.status is CGStatus.CONVERGED

    def gain(n, preconditioner):
        return 0.5 * conjugate_gradient(fisher, b, max_iter=n, M=preconditioner).curvature / (0.5 * best.curvature)

    enough = next(n for n in range(1, 100) if gain(n, M) >= 0.99)
    assert gain(int(times * enough) - 1, None) < 0.99


# With SB3's policies.


def test_any_policy_of_sb3s(case):
    layers = kfac_layers(case.policy, case.actor)
    M = KFACPreconditioner(case.surrogate(layers=layers), 0.1)
    matrix = dense(M, len(flatten(case.actor)))
    assert_same(matrix, matrix.T, 1e-10)
    assert th.linalg.eigvalsh(matrix)[0] > 0.0
    chunked = KFACPreconditioner(case.surrogate(5, layers=layers), 0.1)
    assert_same(dense(chunked, len(matrix)), matrix, 1e-9)


def test_it_changes_the_way_and_not_the_solution(case):
    surrogate = case.surrogate(layers=kfac_layers(case.policy, case.actor))
    fisher, b = FisherOperator(surrogate, 0.1), surrogate.gradient()
    M = KFACPreconditioner(surrogate, 0.1)
    plain, preconditioned = (conjugate_gradient(fisher, b, max_iter=500, rtol=1e-12, M=m).x for m in (None, M))
    assert_same(preconditioned, plain, 1e-8)


def test_without_recorded_layers_every_parameter_gets_the_diagonal(case):
    M = KFACPreconditioner(case.surrogate(), 0.1)
    matrix = dense(M, len(flatten(case.actor)))
    assert_same(matrix, th.diag(matrix.diagonal()))
    row_sums = case.mean_kl_hessian().sum(dim=1)
    assert_same(matrix.diagonal(), 1.0 / (row_sums.clamp(min=0.0) + 0.1), 1e-8)


# The factor of the observations, which actor and critic share.


def mlp_on(batch, n_outputs, bias=True):
    th.manual_seed(n_outputs)
    net = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, n_outputs)).double()

    def forward(rollout, recorded):
        with recorded_calls(recorded) as calls:
            parts = (Normal(net(rollout.inputs), 1.0),)
        return ModelOutput(parts, rollout.returns, None, calls)

    return RolloutObjective(
        Model(forward, list(net.parameters()), kfac_layers(net, list(net.parameters())), as_mlp(list(net))), batch
    )


def rollout_of(n_states=12):
    inputs, zeros = th.randn(n_states, 4, dtype=DOUBLE), th.zeros(n_states, dtype=DOUBLE)
    return RolloutBatch(inputs, zeros, zeros, zeros, th.rand(n_states, dtype=DOUBLE))


def dense_preconditioner(objective):
    return dense(KFACPreconditioner(objective, 0.1), len(flatten(objective.model.parameters)))


def test_networks_of_the_same_observations_share_their_factor():
    batch = rollout_of()
    alone = dense_preconditioner(mlp_on(replace(batch, shared={}), 2))
    dense_preconditioner(mlp_on(batch, 1))
    assert len(batch.shared) == 1
    assert th.equal(dense_preconditioner(mlp_on(batch, 2)), alone)
    assert len(batch.shared) == 1


def test_encoding_that_changes_nothing_keeps_the_shared_factor():
    batch = rollout_of()
    encoded = batch.encoded(lambda inputs: inputs.flatten(start_dim=1), None)
    dense_preconditioner(mlp_on(batch, 2))
    dense_preconditioner(mlp_on(encoded, 1))
    assert len(batch.shared) == 1


def test_shared_factor_is_of_these_observations_weights_and_bias():
    """Whatever lies at the same place in memory: observations written over, other weights, the next minibatch."""
    batch = rollout_of()
    dense_preconditioner(mlp_on(batch, 2))
    for other in (replace(batch, weights=th.rand(12, dtype=DOUBLE)), batch.select(slice(6)), batch.select(slice(6, 12))):
        assert_same(dense_preconditioner(mlp_on(other, 2)), dense_preconditioner(mlp_on(replace(other, shared={}), 2)))
    without = dense_preconditioner(mlp_on(batch, 2, bias=False))
    assert_same(without, dense_preconditioner(mlp_on(replace(batch, shared={}), 2, bias=False)))
    batch.inputs.mul_(2.0)
    assert_same(dense_preconditioner(mlp_on(batch, 2)), dense_preconditioner(mlp_on(replace(batch, shared={}), 2)))
    for _ in range(20):
        sample = batch.sample(th.randperm(12)[:6])
        assert_same(dense_preconditioner(mlp_on(sample, 2)), dense_preconditioner(mlp_on(replace(sample, shared={}), 2)))
        del sample


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_in_a_row_give_the_factors_of_the_graph(name):
    net, inputs = mlp(3, 5, 4, 2), batch(6, 3)
    by_graph = KFACPreconditioner(forwards(net, FAMILIES[name], inputs), 0.1)
    by_layers = KFACPreconditioner(forwards(net, FAMILIES[name], inputs, mlp=as_mlp(list(net))), 0.1)
    v = th.randn_like(flatten(list(net.parameters()))).detach()
    assert_same(by_layers(v), by_graph(v))


def test_layers_in_a_row_and_log_std_have_their_factors_and_row_sums():
    policy, inputs = WithLogStd(mlp(3, 5, 2), 2).double(), batch(6, 3)
    by_graph = KFACPreconditioner(forwards(policy, policy.family, inputs), 0.1)
    by_layers = KFACPreconditioner(forwards(policy, policy.family, inputs, mlp=as_mlp(list(policy.net))), 0.1)
    v = th.randn_like(flatten(list(policy.parameters()))).detach()
    assert_same(by_layers(v), by_graph(v))


def test_it_pays_for_networks_with_factors_and_families_with_a_closed_form():
    plain, x = mlp(3, 4, 2), batch(5, 3)
    convolutional = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    assert pays(forwards(plain, gaussian, x))
    assert not pays(forwards(convolutional, gaussian, batch(5, 1, 3, 3)))
    assert not pays(forwards(plain, lambda output: (th.distributions.Laplace(output, th.ones_like(output)),), x))
