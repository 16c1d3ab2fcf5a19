"""The constructor takes sb3-contrib's arguments, and refuses wrong ones before anything is built."""

import inspect
import io
import json
import warnings
import zipfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from pydoc import plain, render_doc
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn

from sb3_trpo import NPG, TRPO, CnnPolicy, MaskableTRPO, MlpPolicy, MultiInputPolicy, RecurrentTRPO
from sb3_trpo.npg import LINE_SEARCH_ARGUMENTS

NAN, INF = float("nan"), float("inf")
ALGORITHMS = [(TRPO, "MlpPolicy"), (NPG, "MlpPolicy"), (RecurrentTRPO, "MlpLstmPolicy"), (MaskableTRPO, "MlpPolicy")]
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
    "cg_residual_tol": (-0.01, NAN, INF, "0.1", True),
    "cg_preconditioner": ("KFAC", "", True, 0),
    "critic_method": ("adam", None, 0),
    "critic_damping": NO_POSITIVE_NUMBER,
    "n_critic_steps": NO_COUNT,
    "max_batch_size": (0, -1, 1.5, "3", True, NAN),
    "ent_coef": NO_NUMBER_FROM_ZERO,
    "n_policy_updates": NO_COUNT,
    "policy_batch_size": (0, -1, 1.5, "3", True, NAN),
    "line_search_accept_ratio": NO_FRACTION,
    "max_state_kl": (0, 0.0, -0.01, NAN, INF, "0.1", True),
    "curvature_batch_size": (0, -1, 1.5, "3", True, NAN),
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
        assert ours[name].default == (0.03 if name == "target_kl" else theirs[name].default), name
    for name in list(ours)[len(theirs) :]:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert ours[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("method", ["learn", "load", "save", "predict", "set_env", "set_parameters"])
def test_methods_take_the_arguments_of_sb3_contrib(method: str) -> None:
    theirs, ours = parameters(sb3_contrib.TRPO, method), parameters(TRPO, method)

    new = [ours.pop(name) for name in list(ours) if name not in theirs]
    if method == "learn":
        assert ours["tb_log_name"].default is None  # the algorithm's name, "TRPO"
        theirs["tb_log_name"] = theirs["tb_log_name"].replace(default=None)
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
        "max_batch_size": 7,
        "ent_coef": 0.01,
        "n_policy_updates": 2,
        "policy_batch_size": 5,
        "line_search_accept_ratio": 0.1,
        "max_state_kl": 0.5,
        "return_scaling": True,
        "curvature_batch_size": 6,
    }
    with pytest.warns(UserWarning, match="no effect with critic_method='minibatch': critic_damping, n_critic_steps"):
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
        {"gamma": 0, "gae_lambda": 0, "cg_damping": 0, "cg_residual_tol": 0},
        {"gamma": 1, "gae_lambda": 1.0},
        {"n_steps": np.int64(8), "target_kl": np.float64(0.01), "gamma": np.float32(0.9)},
        {"critic_method": "minibatch", "batch_size": np.int32(4), "n_critic_updates": 1, "learning_rate": 0},
        {"cg_max_steps": 1, "line_search_max_iter": 1, "line_search_shrinking_factor": 1e-3},
        {"n_critic_steps": 1, "max_batch_size": 1},
        {"sub_sampling_factor": 8},
        {"ent_coef": 0, "n_policy_updates": 1, "policy_batch_size": 8, "line_search_accept_ratio": 0},
        {"ent_coef": np.float32(0.5), "n_policy_updates": np.int64(2), "policy_batch_size": 1, "line_search_accept_ratio": 1},
        {"policy_batch_size": 3, "sub_sampling_factor": 8},
        {"curvature_batch_size": 1},
        {"curvature_batch_size": np.int64(2**62), "sub_sampling_factor": 2},
    ],
)
def test_limits_and_numpy_numbers_are_allowed(arguments: dict[str, Any]) -> None:
    model = TRPO("MlpPolicy", IdentityEnv(2), seed=0, device="cpu", **({"n_steps": 8} | arguments)).learn(16)

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


