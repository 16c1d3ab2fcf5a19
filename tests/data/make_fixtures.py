"""
Write the models and checkpoints that later versions must load, and the predictions they gave.

    git worktree add --detach ../base 3440a56
    PYTHONPATH=../base python tests/data/make_fixtures.py tests/data/3440a56

For each case, ``NAME.zip`` is a file of ``save``, ``NAME_checkpoint.zip`` one of ``save_checkpoint`` after the same training,
and ``predictions.npz`` holds observations, and the deterministic actions for them. Uses the public API alone.
"""

import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_trpo import NPG, TRPO, MaskableTRPO, RecurrentTRPO

N_ENVS, N_STEPS, N_PREDICTIONS = 2, 16, 4
VECTOR = spaces.Box(-2.0, 2.0, (3,))
#: The smallest that SB3's NatureCNN takes.
IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
DICT = spaces.Dict({"vector": VECTOR, "gear": spaces.Discrete(3)})
BOX = spaces.Box(np.array([-0.5, -2.0], np.float32), np.array([1.0, 3.0], np.float32))
DISCRETE = spaces.Discrete(4)
MULTI_DISCRETE = spaces.MultiDiscrete([2, 3])
MULTI_BINARY = spaces.MultiBinary(3)
SMALL = {"policy_kwargs": {"net_arch": [8]}}
#: One extractor for actor and critic: NatureCNN is most of the file.
SMALL_CNN = {
    "policy_kwargs": {
        "net_arch": [],
        "features_extractor_kwargs": {"features_dim": 4},
        "share_features_extractor": True,
    }
}
LSTM = {"policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 6}}
SCHEDULES = {"learning_rate": LinearSchedule(1e-3, 1e-4, 0.5), "target_kl": LinearSchedule(0.05, 0.01, 1.0)}


class Case(NamedTuple):
    """
    A model to train and save.

    :param algorithm: its class
    :param policy: name of the policy
    :param observation_space: of the environments
    :param action_space: of the environments
    :param kwargs: further arguments of the algorithm
    :param wrap: wrapper of the vectorized environment
    :param kinds: files to write: ``"model"``, ``"checkpoint"``
    """

    algorithm: type[BaseAlgorithm]
    policy: str = "MlpPolicy"
    observation_space: spaces.Space = VECTOR
    action_space: spaces.Space = BOX
    kwargs: dict[str, Any] = SMALL
    wrap: Callable[[VecEnv], VecEnv] = lambda env: env
    kinds: tuple[str, ...] = ("model", "checkpoint")

    @property
    def loader(self) -> type[TRPO]:
        """The class of this package that loads the file."""
        return TRPO if self.algorithm is sb3_contrib.TRPO else self.algorithm

    def make_env(self) -> VecEnv:
        """Return the environments, made in the same way each time."""
        env = DummyVecEnv([lambda: Wander(deepcopy(self.observation_space), deepcopy(self.action_space))] * N_ENVS)
        return self.wrap(env)


def frame_stack(env: VecEnv) -> VecEnv:
    """Stack two observations, below the normalization."""
    return VecNormalize(VecFrameStack(env, 2))


MODEL, CHECKPOINT = ("model",), ("checkpoint",)
CASES: dict[str, Case] = {
    "box": Case(TRPO),
    "discrete": Case(TRPO, action_space=DISCRETE),
    "multi_discrete": Case(TRPO, action_space=MULTI_DISCRETE),
    "multi_binary": Case(TRPO, action_space=MULTI_BINARY),
    "discrete_observation": Case(TRPO, observation_space=spaces.Discrete(5), kinds=MODEL),
    "multi_binary_observation": Case(TRPO, observation_space=spaces.MultiBinary(4), kinds=MODEL),
    "dict": Case(TRPO, "MultiInputPolicy", DICT),
    "cnn": Case(TRPO, "CnnPolicy", IMAGE, BOX, SMALL_CNN),
    "gsde": Case(TRPO, kwargs={"use_sde": True, "sde_sample_freq": 4, **SMALL}),
    "tanh": Case(TRPO, kwargs={"action_bound": "tanh", **SMALL}, kinds=CHECKPOINT),
    "vec_normalize": Case(TRPO, wrap=VecNormalize),
    "vec_normalize_dict": Case(
        TRPO, "MultiInputPolicy", DICT, wrap=lambda env: VecNormalize(env, norm_obs_keys=["vector"]), kinds=CHECKPOINT
    ),
    "frame_stack": Case(TRPO, wrap=frame_stack, kinds=CHECKPOINT),
    "return_scaling": Case(TRPO, kwargs={"return_scaling": True, **SMALL}, kinds=CHECKPOINT),
    "minibatch_critic": Case(TRPO, kwargs={"critic_method": "minibatch", "batch_size": 16, **SMALL}, kinds=CHECKPOINT),
    "schedules": Case(TRPO, kwargs={**SCHEDULES, **SMALL}),
    "network": Case(
        TRPO, kwargs={"policy_kwargs": {"net_arch": {"pi": [8, 4], "vf": [6]}, "activation_fn": th.nn.ReLU}}, kinds=MODEL
    ),
    "npg": Case(NPG),
    "npg_step_size": Case(NPG, action_space=DISCRETE, kwargs={"actor_step_size": 0.05, **SMALL}, kinds=MODEL),
    "recurrent": Case(RecurrentTRPO, "MlpLstmPolicy", kwargs=LSTM),
    "recurrent_dict": Case(RecurrentTRPO, "MultiInputLstmPolicy", DICT, BOX, LSTM, kinds=CHECKPOINT),
    "maskable": Case(MaskableTRPO, action_space=DISCRETE),
    "maskable_dict": Case(MaskableTRPO, "MultiInputPolicy", DICT, MULTI_DISCRETE, kinds=MODEL),
    "maskable_multi_binary": Case(MaskableTRPO, action_space=MULTI_BINARY, kinds=MODEL),
    "contrib_box": Case(sb3_contrib.TRPO, kinds=MODEL),
    "contrib_discrete": Case(sb3_contrib.TRPO, action_space=DISCRETE, kinds=MODEL),
    "contrib_dict": Case(sb3_contrib.TRPO, "MultiInputPolicy", DICT, kinds=MODEL),
    "contrib_gsde": Case(sb3_contrib.TRPO, kwargs={"use_sde": True, **SMALL}, kinds=MODEL),
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
        """Forbid the first choice of the first component."""
        if isinstance(self.action_space, spaces.MultiDiscrete):
            sizes = self.action_space.nvec.tolist()
        elif isinstance(self.action_space, spaces.MultiBinary):
            sizes = [2] * int(self.action_space.n)
        else:
            sizes = [int(self.action_space.n)]
        return np.arange(sum(sizes)) > 0


def predict(model: BaseAlgorithm, observations: Any) -> np.ndarray:
    """
    Predict deterministically, with the LSTM's state carried along and with the masks that the algorithm takes.

    :param model: the model
    :param observations: as ``flatten_observations`` makes them: one array a key, ``""`` if the space is no Dict
    :return: one action a state
    """
    batch = observations.get("", observations)
    n_states = len(next(iter(observations.values())))
    if isinstance(model, MaskableTRPO):
        masks = Wander(model.observation_space, model.action_space).action_masks()
        return model.predict(batch, deterministic=True, action_masks=np.tile(masks, (n_states, 1)))[0]
    if not isinstance(model, RecurrentTRPO):
        return model.predict(batch, deterministic=True)[0]
    actions, state = [], None
    for step in range(n_states):
        one = {key: values[step : step + 1] for key, values in observations.items()}
        start = np.array([step in (0, n_states // 2)])
        action, state = model.predict(one.get("", one), state=state, episode_start=start, deterministic=True)
        actions.append(action[0])
    return np.stack(actions)


def as_arrays(observations: Any) -> dict[str, np.ndarray]:
    """Return observations as one array a key, ``""`` if the space is no Dict."""
    observations = observations if isinstance(observations, dict) else {"": observations}
    return {key: np.asarray(values) for key, values in observations.items()}


def sample(space: spaces.Space) -> dict[str, np.ndarray]:
    """Draw a batch of observations."""
    space = deepcopy(space)
    space.seed(1)
    draws = [as_arrays(space.sample()) for _ in range(N_PREDICTIONS)]
    return {key: np.stack([draw[key] for draw in draws]) for key in draws[0]}


def write(name: str, case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Train and save one case, and return its entries in ``predictions.npz``."""
    model = case.algorithm(
        case.policy, case.make_env(), seed=0, device="cpu", **{"n_steps": N_STEPS, "gamma": 0.9, **case.kwargs}
    )
    model.learn(2 * N_STEPS * N_ENVS)
    # The policy has hardly moved from zero actions: make the predictions of the states differ.
    with th.no_grad():
        for parameter in model.policy.action_net.parameters():
            parameter.add_(th.linspace(-1.0, 1.0, parameter.numel()).reshape(parameter.shape))
    if "model" in case.kinds:
        model.save(folder / f"{name}.zip")
    if "checkpoint" in case.kinds:
        model.save_checkpoint(folder / f"{name}_checkpoint.zip")
    observations = sample(model.observation_space)
    entries = {f"{name}/observations/{key}": values for key, values in observations.items()}
    for key, values in as_arrays(model._last_obs).items():
        entries[f"{name}/last_observations/{key}"] = values
    return {**entries, f"{name}/actions": predict(model, observations)}


def main(folder: Path) -> None:
    """Write all files."""
    th.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        entries |= write(name, case, folder)
    np.savez_compressed(folder / "predictions.npz", **entries)
    print(f"{len(list(folder.iterdir()))} files, {sum(file.stat().st_size for file in folder.iterdir())} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
