"""An exported policy acts as the model does."""

import pickletools
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_trpo import TRPO, RecurrentTRPO, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")

BOX = spaces.Box(-2.0, 3.0, (3,))
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
CASES: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "box": (BOX, spaces.Box(-0.1, 0.2, (2, 2)), {}),
    "gsde_squashed": (BOX, spaces.Box(-3.0, 1.0, (2,)), {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "tanh": (BOX, spaces.Box(-0.1, 0.2, (2, 2)), {"action_bound": "tanh"}),
    "clip": (BOX, spaces.Box(-0.1, 0.2, (2,)), {"action_bound": "clip"}),
    "discrete": (spaces.Discrete(5), spaces.Discrete(4), {}),
    "multi_discrete": (spaces.MultiDiscrete([3, 2]), spaces.MultiDiscrete([2, 5]), {}),
    "multi_binary": (BOX, spaces.MultiBinary(4), {}),
    "image": (IMAGE, spaces.Discrete(3), {}),
    "dict": (spaces.Dict({"place": BOX, "gear": spaces.Discrete(3)}), spaces.Box(-1.0, 1.0, (2,)), {}),
}
POLICIES = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}


class Samples(gym.Env):
    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(np.mean(action)), False, False, {}


def train(name: str, normalize: bool) -> TRPO:
    observation_space, action_space, kwargs = CASES[name]
    env: VecEnv = DummyVecEnv([lambda: Samples(observation_space, action_space)])
    if normalize:
        env = VecNormalize(env, norm_obs_keys=["place"] if name == "dict" else None, clip_obs=1.5)
    policy = POLICIES.get(name, "MlpPolicy")
    return TRPO(policy, env, n_steps=16, seed=0, device="cpu", **kwargs).learn(32)


@pytest.mark.parametrize(
    ("name", "normalize"), [*((name, False) for name in CASES), ("box", True), ("dict", True), ("gsde_squashed", True)]
)
def test_an_exported_policy_acts_as_the_model(name: str, normalize: bool, tmp_path: Path) -> None:
    model = train(name, normalize)
    export_onnx(model, tmp_path / "policy.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    CASES[name][0].seed(5)
    for n in (1, 7):
        samples = [CASES[name][0].sample() for _ in range(n)]
        batch: Any = np.stack(samples) if name != "dict" else {key: np.stack([s[key] for s in samples]) for key in samples[0]}
        normalizer = model.get_vec_normalize_env()
        expected, _ = model.predict(batch if normalizer is None else normalizer.normalize_obs(batch), deterministic=True)
        (actions,) = session.run(["action"], batch if name == "dict" else {"observation": batch})
        assert actions.shape == expected.shape
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)


def test_an_exported_file_holds_no_pickle_and_is_written_whole(tmp_path: Path) -> None:
    model = train("box", False)
    export_onnx(model, tmp_path / "policy.onnx")

    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]
    with pytest.raises(ValueError, match=r".+"):
        list(pickletools.genops((tmp_path / "policy.onnx").read_bytes()))
    assert not model.policy.training


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)

    with pytest.raises(ImportError, match=r"\.\[onnx\]"):
        export_onnx(train("box", False), tmp_path / "policy.onnx")


def test_export_onnx_refuses_a_recurrent_policy(tmp_path: Path) -> None:
    model = RecurrentTRPO("MlpLstmPolicy", "CartPole-v1", n_steps=16, device="cpu")
    with pytest.raises(ValueError, match=r"^model=RecurrentTRPO is not allowed: .* observations before$"):
        export_onnx(model, tmp_path / "policy.onnx")
    assert not any(tmp_path.iterdir())
