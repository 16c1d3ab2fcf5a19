from dataclasses import replace

import pytest
import torch as th
from torch import nn

from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.distributions import has_closed_form
from sb3_trpo.optim.fisher import FisherOperator, GGNProduct, KLHessianProduct, layerwise_fisher_product
from sb3_trpo.optim.line_search import max_step_length
from sb3_trpo.optim.mlp import as_mlp
from sb3_trpo.optim.parameters import assign, flatten


def dense(product, actor):
    """The matrix of a product, column by column."""
    basis = th.eye(sum(p.numel() for p in actor), dtype=th.float64)
    return th.stack([product(v) for v in basis], dim=1)


def assert_same(actual, expected, atol=1e-8):
    th.testing.assert_close(actual, expected, atol=atol, rtol=0.0)


def test_operator_is_the_dense_hessian_of_the_kl(case):
    fisher = dense(FisherOperator(case.surrogate(), damping=0.0), case.actor)
    assert_same(fisher, case.mean_kl_hessian())
    assert_same(fisher, fisher.T, atol=1e-12)
    eigenvalues = th.linalg.eigvalsh(fisher)
    assert eigenvalues[0] > -1e-12
    assert eigenvalues[-1] > 1e-2


def test_operator_is_the_dense_hessian_for_a_users_own_policy(user_case):
    fisher = dense(FisherOperator(user_case.surrogate(), damping=0.0), user_case.actor)
    assert_same(fisher, user_case.mean_kl_hessian())
    assert th.linalg.eigvalsh(fisher)[-1] > 1e-2


@pytest.mark.parametrize(("name", "closed"), [("state_dependent_gaussian", True), ("beta", False), ("full_gaussian", False)])
def test_which_of_a_users_own_policies_has_a_closed_form(make_case, name, closed):
    ((_, _, new),) = make_case(name).surrogate().linearized()
    assert has_closed_form(new.components) == closed


def test_both_ways_to_multiply_agree(case):
    surrogate = case.surrogate()
    ((chunk, old, new),) = surrogate.linearized()
    v = th.randn_like(flatten(case.actor))
    gauss_newton = GGNProduct(surrogate, chunk, new)(v)
    assert_same(gauss_newton, KLHessianProduct(surrogate, chunk, old, new)(v), atol=1e-12)


def test_operator_is_the_mean_outer_product_of_scores(make_case):
    """F by its definition, E over s and a ~ π of ∇log π ∇log πᵀ; with few actions the inner mean is exact."""
    case = make_case("discrete")
    expected = th.zeros(2 * [len(flatten(case.actor))], dtype=th.float64)
    log_probs = case.distribution(case.rollout.inputs).distribution.logits
    for weight, row in zip(case.rollout.weights, log_probs, strict=True):
        for log_prob in row:
            score = flatten(th.autograd.grad(log_prob, case.actor, retain_graph=True))
            expected += weight * log_prob.exp().detach() * score.outer(score)
    assert_same(dense(FisherOperator(case.surrogate(), damping=0.0), case.actor), expected)


def test_damping_is_added_to_the_diagonal(case):
    v = th.randn_like(flatten(case.actor))
    surrogate = case.surrogate()
    undamped, damped = (FisherOperator(surrogate, damping)(v) for damping in (0.0, 0.3))
    assert_same(damped, undamped + 0.3 * v, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_chunks_add_up(case, chunk_size):
    v = th.randn_like(flatten(case.actor))
    whole, chunked = (FisherOperator(case.surrogate(size), damping=0.1)(v) for size in (None, chunk_size))
    assert_same(chunked, whole, atol=1e-12)


def test_chunks_of_a_users_own_policy_add_up(user_case):
    v = th.randn_like(flatten(user_case.actor))
    whole, chunked = (FisherOperator(user_case.surrogate(size), damping=0.1)(v) for size in (None, 5))
    assert_same(chunked, whole, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_products_are_linear_and_repeatable(make_case, chunk_size):
    case = make_case("box")
    fisher = FisherOperator(case.surrogate(chunk_size), damping=0.1)
    u, v = th.randn(2, len(flatten(case.actor)), dtype=th.float64)
    first = fisher(u)
    assert_same(fisher(2.0 * u - v), 2.0 * first - fisher(v), atol=1e-12)
    assert th.equal(fisher(u), first)


@pytest.mark.parametrize("factor", [2, 5])
def test_thinned_rollout_gives_the_mean_over_its_own_states(case, factor):
    kept = case.rollout.subsample(factor)
    v = th.randn_like(flatten(case.actor))
    fisher = FisherOperator(case.surrogate(rollout=kept), damping=0.0)
    evenly = replace(kept, weights=th.full_like(kept.weights, 1.0 / kept.n_states))
    assert_same(fisher(v), case.mean_kl_hessian(evenly) @ v)


MLPS = ["box", "discrete", "multi_discrete", "multi_binary", "dict_observation"]


def mlp_of(case):
    return as_mlp([*case.policy.mlp_extractor.policy_net, case.policy.action_net])


@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU, nn.GELU], ids=["tanh", "relu", "gelu"])
@pytest.mark.parametrize("net_arch", [[], [5], [4, 3]], ids=["linear", "one_hidden", "two_hidden"])
@pytest.mark.parametrize("name", MLPS)
def test_fast_path_is_the_dense_hessian_too(make_case, name, net_arch, activation_fn):
    case = make_case(name, net_arch=net_arch, activation_fn=activation_fn)
    surrogate = case.surrogate(mlp=mlp_of(case))
    ((chunk, _, new),) = surrogate.linearized()
    product = layerwise_fisher_product(surrogate.model, new, chunk.weights)
    assert product is not None
    assert_same(dense(product, case.actor), case.mean_kl_hessian())


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", MLPS)
def test_gradient_by_layers_is_that_of_the_graph(make_case, name, chunk_size):
    case = make_case(name)
    fast, general = case.surrogate(chunk_size, mlp=mlp_of(case)), case.surrogate(chunk_size)
    assert all(fast.layerwise(new) is not None for _, _, new in fast.linearized())
    assert_same(fast.gradient(), general.gradient(), atol=1e-12)


