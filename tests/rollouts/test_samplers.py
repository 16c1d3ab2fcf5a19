import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from torch import nn

from sb3_trpo.adapters.models import actor_mlp
from sb3_trpo.rollouts.samplers import NumpyActionSampler, PolicyActionSampler, action_transform, make_sampler

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
ACTIONS = {
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "box_matrix": spaces.Box(-1.0, 1.0, (2, 2)),
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3, 4]),
    "multi_binary": spaces.MultiBinary(3),
}
#: A difference this improbable, in a test with a fixed seed, is an error.
IMPROBABLE = 1e-4
TO_ROUNDING = {"rtol": 1e-6, "atol": 1e-6}


def make_policy(action_space, observation_space=VECTOR, policy_class=ActorCriticPolicy, **kwargs):
    """A policy whose actions depend on the state, with logits of the size of one."""
    th.manual_seed(0)
    policy = policy_class(observation_space, action_space, lambda _: 1e-3, **kwargs)
    with th.no_grad():
        for name, parameter in policy.named_parameters():
            if name.startswith("action_net"):
                parameter.copy_(0.7 * th.randn_like(parameter))
            elif name == "log_std":
                parameter.copy_(th.linspace(-1.0, 0.5, parameter.numel()).reshape(parameter.shape))
    policy.set_training_mode(False)
    return policy


def lean_actor(policy, n_steps, n_envs):
    actor = make_sampler(policy, actor_mlp(policy), n_steps, n_envs, sde_sample_freq=-1)
    assert isinstance(actor, NumpyActionSampler)
    return actor


def sample(name, n_steps=20, n_envs=1000):
    """Many actions of a lean actor in one state, shape ``(n_steps * n_envs, dimensions)``; and the policy's distribution."""
    policy = make_policy(ACTIONS[name])
    state = np.array([0.5, -1.0, 2.0], dtype=np.float32)
    th.manual_seed(1)
    actor = lean_actor(policy, n_steps, n_envs)
    actions = np.concatenate([actor(np.tile(state, (n_envs, 1)), step) for step in range(n_steps)])
    with th.no_grad():
        distribution = policy.get_distribution(th.as_tensor(state)[None]).distribution
    return actions.reshape(len(actions), -1), distribution


def assert_frequencies(outcomes, probabilities):
    """Chi-square test of how often each outcome came."""
    counts = np.bincount(outcomes, minlength=len(probabilities))
    assert len(counts) == len(probabilities)
    probabilities = probabilities.astype(float)
    assert stats.chisquare(counts, probabilities / probabilities.sum() * counts.sum()).pvalue > IMPROBABLE


