"""
Hashes of all parameters after eight updates: whether two versions of the code compute the same thing, bit for bit.

    python benchmarks/parameter_hashes.py --out before.json        # under a minute on one core
    python benchmarks/parameter_hashes.py --compare before.json    # fails if a hash differs
    python benchmarks/parameter_hashes.py --only box gsde          # some configurations

Uses the public API alone, so that the file can be run against any commit (set PYTHONPATH to its checkout). One thread, on
the CPU. Hashes differ between versions of torch and between kinds of CPU: compare only runs on one machine.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo import NPG, TRPO, MaskableTRPO, RecurrentTRPO

N_UPDATES, N_STEPS, N_ENVS = 8, 32, 2
VECTOR = spaces.Box(-2.0, 2.0, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
DICT = spaces.Dict({"vector": VECTOR, "gear": spaces.Discrete(3)})
DICT_IMAGE = spaces.Dict({"vector": VECTOR, "image": IMAGE})
BOX = spaces.Box(-0.5, 1.0, (2,))
DISCRETE = spaces.Discrete(4)
MULTI_DISCRETE = spaces.MultiDiscrete([2, 3])
MULTI_BINARY = spaces.MultiBinary(3)
SMALL = {"policy_kwargs": {"net_arch": [16, 16]}}
LSTM = {"policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 8}}

#: Name ↦ algorithm, policy, observation space, action space, further arguments of the algorithm.
CONFIGURATIONS: dict[str, tuple[type[TRPO], str, spaces.Space, spaces.Space, dict[str, Any]]] = {
    "box": (TRPO, "MlpPolicy", VECTOR, BOX, SMALL),
    "discrete": (TRPO, "MlpPolicy", VECTOR, DISCRETE, SMALL),
    "multi_discrete": (TRPO, "MlpPolicy", VECTOR, MULTI_DISCRETE, SMALL),
    "multi_binary": (TRPO, "MlpPolicy", VECTOR, MULTI_BINARY, SMALL),
    "dict": (TRPO, "MultiInputPolicy", DICT, BOX, SMALL),
    "dict_with_image": (TRPO, "MultiInputPolicy", DICT_IMAGE, DISCRETE, SMALL),
    "images": (TRPO, "CnnPolicy", IMAGE, DISCRETE, SMALL),
    "images_shared_extractor": (
        TRPO,
        "CnnPolicy",
        IMAGE,
        BOX,
        {"policy_kwargs": {"net_arch": [16], "share_features_extractor": True}},
    ),
    "gsde": (TRPO, "MlpPolicy", VECTOR, BOX, {"use_sde": True, "sde_sample_freq": 4, **SMALL}),
    "action_bound_tanh": (TRPO, "MlpPolicy", VECTOR, BOX, {"action_bound": "tanh", **SMALL}),
    "vec_normalize": (TRPO, "MlpPolicy", VECTOR, BOX, SMALL),
    "several_steps": (TRPO, "MlpPolicy", VECTOR, BOX, {"n_policy_updates": 3, **SMALL}),
    "several_minibatches": (
        TRPO,
        "MlpPolicy",
        VECTOR,
        DISCRETE,
        {"n_policy_updates": 2, "policy_batch_size": 32, **SMALL},
    ),
    "return_scaling": (TRPO, "MlpPolicy", VECTOR, BOX, {"return_scaling": True, **SMALL}),
    "chunks": (TRPO, "MlpPolicy", VECTOR, BOX, {"max_batch_size": 20, **SMALL}),
    "sub_sampling": (TRPO, "MlpPolicy", VECTOR, BOX, {"sub_sampling_factor": 3, **SMALL}),
    "minibatch_critic": (
        TRPO,
        "MlpPolicy",
        VECTOR,
        BOX,
        {"critic_method": "minibatch", "batch_size": 24, "n_critic_updates": 3, **SMALL},
    ),
    "several_critic_steps": (TRPO, "MlpPolicy", VECTOR, BOX, {"n_critic_steps": 3, "critic_damping": 0.1, **SMALL}),
    "ent_coef": (TRPO, "MlpPolicy", VECTOR, DISCRETE, {"ent_coef": 0.01, **SMALL}),
    "plain_conjugate_gradients": (TRPO, "MlpPolicy", VECTOR, BOX, {"cg_preconditioner": None, **SMALL}),
    "npg": (NPG, "MlpPolicy", VECTOR, BOX, SMALL),
    "npg_step_size": (NPG, "MlpPolicy", VECTOR, DISCRETE, {"actor_step_size": 0.05, **SMALL}),
    "recurrent": (RecurrentTRPO, "MlpLstmPolicy", VECTOR, BOX, {"n_steps": N_STEPS, **LSTM}),
    "recurrent_dict": (RecurrentTRPO, "MultiInputLstmPolicy", DICT, DISCRETE, {"n_steps": N_STEPS, **LSTM}),
    "maskable": (MaskableTRPO, "MlpPolicy", VECTOR, DISCRETE, SMALL),
    "maskable_dict": (MaskableTRPO, "MultiInputPolicy", DICT, MULTI_DISCRETE, SMALL),
    "two_processes": (TRPO, "MlpPolicy", VECTOR, BOX, {**SMALL}),
}


class Wander(gym.Env):
    """Random observations; the action moves the reward, and episodes end or are cut off at random."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        draw = self.np_random.random()
        reward = float(np.cos(np.sum(action))) + 0.1 * draw
        return self.observation_space.sample(), reward, draw < 0.05, draw > 0.95, {}

    def action_masks(self) -> np.ndarray:
        """Forbid the first choice of every component in three steps of ten."""
        sizes = self.action_space.nvec if isinstance(self.action_space, spaces.MultiDiscrete) else [self.action_space.n]
        masks = [np.ones(size, dtype=bool) for size in sizes]
        for mask in masks:
            mask[0] = self.np_random.random() > 0.3
        return np.concatenate(masks)


