"""Models are saved and loaded as SB3 users know it, those of sb3-contrib's TRPO included."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from support.arguments import effective

from sb3_trpo import TRPO

N_STEPS = 16
SPACES = {
    "box": spaces.Box(-1.0, 1.0, (3,)),
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(4),
}
DICT = spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,)), "b": spaces.Discrete(3)})


class WalkEnv(gym.Env):
    """The state is where the actions so far have led; no randomness, so that two runs can be the same run."""

    def __init__(self, action_space: spaces.Space, observation_space: spaces.Space = SPACES["box"]) -> None:
        self.action_space, self.observation_space = action_space, observation_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = 0.0, 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place += float(np.mean(action)) - 0.5
        self.steps += 1
        return self.observe(), float(np.cos(self.place)), False, self.steps % 8 == 0, {}

    def observe(self) -> Any:
        angles = self.place + np.arange(3)
        vector = np.sin(angles).astype(np.float32)
        return {"a": vector[:2], "b": self.steps % 3} if isinstance(self.observation_space, spaces.Dict) else vector


def make(action: str = "box", algorithm: type[Any] = TRPO, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    env = WalkEnv(SPACES[action], DICT if policy == "MultiInputPolicy" else SPACES["box"])
    arguments = {"n_steps": N_STEPS, "batch_size": 8, "seed": 0, "device": "cpu", **kwargs}
    return algorithm(policy, env, **effective(arguments, algorithm))


def assert_same(first: Any, second: Any) -> None:
    """Compare nested state dictionaries bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert th.equal(first, second) if th.is_tensor(first) else first == second


def observations(model: TRPO, n: int = 20) -> Any:
    model.observation_space.seed(0)
    samples = [model.observation_space.sample() for _ in range(n)]
    if isinstance(model.observation_space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in DICT}
    return np.stack(samples)


# ---- our own files


@pytest.mark.parametrize(
    ("action", "kwargs"),
    [
        *[(action, {}) for action in SPACES],
        ("box", {"use_sde": True}),
        ("box", {"policy": "MultiInputPolicy"}),
        ("discrete", {"policy_kwargs": {"optimizer_class": th.optim.RMSprop, "net_arch": [4]}, "critic_method": "minibatch"}),
    ],
)
def test_a_loaded_model_is_the_saved_one(action: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = make(action, target_kl=0.02, cg_damping=0.3, cg_residual_tol=0.01, **kwargs).learn(2 * N_STEPS)
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = TRPO.load(tmp_path / "model", device="cpu")

    assert_same(loaded.get_parameters(), model.get_parameters())
    for name in ("target_kl", "cg_damping", "cg_residual_tol", "n_steps", "num_timesteps", "_n_updates"):
        assert getattr(loaded, name) == getattr(model, name), name
    states = observations(model)
    for x, y in zip(model.predict(states, deterministic=True), loaded.predict(states, deterministic=True), strict=True):
        assert np.array_equal(x, y) if x is not None else y is None


@pytest.mark.parametrize("schedule", [False, True])
def test_a_loaded_model_goes_on_as_the_saved_one(schedule: bool, tmp_path: Path) -> None:
    rates: dict[str, Any] = {}
    if schedule:
        rates = {"target_kl": lambda progress: 0.02 * progress, "learning_rate": lambda progress: 1e-3 * progress}
    model = make("discrete", **rates).learn(2 * N_STEPS)
    model.save(tmp_path / "model.zip")
    loaded = TRPO.load(tmp_path / "model.zip", env=WalkEnv(SPACES["discrete"]), device="cpu", trust=schedule)

    logs = []
    for run in (model, loaded):
        run.set_random_seed(1)
        run._last_obs = None  # start both with a reset
        run.learn(3 * N_STEPS, reset_num_timesteps=False)
        assert run.num_timesteps == 5 * N_STEPS
        logs.append({key: value for key, value in run.logger.name_to_value.items() if key.startswith("train")})
    assert_same(loaded.get_parameters(), model.get_parameters())
    assert logs[0] == logs[1]
    assert logs[0]["train/target_kl"] == (0.0 if schedule else 0.03)


def test_a_model_goes_through_a_file_object() -> None:
    model = make().learn(N_STEPS)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)

    assert_same(TRPO.load(file, device="cpu").get_parameters(), model.get_parameters())


def test_arguments_can_be_changed_at_load(tmp_path: Path) -> None:
    make(target_kl=0.02).learn(N_STEPS).save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=WalkEnv(SPACES["box"]), device="cpu", target_kl=1e-3, n_steps=8)
    loaded.learn(8)

    assert loaded.target_kl == loaded.logger.name_to_value["train/target_kl"] == 1e-3
    assert loaded.num_timesteps == 8
    assert 0.0 < loaded.logger.name_to_value["train/kl_divergence_loss"] <= 1e-3


