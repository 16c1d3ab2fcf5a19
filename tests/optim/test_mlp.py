"""The layer-wise products against `torch.func`, dense matrices, and the general path; and who may take the fast path."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from support.models import policy_model
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_trpo.adapters.models import actor_mlp, actor_parameters, critic_mlp, critic_parameters
from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.fisher import FisherOperator, GGNProduct, layerwise_fisher_product
from sb3_trpo.optim.kfac import kfac_layers
from sb3_trpo.optim.mlp import ELEMENTWISE, MLP, MLPJacobian, as_mlp, recorded_calls
from sb3_trpo.optim.objective import Model, ModelOutput, Surrogate
from sb3_trpo.optim.parameters import flatten, unflatten

N_STATES, N_INPUTS = 7, 3
VECTOR = spaces.Box(-np.inf, np.inf, (N_INPUTS,))
BOX = spaces.Box(-1.0, 1.0, (2,))
ACTIVATIONS = {module.__name__: module for module in ELEMENTWISE}
HIDDEN = {"linear": [], "one_hidden": [5], "two_hidden": [5, 4], "three_hidden": [4, 4, 4]}


def network(hidden, n_outputs, activation=nn.Tanh):
    th.manual_seed(0)
    sizes = [N_INPUTS, *hidden, n_outputs]
    modules = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), activation())]
    return nn.Sequential(*modules[:-1]).double()


def recorded(net):
    """The network's chain, a batch, and the calls and output of a forward pass."""
    layers = as_mlp(list(net))
    x = th.randn(N_STATES, N_INPUTS, dtype=th.float64)
    with recorded_calls(layers.layers) as calls:
        output = net(x)
    return layers, x, calls, output


def as_function(net, x) -> Callable[..., th.Tensor]:
    """θ ↦ the outputs, for `torch.func`."""
    names = [name for name, _ in net.named_parameters()]
    return lambda *theta: th.func.functional_call(net, dict(zip(names, theta, strict=True)), (x,))


def constants(net):
    return tuple(parameter.detach() for parameter in net.parameters())


