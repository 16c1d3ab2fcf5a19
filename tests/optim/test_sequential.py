"""Products of sequential networks against `torch.func`, a dense Jacobian and autograd; and who may take the fast path."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from support.models import policy_model
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F
from torch.nn.utils import prune

from sb3_trpo.adapters.models import actor_model, actor_sequential, critic_model, critic_sequential
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.fisher import GGNProduct, fisher_product, layerwise_fisher_product
from sb3_trpo.optim.mlp import recorded_calls
from sb3_trpo.optim.objective import RolloutObjective
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.optim.sequential import MODULES, SequentialJacobian, are_sequential, as_sequential

N = 3
IMAGE = spaces.Box(0, 255, (2, 36, 36), np.uint8)

#: Networks of 2 × 9 × 9 images with two outputs.
NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions": lambda: [nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)],
    "padding": lambda: [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ELU(),
        nn.Conv2d(3, 1, (9, 8), padding=(0, 1)),
        nn.Flatten(),
        final(4),
    ],
    "groups": lambda: [nn.Conv2d(2, 4, 4, 3, groups=2), nn.SiLU(), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), final(4)],
    "dilation": lambda: [nn.Conv2d(2, 3, 3, dilation=(2, 3)), nn.GELU(), nn.Flatten(), nn.Linear(45, 2)],
    "no_bias": lambda: [nn.Conv2d(2, 3, 3, 3, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(27, 2, bias=False)],
    "max_pool": lambda: [nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, 2, padding=1), nn.Flatten(), nn.Tanh(), nn.Linear(48, 2)],
    "max_pool_odd": lambda: [nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, ceil_mode=True), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)],
    "average_pool": lambda: [nn.Conv2d(2, 3, 2), nn.AvgPool2d(3, 2, 1), nn.Tanh(), nn.Conv2d(3, 1, 3), nn.Flatten(), final(4)],
    "adaptive_pool": lambda: [nn.Conv2d(2, 3, 2), nn.Softplus(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 2)],
    "one_layer": lambda: [nn.Flatten(), nn.Linear(162, 2)],
    "identity": lambda: [nn.Conv2d(2, 1, 9), nn.Identity(), nn.LeakyReLU(), nn.Flatten(), final(1)],
}


def final(n_inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_inputs, 5), nn.Tanh(), nn.Linear(5, 2))


def network(name: str) -> nn.Sequential:
    th.manual_seed(0)
    return nn.Sequential(*NETWORKS[name]()).double()


def recorded(net, x):
    modules = [part for part in net.modules() if type(part) in MODULES]
    with recorded_calls(modules) as calls:
        output = net(x)
    return calls, output


def images(n=N):
    return th.randn(n, 2, 9, 9, dtype=th.float64)


def output_of(net):
    return [part for part in net.modules() if isinstance(part, nn.Linear)][-1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [th.contiguous_format, th.channels_last])
def test_products_are_those_of_torch_func(name, layout):
    net = network(name)
    x = images().contiguous(memory_format=layout)
    calls, _ = recorded(net, x)
    assert are_sequential(calls, output_of(net))
    jacobian = SequentialJacobian(calls)
    names = [name for name, _ in net.named_parameters()]
    theta = tuple(parameter.detach() for parameter in net.parameters())
    assert all(a is b for a, b in zip(jacobian.parameters, net.parameters(), strict=True))

    def function(*values):
        return th.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    tangents = tuple(th.randn_like(parameter) for parameter in theta)
    cotangent = th.randn(N, 2, dtype=th.float64)
    kept = [tensor.clone() for tensor in (*tangents, cotangent)]
    for _ in range(2):  # nothing recorded changes on the way
        close(jacobian.jvp(tangents), th.func.jvp(function, theta, tangents)[1])
        for actual, expected in zip(jacobian.vjp(cotangent), th.func.vjp(function, *theta)[1](cotangent), strict=True):
            close(actual, expected)
    assert all(th.equal(a, b) for a, b in zip((*tangents, cotangent), kept, strict=True))


def close(actual, expected):
    th.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["convolutions", "padding", "max_pool"])
@pytest.mark.parametrize("family", ["categorical", "normal"])
def test_fisher_product_is_that_of_the_dense_jacobian_and_of_differentiating_twice(name, family):
    net, x = network(name), images(5)
    log_std = nn.Parameter(th.tensor([-0.3, 0.2], dtype=th.float64))
    theta = [*net.parameters(), *([log_std] if family == "normal" else [])]

    class Policy:
        def __init__(self, z):
            self.distribution = Normal(z, log_std.exp().expand_as(z)) if family == "normal" else Categorical(logits=z)

        def log_prob(self, actions):
            found = self.distribution.log_prob(actions)
            return found.sum(dim=1) if found.ndim > 1 else found

        def entropy(self):
            return None

    weights = th.rand(5, dtype=th.float64)
    actions = th.randn(5, 2, dtype=th.float64) if family == "normal" else th.randint(2, (5,))
    model = policy_model(lambda inputs: Policy(net(inputs)), theta)
    model = replace(model, sequential=as_sequential(net, output_of(net), channels_last=False))
    objective = RolloutObjective(model, RolloutBatch(x, actions, weights, weights, weights))
    ((chunk, old, new),) = objective.linearized()
    fast = layerwise_fisher_product(model, new, weights)
    assert fast is not None
    assert fisher_product(objective, chunk, old, new).__qualname__ == fast.__qualname__
    v = th.randn(sum(parameter.numel() for parameter in theta), dtype=th.float64)
    close(fast(v), GGNProduct(objective, chunk, new)(v))

    jacobian = dense_jacobian(new, theta)  # (state, output, parameter)
    part = new.components[0]
    if family == "normal":
        metric = th.diag_embed(part.scale.detach() ** -2)
    else:
        metric = th.diag_embed(part.probs.detach()) - part.probs.detach().unsqueeze(2) * part.probs.detach().unsqueeze(1)
    expected = th.einsum("sap,sab,sbq,q,s->p", jacobian, metric, jacobian, v, weights)
    if family == "normal":
        expected[-2:] = 2.0 * weights.sum() * v[-2:]
    close(fast(v), expected)


def dense_jacobian(new, theta):
    z = new.components[0].loc if isinstance(new.components[0], Normal) else new.components[0].logits
    rows = [
        flatten(th.autograd.grad(number, theta, retain_graph=True, materialize_grads=True)) for state in z for number in state
    ]
    return th.stack(rows).view(len(z), 2, -1)


# ---- who may take it


class Functional(nn.Module):
    """Something between two layers that no module does."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 3), nn.Linear(3, 2), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class HalfGradient(th.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, u):
        return 0.5 * u