def test_saved_objects_can_be_replaced_at_load(tmp_path: Path) -> None:
    make(critic_method="minibatch", learning_rate=lambda progress: 1e-3 * progress).save(tmp_path / "model")
    replaced = {"learning_rate": 0.5, "lr_schedule": lambda _: 0.5, "target_kl": 1e-3}
    loaded = TRPO.load(tmp_path / "model", env=WalkEnv(SPACES["box"]), device="cpu", custom_objects=replaced)
    loaded.learn(N_STEPS)

    assert loaded.logger.name_to_value["train/learning_rate"] == 0.5
    assert loaded.logger.name_to_value["train/target_kl"] == 1e-3


def test_a_loaded_model_takes_another_number_of_environments(tmp_path: Path) -> None:
    make("discrete").save(tmp_path / "model")
    env = make_vec_env(lambda: WalkEnv(SPACES["discrete"]), n_envs=3)

    assert TRPO.load(tmp_path / "model", env=env, device="cpu").learn(1).num_timesteps == 3 * N_STEPS


@pytest.mark.parametrize(
    ("name", "value"), [("target_kl", -1), ("n_steps", 1.5), ("gamma", 2.0), ("sub_sampling_factor", N_STEPS + 1)]
)
def test_a_bad_argument_at_load_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    make().save(tmp_path / "model")

    with pytest.raises(ValueError, match=rf"{name}={value}\b"):
        TRPO.load(tmp_path / "model", device="cpu", **{name: value})


def test_parameters_go_from_model_to_model() -> None:
    trained, fresh = make().learn(2 * N_STEPS), make(seed=1)
    assert not th.equal(fresh.policy.action_net.weight, trained.policy.action_net.weight)
    fresh.set_parameters(trained.get_parameters(), device="cpu")

    assert_same(fresh.get_parameters(), trained.get_parameters())
    states = observations(trained)
    assert np.array_equal(fresh.predict(states, deterministic=True)[0], trained.predict(states, deterministic=True)[0])


def test_the_environment_can_be_replaced() -> None:
    model = make("discrete").learn(N_STEPS)
    env = make_vec_env(lambda: WalkEnv(SPACES["discrete"]), n_envs=1)
    model.set_env(env)

    assert model.get_env() is env
    assert model.learn(N_STEPS, reset_num_timesteps=False).num_timesteps == 2 * N_STEPS
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(IdentityEnv(3))


@pytest.mark.parametrize("action", SPACES)
def test_deterministic_predictions_are_modes_and_others_vary(action: str) -> None:
    model = make(action)
    states = {True: np.repeat(observations(model, 1), 64, axis=0), False: observations(model, 1)[0]}

    modes, _ = model.predict(states[True], deterministic=True)
    samples, _ = model.predict(states[True])
    assert modes.shape == samples.shape == (64, *SPACES[action].shape)
    assert (modes == modes[0]).all()
    assert not (samples == samples[0]).all()
    single, _ = model.predict(states[False], deterministic=True)
    assert np.allclose(single, modes[0])


# ---- files of sb3-contrib


@pytest.mark.parametrize(
    ("action", "factor", "kwargs"),
    [
        ("box", 3, {}),
        ("box", 3, {"use_sde": True}),
        ("box", 3, {"policy": "MultiInputPolicy"}),
        ("multi_binary", 4, {}),
        ("discrete", 1, {}),
        ("multi_discrete", 1, {}),
    ],
)
@pytest.mark.parametrize("source", [Path, lambda path: io.BytesIO(path.read_bytes())], ids=["path", "file"])
def test_a_model_of_sb3_contrib_goes_on_in_units_of_the_joint_kl(
    action: str, factor: int, kwargs: dict[str, Any], source: Callable[[Path], Any], tmp_path: Path
) -> None:
    theirs = make(action, sb3_contrib.TRPO, target_kl=0.02, cg_damping=0.3, **kwargs).learn(2 * N_STEPS)
    theirs.save(tmp_path / "theirs.zip")
    changes = f"target_kl=0.02 -> {0.02 * factor}, cg_damping=0.3 -> {0.3 * factor:.12g}"
    with pytest.warns(UserWarning, match=f"sb3-contrib.*{changes}"):
        ours = TRPO.load(source(tmp_path / "theirs.zip"), env=theirs.get_env(), device="cpu")

    assert_same(ours.get_parameters(), theirs.get_parameters())
    assert ours.target_kl == pytest.approx(0.02 * factor)
    assert ours.cg_damping == pytest.approx(0.3 * factor)
    states = observations(ours)
    assert np.array_equal(ours.predict(states, deterministic=True)[0], theirs.predict(states, deterministic=True)[0])
    ours.learn(N_STEPS, reset_num_timesteps=False)
    assert ours.num_timesteps == 3 * N_STEPS
    assert ours.logger.name_to_value["train/target_kl"] == pytest.approx(0.02 * factor)

    ours.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = TRPO.load(tmp_path / "ours", device="cpu")
    assert (again.target_kl, again.cg_damping) == (ours.target_kl, ours.cg_damping)


def test_arguments_given_at_load_are_in_our_units_already(tmp_path: Path) -> None:
    make("box", sb3_contrib.TRPO, target_kl=0.02, cg_damping=0.3).save(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="cg_damping"):
        ours = TRPO.load(tmp_path / "theirs", device="cpu", target_kl=0.07)

    assert ours.target_kl == 0.07
    assert ours.cg_damping == pytest.approx(0.9)