# ---- numbers of every kind


@pytest.mark.parametrize(("algorithm", "policy"), ALGORITHMS)
def test_numbers_of_every_kind_train_as_pythons_own(algorithm: type[TRPO], policy: str) -> None:
    plain: dict[str, Any] = {
        "n_steps": 100,
        "gamma": 0.5,
        "gae_lambda": 0.25,
        "ent_coef": 0.0,
        "cg_max_steps": 3,
        "target_kl": 0.125,
    }
    kinds: dict[str, Any] = {
        "n_steps": np.int8(100),
        "gamma": np.float64(0.5),
        "gae_lambda": Fraction(1, 4),
        "ent_coef": np.float32(0.0),
        "cg_max_steps": np.uint8(3),
        "target_kl": np.float64(0.125),
        "seed": np.int64(0),
        "n_policy_updates": np.int16(1),
        "sub_sampling_factor": np.uint8(1),
        "critic_damping": Fraction(3, 100),
    }
    small = {"net_arch": [4], **({"lstm_hidden_size": 4} if algorithm is RecurrentTRPO else {})}
    models = []
    for arguments in ({"seed": 0, **plain}, kinds):
        env = make_vec_env(lambda: ActionMasker(gym.make("CartPole-v1"), lambda env: np.ones(2, bool)), n_envs=2)
        models.append(algorithm(policy, env, device="cpu", policy_kwargs=small, **arguments).learn(400))
    for name in kinds:
        assert type(getattr(models[1], name)) in (int, float), name
    first, second = (model.policy.state_dict().values() for model in models)
    assert all(th.equal(one, other) for one, other in zip(first, second, strict=True))


def test_numbers_given_to_load_are_converted(tmp_path: Path) -> None:
    TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, device="cpu").save(tmp_path / "model")
    model = TRPO.load(tmp_path / "model", env=IdentityEnv(2), gamma=np.float64(0.5), n_steps=np.int8(100), device="cpu")
    assert (type(model.gamma), type(model.n_steps)) == (float, int)
    with pytest.raises(ValueError, match=r"^seed='x' is not allowed"):
        TRPO.load(tmp_path / "model", seed="x", device="cpu")


# ---- schedules


def test_schedule_that_fails_in_the_middle_is_named_in_learn() -> None:
    def target_kl(progress_remaining: float) -> float:
        return -1.0 if 0.0 < progress_remaining < 1.0 else 0.01

    with pytest.raises(ValueError, match=r"^target_kl=<function .*it returned -1.0 at progress_remaining=0.5"):
        TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, target_kl=target_kl, device="cpu").learn(16)


def test_schedule_of_the_learning_rate_is_checked_at_use_by_the_minibatch_critic_alone() -> None:
    def learning_rate(progress_remaining: float) -> float:
        return NAN if 0.0 < progress_remaining < 1.0 else 0.01

    def make(**kwargs: Any) -> TRPO:
        return TRPO("MlpPolicy", IdentityEnv(2), learning_rate, n_steps=8, device="cpu", **kwargs)

    with pytest.raises(ValueError, match=r"^learning_rate=<function .*it returned nan at progress_remaining=0.5"):
        make(critic_method="minibatch", batch_size=8).learn(16)
    with pytest.warns(UserWarning, match="no effect .*: learning_rate"):
        model = make()
    model.learn(16)


def test_schedule_that_ends_at_zero_is_allowed() -> None:
    model = TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, target_kl=lambda progress: 0.1 * progress, device="cpu").learn(8)
    assert model.logger.name_to_value["train/target_kl"] == 0.0


# ---- arguments without effect


