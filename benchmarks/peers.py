"""
What the benchmarks share: ours and its peers with the same environments, the published settings, and how to write results.

Import this module before torch: it keeps every library to one thread.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

import sb3_trpo
from sb3_trpo.saving.sb3_contrib import joint_kl_arguments
from sb3_trpo.zoo.tianshou_peer import TIANSHOU_SHAPE

th.set_num_threads(1)

RESULTS = Path(__file__).parent / "results"
#: What the figures depend on.
PACKAGES = ["stable_baselines3", "sb3_contrib", "tianshou", "torch", "numpy", "gymnasium", "mujoco", "envpool"]

#: RL Zoo's settings of sb3-contrib's TRPO for MuJoCo tasks. Its KL is averaged over action dimensions.
ZOO_TRPO: dict[str, Any] = {
    "n_steps": 1024,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
    "target_kl": 0.04,
}

_ZOO_NETWORK = {
    "log_std_init": -2,
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "net_arch": {"pi": [256, 256], "vf": [256, 256]},
}
#: RL Zoo's settings of SB3's PPO: number of environments, and arguments.
ZOO_PPO: dict[str, tuple[int, dict[str, Any]]] = {
    "CartPole-v1": (
        8,
        {
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "learning_rate": LinearSchedule(0.001, 0.0, 1.0),
            "clip_range": LinearSchedule(0.2, 0.0, 1.0),
        },
    ),
    "HalfCheetah-v5": (
        1,
        {
            "batch_size": 64,
            "n_steps": 512,
            "gamma": 0.98,
            "learning_rate": 2.0633e-05,
            "ent_coef": 0.000401762,
            "clip_range": 0.1,
            "n_epochs": 20,
            "gae_lambda": 0.92,
            "max_grad_norm": 0.8,
            "vf_coef": 0.58096,
            "policy_kwargs": _ZOO_NETWORK,
        },
    ),
    "Humanoid-v5": (
        1,
        {
            "batch_size": 256,
            "n_steps": 512,
            "gamma": 0.95,
            "learning_rate": 3.56987e-05,
            "ent_coef": 0.00238306,
            "clip_range": 0.3,
            "n_epochs": 5,
            "gae_lambda": 0.9,
            "max_grad_norm": 2,
            "vf_coef": 0.431892,
            "policy_kwargs": _ZOO_NETWORK,
        },
    ),
}

#: The same problem in our terms: its KL is the joint one already, its damping 0.1 is fixed.
TIANSHOU_AS_OURS: dict[str, Any] = {
    "n_steps": TIANSHOU_SHAPE["n_steps"],
    "batch_size": 1024,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "target_kl": 0.01,
    "cg_damping": 0.1,
    "policy_kwargs": {"log_std_init": -0.5},
}


def as_ours(settings: dict[str, Any], action_space: spaces.Space) -> dict[str, Any]:
    """Settings of sb3-contrib's TRPO in terms of the joint KL."""
    return {**settings, **joint_kl_arguments(settings, action_space)}


def make_env(task: str, n_envs: int, *, seed: int = 0, normalize: bool = False, gamma: float = 0.99) -> VecEnv:
    """Monitor-wrapped environments, normalised on request."""
    env: VecEnv = make_vec_env(task, n_envs, seed=seed)
    return VecNormalize(env, gamma=gamma) if normalize else env


class RandomEnv(gym.Env):
    """Random observations and rewards: the shapes of a task without its cost."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = 200) -> None:
        self.observation_space, self.action_space, self.length = observation_space, action_space, length
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return self._observe(), float(self.np_random.normal()), self._steps >= self.length, False, {}

    def _observe(self) -> Any:
        space = self.observation_space
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape, dtype=np.uint8)
        return self.np_random.normal(size=space.shape).astype(np.float32)


def random_env(observation_space: spaces.Space, action_space: spaces.Space, n_envs: int) -> VecEnv:
    return make_vec_env(lambda: RandomEnv(observation_space, action_space), n_envs, seed=0)


def ours(env: VecEnv, policy: str = "MlpPolicy", **settings: Any) -> sb3_trpo.TRPO:
    return sb3_trpo.TRPO(policy, env, seed=0, device="cpu", **settings)


def contrib(env: VecEnv, policy: str = "MlpPolicy", **settings: Any) -> sb3_contrib.TRPO:
    return sb3_contrib.TRPO(policy, env, seed=0, device="cpu", **settings)


def ppo(env: VecEnv, task: str) -> stable_baselines3.PPO:
    return stable_baselines3.PPO("MlpPolicy", env, seed=0, device="cpu", **ZOO_PPO[task][1])


def begin(model: OnPolicyAlgorithm) -> Any:
    """Get ready for collecting and updating by hand, as ``learn`` does; return the callback."""
    _, callback = model._setup_learn(10**9, None)
    callback.on_training_start(locals(), globals())
    return callback


def load_into_tianshou(policy: ActorCriticPolicy, algorithm: Any) -> None:
    """Give Tianshou's networks the weights of an SB3 policy of the same shape."""
    pi, vf = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
    actor = [policy.log_std, *pi.parameters(), *policy.action_net.parameters()]
    critic = [*vf.parameters(), *policy.value_net.parameters()]
    with th.no_grad():
        for theirs, own in ((algorithm.policy.actor, actor), (algorithm.critic, critic)):
            for parameter, value in zip(theirs.parameters(), own, strict=True):
                parameter.copy_(value.reshape(parameter.shape))


def machine() -> dict[str, Any]:
    """Processor and versions; nothing that identifies the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["sb3_trpo"] = sb3_trpo.__version__
    versions["python"] = platform.python_version()
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": th.get_num_threads(), "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def update_json(path: Path | None, section: str, name: str, value: Any) -> None:
    """Put one result into a JSON file at once, so that a stop loses nothing."""
    if path is None:
        return
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    data["machine"] = machine()
    data.setdefault(section, {})[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
