"""The constructor takes sb3-contrib's arguments, and refuses wrong ones before anything is built."""

import inspect
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn

from sb3_trpo import TRPO, CnnPolicy, MlpPolicy, MultiInputPolicy

NAN, INF = float("nan"), float("inf")
NO_COUNT = (0, -1, 1.5, 2.0, "3", None, True, NAN, INF)
NO_FRACTION = (-0.1, 1.1, NAN, INF, None, "0.9", True)
NO_POSITIVE_NUMBER = (0, 0.0, -0.01, NAN, INF, None, "0.1", True)
NO_NUMBER_FROM_ZERO = (-0.01, NAN, INF, None, "0.1", True)
BAD: dict[str, tuple[Any, ...]] = {
    "learning_rate": NO_NUMBER_FROM_ZERO,
    "n_steps": NO_COUNT,
    "batch_size": NO_COUNT,
    "gamma": NO_FRACTION,
    "cg_max_steps": NO_COUNT,
    "cg_damping": NO_NUMBER_FROM_ZERO,
    "line_search_shrinking_factor": (0, 1, 0.0, 1.0, *NO_FRACTION),
    "line_search_max_iter": NO_COUNT,
    "n_critic_updates": NO_COUNT,
    "gae_lambda": NO_FRACTION,
    "target_kl": NO_POSITIVE_NUMBER,
    "sub_sampling_factor": NO_COUNT,
    "cg_residual_tol": NO_NUMBER_FROM_ZERO,
    "cg_preconditioner": ("KFAC", "", True, 0),
    "critic_method": ("adam", None, 0),
    "critic_damping": NO_POSITIVE_NUMBER,
    "n_critic_steps": NO_COUNT,
    "critic_cg_max_steps": NO_COUNT,
    "critic_cg_residual_tol": NO_NUMBER_FROM_ZERO,
    "max_batch_size": (0, -1, 1.5, "3", True, NAN),
    "ent_coef": NO_NUMBER_FROM_ZERO,
    "n_policy_updates": NO_COUNT,
    "policy_batch_size": (0, -1, 1.5, "3", True, NAN),
    "line_search_accept_ratio": NO_FRACTION,
    "cg_warm_start": (None, 1, 0, "yes"),
    "return_scaling": (None, 1, 0, "yes"),
    "action_bound": ("", "Tanh", "scale", True, 0),
}


def parameters(algorithm: type[Any], method: str = "__init__") -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(algorithm, method)).parameters)


def test_arguments_are_those_of_sb3_contrib_in_their_order() -> None:
    theirs, ours = parameters(sb3_contrib.TRPO), parameters(TRPO)

    assert list(ours)[: len(theirs)] == list(theirs)
    for name in theirs:
        assert ours[name].kind is theirs[name].kind, name
        assert ours[name].default == (0.05 if name == "target_kl" else theirs[name].default), name
    for name in list(ours)[len(theirs) :]:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert ours[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("method", ["learn", "load", "save", "predict", "set_env", "set_parameters"])
def test_methods_take_the_arguments_of_sb3_contrib(method: str) -> None:
    theirs, ours = parameters(sb3_contrib.TRPO, method), parameters(TRPO, method)

    new = [ours.pop(name) for name in list(ours) if name not in theirs]
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is False for p in new)
    assert [p.name for p in new] == (["trust", "allow_non_finite"] if method == "load" else [])


