"""Acting with an LSTM policy in NumPy against the policy's own ``forward``."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from torch import nn

from sb3_trpo.rollouts.lstm_sampler import NumpyLstmNetworks, serves_lstm

N_ENVS = 4
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
BOX, DISCRETE = spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(3)

CASES: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "discrete": (DISCRETE, {}),
    "box": (BOX, {}),
    "gsde": (BOX, {"use_sde": True}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), {}),
    "multi_binary": (spaces.MultiBinary(2), {}),
    "relu": (BOX, {"activation_fn": nn.ReLU}),
    "two_layers": (DISCRETE, {"n_lstm_layers": 2}),
    "shared_lstm": (DISCRETE, {"shared_lstm": True, "enable_critic_lstm": False}),
    "no_critic_lstm": (BOX, {"enable_critic_lstm": False}),
    "no_bias": (BOX, {"lstm_kwargs": {"bias": False}}),
    "no_heads": (DISCRETE, {"net_arch": []}),
}


def make_policy(name: str, observation_space: spaces.Box = VECTOR, **changes: Any) -> RecurrentActorCriticPolicy:
    action_space, options = CASES[name]
    th.manual_seed(0)
    options = {"lstm_hidden_size": 5, "net_arch": [4], **options, **changes}
    policy = RecurrentActorCriticPolicy(observation_space, action_space, lambda _: 1e-3, **options)
    with th.no_grad():  # outputs that differ from state to state
        for parameter in policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    policy.set_training_mode(False)
    return policy


def random_states(policy: RecurrentActorCriticPolicy) -> RNNStates:
    lstm = policy.lstm_actor
    actor = tuple(th.randn(lstm.num_layers, N_ENVS, lstm.hidden_size) for _ in range(2))
    critic = tuple(th.randn_like(state) for state in actor)
    return RNNStates(actor, actor if policy.lstm_critic is None else critic)


@pytest.mark.parametrize("name", CASES)
def test_numpy_lstm_networks_follow_the_policy(name):
    """Actions, values, log-probabilities and states over several steps, episode starts among them, on the same noise."""
    policy = make_policy(name)
    assert serves_lstm(policy)
    if policy.use_sde:
        policy.reset_noise(N_ENVS)
    random = np.random.default_rng(0)
    networks = NumpyLstmNetworks(policy)
    expected_states = states = random_states(policy)
    for _ in range(6):
        observations = random.normal(size=(N_ENVS, 3)).astype(np.float32)
        starts = th.as_tensor(random.random(N_ENVS) < 0.3).float()
        generator = th.get_rng_state()
        with th.no_grad():
            *expected, expected_states = policy(th.as_tensor(observations), expected_states, starts)
        th.set_rng_state(generator)
        *found, states = networks(observations, states, starts)
        for actual, wanted in zip(
            [*found, *states.pi, *states.vf], [*expected, *expected_states.pi, *expected_states.vf], strict=True
        ):
            th.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


def test_numpy_lstm_networks_follow_large_inputs():
    policy = make_policy("box")
    observations, starts = np.full((N_ENVS, 3), 1e4, np.float32), th.zeros(N_ENVS)
    observations[1] *= -1.0
    states = random_states(policy)
    with th.no_grad():
        _, values, _, after = policy(th.as_tensor(observations), states, starts)
    _, found, _, found_after = NumpyLstmNetworks(policy)(observations, states, starts)
    th.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)
    th.testing.assert_close(found_after.pi, after.pi, atol=1e-5, rtol=1e-5)


class OwnDistribution(RecurrentActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return super()._get_action_dist_from_latent(2.0 * latent_pi)


def own_distribution(policy: RecurrentActorCriticPolicy) -> None:
    policy.__class__ = OwnDistribution


def patch_log_prob(policy: RecurrentActorCriticPolicy) -> None:
    usual = policy.action_dist.log_prob
    policy.action_dist.log_prob = lambda actions: usual(actions) - 1.0


def own_action_net(policy: RecurrentActorCriticPolicy) -> None:
    policy.action_net = nn.Sequential(policy.action_net, nn.Tanh())


@pytest.mark.parametrize("name", ["box", "discrete"])
@pytest.mark.parametrize("change", [own_distribution, patch_log_prob, own_action_net], ids=lambda change: change.__name__)
def test_numpy_lstm_networks_keep_a_users_distribution(name, change):
    policy = make_policy(name)
    change(policy)
    assert serves_lstm(policy)
    states, observations, starts = random_states(policy), np.ones((N_ENVS, 3), np.float32), th.zeros(N_ENVS)
    generator = th.get_rng_state()
    with th.no_grad():
        expected = policy(th.as_tensor(observations), states, starts)
    th.set_rng_state(generator)
    found = NumpyLstmNetworks(policy)(observations, states, starts)
    for actual, wanted in zip(found[:3], expected[:3], strict=True):
        th.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


class OwnForward(RecurrentActorCriticPolicy):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def hook(policy: RecurrentActorCriticPolicy) -> None:
    policy.lstm_actor.register_forward_hook(lambda *_: None)


def patch(policy: RecurrentActorCriticPolicy) -> None:
    policy._process_sequence = policy._process_sequence


def replace_extractor(policy: RecurrentActorCriticPolicy) -> None:
    policy.features_extractor = nn.Sequential()


def change_class(policy: RecurrentActorCriticPolicy) -> None:
    policy.__class__ = OwnForward


CHANGES = [hook, patch, replace_extractor, change_class, RecurrentActorCriticPolicy.double]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_serves_lstm_refuses_a_policy_with(change):
    policy = make_policy("box")
    change(policy)
    assert not serves_lstm(policy)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_fn": nn.GELU},
        {"observation_space": spaces.Box(0, 255, (36, 36, 1), np.uint8)},
        {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}},
    ],
    ids=["activation", "images", "dropout"],
)
def test_serves_lstm_refuses(options):
    policy = make_policy("box", **options)
    policy.set_training_mode(True)
    assert not serves_lstm(policy)
