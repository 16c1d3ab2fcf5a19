import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo.adapters.models import actor_parameters, critic_parameters, value_function
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


def actor_of(case):
    return actor_parameters(case.policy, case.distribution, case.rollout.select(slice(1)).inputs)


def critic_of(case, actor=None):
    return critic_parameters(
        case.policy, case.values, case.rollout.select(slice(1)).inputs, case.actor if actor is None else actor
    )


def names(policy, parameters):
    """The parameters' names, in their order."""
    name_of = {id(parameter): name for name, parameter in policy.named_parameters()}
    return [name_of[id(parameter)] for parameter in parameters]


def test_actor_is_what_the_distribution_depends_on(case):
    assert names(case.policy, actor_of(case)) == names(case.policy, case.actor)


def test_actor_of_a_users_own_policy(user_case):
    assert names(user_case.policy, actor_of(user_case)) == names(user_case.policy, user_case.actor)


def test_critic_is_all_the_rest(case):
    rest = [name for name, _ in case.policy.named_parameters() if name not in names(case.policy, case.actor)]
    assert names(case.policy, critic_of(case)) == rest


def test_nothing_is_left_in_grad(case):
    critic_of(case, actor_of(case))
    assert all(parameter.grad is None for parameter in case.policy.parameters())


class OddlyNamedPolicy(ActorCriticPolicy):
    """The actor's last layer is called after the value, the critic's after the action; and one layer is not used."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.value_thing, self.action_critic = self.action_net, self.value_net
        del self.action_net, self.value_net
        self.unused = nn.Linear(1, 1)

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.value_thing(latent_pi), self.log_std)

    def predict_values(self, obs):
        return self.action_critic(self.mlp_extractor.forward_critic(self.extract_features(obs)))


def test_names_do_not_matter(make_case):
    case = make_case("box", policy_class=OddlyNamedPolicy)
    actor = actor_of(case)
    assert {name.split(".")[0] for name in names(case.policy, actor)} == {"log_std", "mlp_extractor", "value_thing"}
    assert names(case.policy, critic_of(case, actor)) == [
        "mlp_extractor.value_net.0.weight",
        "mlp_extractor.value_net.0.bias",
        "action_critic.weight",
        "action_critic.bias",
    ]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_shared_extractor_is_the_actors(make_case, learned_extractor, share):
    case = make_case("box", share_features_extractor=share, **learned_extractor)
    actor = actor_of(case)
    critic = critic_of(case, actor)
    assert "features_extractor.layer.weight" in names(case.policy, actor)
    assert ("vf_features_extractor.layer.weight" in names(case.policy, critic)) != share
    assert {id(p) for p in actor}.isdisjoint(id(p) for p in critic)
    assert len(actor) + len(critic) == len(list(case.policy.parameters()))


def test_frozen_parameters_belong_to_nobody(make_case):
    case = make_case("box")
    case.policy.log_std.requires_grad_(False)
    case.policy.value_net.bias.requires_grad_(False)
    assert "log_std" not in names(case.policy, actor_of(case))
    assert "value_net.bias" not in names(case.policy, critic_of(case))


def test_policy_without_trainable_actor_is_refused_by_name(make_case):
    case = make_case("box")
    for parameter in case.actor:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="ActorCriticPolicy depends on none of its trainable parameters"):
        actor_of(case)


def test_distribution_that_ignores_the_parameters_is_refused(make_case):
    case = make_case("box")
    constant = DiagGaussianDistribution(2)
    with pytest.raises(ValueError, match="depends on none"):
        actor_parameters(
            case.policy, lambda inputs: constant.proba_distribution(th.zeros(1, 2), th.zeros(2)), case.rollout.inputs
        )


def test_critic_that_lives_off_the_actor_has_nothing_of_its_own(make_case):
    case = make_case("box")
    values = lambda inputs: case.distribution(inputs).distribution.mean.sum(dim=1)  # noqa: E731
    assert critic_parameters(case.policy, values, case.rollout.inputs, case.actor) == []


def test_critic_that_is_constant_has_nothing(make_case):
    case = make_case("box")
    assert critic_parameters(case.policy, lambda inputs: th.zeros(len(inputs)), case.rollout.inputs, case.actor) == []


def test_values_in_two_parts_are_the_values(case):
    critic = critic_of(case)
    encode, head = value_function(case.policy, case.values, critic)
    assert encode is not None
    th.testing.assert_close(head(encode(case.rollout.inputs)), case.values(case.rollout.inputs))


def test_shared_extractor_is_encoded_once_and_the_critics_own_is_not(make_case, learned_extractor):
    for share in (True, False):
        case = make_case("box", share_features_extractor=share, **learned_extractor)
        encode, head = value_function(case.policy, case.values, critic_of(case))
        assert (encode is not None) == share
        inputs = case.rollout.inputs
        th.testing.assert_close(head(encode(inputs) if share else inputs), case.values(inputs))


def test_users_own_values_are_not_taken_apart(make_case):
    case = make_case("box", policy_class=OddlyNamedPolicy)
    encode, head = value_function(case.policy, case.values, critic_of(case))
    assert encode is None
    th.testing.assert_close(head(case.rollout.inputs), case.values(case.rollout.inputs))


IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
POLICIES = {
    "cnn": (CnnPolicy, IMAGE),
    "multi_input": (MultiInputPolicy, spaces.Dict({"image": IMAGE, "speed": spaces.Box(-1.0, 1.0, (2,))})),
}


@pytest.mark.parametrize(("policy_class", "space"), POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    ("kwargs", "shared"), [({}, False), ({"share_features_extractor": True}, True)], ids=["default", "shared"]
)
def test_policies_with_extractors_to_learn_keep_actor_and_critic_apart_by_default(policy_class, space, kwargs, shared):
    policy = policy_class(space, spaces.Discrete(2), lambda _: 1e-3, **kwargs)
    assert (policy.pi_features_extractor is policy.vf_features_extractor) == shared
    inputs = (
        {key: th.zeros(1, *s.shape) for key, s in space.items()}
        if isinstance(space, spaces.Dict)
        else th.zeros(1, *space.shape)
    )
    actor = actor_parameters(policy, policy.get_distribution, inputs)
    critic = critic_parameters(policy, policy.predict_values, inputs, actor)
    extractor = flatten(policy.vf_features_extractor.parameters()).numel()
    assert (sum(p.numel() for p in critic) > extractor) != shared


@pytest.mark.parametrize(
    ("arguments", "expected"), [({}, -0.5), ({"use_sde": True}, 0.0), ({"log_std_init": 0.3}, 0.3)], ids=["", "gsde", "given"]
)
def test_first_standard_deviation_is_below_sb3s_except_with_gsde(arguments, expected):
    policy = MlpPolicy(spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-1.0, 1.0, (2,)), lambda _: 1e-3, **arguments)
    assert policy.log_std.unique().tolist() == pytest.approx([expected])
    copy = MlpPolicy(**policy._get_constructor_parameters())
    assert th.equal(copy.log_std, policy.log_std)
