"""Statistics of float16 observations under ``VecNormalize``, against NumPy's moments in float64."""

import copy
import pickle
import pickletools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize, sync_envs_normalization

from sb3_trpo import TRPO, load_vec_normalize
from sb3_trpo.rollouts.half_precision import WideRunningMeanStd, widen_moments

pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
RANGES = {"unit": (-1.0, 1.0), "thousandths": (-1e-3, 1e-3), "hundreds": (-200.0, 200.0), "far_from_0": (100.0, 101.0)}
N_STEPS, N_ENVS = 16, 4


class Uniform(gym.Env):
    """Uniform observations, which it keeps."""

    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space
        self.seen: list[Any] = []

    def _observe(self) -> Any:
        self.seen.append(self.observation_space.sample())
        return copy.deepcopy(self.seen[-1])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.observation_space.seed(seed)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(), float(action[0]), False, False, {}


class Passing(VecEnvWrapper):
    """A wrapper that has no lean counterpart."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class OwnNormalize(VecNormalize):
    """A subclass, which steps by SB3's own methods."""


def box(limits: tuple[float, float] = (-200.0, 200.0), dtype: Any = np.float16) -> spaces.Box:
    return spaces.Box(*limits, (3,), dtype)


def make(space: spaces.Space, normalize: Any = VecNormalize, **kwargs: Any) -> TRPO:
    env = normalize(DummyVecEnv([lambda: Uniform(copy.deepcopy(space))] * N_ENVS), **kwargs)
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    return TRPO(policy, env, n_steps=N_STEPS, seed=0, device="cpu", policy_kwargs={"net_arch": [4]})


def seen(model: TRPO) -> np.ndarray:
    """All observations, by environment."""
    return np.array([env.seen for env in model.env.unwrapped.envs])


def assert_moments(moments: RunningMeanStd, observations: np.ndarray) -> None:
    """NumPy's of all observations, and of the 1e-4 zeros with variance 1 that SB3 begins with."""
    samples, first = observations.reshape(-1, *observations.shape[2:]).astype(np.float64), 1e-4
    count = len(samples) + first
    mean = samples.sum(axis=0) / count
    variance = (np.square(samples - mean).sum(axis=0) + first * (1.0 + np.square(mean))) / count
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.var, variance, rtol=1e-10)
    assert moments.count == pytest.approx(count)


@pytest.mark.parametrize("normalize", [VecNormalize, OwnNormalize, lambda env: VecNormalize(Passing(env))])
@pytest.mark.parametrize("limits", RANGES.values(), ids=RANGES)
def test_learn_normalizes_float16_by_float64_moments(limits, normalize):
    model = make(box(limits), normalize)
    model.learn(3 * N_STEPS * N_ENVS)
    assert_moments(model.env.obs_rms, seen(model))


def test_learn_normalizes_float16_parts_of_a_dict_by_float64_moments():
    space = spaces.Dict({"narrow": box(), "usual": box(dtype=np.float32), "other": box()})
    model = make(space, norm_obs_keys=["narrow", "usual"])
    model.learn(2 * N_STEPS * N_ENVS)
    narrow = np.array([[each["narrow"] for each in env.seen] for env in model.env.unwrapped.envs])
    assert_moments(model.env.obs_rms["narrow"], narrow)


def test_sb3s_loop_normalizes_float16_by_float64_moments():
    class OwnBuffer(type(make(box()).rollout_buffer)):
        def add(self, *args: Any, **kwargs: Any) -> None:
            super().add(*args, **kwargs)

    env = VecNormalize(DummyVecEnv([lambda: Uniform(box())] * N_ENVS))
    model = TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu", rollout_buffer_class=OwnBuffer)
    assert not model.adapter.fits_loop(model.rollout_buffer)
    model.learn(2 * N_STEPS * N_ENVS)
    assert_moments(env.obs_rms, seen(model))