def train(name: str) -> str:
    """Train one configuration in this process, and return the hash of its parameters."""
    algorithm, policy, observation_space, action_space, kwargs = CONFIGURATIONS[name]
    env = DummyVecEnv([lambda: Wander(deepcopy(observation_space), deepcopy(action_space))] * N_ENVS)
    if name == "vec_normalize":
        env = VecNormalize(env)
    if algorithm in (TRPO, NPG):  # defaults that have changed
        kwargs = {**kwargs, "policy_kwargs": {"log_std_init": 0.0, **kwargs["policy_kwargs"]}}
    model = algorithm(
        policy, env, seed=0, device="cpu", **{"n_steps": N_STEPS, "target_kl": 0.05, "cg_residual_tol": 0.05, **kwargs}
    )
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    model.learn(N_UPDATES * N_STEPS * N_ENVS * n_processes)
    return hash_of(model)


def hash_of(model: OnPolicyAlgorithm) -> str:
    """SHA-256 of the names, shapes and bytes of all parameters and buffers of the policy."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.policy.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_two_processes(name: str) -> str:
    """Train in two processes, and return the hash of the first."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hash.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--worker", name, "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return str(json.loads(out.read_text(encoding="utf-8"))[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--out", type=Path, help="write the hashes to this file")
    parser.add_argument("--compare", type=Path, help="compare with the hashes of this file; exit with 1 if one differs")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), help="configurations")
    parser.add_argument("--worker", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    if arguments.worker:
        value = train(arguments.worker)
        if os.environ["RANK"] == "0":
            arguments.out.write_text(json.dumps({arguments.worker: value}), encoding="utf-8")
        return 0
    expected = json.loads(arguments.compare.read_text(encoding="utf-8")) if arguments.compare else {}
    hashes, n_different = {}, 0
    for name in arguments.only:
        hashes[name] = train_two_processes(name) if name == "two_processes" else train(name)
        is_different = name in expected and hashes[name] != expected[name]
        n_different += is_different
        print(f"{hashes[name]}  {name}{'  DIFFERENT' if is_different else ''}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    if arguments.compare:
        print(f"{n_different} of {len(hashes)} differ from {arguments.compare}")
    return int(n_different > 0)


if __name__ == "__main__":
    sys.exit(main())