def test_every_argument_is_kept_under_its_name() -> None:
    arguments = {
        "n_steps": 10,
        "batch_size": 5,
        "gamma": 0.5,
        "cg_max_steps": 3,
        "cg_damping": 0.2,
        "line_search_shrinking_factor": 0.6,
        "line_search_max_iter": 4,
        "n_critic_updates": 6,
        "gae_lambda": 0.7,
        "normalize_advantage": False,
        "target_kl": 0.08,
        "sub_sampling_factor": 2,
        "cg_residual_tol": 0.3,
        "cg_preconditioner": None,
        "critic_method": "minibatch",
        "critic_damping": 0.4,
        "n_critic_steps": 3,
        "critic_cg_max_steps": 5,
        "critic_cg_residual_tol": 0.2,
        "max_batch_size": 7,
        "ent_coef": 0.01,
        "n_policy_updates": 2,
        "policy_batch_size": 5,
        "line_search_accept_ratio": 0.1,
        "cg_warm_start": True,
        "return_scaling": True,
    }
    model = TRPO("MlpPolicy", IdentityEnv(2), device="cpu", **arguments)

    assert {name: getattr(model, name) for name in arguments} == arguments


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(name, value, id=f"{name}={value!r}") for name, values in BAD.items() for value in values]
)
def test_a_bad_argument_is_refused_before_an_environment_is_made(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        TRPO("MlpPolicy", "NoSuchEnvironment-v0", **{name: value})

    assert str(error.value).startswith(f"{name}={value!r} is not allowed: it must be ")
    assert not isinstance(error.value, gym.error.Error)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gamma": 0, "gae_lambda": 0, "cg_damping": 0, "cg_residual_tol": 0, "learning_rate": 0},
        {"gamma": 1, "gae_lambda": 1.0},
        {"n_steps": np.int64(8), "batch_size": np.int32(4), "target_kl": np.float64(0.01), "gamma": np.float32(0.9)},
        {"cg_max_steps": 1, "line_search_max_iter": 1, "n_critic_updates": 1, "line_search_shrinking_factor": 1e-3},
        {"n_critic_steps": 1, "critic_cg_max_steps": 1, "max_batch_size": 1},
        {"sub_sampling_factor": 8},
        {"ent_coef": 0, "n_policy_updates": 1, "policy_batch_size": 8, "line_search_accept_ratio": 0},
        {"ent_coef": np.float32(0.5), "n_policy_updates": np.int64(2), "policy_batch_size": 1, "line_search_accept_ratio": 1},
        {"policy_batch_size": 3, "sub_sampling_factor": 8},
    ],
)
def test_limits_and_numpy_numbers_are_allowed(arguments: dict[str, Any]) -> None:
    model = TRPO("MlpPolicy", IdentityEnv(2), seed=0, device="cpu", **({"n_steps": 8, "batch_size": 4} | arguments)).learn(16)

    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_a_rollout_too_small_for_sub_sampling_is_refused_before_anything_is_changed() -> None:
    env = make_vec_env(lambda: IdentityEnv(2), n_envs=2)
    state = th.get_rng_state()
    with pytest.raises(ValueError, match=r"sub_sampling_factor=9 is not allowed.*n_steps=4 \* n_envs=2 = 8"):
        TRPO("MlpPolicy", env, n_steps=4, batch_size=4, sub_sampling_factor=9, seed=123)

    assert th.equal(th.get_rng_state(), state)


def test_one_state_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"n_steps=1 \* n_envs=1 = 1 .*normalize_advantage=True.*at least 2"):
        TRPO("MlpPolicy", IdentityEnv(2), n_steps=1, batch_size=1)


@pytest.mark.parametrize("batch_size", [16, 3])
def test_a_batch_that_does_not_divide_the_rollout_warns(batch_size: int) -> None:
    with pytest.warns(UserWarning, match=rf"batch_size={batch_size} .*n_steps=8 \* n_envs=1 = 8"):
        model = TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, batch_size=batch_size, device="cpu", critic_method="minibatch")
    assert model.learn(8).num_timesteps == 8


def test_a_batch_that_nothing_uses_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, batch_size=3, device="cpu")


@pytest.mark.parametrize("action_space", [spaces.Tuple([spaces.Discrete(2)]), spaces.Dict({"a": spaces.Discrete(2)})])
def test_an_action_space_that_sb3_does_not_support_is_sb3s_error(action_space: spaces.Space) -> None:
    env = IdentityEnv(2)
    env.action_space = action_space
    with pytest.raises(AssertionError, match="as action spaces"):
        TRPO("MlpPolicy", env)


class NoPolicy(nn.Module):
    """Not an actor-critic policy."""


@pytest.mark.parametrize("policy", [DQNPolicy, NoPolicy])
def test_a_policy_without_the_actor_critic_interface_is_refused(policy: type[Any]) -> None:
    with pytest.raises(ValueError, match=rf"policy={policy.__name__} is not allowed: .*get_distribution"):
        TRPO(policy, IdentityEnv(2))


def test_an_unknown_policy_name_is_refused() -> None:
    with pytest.raises(ValueError, match="NoSuchPolicy"):
        TRPO("NoSuchPolicy", IdentityEnv(2))


@pytest.mark.parametrize(
    ("name", "policy_class"), [("MlpPolicy", MlpPolicy), ("CnnPolicy", CnnPolicy), ("MultiInputPolicy", MultiInputPolicy)]
)
def test_policies_have_sb3s_names(name: str, policy_class: type[Any]) -> None:
    assert TRPO.policy_aliases[name] is policy_class