def test_every_layer_of_normalization_is_widened():
    model = make(box(), lambda env: VecNormalize(VecNormalize(env), norm_obs=False))
    model.learn(N_STEPS * N_ENVS)
    assert_moments(model.env.venv.obs_rms, seen(model))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_types_have_sb3s_moments_bit_for_bit(dtype):
    batches = np.random.default_rng(0).normal(3.0, 2.0, (20, 4, 3)).astype(dtype)
    ours, sb3s = WideRunningMeanStd(shape=(3,)), RunningMeanStd(shape=(3,))
    for batch in batches:
        ours.update(batch)
        sb3s.update(batch)
    np.testing.assert_array_equal([ours.mean, ours.var], [sb3s.mean, sb3s.var])


class TestWidenMoments:
    def widened(self) -> VecNormalize:
        env = VecNormalize(DummyVecEnv([lambda: Uniform(box())]))
        shared = env.obs_rms
        widen_moments(env)
        assert env.obs_rms is shared
        assert type(shared) is WideRunningMeanStd
        env.reset()
        return env

    def test_files_name_sb3s_class_alone(self, tmp_path):
        env = self.widened()
        env.save(str(tmp_path / "env.pkl"))
        contents = (tmp_path / "env.pkl").read_bytes()
        assert not any("sb3_trpo" in str(argument) for _, argument, _ in pickletools.genops(contents))
        venv = DummyVecEnv([lambda: Uniform(box())])
        for loaded in (VecNormalize.load(str(tmp_path / "env.pkl"), venv), load_vec_normalize(tmp_path / "env.pkl", venv)):
            assert type(loaded.obs_rms) is RunningMeanStd
            np.testing.assert_array_equal(loaded.obs_rms.mean, env.obs_rms.mean)
            assert loaded.obs_rms.count == env.obs_rms.count

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_every_protocol_gives_sb3s_class(self, protocol):
        moments = self.widened().obs_rms
        again = pickle.loads(pickle.dumps(moments, protocol))
        assert type(again) is RunningMeanStd
        np.testing.assert_array_equal(again.mean, moments.mean)

    def test_copies_for_evaluation_are_sb3s(self):
        env = self.widened()
        other = VecNormalize(DummyVecEnv([lambda: Uniform(box())]), training=False)
        sync_envs_normalization(env, other)
        assert type(other.obs_rms) is RunningMeanStd
        np.testing.assert_array_equal(other.obs_rms.var, env.obs_rms.var)

    def test_subclasses_are_left_alone(self):
        class Own(RunningMeanStd):
            pass

        env = VecNormalize(DummyVecEnv([lambda: Uniform(box())]))
        env.obs_rms = Own(shape=(3,))
        widen_moments(env)
        assert type(env.obs_rms) is Own


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the reset before the statistics are restored
def test_resumed_training_has_the_moments_of_an_uninterrupted_one(tmp_path):
    model = make(box())
    model.learn(2 * N_STEPS * N_ENVS)
    model.save_checkpoint(tmp_path / "checkpoint")
    resumed = TRPO.resume(tmp_path / "checkpoint", make(box()).env)
    for each in (model, resumed):
        each.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
    np.testing.assert_array_equal(resumed.env.obs_rms.var, model.env.obs_rms.var)
    np.testing.assert_array_equal(resumed.env.obs_rms.mean, model.env.obs_rms.mean)


def test_saved_during_learn_it_needs_no_class_of_this_package(tmp_path):
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            self.model.get_vec_normalize_env().save(str(tmp_path / "env.pkl"))
            return True

    model = make(box())
    evaluated = VecNormalize(DummyVecEnv([lambda: Monitor(gym.wrappers.TimeLimit(Uniform(box()), 5))]), training=False)
    model.learn(N_STEPS * N_ENVS, callback=[Save(), EvalCallback(evaluated, eval_freq=4, n_eval_episodes=1, verbose=0)])
    loaded = VecNormalize.load(str(tmp_path / "env.pkl"), DummyVecEnv([lambda: Uniform(box())]))
    assert type(loaded.obs_rms) is RunningMeanStd
    np.testing.assert_array_equal(loaded.obs_rms.mean, model.env.obs_rms.mean)