def assert_independent(first, second):
    """Chi-square test of two discrete components."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    assert stats.chi2_contingency(table).pvalue > IMPROBABLE


class TestSamplingLaw:
    @pytest.mark.parametrize("name", ["box", "box_matrix"])
    def test_of_box(self, name):
        actions, normal = sample(name)
        mean, std = normal.mean[0].numpy(), normal.stddev[0].numpy()
        assert len(set(std)) == len(std)
        for dimension in range(actions.shape[1]):
            standardised = (actions[:, dimension] - mean[dimension]) / std[dimension]
            assert stats.kstest(standardised, "norm").pvalue > IMPROBABLE
            assert abs(np.corrcoef(standardised[:-1000], standardised[1000:])[0, 1]) < 0.03  # of successive steps
            assert abs(np.corrcoef(standardised[:-1], standardised[1:])[0, 1]) < 0.03  # of neighbouring environments
        assert np.abs(np.corrcoef(actions.T) - np.eye(actions.shape[1])).max() < 0.03

    def test_of_discrete(self):
        actions, categorical = sample("discrete")
        assert_frequencies(actions[:, 0], categorical.probs[0].numpy())
        assert_independent(actions[:-1000, 0], actions[1000:, 0])
        assert_independent(actions[:-1, 0], actions[1:, 0])

    def test_of_multi_discrete(self):
        actions, categoricals = sample("multi_discrete")
        for component, categorical in zip(actions.T, categoricals, strict=True):
            assert_frequencies(component, categorical.probs[0].numpy())
        assert_independent(actions[:, 0], actions[:, 1])
        assert_independent(actions[:, 1], actions[:, 2])

    def test_of_multi_binary(self):
        actions, bernoulli = sample("multi_binary")
        assert set(np.unique(actions)) == {0.0, 1.0}
        actions = actions.astype(int)
        for component, probability in zip(actions.T, bernoulli.probs[0].numpy(), strict=True):
            assert_frequencies(component, np.array([1.0 - probability, probability]))
        assert_independent(actions[:, 0], actions[:, 1])
        assert_independent(actions[:, 1], actions[:, 2])


class TestWithGivenNoise:
    """The parameters of the distribution, without chance."""

    OBSERVATIONS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def actor_and_distribution(self, name, **kwargs):
        policy = make_policy(ACTIONS[name], **kwargs)
        with th.no_grad():
            distribution = policy.get_distribution(th.as_tensor(self.OBSERVATIONS)).distribution
        return lean_actor(policy, 2, len(self.OBSERVATIONS)), distribution

    @pytest.mark.parametrize("name", ["box", "box_matrix"])
    @pytest.mark.parametrize(
        "policy_kwargs",
        [
            {},
            {"activation_fn": nn.ReLU},
            {"net_arch": []},
            {"net_arch": {"pi": [7, 6, 5], "vf": [4]}},
            {"share_features_extractor": False},
        ],
        ids=str,
    )
    def test_the_mean(self, name, policy_kwargs):
        actor, normal = self.actor_and_distribution(name, **policy_kwargs)
        actor._noise = np.zeros_like(actor._noise)
        actions = actor(self.OBSERVATIONS, 0)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions.reshape(5, -1), normal.mean, **TO_ROUNDING)

    @pytest.mark.parametrize("step", [0, 1])
    def test_the_noise_is_that_of_the_step(self, step):
        actor, normal = self.actor_and_distribution("box")
        np.testing.assert_allclose(actor(self.OBSERVATIONS, step) - normal.mean.numpy(), actor._noise[step], **TO_ROUNDING)
        assert (actor._noise[0] != actor._noise[1]).all()

    @pytest.mark.parametrize("favourite", range(4))
    def test_the_logits_of_discrete(self, favourite):
        """Noise that makes all perturbed logits the same, but for one that is a little larger."""
        actor, categorical = self.actor_and_distribution("discrete")
        actor._noise = -categorical.logits.numpy()[None].repeat(2, axis=0)
        actor._noise[..., favourite] += 3e-6
        np.testing.assert_array_equal(actor(self.OBSERVATIONS, 0), favourite)

    def test_the_logits_of_multi_discrete(self):
        actor, categoricals = self.actor_and_distribution("multi_discrete")
        actor._noise = -np.concatenate([part.logits.numpy() for part in categoricals], axis=1)[None]
        actor._noise[..., [1, 2, 5]] += 3e-6  # the second of two, the first of three, the first of four
        np.testing.assert_array_equal(actor(self.OBSERVATIONS, 0), np.tile([1, 0, 0], (5, 1)))

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_logits_of_multi_binary(self, sign):
        actor, bernoulli = self.actor_and_distribution("multi_binary")
        actor._noise = -bernoulli.logits.numpy()[None] + sign * np.array([1e-6, -1e-6, 1e-6], dtype=np.float32)
        np.testing.assert_array_equal(actor(self.OBSERVATIONS, 0), np.tile([sign > 0, sign < 0, sign > 0], (5, 1)))

    def test_observations_of_other_types(self):
        space = spaces.Box(0, 255, (3,), np.uint8)
        policy = make_policy(ACTIONS["box"], space)
        observations = np.array([[0, 100, 255], [3, 2, 1]], dtype=np.uint8)
        actor = lean_actor(policy, 1, 2)
        actor._noise = np.zeros_like(actor._noise)
        with th.no_grad():
            mean = policy.get_distribution(th.as_tensor(observations)).distribution.mean
        np.testing.assert_allclose(actor(observations, 0), mean, **TO_ROUNDING)
        assert observations.tolist() == [[0, 100, 255], [3, 2, 1]]

    def test_observations_of_more_dimensions_stay_as_they_are(self):
        policy = make_policy(ACTIONS["box"], spaces.Box(-np.inf, np.inf, (2, 3)), net_arch=[], activation_fn=nn.ReLU)
        observations = -np.ones((2, 2, 3), dtype=np.float32)
        actor = lean_actor(policy, 1, 2)
        actor._noise = np.zeros_like(actor._noise)
        with th.no_grad():
            mean = policy.get_distribution(th.as_tensor(observations)).distribution.mean
        np.testing.assert_allclose(actor(observations, 0), mean, **TO_ROUNDING)
        assert (observations == -1.0).all()


@pytest.mark.parametrize("name", ACTIONS)
def test_a_lean_actors_actions_are_of_the_policys_shape_and_type(name):
    policy = make_policy(ACTIONS[name])
    observations = np.zeros((4, 3), dtype=np.float32)
    lean, general = lean_actor(policy, 1, 4)(observations, 0), PolicyActionSampler(policy, 4, -1)(observations, 0)
    assert lean.shape == general.shape == (4, *ACTIONS[name].shape)
    assert lean.dtype == general.dtype


@pytest.mark.parametrize("name", ACTIONS)
def test_the_seed_fixes_the_actions(name):
    policy = make_policy(ACTIONS[name])
    observations = np.zeros((50, 3), dtype=np.float32)

    def act(seed):
        th.manual_seed(seed)
        actor = lean_actor(policy, 2, 50)
        return np.stack([actor(observations, 0), actor(observations, 1)])

    np.testing.assert_array_equal(act(0), act(0))
    assert (act(0) != act(1)).any()


def test_lean_actors_follow_the_policys_parameters():
    policy = make_policy(ACTIONS["box"])
    actor = lean_actor(policy, 1, 1)
    actor._noise = np.zeros_like(actor._noise)
    observations = np.ones((1, 3), dtype=np.float32)
    before = actor(observations, 0)
    with th.no_grad():
        policy.action_net.bias.add_(1.0)
    np.testing.assert_allclose(actor(observations, 0), before + 1.0, **TO_ROUNDING)


class OwnDistribution(ActorCriticPolicy):
    """A policy with a distribution of its own, in acting, evaluating and predicting alike."""

    def _get_action_dist_from_latent(self, latent_pi):
        return super()._get_action_dist_from_latent(0.5 * latent_pi)


DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
GENERAL = {
    "gsde": (ACTIONS["box"], VECTOR, ActorCriticPolicy, {"use_sde": True}),
    "gsde_squashed": (ACTIONS["box"], VECTOR, ActorCriticPolicy, {"use_sde": True, "squash_output": True}),
    "dict": (ACTIONS["box"], DICT, MultiInputActorCriticPolicy, {}),
    "discrete_observation": (ACTIONS["discrete"], spaces.Discrete(5), ActorCriticPolicy, {}),
    "image": (ACTIONS["discrete"], IMAGE, ActorCriticCnnPolicy, {"features_extractor_kwargs": {"features_dim": 8}}),
    "image_mlp": (ACTIONS["discrete"], IMAGE, ActorCriticPolicy, {}),
    "activation": (ACTIONS["multi_discrete"], VECTOR, ActorCriticPolicy, {"activation_fn": nn.ELU}),
    "own_distribution": (ACTIONS["multi_binary"], VECTOR, OwnDistribution, {}),
}


@pytest.mark.parametrize("name", GENERAL)
def test_other_policies_are_asked_themselves(name):
    """The actor of every other policy draws what the policy draws from the same state of the generator."""
    action_space, observation_space, policy_class, kwargs = GENERAL[name]
    policy = make_policy(action_space, observation_space, policy_class, **kwargs)
    actor = make_sampler(policy, actor_mlp(policy), 4, 2, sde_sample_freq=-1)
    assert isinstance(actor, PolicyActionSampler)
    if isinstance(observation_space, spaces.Dict):
        observations = {"a": np.ones((2, 3), dtype=np.float32), "b": np.array([0, 2])}
        inputs = {key: th.as_tensor(array) for key, array in observations.items()}
    else:
        observation_space.seed(0)
        observations = np.stack([observation_space.sample() for _ in range(2)])
        inputs = th.as_tensor(observations)
    th.manual_seed(3)
    actions = actor(observations, 0)
    th.manual_seed(3)
    if policy.use_sde:
        policy.reset_noise(2)
    with th.no_grad():
        np.testing.assert_array_equal(actions, policy(inputs)[0].numpy())


def test_double_precision_policies_are_asked_themselves():
    policy = make_policy(ACTIONS["box"]).double()
    assert isinstance(make_sampler(policy, actor_mlp(policy), 1, 1, -1), PolicyActionSampler)


@pytest.mark.parametrize(("frequency", "resampled"), [(-1, [0]), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (10, [0])])
def test_gsde_noise_is_resampled_when_sb3_does(frequency, resampled):
    policy = make_policy(ACTIONS["box"], use_sde=True)
    actor = PolicyActionSampler(policy, 2, frequency)
    observations = np.ones((2, 3), dtype=np.float32)
    actions = np.stack([actor(observations, step) for step in range(7)])
    changed = [0, *(step for step in range(1, 7) if (actions[step] != actions[step - 1]).any())]
    assert changed == resampled
    assert (actions[:, 0] != actions[:, 1]).all()  # a matrix for each environment


class TestActionTransform:
    def test_clips_box_actions(self):
        space = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32))
        actions = np.array([[-2.0, -0.5], [0.5, 2.5], [1.5, 4.0]], dtype=np.float32)
        kept = actions.copy()
        transformed = action_transform(make_policy(space))(actions)
        np.testing.assert_array_equal(transformed, np.clip(actions, space.low, space.high))
        assert transformed.dtype == np.float32
        np.testing.assert_array_equal(actions, kept)

    def test_unscales_squashed_actions(self):
        space = spaces.Box(-2.0, 6.0, (2,))
        policy = make_policy(space, use_sde=True, squash_output=True)
        actions = np.array([[-1.0, 0.0], [0.5, 1.0]], dtype=np.float32)
        np.testing.assert_allclose(action_transform(policy)(actions), [[-2.0, 2.0], [4.0, 6.0]])

    @pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_binary"])
    def test_leaves_the_others(self, name):
        actions = np.array([7])
        assert action_transform(make_policy(ACTIONS[name]))(actions) is actions
