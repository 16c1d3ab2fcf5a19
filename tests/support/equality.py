"""Runs a row of the equality harness: through the package's loop, and through SB3's with the same actions."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize
from support.rows import BOX, READS, VECTOR, Reader, Wander, clone, listed

from sb3_trpo import TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo.actions import raw_actions

N_STEPS, N_ENVS, LIMIT = 40, 3, 5


def sb3_loop(model: OnPolicyAlgorithm, *args: Any) -> bool:
    """SB3's own loop, in which bounded policies return the actions that the buffer holds."""
    with raw_actions(model.policy):
        return OnPolicyAlgorithm.collect_rollouts(model, *args)


#: Algorithm ↦ the loop that it is compared with.
SB3S_LOOP: dict[type[TRPO], Any] = {
    TRPO: sb3_loop,
    RecurrentTRPO: RecurrentPPO.collect_rollouts,
    MaskableTRPO: MaskablePPO.collect_rollouts,
}


@dataclass(frozen=True)
class Row:
    """
    A policy, an environment and a callback.

    :param observation: observation space
    :param action: action space
    :param prepare: what is done to the policy before the rollout
    :param change: makes the callback that changes something on the way
    :param read: how a callback reads values, and log-probabilities, at every step
    :param place: puts callbacks where a user has them
    :param algorithm: TRPO or a sibling
    :param extractor: a user's features extractor
    :param policy_kwargs: further arguments of the policy
    :param arguments: arguments of the algorithm
    :param normalize: arguments of ``VecNormalize``; None for none
    :param stack: frames to stack; 1 for none
    :param env: arguments of the environment
    :param default_dtype: torch's default type while the rollout is collected
    :param default_device: torch's default device then
    :param stays: whether the policy stays as it is, so that the buffer is from the policy that is trained
    :param updates: whether an update can be made of the rollout, and compared
    """

    observation: spaces.Space = field(default_factory=lambda: VECTOR)
    action: spaces.Space = field(default_factory=lambda: BOX)
    prepare: Callable[[Any], None] = lambda policy: None
    change: Callable[[], BaseCallback] | None = None
    read: str | None = None
    place: Callable[..., BaseCallback] = listed
    algorithm: type[TRPO] = TRPO
    extractor: type | None = None
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    normalize: dict[str, Any] | None = None
    stack: int = 1
    env: dict[str, Any] = field(default_factory=dict)
    default_dtype: th.dtype = th.float32
    default_device: str | None = None
    stays: bool = True
    updates: bool = True


def make_env(row: Row, one_array: bool) -> VecEnv:
    settings = {"one_array": False, "nested": False, "scale": 1.0, **row.env}
    settings["one_array"] = settings["one_array"] and one_array

    def make() -> gym.Env:
        return Monitor(gym.wrappers.TimeLimit(Wander(row.observation, row.action, **settings), LIMIT))

    env: VecEnv = DummyVecEnv([make] * N_ENVS)
    if row.stack > 1:
        env = VecFrameStack(env, row.stack)
    return env if row.normalize is None else VecNormalize(env, **row.normalize)


def make_model(row: Row, one_array: bool = True, **changes: Any) -> Any:
    """
    Make the model of a row, with values and probabilities that differ from state to state.

    :param one_array: False for an environment that returns new arrays where the row's writes into one
    """
    arguments = {"n_steps": N_STEPS, "gamma": 0.9, "gae_lambda": 0.8, "batch_size": N_ENVS, **row.arguments, **changes}
    usual = "MultiInput" if isinstance(row.observation, spaces.Dict) else "Mlp"
    policy = arguments.pop("policy", f"{usual}{'Lstm' if row.algorithm is RecurrentTRPO else ''}Policy")
    policy_kwargs = {
        "net_arch": [5],
        **({"lstm_hidden_size": 3} if row.algorithm is RecurrentTRPO else {}),
        **row.policy_kwargs,
    }
    if row.extractor is not None:
        policy_kwargs["features_extractor_class"] = row.extractor
    th.manual_seed(0)
    model = row.algorithm(policy, make_env(row, one_array), seed=0, device="cpu", policy_kwargs=policy_kwargs, **arguments)
    with th.no_grad():
        model.policy.value_net.weight.mul_(3.0)
        model.policy.action_net.weight.mul_(50.0)
    row.prepare(model.policy)
    return model