def warnings_of(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    found = [warning for warning in caught if "no effect" in str(warning.message)]
    assert all(warning.filename == __file__ for warning in found)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize(
    ("algorithm", "arguments", "expected"),
    [
        (TRPO, {}, []),
        (TRPO, {"learning_rate": 1e-3}, ["critic_method='gauss_newton': learning_rate"]),
        (TRPO, {"learning_rate": 1e-3, "batch_size": 3}, ["critic_method='gauss_newton': learning_rate, batch_size"]),
        (
            TRPO,
            {"n_critic_updates": 1, "policy_kwargs": {"optimizer_class": th.optim.SGD}},
            ["critic_method='gauss_newton': n_critic_updates, policy_kwargs['optimizer_class']"],
        ),
        (TRPO, {"critic_method": "minibatch", "learning_rate": 1e-3, "batch_size": 4, "n_critic_updates": 1}, []),
        (
            TRPO,
            {"critic_method": "minibatch", "batch_size": 8, "critic_damping": 1.0, "n_critic_steps": 2},
            ["critic_method='minibatch': critic_damping, n_critic_steps"],
        ),
        (NPG, {}, []),
        (NPG, {"batch_size": 4}, ["critic_method='gauss_newton': batch_size"]),
        (NPG, {"target_kl": 0.1}, []),
        (RecurrentTRPO, {}, []),
        (RecurrentTRPO, {"learning_rate": 1e-3}, ["critic_method='gauss_newton': learning_rate"]),
        (NPG, {"target_kl": 0.1, "actor_step_size": 0.1}, ["actor_step_size: target_kl"]),
    ],
)
def test_arguments_without_effect_are_named_once(
    algorithm: type[TRPO], arguments: dict[str, Any], expected: list[str]
) -> None:
    arguments = {"n_steps": 8, "device": "cpu"} | arguments
    policy = dict(ALGORITHMS)[algorithm]
    found = warnings_of(lambda: algorithm(policy, IdentityEnv(2), **arguments).learn(16))
    assert found == [f"no effect with {words}" for words in expected]


def test_arguments_without_effect_are_named_in_load(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, device="cpu", learning_rate=0.5).save(tmp_path / "model")
    assert not warnings_of(lambda: TRPO.load(tmp_path / "model", device="cpu"))
    assert len(warnings_of(lambda: TRPO.load(tmp_path / "model", device="cpu", learning_rate=0.1))) == 1


@pytest.mark.parametrize("env", [None, "CartPole-v1"])
def test_batch_size_that_does_not_divide_is_named_once(env: str | None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="batch_size=3 does not divide") as made:
        TRPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=3, critic_method="minibatch").save(tmp_path / "model")
    with pytest.warns(UserWarning, match="batch_size=3 does not divide") as loaded:
        TRPO.load(tmp_path / "model", env=env)
    assert [warning.filename for warning in (*made, *loaded)] == [__file__] * 2


def test_learning_rate_is_logged_where_it_is_used() -> None:
    for critic_method in ("gauss_newton", "minibatch"):
        arguments = {} if critic_method == "gauss_newton" else {"learning_rate": 0.5, "batch_size": 8}
        model = TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, device="cpu", critic_method=critic_method, **arguments).learn(8)
        logged = model.logger.name_to_value.get("train/learning_rate")
        assert logged == (0.5 if critic_method == "minibatch" else None)


def test_model_of_sb3_contrib_says_which_critic_it_gets(tmp_path: Path) -> None:
    sb3_contrib.TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, batch_size=8, device="cpu").save(tmp_path / "theirs")
    with pytest.warns(
        UserWarning, match=r"critic_method='gauss_newton', which does not use learning_rate, batch_size"
    ) as found:
        TRPO.load(tmp_path / "theirs", device="cpu")
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match=r"joint KL") as found:
        model = TRPO.load(tmp_path / "theirs", device="cpu", critic_method="minibatch")
    assert "gauss_newton" not in str(found[0].message)
    assert model.critic_method == "minibatch"