def assert_same(actual, expected):
    th.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_push_is_the_jacobian_vector_product(hidden, activation):
    net = network(hidden, 2, activation)
    layers, x, calls, _ = recorded(net)
    tangents = tuple(th.randn_like(parameter) for parameter in constants(net))
    _, expected = th.func.jvp(as_function(net, x), constants(net), tangents)
    assert_same(MLPJacobian(calls, layers.activations).jvp(tangents), expected)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_pull_is_the_vector_jacobian_product(hidden, activation):
    net = network(hidden, 2, activation)
    layers, x, calls, _ = recorded(net)
    cotangent = th.randn(N_STATES, 2, dtype=th.float64)
    _, pull = th.func.vjp(as_function(net, x), *constants(net))
    pulled = MLPJacobian(calls, layers.activations).vjp(cotangent)
    assert len(pulled) == len(constants(net))
    for actual, expected in zip(pulled, pull(cotangent), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_push_and_pull_change_neither_their_arguments_nor_what_is_recorded(activation):
    net = network([5, 4], 2, activation)
    layers, _, calls, output = recorded(net)
    jacobian = MLPJacobian(calls, layers.activations)
    tangents = [th.randn_like(parameter) for parameter in constants(net)]
    cotangent = th.randn(N_STATES, 2, dtype=th.float64)
    kept = [tensor.detach().clone() for tensor in (*tangents, cotangent, output, *[call.input for call in calls])]
    first = (jacobian.jvp(tangents), jacobian.vjp(cotangent))
    second = (jacobian.jvp(tangents), jacobian.vjp(cotangent))
    assert th.equal(first[0], second[0])
    assert all(th.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    now = (*tangents, cotangent, output, *[call.input for call in calls])
    assert all(th.equal(a, b) for a, b in zip(now, kept, strict=True))


def normal(output):
    log_std = nn.Parameter(th.tensor([-0.3, 0.2], dtype=th.float64))
    return (Normal(output, log_std.exp().expand_as(output)),), [log_std]


def normal_of_fixed_width(output):
    return (Normal(output, th.full_like(output, 0.7)),), []


def categorical(output):
    return (Categorical(logits=output),), []


def bernoulli(output):
    return (Bernoulli(logits=output),), []


def two_categoricals(output):
    return tuple(Categorical(logits=part) for part in output.split([2, 3], dim=1)), []


#: Name of a family ↦ number of outputs, how it is made from them.
FAMILIES = {
    "normal": (2, normal),
    "normal_of_fixed_width": (2, normal_of_fixed_width),
    "categorical": (3, categorical),
    "bernoulli": (3, bernoulli),
    "two_categoricals": (5, two_categoricals),
}


def ggn_product(parts, weights, actor):
    """The general path, with nothing around it."""
    objective = SimpleNamespace(is_twice_differentiable=None, model=SimpleNamespace(parameters=actor))
    return GGNProduct(objective, SimpleNamespace(weights=weights), SimpleNamespace(components=parts))


def fast_product(parts, calls, weights, actor, mlp):
    """The fast path, likewise; None if it does not serve."""
    return layerwise_fisher_product(Model(None, actor, mlp=mlp), ModelOutput(parts, weights, weights, calls), weights)


def dense_metric(parts, state):
    """M of one state in the outputs, written out by hand; for a Gaussian, of its mean alone."""
    blocks = []
    for part in parts:
        if isinstance(part, Normal):
            blocks.append(th.diag(part.scale[state] ** -2.0))
        elif isinstance(part, Categorical):
            p = part.probs[state]
            blocks.append(th.diag(p) - th.outer(p, p))
        else:
            p = part.probs[state]
            blocks.append(th.diag(p * (1.0 - p)))
    return th.block_diag(*blocks).detach()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_the_dense_matrix(family, hidden, activation):
    """Σ_s w_s Jᵀ M J, with J from `torch.func.jacrev` and M by hand; 2I for log σ. Both ways to multiply agree with it."""
    n_outputs, make = FAMILIES[family]
    net = network(hidden, n_outputs, activation)
    layers, x, calls, output = recorded(net)
    parts, rest = make(output)
    weights = th.rand(N_STATES, dtype=th.float64)

    blocks = th.func.jacrev(as_function(net, x), argnums=tuple(range(len(constants(net)))))(*constants(net))
    jacobian = th.cat([block.flatten(start_dim=2) for block in blocks], dim=2)
    expected = sum(w * J.T @ dense_metric(parts, s) @ J for s, (w, J) in enumerate(zip(weights, jacobian, strict=True)))
    if rest:
        expected = th.block_diag(expected, 2.0 * weights.sum() * th.eye(2, dtype=th.float64))

    actor = [*net.parameters(), *rest]
    fast = fast_product(parts, calls, weights, actor, layers)
    assert fast is not None
    for product in (fast, ggn_product(parts, weights, actor)):
        matrix = th.stack([product(v) for v in th.eye(len(expected), dtype=th.float64)], dim=1)
        th.testing.assert_close(matrix, expected, atol=1e-12, rtol=1e-10)


def test_order_of_the_parameters_is_the_actors():
    """SB3 puts log_std first; θ may be in any order."""
    net = network([4], 2)
    layers, _, calls, output = recorded(net)
    parts, rest = normal(output)
    weights = th.rand(N_STATES, dtype=th.float64)
    for actor in ([*rest, *net.parameters()], [*reversed(list(net.parameters())), *rest]):
        v = th.randn_like(flatten(actor)).detach()
        fast = fast_product(parts, calls, weights, actor, layers)
        assert_same(fast(v), ggn_product(parts, weights, actor)(v))


def test_products_leave_no_graph_and_no_gradients():
    net = network([4], 2)
    layers, _, calls, _ = recorded(net)
    jacobian = MLPJacobian(calls, layers.activations)
    assert not jacobian.jvp(constants(net)).requires_grad
    assert not any(part.requires_grad for part in jacobian.vjp(th.ones(N_STATES, 2, dtype=th.float64)))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_chain_of_alternating_modules(activation):
    net = network([5, 4], 2, activation)
    read = as_mlp(list(net))
    assert read == MLP([net[0], net[2], net[4]], [net[1], net[3]])
    assert all(p is q for p, q in zip(read.parameters, net.parameters(), strict=True))


def test_one_layer_is_a_chain():
    layer = nn.Linear(3, 2)
    assert as_mlp([layer]) == MLP([layer], [])


class OwnLinear(nn.Linear):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) ** 2


class OwnTanh(nn.Tanh):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward(x)


NOT_CHAINS = {
    "nothing": [],
    "activation_at_the_end": [nn.Linear(3, 3), nn.Tanh()],
    "activation_at_the_start": [nn.Tanh(), nn.Linear(3, 3)],
    "two_layers_in_a_row": [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)],
    "two_activations_in_a_row": [nn.Linear(3, 3), nn.Tanh(), nn.ReLU(), nn.Linear(3, 3)],
    "no_bias": [nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)],
    "no_bias_at_the_end": [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)],
    "layer_norm": [nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)],
    "softmax": [nn.Linear(3, 3), nn.Softmax(dim=1), nn.Linear(3, 3)],
    "learned_activation": [nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 3)],
    "dropout": [nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)],
    "in_place": [nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)],
    "bilinear": [nn.Bilinear(3, 3, 3)],
    "own_linear": [OwnLinear(3, 3)],
    "own_activation": [nn.Linear(3, 3), OwnTanh(), nn.Linear(3, 3)],
    "parametrised": [nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))],
}