BETWEEN = {
    "relu": F.relu,
    "relu_in_place": F.relu_,
    "in_place": lambda x: x.mul_(2.0),
    "gradient": HalfGradient.apply,
    "detach": lambda x: x.detach(),
    "residual": lambda x: x + 0.1,
    "first_half": lambda x: x.flip(0),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_an_operation_between_the_modules_is_noticed(between):
    net = Functional(between)
    assert not are_sequential(recorded(net, th.randn(N, 4))[0], net.second)


def test_no_operation_between_the_modules_is_noticed():
    net = Functional(lambda x: x)
    calls, _ = recorded(net, th.randn(N, 4))
    assert are_sequential(calls, net.second)
    assert not are_sequential(calls, net.first)
    assert not are_sequential(calls[1:], net.second)  # its input depends on parameters
    assert not are_sequential([], net.second)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Conv2d(2, 3, 3, padding="same"), nn.Flatten(), nn.Linear(243, 2)],
        [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(243, 2)],
        [nn.Conv2d(2, 3, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2)],
        [nn.Conv2d(2, 3, 3, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(27, 2)],
        [nn.Conv2d(2, 3, 3, 3), nn.PReLU(), nn.Flatten(), nn.Linear(27, 2)],
        [nn.Linear(9, 1), nn.Flatten(), nn.Linear(18, 2)],
    ],
    ids=lambda modules: type(modules[1]).__name__,
)
def test_modules_without_products_are_left_to_autograd(modules):
    net = nn.Sequential(*modules).double()
    assert not are_sequential(recorded(net, images())[0], output_of(net))