def test_operator_takes_the_fast_path_chunk_by_chunk(make_case):
    case = make_case("box")
    v = th.randn_like(flatten(case.actor))
    chunked = FisherOperator(case.surrogate(5, mlp=mlp_of(case)), 0.1)
    assert_same(chunked(v), FisherOperator(case.surrogate(), 0.1)(v), atol=1e-12)


def test_fast_path_is_left_where_parameters_are_not_the_mlps(make_case):
    case = make_case("box")
    surrogate = case.surrogate(mlp=mlp_of(case))
    ((chunk, _, new),) = surrogate.linearized()
    idle = nn.Parameter(th.zeros(2, dtype=th.float64))
    for actor in (case.actor[:-1], [*case.actor, idle], [p for p in case.actor if p is not case.policy.log_std]):
        assert layerwise_fisher_product(replace(surrogate.model, parameters=actor), new, chunk.weights) is None
    ((chunk, _, unrecorded),) = case.surrogate().linearized()
    assert layerwise_fisher_product(surrogate.model, unrecorded, chunk.weights) is None


def test_outputs_that_do_not_move_take_no_part(make_case):
    case = make_case("box")
    case.policy.log_std.requires_grad_(False)
    case.actor = [p for p in case.actor if p.requires_grad]
    assert_same(dense(FisherOperator(case.surrogate(), damping=0.0), case.actor), case.mean_kl_hessian())


def test_parameters_that_some_components_ignore(make_case):
    """A product must fill in zeros for a parameter that the KL does not reach."""
    case = make_case("discrete")
    idle = nn.Parameter(th.zeros(2, dtype=th.float64))
    v = th.randn(len(flatten(case.actor)) + 2, dtype=th.float64)
    product = FisherOperator(case.surrogate(actor=[*case.actor, idle]), damping=0.0)(v)
    assert product[-2:].tolist() == [0.0, 0.0]
    assert_same(product[:-2], FisherOperator(case.surrogate(), damping=0.0)(v[:-2]), atol=1e-14)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_longest_step_reaches_the_trust_region_in_the_quadratic_model(case, damping):
    """½β²sᵀ(F + λI)s = δ, and undamped the KL itself is δ to first order."""
    target_kl = 1e-6
    case.differentiate_everything()
    surrogate = case.surrogate()
    fisher = FisherOperator(surrogate, damping)
    s = conjugate_gradient(fisher, surrogate.gradient(), max_iter=10).x
    step = max_step_length(float(s.dot(fisher(s))), target_kl) * s
    quadratic = case.mean_kl_hessian() + damping * th.eye(len(s), dtype=th.float64)
    assert float(0.5 * step.dot(quadratic @ step)) == pytest.approx(target_kl, rel=1e-9)
    if damping == 0.0:
        assign(case.actor, flatten(case.actor).detach() + step)
        assert surrogate.evaluate().kl == pytest.approx(target_kl, rel=2e-2)


def test_products_leave_no_gradients_behind(case):
    fisher = FisherOperator(case.surrogate(), damping=0.1)
    product = fisher(th.ones_like(flatten(case.actor)).detach())
    assert not product.requires_grad
    assert all(p.grad is None for p in case.policy.parameters())
