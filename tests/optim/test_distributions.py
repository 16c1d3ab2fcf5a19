import numpy as np
import pytest
import torch as th
from scipy import stats
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, VonMises, kl_divergence

from sb3_trpo.adapters.models import components
from sb3_trpo.optim.batch import map_inputs
from sb3_trpo.optim.distributions import (
    constant,
    detach,
    fisher_metric,
    fisher_root,
    has_closed_form,
    joint_kl,
    outputs,
    without_validation,
)
from sb3_trpo.optim.parameters import flatten, unflatten


def perturb(case, scale=0.3):
    with th.no_grad():
        for parameter in case.actor:
            parameter.add_(scale * th.randn_like(parameter))


def tensor(*rows):
    return th.as_tensor(np.array(rows, dtype=np.float64))


def test_kl_of_normals_is_by_hand_and_summed_over_dimensions():
    old = (Normal(tensor([0.0, 1.0]), tensor([1.0, 2.0])),)
    new = (Normal(tensor([1.0, 1.0]), tensor([2.0, 1.0])),)
    # log(σ_new/σ_old) + (σ_old² + (μ_old − μ_new)²) / 2σ_new² − 1/2, dimension by dimension
    first, second = np.log(2.0) + (1.0 + 1.0) / 8.0 - 0.5, -np.log(2.0) + 4.0 / 2.0 - 0.5
    assert joint_kl(old, new).tolist() == pytest.approx([first + second], abs=1e-12)


def test_kl_of_discrete_families_is_scipys_and_summed_over_components():
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.5, 0.25, 0.25])
    categorical = stats.entropy(p, q)
    bernoulli = [stats.entropy([a, 1 - a], [b, 1 - b]) for a, b in zip(p, q, strict=True)]
    old = Categorical(probs=tensor(p)), Bernoulli(probs=tensor(p))
    new = Categorical(probs=tensor(q)), Bernoulli(probs=tensor(q))
    assert joint_kl(old[:1], new[:1]).tolist() == pytest.approx([categorical], abs=1e-12)
    assert joint_kl(old[1:], new[1:]).tolist() == pytest.approx([sum(bernoulli)], abs=1e-12)
    assert joint_kl(old, new).tolist() == pytest.approx([categorical + sum(bernoulli)], abs=1e-12)


def test_kl_is_the_mean_log_ratio_of_the_joint_action(case):
    """KL(π_old‖π_new) = E over a ~ π_old of log π_old(a) − log π_new(a), squashing and all, by Monte Carlo."""
    n_samples = 20_000
    state = case.rollout.select(slice(1)).inputs
    states = map_inputs(lambda tensor: tensor.expand(n_samples, *tensor.shape[1:]), state)
    with th.no_grad():
        if case.policy.use_sde:
            case.policy.reset_noise(n_samples)
        old = case.distribution(states)
        actions, old_parts = old.sample(), components(old)
        old_log_prob = old.log_prob(actions)
        perturb(case)
        new = case.distribution(states)
        log_ratio, kl = old_log_prob - new.log_prob(actions), joint_kl(old_parts, components(new))
    assert kl.shape == (n_samples,)
    assert kl[0] > 0.01
    assert float(kl[0]) == pytest.approx(float(log_ratio.mean()), abs=float(4 * log_ratio.std() / n_samples**0.5))


def test_kl_of_one_number_a_state_is_kept(make_case):
    case = make_case("full_gaussian")
    old = components(case.distribution(case.rollout.inputs))
    perturb(case)
    new = components(case.distribution(case.rollout.inputs))
    th.testing.assert_close(joint_kl(old, new), kl_divergence(old[0], new[0]))


def test_kl_that_torch_does_not_know_is_refused_by_name():
    parts = (VonMises(tensor([0.0]), tensor([1.0])),)
    with pytest.raises(ValueError, match=r"VonMises has no KL divergence in torch.*register_kl"):
        joint_kl(parts, parts)


def test_kl_of_other_components_is_refused():
    parts = (Bernoulli(logits=tensor([0.0])),)
    with pytest.raises(ValueError, match="zip"):
        joint_kl(parts, parts * 2)


def test_components_outlive_the_next_forward_pass(case):
    old = components(case.distribution(case.rollout.inputs))
    before = flatten(outputs(old)).clone()
    perturb(case)
    new = components(case.distribution(case.rollout.inputs))
    assert th.equal(flatten(outputs(old)), before)
    assert not th.equal(flatten(outputs(new)), before)


@pytest.mark.parametrize(("name", "count"), [("box", 1), ("multi_discrete", 3), ("multi_binary", 1)])
def test_number_of_components(make_case, name, count):
    case = make_case(name)
    assert len(components(case.distribution(case.rollout.inputs))) == count


def test_every_sb3_family_has_a_closed_form(case):
    assert has_closed_form(components(case.distribution(case.rollout.inputs)))


def test_one_unknown_component_leaves_no_closed_form():
    known, unknown = Normal(tensor([0.0]), tensor([1.0])), VonMises(tensor([0.0]), tensor([1.0]))
    assert has_closed_form((known,))
    assert not has_closed_form((known, unknown))