@pytest.mark.parametrize("modules", NOT_CHAINS.values(), ids=NOT_CHAINS)
def test_anything_else_is_no_chain(modules):
    assert as_mlp(modules) is None


ACTION_SPACES = {
    "box": BOX,
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}


def build(policy_class=ActorCriticPolicy, action_space=BOX, observation_space=VECTOR, **kwargs):
    th.manual_seed(0)
    return policy_class(observation_space, action_space, lambda _: 1e-3, **kwargs)


@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_standard_policies_have_both_chains(action_space):
    policy = build(action_space=action_space, net_arch={"pi": [4, 4], "vf": [5]})
    pi, vf = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
    assert actor_mlp(policy).layers == [pi[0], pi[2], policy.action_net]
    assert critic_mlp(policy).layers == [vf[0], policy.value_net]


OBSERVATION_SPACES = {
    "vector": VECTOR,
    "matrix": spaces.Box(-1.0, 1.0, (2, 3)),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(4),
}


@pytest.mark.parametrize("net_arch", [[], [6], {"pi": [6, 5], "vf": [4]}], ids=["linear", "shared_widths", "own_widths"])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
@pytest.mark.parametrize("observation_space", OBSERVATION_SPACES.values(), ids=OBSERVATION_SPACES)
def test_chains_of_real_policies_multiply_as_the_general_path(observation_space, action_space, net_arch):
    policy = build(action_space=action_space, observation_space=observation_space, net_arch=net_arch)
    observation_space.seed(0)
    inputs = th.as_tensor(np.stack([observation_space.sample() for _ in range(9)]))
    with th.no_grad():
        actions = policy.get_distribution(inputs).sample()
    rollout = RolloutBatch(inputs, actions, th.randn(9), th.randn(9), th.full((9,), 1 / 9))
    actor = actor_parameters(policy, policy.get_distribution, inputs)
    surrogate, general = (
        Surrogate(policy_model(policy.get_distribution, actor, kfac_layers(policy, actor), mlp), rollout)
        for mlp in (actor_mlp(policy), None)
    )
    ((chunk, _, new),) = surrogate.linearized()
    assert layerwise_fisher_product(surrogate.model, new, chunk.weights) is not None
    v = th.randn_like(flatten(actor)).detach()
    th.testing.assert_close(FisherOperator(surrogate, 0.1)(v), FisherOperator(general, 0.1)(v), atol=1e-5, rtol=1e-4)

    critic = critic_parameters(policy, lambda i: policy.predict_values(i).flatten(), inputs, actor)
    assert {id(p) for p in critic_mlp(policy).parameters} == {id(p) for p in critic}