# ---- names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_kl", "use target_kl"),
        ("target_Kl", "did you mean 'target_kl'"),
        ("cg_dampng", "did you mean 'cg_damping'"),
        ("clip_range", "no clipping; target_kl bounds"),
        ("vf_coef", "no weight between them"),
        ("n_epochs", "use n_critic_updates"),
        ("max_grad_norm", "not clipped"),
        ("cg_warm_start", "start at zero"),
        ("distributed", "class attribute"),
        ("zzz", "$"),
    ],
)
@pytest.mark.parametrize(("algorithm", "policy"), ALGORITHMS)
def test_unknown_argument_gets_a_hint(algorithm: type[TRPO], policy: str, name: str, words: str) -> None:
    with pytest.raises(TypeError, match=rf"^{algorithm.__name__}\(\) got an unexpected keyword argument '{name}'.*{words}"):
        algorithm(policy, IdentityEnv(2), **{name: 1.0})


def test_missing_and_doubled_arguments_are_pythons_type_error() -> None:
    with pytest.raises(TypeError, match=r"^TRPO\(\): missing a required argument: 'env'"):
        TRPO("MlpPolicy")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^TRPO\(\): multiple values for argument 'policy'"):
        TRPO("MlpPolicy", IdentityEnv(2), policy="MlpPolicy")  # type: ignore[misc]


@pytest.mark.parametrize(("algorithm", "policy"), ALGORITHMS)
def test_signature_is_complete(algorithm: type[TRPO], policy: str) -> None:
    removed = set(LINE_SEARCH_ARGUMENTS) if algorithm is NPG else set()
    ours, trpos = parameters(algorithm), parameters(TRPO)
    assert set(trpos) - removed == set(ours) - {"actor_step_size"}
    changed = {name for name in set(trpos) - removed if ours[name].default != trpos[name].default}
    assert changed == ({"n_steps"} if algorithm is RecurrentTRPO else set())
    assert "Annotated[float, <a finite number of at least 0>] = 0.1" in plain(render_doc(algorithm))
    assert "Annotated" not in str(parameters(TRPO, "learn"))


def test_positional_arguments_count_as_given() -> None:
    for algorithm, policy in ((TRPO, "MlpPolicy"), (RecurrentTRPO, "MlpLstmPolicy")):
        found = warnings_of(lambda: algorithm(policy, IdentityEnv(2), 1e-3, 8, 8, device="cpu"))  # noqa: B023
        assert found == ["no effect with critic_method='gauss_newton': learning_rate, batch_size"]


def test_subclass_with_a_constructor_of_its_own(tmp_path: Path) -> None:
    class Mine(TRPO):
        def __init__(
            self, policy: Any, env: Any, learning_rate: float = 1e-3, temperature: float = 1.0, **kwargs: Any
        ) -> None:
            self.temperature = temperature
            super().__init__(policy, env, learning_rate, **kwargs)

    with pytest.warns(UserWarning, match="no effect .*: learning_rate"):
        model = Mine("MlpPolicy", IdentityEnv(2), n_steps=8, temperature=2.0, device="cpu").learn(8)
    assert model.temperature == 2.0
    model.save(tmp_path / "mine")
    assert not warnings_of(lambda: Mine.load(tmp_path / "mine", device="cpu"))
    with pytest.raises(TypeError, match=r"^Mine\(\) got an unexpected .*did you mean 'cg_damping'"):
        Mine("MlpPolicy", IdentityEnv(2), cg_dampin=1.0)


# ---- wrong values of every type


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def raises(progress_remaining: float) -> float:
    raise KeyError("no such phase")


WRONG: list[Any] = [
    *(None, True, 0, 1, -1, 2**31, 2**63, 2**70, 10**400, 0.0, 0.5, -0.5, 1.5, 1e300, NAN, INF),
    *(np.int8(100), np.uint8(200), np.float64(0.9), np.True_, np.array(3), np.array([1, 2]), np.str_("cpu")),
    *(
        Fraction(1, 2),
        Fraction(1, 10**400),
        Decimal("0.5"),
        1j,
        "",
        "1",
        "auto",
        "nonsense",
        b"x",
        [1],
        (),
        {},
        {"a": 1},
        {1: 2},
    ),
    *(
        set(),
        object(),
        Mute(),
        int,
        TRPO,
        len,
        raises,
        th.tensor(0.5),
        th.tensor([1.0]),
        th.device("meta"),
        spaces.Discrete(2),
    ),
    *(lambda: 1.0, *(lambda _, value=value: value for value in (None, "x", np.array([1.0, 2.0]), NAN, -1.0, INF, 1e-3))),
]