FAMILIES = {
    "normal": (lambda z: Normal(z[:, :2], z[:, 2:].exp()), tensor([0.3, -1.0, 0.2, -0.7], [0.0, 2.0, 0.9, 0.4])),
    "categorical": (lambda z: Categorical(logits=z), tensor([0.3, -1.0, 2.0], [0.0, 0.0, -3.0])),
    "categorical_by_probabilities": (lambda z: Categorical(probs=z), tensor([0.3, 0.1, 0.6], [0.2, 0.7, 0.1])),
    "bernoulli": (lambda z: Bernoulli(logits=z), tensor([0.3, -1.0], [4.0, 0.0])),
    "bernoulli_by_probabilities": (lambda z: Bernoulli(probs=z), tensor([0.3, 0.1], [0.9, 0.5])),
}


@pytest.mark.parametrize(("make", "raw"), FAMILIES.values(), ids=FAMILIES)
def test_metric_is_the_hessian_of_the_kl_in_the_outputs(make, raw):
    old = make(raw)
    z = outputs((old,))
    shapes = [tensor.shape for tensor in z]

    def kl(*z):
        new = Normal(*z, validate_args=False) if isinstance(old, Normal) else type(old)(logits=z[0])
        return joint_kl((old,), (new,)).sum()

    hessian = th.autograd.functional.hessian(kl, tuple(z))
    dense = th.cat([th.cat([b.reshape(p.numel(), -1) for b in row], dim=1) for p, row in zip(z, hessian, strict=True)])
    for direction in th.eye(len(dense), dtype=th.float64):
        product = fisher_metric((old,), unflatten(direction, z))
        assert [tensor.shape for tensor in product] == shapes
        th.testing.assert_close(flatten(product), dense @ direction, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("make", "raw"), FAMILIES.values(), ids=FAMILIES)
def test_root_times_its_transpose_is_the_metric(make, raw):
    part = make(raw)
    z = outputs((part,))
    basis = th.eye(sum(tensor.numel() for tensor in z), dtype=th.float64)
    root, metric = (
        th.stack([flatten(function((part,), unflatten(vector, z))) for vector in basis], dim=1)
        for function in (fisher_root, fisher_metric)
    )
    th.testing.assert_close(root @ root.T, metric, atol=1e-12, rtol=1e-12)


def test_detached_components_are_the_same_constants(case):
    parts = components(case.distribution(case.rollout.inputs))
    constants = detach(parts)
    assert not any(tensor.requires_grad for tensor in outputs(constants))
    assert [type(part) for part in constants] == [type(part) for part in parts]
    th.testing.assert_close(flatten(outputs(constants)), flatten(outputs(parts)).detach(), atol=1e-14, rtol=0.0)
    assert joint_kl(constants, parts).abs().max() < 1e-15


def test_metric_by_hand():
    normal, categorical, bernoulli = (
        Normal(tensor([5.0]), tensor([0.5])),
        Categorical(probs=tensor([0.25, 0.75])),
        Bernoulli(probs=tensor([0.2])),
    )
    tangents = [tensor([1.0]), tensor([1.0]), tensor([1.0, 0.0]), tensor([1.0])]
    on_mean, on_scale, on_logits, on_logit = fisher_metric((normal, categorical, bernoulli), tangents)
    th.testing.assert_close(on_mean, tensor([4.0]))  # 1/σ²
    th.testing.assert_close(on_scale, tensor([8.0]))  # 2/σ²
    th.testing.assert_close(on_logits, tensor([0.25 - 0.25**2, -0.25 * 0.75]))  # diag(p) − ppᵀ
    th.testing.assert_close(on_logit, tensor([0.2 * 0.8]))  # p(1 − p)


def test_outputs_are_connected_to_the_policy(case):
    z = outputs(components(case.distribution(case.rollout.inputs)))
    assert all(tensor.shape[0] == case.rollout.n_states and tensor.requires_grad for tensor in z)


@pytest.fixture
def validation():
    """torch's checks as they are by default; `torch.compile` switches them off for the whole process."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("validation")
def test_validation_is_off_inside_and_back_afterwards():
    nan = tensor([float("nan")])
    with pytest.raises(ValueError, match="invalid values"):
        Normal(nan, nan)
    with without_validation():
        assert Normal(nan, nan).loc.isnan()
    with pytest.raises(ValueError, match="invalid values"):
        Normal(nan, nan)


@pytest.mark.usefixtures("validation")
def test_validation_is_back_after_an_exception():
    @without_validation()
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(ValueError, match="invalid values"):
        Normal(tensor([0.0]), tensor([-1.0]))


def test_validation_that_was_off_stays_off():
    with without_validation():
        with without_validation():
            pass
        Normal(tensor([float("nan")]), tensor([1.0]))


class HoldsGraph(Normal):
    """A user's family that keeps what it was computed from, and nests it."""

    def __init__(self, loc, scale):
        super().__init__(loc, scale)
        self.history = {"latent": [2.0 * loc], "self": self}


def test_constant_copies_distributions_that_hold_tensors_of_a_graph():
    weight = th.ones(3, requires_grad=True)
    held = HoldsGraph(weight * 2.0, weight.exp())
    (copied,) = constant((held,))
    assert not copied.loc.requires_grad
    assert not copied.history["latent"][0].requires_grad
    assert copied.history["self"] is copied
    assert held.loc.requires_grad
    with th.no_grad():
        weight.zero_()
    assert copied.loc.tolist() == [2.0] * 3