class OwnExtractor(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward(observations)


class OwnMlpExtractor(MlpExtractor):
    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward_actor(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward_critic(features)


class WithOwnMlpExtractor(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OwnMlpExtractor(self.features_dim, self.net_arch, self.activation_fn, self.device)


class WithOwnFeatures(ActorCriticPolicy):
    def extract_features(self, obs, features_extractor=None):
        return 2.0 * super().extract_features(obs, features_extractor)


class WithOwnActions(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi):
        return super()._get_action_dist_from_latent(2.0 * latent_pi)


class WithOwnDistribution(ActorCriticPolicy):
    def get_distribution(self, obs):
        return super().get_distribution(2.0 * obs)


class WithOwnValues(ActorCriticPolicy):
    def predict_values(self, obs):
        return 2.0 * super().predict_values(obs)


class WithOwnHeads(ActorCriticPolicy):
    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Sequential(self.action_net, nn.Tanh())
        self.value_net = nn.Sequential(self.value_net, nn.Tanh())


class WithoutBiases(ActorCriticPolicy):
    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Linear(self.action_net.in_features, 2, bias=False)
        self.value_net = nn.Linear(self.value_net.in_features, 1, bias=False)


IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(2)})

#: Name of a policy ↦ arguments of `build`, whether it has the actor's chain, whether it has the critic's.
OTHERS = {
    "gsde": ({"use_sde": True}, False, True),
    "cnn": ({"policy_class": ActorCriticCnnPolicy, "observation_space": IMAGE}, False, False),
    "dict": ({"policy_class": MultiInputActorCriticPolicy, "observation_space": DICT}, False, False),
    "own_extractor": ({"features_extractor_class": OwnExtractor}, False, False),
    "own_mlp_extractor": ({"policy_class": WithOwnMlpExtractor}, False, False),
    "own_features": ({"policy_class": WithOwnFeatures}, False, False),
    "own_actions": ({"policy_class": WithOwnActions}, False, True),
    "own_distribution": ({"policy_class": WithOwnDistribution}, False, True),
    "own_values": ({"policy_class": WithOwnValues}, True, False),
    "own_heads": ({"policy_class": WithOwnHeads}, False, False),
    "no_biases": ({"policy_class": WithoutBiases}, False, False),
    "other_activation": ({"activation_fn": nn.PReLU}, False, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_policies_take_the_general_path(name):
    kwargs, has_actor, has_critic = OTHERS[name]
    policy = build(**kwargs)
    assert (actor_mlp(policy) is not None) == has_actor
    assert (critic_mlp(policy) is not None) == has_critic


def test_no_policy_of_sb3s_has_no_chain():
    assert actor_mlp(nn.Linear(2, 2)) is None
    assert critic_mlp(nn.Linear(2, 2)) is None


def test_frozen_parameters_take_the_general_path():
    """The chain is there, but θ is not all of it."""
    net = network([4], 2)
    net[0].bias.requires_grad_(False)
    layers, _, calls, output = recorded(net)
    parts, rest = normal(output)
    actor = [p for p in [*net.parameters(), *rest] if p.requires_grad]
    zeros = th.zeros(N_STATES, dtype=th.float64)
    assert fast_product(parts, calls, zeros + 1.0, actor, layers) is None


@pytest.mark.parametrize("tie", ["weights", "layers"])
def test_tied_weights_are_multiplied_right(tie):
    """Whichever path they take: a parameter of two layers gets what both give it."""
    net = network([4, 4, 4], 2)
    if tie == "weights":
        net[4].weight = net[2].weight
    else:
        net[4] = net[2]
    layers, x = as_mlp(list(net)), th.randn(N_STATES, N_INPUTS, dtype=th.float64)
    distinct = list(dict.fromkeys(layers.layers))
    with recorded_calls(distinct) as calls:
        output = net(x)
    parts, _ = normal_of_fixed_width(output)
    zeros = th.zeros(N_STATES, dtype=th.float64)
    actor = list(net.parameters())
    fast = fast_product(parts, calls, zeros + 1.0, actor, layers)
    v = th.randn_like(flatten(actor)).detach()
    assert fast is None or th.allclose(fast(v), ggn_product(parts, zeros + 1.0, actor)(v))


def test_views_of_the_vector_are_not_written_to():
    net = network([4], 2)
    layers, _, calls, output = recorded(net)
    parts, rest = normal(output)
    actor = [*net.parameters(), *rest]
    zeros = th.zeros(N_STATES, dtype=th.float64)
    v = th.randn_like(flatten(actor)).detach()
    kept = v.clone()
    fast_product(parts, calls, zeros + 1.0, actor, layers)(v)
    assert th.equal(v, kept)
    assert th.equal(flatten(unflatten(v, actor)), kept)
