"""Fisher products and Kronecker factors of modules that are no plain layers: each is right, or steps aside."""

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from support.models import policy_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from sb3_trpo.adapters.models import actor_parameters
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.conjugate_gradient import CGStatus, conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import Factors, KFACPreconditioner, damped_inverses, kfac_layers
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import all_finite, flatten

N_STATES, N_OBJECTS, N_FEATURES = 16, 6, 4
VECTOR = spaces.Box(-np.inf, np.inf, (N_OBJECTS * 3,))
linear = nn.Linear


class Extractor(BaseFeaturesExtractor):
    """Objects of three numbers each ↦ features."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, N_FEATURES)
        self.build()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.features(observations.view(len(observations), N_OBJECTS, 3))


class ObjectsInTheBatch(Extractor):
    def build(self):
        self.phi, self.rho = linear(3, 5), linear(5, N_FEATURES)

    def features(self, objects):
        each = th.tanh(self.phi(objects.reshape(-1, 3))).view(*objects.shape[:2], -1)
        return self.rho(each.mean(dim=1))


class FramesInTheBatch(Extractor):
    def build(self):
        self.conv, self.out = nn.Conv2d(1, 2, 2), linear(8, N_FEATURES)

    def features(self, objects):
        frames = objects.reshape(-1, 1, 3, 3)
        return self.out(th.tanh(self.conv(frames)).flatten(1)).view(len(objects), 2, -1).mean(dim=1)


class SequenceFirst(Extractor):
    def build(self):
        self.phi = linear(3, N_FEATURES)

    def features(self, objects):
        return th.tanh(self.phi(objects.transpose(0, 1))).mean(dim=0)


class Table(Extractor):
    """A layer that never sees an observation."""

    def build(self):
        self.table, self.keys, self.out = nn.Parameter(th.randn(7, 2)), linear(2, 3), linear(7, N_FEATURES)

    def features(self, objects):
        return self.out(th.tanh(objects.mean(dim=1) @ self.keys(self.table).t()))


class OneByOne(Extractor):
    """Layers that are called without a batch."""

    def build(self):
        self.conv, self.out = nn.Conv2d(1, 2, 2), linear(8, N_FEATURES)

    def features(self, objects):
        return th.stack([self.out(th.tanh(self.conv(o.reshape(-1, 1, 3, 3)[0])).flatten()) for o in objects])


class Vmapped(Extractor):
    def build(self):
        self.phi = linear(3, N_FEATURES)

    def features(self, objects):
        return th.vmap(lambda o: th.tanh(self.phi(o)).mean(dim=0))(objects)


class Transformer(Extractor):
    def build(self):
        self.embed = linear(3, N_FEATURES)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(N_FEATURES, 2, 8, 0.0, batch_first=True), 1)

    def features(self, objects):
        return self.encoder(self.embed(objects)).mean(dim=1)


class Attention(Extractor):
    def build(self):
        self.query, self.key, self.value = linear(3, 2), linear(3, 2), linear(3, N_FEATURES)

    def features(self, objects):
        qkv = (layer(objects).unsqueeze(1) for layer in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(*qkv)[:, 0].mean(dim=1)


class TwoLayers(Extractor):
    """Two layers with anything between them."""

    first, between, second = partial(linear, 18, 5), staticmethod(th.tanh), partial(linear, 5, N_FEATURES)

    def build(self):
        self.a, self.b = self.first(), self.second()

    def features(self, objects):
        return self.b(self.between(self.a(objects.flatten(1))))


class Parametrized(TwoLayers):
    def first(self):
        return parametrizations.spectral_norm(linear(18, 5))

    def second(self):
        return parametrizations.weight_norm(linear(5, N_FEATURES))


class Orthogonal(TwoLayers):
    def second(self):
        return parametrizations.orthogonal(linear(5, N_FEATURES))


class NormedByHooks(TwoLayers):
    def first(self):
        return nn.utils.spectral_norm(linear(18, 5))

    def second(self):
        return nn.utils.weight_norm(linear(5, N_FEATURES))


class Pruned(TwoLayers):
    def second(self):
        return prune.random_unstructured(linear(5, N_FEATURES), "weight", 0.5)


class Gain(nn.Linear):
    """A subclass with a parameter and a forward of its own."""

    def __init__(self):
        super().__init__(5, N_FEATURES)
        self.gain = nn.Parameter(th.ones(N_FEATURES))

    def forward(self, x, scale=1.0):
        return super().forward(x) * self.gain * scale


class Subclass(TwoLayers):
    second = Gain

    def features(self, objects):
        return self.b(th.tanh(self.a(input=objects.flatten(1))), scale=2.0)


class Patched(TwoLayers):
    def second(self):
        layer = linear(5, N_FEATURES)
        layer.forward = lambda x: nn.functional.linear(x.square(), layer.weight, layer.bias)
        return layer


class HookThatChanges(TwoLayers):
    def first(self):
        layer = linear(18, 5)
        layer.register_forward_hook(lambda module, inputs, output: 2.0 * output)
        return layer


class WithoutGraphAsWell(TwoLayers):
    def features(self, objects):
        with th.no_grad():
            shift = self.a(th.ones(18))
            self.b(shift)
        return self.b(th.tanh(self.a(objects.flatten(1)) - shift))


class InPlace(TwoLayers):
    between = nn.ELU(inplace=True)


class Autocast(TwoLayers):
    def features(self, objects):
        with th.autocast("cpu", dtype=th.bfloat16):
            return super().features(objects).float()


class MixedPrecision(TwoLayers):
    """A float64 layer in a float32 policy."""

    def build(self):
        super().build()
        self.a.double()

    def features(self, objects):
        return self.b(th.tanh(self.a(objects.flatten(1).double())).float())


class HalfPrecision(MixedPrecision):
    def build(self):
        TwoLayers.build(self)
        self.a.bfloat16()

    def features(self, objects):
        return self.b(th.tanh(self.a(objects.flatten(1).bfloat16())).float())


class HardSigmoid(TwoLayers):
    between = nn.Hardsigmoid()


class OnceTanh(th.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (1.0 - ctx.saved_tensors[0].square())


class NumpyTanh(th.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return th.as_tensor(gradient.detach().numpy() * (1.0 - ctx.saved_tensors[0].numpy() ** 2))


class DifferentiableOnce(TwoLayers):
    between = OnceTanh.apply


class BackwardInNumpy(TwoLayers):
    between = NumpyTanh.apply


class SkipAroundNumpy(TwoLayers):
    """The part of the graph that is left looks like a derivative."""

    @staticmethod
    def between(x):
        return x + NumpyTanh.apply(x)


class Other(TwoLayers):
    """Parameters of many other kinds."""

    def build(self):
        self.a, self.norm, self.one = nn.GRU(3, 6, batch_first=True), nn.GroupNorm(2, 6), nn.Conv1d(6, N_FEATURES, 1)

    def features(self, objects):
        return self.one(self.norm(self.a(objects)[0].transpose(1, 2))).mean(dim=2)


EXTRACTORS = [
    ObjectsInTheBatch, FramesInTheBatch, SequenceFirst, Table, OneByOne, Vmapped, Transformer, Attention, TwoLayers,
    Parametrized, Orthogonal, NormedByHooks, Pruned, Subclass, Patched, HookThatChanges, WithoutGraphAsWell, InPlace,
    Autocast, MixedPrecision, HalfPrecision, HardSigmoid, DifferentiableOnce, BackwardInNumpy, SkipAroundNumpy, Other,
]  # fmt: skip
#: Products by finite differences; the others are exact.
NOT_TWICE = (HardSigmoid, DifferentiableOnce, BackwardInNumpy, SkipAroundNumpy)
LOW_PRECISION = (Autocast, HalfPrecision)


def build(extractor):
    """A policy, θ, and a surrogate that records."""
    th.manual_seed(0)
    policy = ActorCriticPolicy(
        VECTOR, spaces.Discrete(3), lambda _: 1e-3, net_arch=[], features_extractor_class=extractor, ortho_init=False
    )
    policy.set_training_mode(False)
    inputs = th.randn(N_STATES, *VECTOR.shape)
    with th.no_grad():
        actions = policy.get_distribution(inputs).sample()
    weights = th.full((N_STATES,), 1.0 / N_STATES)
    batch = RolloutBatch(inputs, actions, th.randn(N_STATES), th.randn(N_STATES), weights)
    actor = actor_parameters(policy, policy.get_distribution, inputs[:1])
    layers = kfac_layers(policy, actor)
    return policy, actor, partial(Surrogate, policy_model(policy.get_distribution, actor, layers), batch)


def exact_product(policy, actor, inputs, v):
    """E[Jᵀ M J v] of a categorical policy, with J state by state and logit by logit from single backward passes."""
    distribution = policy.get_distribution(inputs).distribution
    total = th.zeros_like(v)
    for logits, probs in zip(distribution.logits, distribution.probs.detach(), strict=True):
        J = th.stack([flatten(th.autograd.grad(z, actor, retain_graph=True, materialize_grads=True)) for z in logits])
        Jv = J.to(v.dtype) @ v
        total += J.to(v.dtype).T @ (probs * (Jv - probs @ Jv.float())).to(v.dtype) / len(inputs)
    return total


@pytest.mark.filterwarnings("ignore:the policy or value network cannot be differentiated twice")
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_fisher_product_of_any_module_is_that_of_single_backward_passes(extractor, chunk_size):
    policy, actor, surrogate = build(extractor)
    v = th.randn_like(flatten(actor)).detach()
    product = FisherOperator(surrogate(chunk_size), 0.0)(v)
    expected = exact_product(policy, actor, surrogate().batch.inputs, v)
    tolerance = 0.05 if extractor in LOW_PRECISION else 5e-3 if extractor in NOT_TWICE else 1e-4
    assert float((product - expected).norm()) < tolerance * float(expected.norm())


@pytest.mark.filterwarnings("ignore:the policy or value network cannot be differentiated twice")
@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_preconditioner_of_any_module_is_positive_definite_and_helps(extractor):
    _, actor, surrogate = build(extractor)
    objective = surrogate()
    M = KFACPreconditioner(objective, 0.1)
    matrix = th.stack([M(v) for v in th.eye(len(flatten(actor)))]).double()
    assert float(th.linalg.eigvalsh((matrix + matrix.T) / 2)[0]) > 0.0
    solve = partial(conjugate_gradient, FisherOperator(objective, 0.1), objective.gradient(), max_iter=30)
    tolerance = 0.05 if extractor in LOW_PRECISION else 1e-2
    preconditioned, plain = solve(M=M, rtol=tolerance), solve(rtol=1e-4)
    assert preconditioned.status is CGStatus.CONVERGED
    assert preconditioned.curvature == pytest.approx(plain.curvature, rel=tolerance)  # gᵀs


FACTORED = {
    ObjectsInTheBatch: {"phi", "rho"}, SequenceFirst: {"phi"}, Table: {"keys", "out"},
    Vmapped: set(), Transformer: {"embed", "encoder.layers.0.linear1", "encoder.layers.0.linear2"},
    Parametrized: set(), Orthogonal: {"a"}, NormedByHooks: set(), Pruned: {"a"}, Subclass: {"a"}, Patched: {"a"},
    WithoutGraphAsWell: {"a", "b"}, MixedPrecision: {"a", "b"},
}  # fmt: skip


@pytest.mark.parametrize("extractor", FACTORED)
def test_layer_that_does_not_fit_leaves_the_others_their_factors(extractor):
    policy, _, surrogate = build(extractor)
    M = KFACPreconditioner(surrogate(), 0.1)
    names = {name: layer for name, layer in policy.named_modules() if layer in M._positions}
    prefix = "features_extractor."
    assert {name.removeprefix(prefix) for name in names} == FACTORED[extractor] | {"action_net"}


@pytest.mark.parametrize("extractor", NOT_TWICE)
def test_operation_without_second_derivative_is_named_once(extractor):
    _, actor, surrogate = build(extractor)
    objective = surrogate(5)
    fisher = FisherOperator(objective, 0.0)
    v = th.randn_like(flatten(actor)).detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fisher(v), fisher(v)
    (message,) = [str(warning.message) for warning in caught]
    assert ("hardsigmoid" in message) == (extractor is HardSigmoid)
    assert "finite differences" in message


@pytest.mark.parametrize("extractor", [Other, BackwardInNumpy])
def test_products_that_are_not_finite_say_nothing_about_derivatives(extractor):
    _, actor, surrogate = build(extractor)
    objective = surrogate(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FisherOperator(objective, 0.0)(th.full_like(flatten(actor), 1e38))
    assert objective.is_twice_differentiable is None


@pytest.mark.parametrize("extractor", [HardSigmoid, BackwardInNumpy])
def test_differences_leave_parameters_and_graphs_as_they_were(extractor):
    policy, actor, surrogate = build(extractor)
    before = copy.deepcopy(policy.state_dict())
    objective = surrogate()
    with pytest.warns(UserWarning, match="cannot be differentiated twice"):
        FisherOperator(objective, 0.0)(th.ones_like(flatten(actor)))
    objective.gradient()
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_features_in_one_factor_are_weighted_as_one_by_one():
    """Objects folded into the batch have the factors that the same objects have as positions of their states."""
    _, actor, surrogate = build(ObjectsInTheBatch)
    folded = KFACPreconditioner(surrogate(), 0.1)

    class AsPositions(ObjectsInTheBatch):
        def features(self, objects):
            return self.rho(th.tanh(self.phi(objects)).mean(dim=1))

    _, _, other = build(AsPositions)
    positions = KFACPreconditioner(other(), 0.1)
    v = th.randn_like(flatten(actor)).detach()
    th.testing.assert_close(folded(v), positions(v), atol=1e-6, rtol=1e-4)


# Scales.


@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.1])
@pytest.mark.parametrize("n_states", [8, 600])
@pytest.mark.parametrize("n_features", [300])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6, 1e12])
def test_factors_of_any_scale_and_rank_have_positive_inverses(scale, n_features, n_states, damping):
    rows = scale * (1.0 + th.rand(n_states, n_features, generator=th.Generator().manual_seed(0)))
    A = rows.T @ rows / n_states
    inverses = damped_inverses(Factors(A, 1e-3 * th.eye(2)), damping)
    v = rows[0] / rows[0].norm()
    assert all_finite(inverses)
    assert float(v @ inverses.A @ v) > 0.0
    assert bool((inverses.A.diagonal() > 0.0).all())


def test_factor_that_no_shift_helps_gives_way_to_its_diagonal():
    indefinite = th.tensor([[1.0, 30.0], [30.0, 1.0]])
    inverse = damped_inverses(Factors(indefinite, th.eye(2)), 0.1).A
    assert th.equal(inverse, th.diag(inverse.diagonal()))
    assert bool((inverse.diagonal() > 0.0).all())


@pytest.mark.parametrize("damping", [0.0, 1e-30])
def test_damping_near_zero_is_raised_to_what_rounding_asks_for(damping):
    _, _actor, surrogate = build(TwoLayers)
    objective = surrogate()
    gradient = objective.gradient()
    fisher = FisherOperator(objective, damping)
    size = float(gradient.dot(fisher(gradient)) / gradient.dot(gradient))
    fisher.keep_definite(gradient)
    assert fisher.damping == pytest.approx(math.sqrt(th.finfo(th.float32).eps) * size, rel=1e-3)


def test_usual_damping_is_left_alone():
    _, actor, surrogate = build(TwoLayers)
    fisher = FisherOperator(surrogate(), 1e-4)
    fisher.keep_definite(th.ones_like(flatten(actor)))
    assert fisher.damping == 1e-4


@pytest.mark.parametrize("extractor", [extractor for extractor in EXTRACTORS if extractor not in NOT_TWICE])
def test_modules_with_second_derivatives_need_no_differences(extractor):
    _, actor, surrogate = build(extractor)
    objective = surrogate()
    FisherOperator(objective, 0.0)(th.ones_like(flatten(actor)))
    assert objective.is_twice_differentiable