@pytest.mark.parametrize("name", [name for name in parameters(TRPO) if name not in ("self", "_init_setup_model")])
def test_any_value_is_taken_or_refused_by_name(name: str) -> None:
    for value in WRONG:
        arguments = {"policy": "MlpPolicy", "env": IdentityEnv(2), "n_steps": 8, "batch_size": 8, "device": "cpu", name: value}
        message = refusal(**arguments)
        assert name in message or "(gSDE) can only" in message  # SB3's own error for use_sde=True
        assert len(message) < 1000


def refusal(**arguments: Any) -> str:
    """The message of a ValueError that names an argument; the arguments' names if they are taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TRPO(**arguments)
        except gym.error.Error:
            assert not isinstance(arguments["env"], IdentityEnv)
        except ValueError as error:
            return str(error)
    return str(list(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"policy_kwargs": {"net_arch": [-1]}},
        {"policy_kwargs": {"activation_fn": "relu"}},
        {"policy_kwargs": {"no_such_option": 1}},
        {"policy_kwargs": {"optimizer_class": 3}},
        {"rollout_buffer_kwargs": {"no_such_option": 1}},
    ],
)
def test_wrong_keyword_arguments_of_policy_and_buffer_are_named(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed: .*MlpPolicy") as error:
        TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, device="cpu", **arguments)
    assert error.value.__cause__ is not None


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
    with pytest.raises(ValueError, match=r"^policy='NoSuchPolicy' is not allowed: it must be 'MlpPolicy' or"):
        TRPO("NoSuchPolicy", IdentityEnv(2))
    with pytest.raises(ValueError, match="did you mean 'MlpPolicy'"):
        TRPO("MLPPolicy", IdentityEnv(2))


@pytest.mark.parametrize(
    ("name", "policy_class"), [("MlpPolicy", MlpPolicy), ("CnnPolicy", CnnPolicy), ("MultiInputPolicy", MultiInputPolicy)]
)
def test_policies_have_sb3s_names(name: str, policy_class: type[Any]) -> None:
    assert TRPO.policy_aliases[name] is policy_class


def test_file_with_attributes_of_earlier_versions_loads(tmp_path: Path) -> None:
    """Commit 3440a56 saved these for `cg_warm_start=True`, and the search direction as a tensor."""
    TRPO("MlpPolicy", IdentityEnv(2), n_steps=8, device="cpu").save(tmp_path / "new")
    old = {"cg_warm_start": True, "critic_cg_max_steps": 5, "critic_cg_residual_tol": 0.2, "distributed": False}
    tensors = io.BytesIO()
    th.save({"_direction": th.ones(3)}, tensors)
    with zipfile.ZipFile(tmp_path / "new.zip") as new, zipfile.ZipFile(tmp_path / "old.zip", "w") as file:
        for name in new.namelist():
            contents = tensors.getvalue() if name == "pytorch_variables.pth" else new.read(name)
            file.writestr(name, json.dumps(json.loads(contents) | old) if name == "data" else contents)
    model = TRPO.load(tmp_path / "old", env=IdentityEnv(2), device="cpu").learn(8)
    assert not {*old, "_direction"} & set(vars(model))


def test_wrong_keyword_arguments_raise_what_sb3_raises_too() -> None:
    with pytest.raises(TypeError, match="rollout_buffer_kwargs"):
        TRPO("MlpPolicy", IdentityEnv(2), rollout_buffer_kwargs={"no_such_option": 1}, device="cpu")
    with pytest.raises(AssertionError, match="policy_kwargs"):
        TRPO("CnnPolicy", IdentityEnv(2), policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}}, device="cpu")