class Watch(BaseCallback):
    """Keeps the actions, and what else is in the locals of every loop."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[np.ndarray] = []
        self.seen: list[dict[str, Any]] = []
        self.infos: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.actions.append(self.locals["actions"].copy())
        names = ("new_obs", "rewards", "dones", "clipped_actions")
        self.seen.append({name: clone(self.locals[name]) for name in names if name in self.locals})
        self.infos += [{key: value for key, value in info.items() if key != "episode"} for info in self.locals["infos"]]
        return True


class Run:
    """
    Rollouts of a row, one after the other, without updates between.

    :param row: the row
    :param loop: collects them
    :param actions: to take in place of those that are sampled; None to sample
    :param n_rollouts: how many
    :param changes: arguments of the algorithm, in place of the row's
    """

    def __init__(
        self, row: Row, loop: Any, actions: list[np.ndarray] | None = None, n_rollouts: int = 2, **changes: Any
    ) -> None:
        # SB3 bootstraps with the observation after the reset where an environment writes into one array: no example to follow.
        self.model = make_model(row, one_array=actions is None, **changes)
        self.watch, self.readers = Watch(), [Reader(READS[row.read])] if row.read else []
        changers = [] if row.change is None else [row.change()]
        # A reader before and one behind the callback that changes the policy: both find what the acting policy said.
        self.readers += [Reader(READS[row.read])] if row.read and changers else []
        callbacks = [self.watch, *self.readers[:1], *changers, *self.readers[1:]]
        if actions is not None:
            replay(self.model.policy, actions)
        _, callback = self.model._setup_learn(10**6, row.place(*callbacks))
        callback.on_training_start({"total_timesteps": 10**6}, {})
        self.buffers = []
        th.manual_seed(5)
        with Defaults(row), raw_actions(self.model.policy) if actions is not None else nullcontext():
            for _ in range(n_rollouts):
                assert loop(self.model, self.model.env, callback, self.model.rollout_buffer, self.model.n_steps)
                self.buffers.append(contents(self.model.rollout_buffer))


class Defaults:
    """torch's default type and device for a while."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __enter__(self) -> None:
        th.set_default_dtype(self.row.default_dtype)
        th.set_default_device(self.row.default_device)

    def __exit__(self, *_: object) -> None:
        th.set_default_device(None)
        th.set_default_dtype(th.float32)


def replay(policy: Any, actions: list[np.ndarray]) -> None:
    """Let the policy's distribution give these actions."""
    remaining = iter(actions)
    discrete = isinstance(policy.action_space, spaces.Discrete)

    def get_actions(deterministic: bool = False) -> th.Tensor:
        taken = th.as_tensor(next(remaining), device="cpu")
        return taken.flatten() if discrete else taken.flatten(start_dim=1)

    policy.action_dist.get_actions = get_actions


def function_callback(callback: BaseCallback) -> BaseCallback:
    """The same as a function, as in SB3's first version."""

    def call(variables: dict[str, Any], _: dict[str, Any]) -> bool:
        callback.model, callback.locals = variables["self"], variables
        return callback.on_step()

    return ConvertCallback(call)


def as_functions(*callbacks: BaseCallback) -> BaseCallback:
    return CallbackList([function_callback(callback) for callback in callbacks])


def contents(buffer: Any) -> dict[str, np.ndarray]:
    names = ["actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns"]
    names += [name for name in ("action_masks", "hidden_states_pi", "cell_states_vf") if hasattr(buffer, name)]
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"all": buffer.observations}
    return {name: getattr(buffer, name).copy() for name in names} | {
        f"observations {k}": v.copy() for k, v in observations.items()
    }


def assert_equal(actual: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """Compare numbers in nested dictionaries and lists."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), what
        for key in expected:
            assert_equal(actual[key], expected[key], f"{what} {key}", tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), what
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other, what, tolerance)
    elif isinstance(expected, str):
        assert actual == expected
    else:
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape, what
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=what)


def deviations(model: Any, inputs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Actions less their means, and their standard deviations, by the distribution that is trained."""
    parts = torch_distributions(model, inputs)
    if model.policy.squash_output and model.use_sde:
        actions = actions.atanh()
    errors, spreads = [], []
    for i, part in enumerate(parts):
        taken = actions if len(parts) == 1 else actions[:, i]
        if isinstance(part, th.distributions.Categorical):
            mean, taken = part.probs, th.nn.functional.one_hot(taken.long().flatten(), part.probs.shape[-1])
        else:
            mean = part.mean
        spread = (mean * (1 - mean)).sqrt() if hasattr(part, "probs") else part.stddev
        errors.append((taken.reshape(mean.shape) - mean).reshape(len(mean), -1))
        spreads.append(spread.reshape(len(mean), -1))
    return th.cat(errors, dim=1).double(), th.cat(spreads, dim=1).double()


def kl_divergence(old: list[Any], new: list[Any], weights: th.Tensor) -> th.Tensor:
    """Mean joint KL of torch's distributions, by torch."""
    pairs = zip(old, new, strict=True)
    return weights @ sum(th.distributions.kl_divergence(p, q).reshape(p.batch_shape[0], -1).sum(dim=1) for p, q in pairs)


def torch_distributions(model: Any, inputs: Any) -> list[Any]:
    distribution = model.adapter.distribution(inputs)
    several = getattr(distribution, "distributions", None) or distribution.distribution
    return list(several) if isinstance(several, list) else [several]
