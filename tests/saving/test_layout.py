"""The memory layout of the last observations is restored: a convolution's last bits depend on it."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo import TRPO
from sb3_trpo.saving.layout import strides_of, with_strides


class Pictures(gym.Env):
    """Random images, channels last as cameras give them."""

    def __init__(self, channels: int) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (36, 36, channels), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._picture(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._picture(), float(action.sum()), bool(self.np_random.random() < 0.1), False, {}

    def _picture(self) -> np.ndarray:
        return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resumed_training_on_images_equals_the_uninterrupted_one(channels: int, tmp_path: Path) -> None:
    def env() -> Any:
        return make_vec_env(lambda: Pictures(channels), 3)

    def parameters(model: TRPO) -> np.ndarray:
        return np.concatenate([value.detach().numpy().ravel() for value in model.policy.parameters()])

    whole = TRPO("CnnPolicy", env(), n_steps=4, seed=0, device="cpu", policy_kwargs={"normalize_images": True})
    whole.learn(24)
    whole.save_checkpoint(tmp_path / "checkpoint.zip")
    strides = whole._last_obs.strides  # type: ignore[union-attr]
    whole.learn(24, reset_num_timesteps=False)
    resumed = TRPO.resume(tmp_path / "checkpoint.zip", env(), device="cpu")
    assert resumed._last_obs.strides == strides  # type: ignore[union-attr]
    resumed.learn(24, reset_num_timesteps=False)
    assert np.array_equal(whole.rollout_buffer.actions, resumed.rollout_buffer.actions)
    assert np.array_equal(parameters(whole), parameters(resumed))


ARRAYS = {
    "c": np.arange(24.0).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(0, 2, 1),
    "one_channel": np.arange(6, dtype=np.uint8).reshape(2, 3, 1).transpose(0, 2, 1),
    "scalar": np.array(3.0),
    "empty": np.zeros((0, 3)).T,
    "nan": np.array([[np.nan, 1.0], [2.0, 3.0]]).T,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_with_strides_restores_values_and_layout(name: str) -> None:
    array = ARRAYS[name]
    copy = with_strides(np.ascontiguousarray(array).reshape(array.shape), strides_of(array))
    assert np.array_equal(copy, array, equal_nan=array.dtype.kind == "f")
    assert copy.dtype == array.dtype
    if array.size:
        assert copy.strides == array.strides
    (keyed,) = with_strides({"key": array}, strides_of({"key": array})).values()
    assert keyed.tobytes() == array.tobytes()


@pytest.mark.parametrize("array", [np.arange(12)[::2], np.arange(6)[::-1], np.broadcast_to(np.arange(3), (2, 3))])
def test_with_strides_keeps_the_values_of_arrays_with_gaps_or_overlaps(array: np.ndarray) -> None:
    assert with_strides(array.copy(), strides_of(array)).tobytes() == array.tobytes()


@pytest.mark.parametrize("strides", [(8, 8, 8), (10**9, 8, 8), (-8, 8, 8), (8,), ("a", 1, 2), (0, 0, 0), [96, 32, 8], 7])
def test_with_strides_ignores_those_that_do_not_fit(strides: Any) -> None:
    array = ARRAYS["c"]
    assert with_strides(array, strides).tobytes() == array.tobytes()