class OwnChain(BaseFeaturesExtractor):
    """As a user writes it: `nn.Sequential` and nothing else."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 6)
        self.net = nn.Sequential(nn.Conv2d(2, 3, 8, 7), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


class OwnResidual(OwnChain):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations) + 1.0


def make_policy(extractor, **kwargs):
    th.manual_seed(1)
    options = {"features_extractor_kwargs": {"features_dim": 6}} if extractor is NatureCNN else {}
    return ActorCriticCnnPolicy(
        IMAGE, spaces.Discrete(3), lambda _: 1e-3, features_extractor_class=extractor, share_features_extractor=False,
        **options, **kwargs,
    )  # fmt: skip


def models(policy):
    x = th.randint(256, (4, 2, 36, 36), dtype=th.uint8)
    weights = th.full((4,), 0.25)
    batch = RolloutBatch(x, th.randint(3, (4,)), weights, weights, weights)
    actor = actor_model(policy, policy.get_distribution, x[:1])
    critic = [p for name, p in policy.named_parameters() if name.startswith(("vf_", "value_", "mlp_extractor.value"))]
    return batch, actor, critic_model(policy, lambda inputs: policy.predict_values(inputs).flatten(), critic)


@pytest.mark.parametrize("net_arch", [[], [5]])
@pytest.mark.parametrize("extractor", [NatureCNN, OwnChain])
def test_actor_and_critic_with_images_take_the_fast_path_and_equal_the_general_one(extractor, net_arch):
    policy = make_policy(extractor, net_arch=net_arch)
    batch, *both = models(policy)
    for model in both:
        objective = RolloutObjective(model, batch)
        ((chunk, _, new),) = objective.linearized()
        fast = layerwise_fisher_product(model, new, batch.weights)
        assert fast is not None
        v = th.randn(sum(parameter.numel() for parameter in model.parameters))
        expected = GGNProduct(objective, chunk, new)(v)
        th.testing.assert_close(fast(v), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_features_with_a_further_operation_take_the_general_path():
    batch, *both = models(make_policy(OwnResidual))
    for model in both:
        ((_, _, new),) = RolloutObjective(model, batch).linearized()
        assert layerwise_fisher_product(model, new, batch.weights) is None


@pytest.mark.parametrize("extractor", [NatureCNN, OwnChain])
def test_changed_policies_are_not_taken(extractor):
    def hook(policy):
        policy.pi_features_extractor.register_forward_hook(lambda *_: None)

    def patch(policy):
        policy.vf_features_extractor.forward = type(policy.vf_features_extractor).forward.__get__(policy.vf_features_extractor)

    def prune_layer(policy):
        layer = next(part for part in policy.pi_features_extractor.modules() if isinstance(part, nn.Linear))
        prune.l1_unstructured(layer, "weight", 0.5)

    for change in (hook, patch, prune_layer):
        policy = make_policy(extractor)
        assert actor_sequential(policy) is not None
        assert critic_sequential(policy) is not None
        change(policy)
        assert actor_sequential(policy) is None
        assert critic_sequential(policy) is None


def test_only_nature_cnn_is_given_other_strides():
    """A user's own extractor may call `view`."""
    assert actor_sequential(make_policy(NatureCNN)).channels_last
    assert not actor_sequential(make_policy(OwnChain)).channels_last
