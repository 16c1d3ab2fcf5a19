"""Export a trained policy as an ONNX file, which needs neither Python, SB3 nor torch, and contains no pickle."""

import importlib
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_trpo.base import ResumableAlgorithm
from sb3_trpo.optim.distributions import without_validation
from sb3_trpo.saving.atomic import atomic_write


def export_onnx(model: ResumableAlgorithm, path: str | pathlib.Path) -> None:
    """
    Write the deterministic policy as an ONNX file.

    The inputs are batches of raw observations: ``observation``, or the keys of a Dict space. The file includes the statistics
    of the model's ``VecNormalize``, if it has one. The output ``action`` equals that of ``predict``, within the bounds.

    :param model: the model
    :param path: the file
    :raises ValueError: the policy is recurrent
    :raises ImportError: the extra ``[onnx]`` is not installed
    """
    policy: ActorCriticPolicy = model.policy
    if isinstance(policy, RecurrentActorCriticPolicy):
        raise ValueError(
            f"model={type(model).__name__} is not allowed: an ONNX file maps single observations to actions, and a recurrent "
            "policy also needs the observations before"
        )
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ImportError("export_onnx needs ONNX; to install it: pip install '.[onnx]' in a checkout of sb3_trpo") from error
    training = policy.training
    policy.set_training_mode(False)
    space = model.observation_space
    names = list(space.spaces) if isinstance(space, spaces.Dict) else ["observation"]
    samples = [space[name].sample() for name in names] if isinstance(space, spaces.Dict) else [space.sample()]
    # With a batch of one, torch would fix the batch size.
    example = tuple(th.as_tensor(np.stack([sample, sample]), device=policy.device) for sample in samples)
    batch = th.export.Dim("batch")
    with tempfile.TemporaryDirectory() as folder, without_validation():
        scratch = pathlib.Path(folder) / "policy.onnx"
        th.onnx.export(
            _Deterministic(policy, model.get_vec_normalize_env(), names).eval(),
            example,
            scratch,
            input_names=names,
            output_names=["action"],
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        contents = scratch.read_bytes()
    policy.set_training_mode(training)
    with atomic_write(path) as file:
        file.write(contents)


class _Deterministic(nn.Module):
    """Map observations to the actions of ``predict(..., deterministic=True)``."""

    def __init__(self, policy: ActorCriticPolicy, normalizer: VecNormalize | None, names: list[str]) -> None:
        super().__init__()
        self._policy = policy
        self._names = names
        self._moments: dict[str, tuple[th.Tensor, th.Tensor]] = {}
        if normalizer is not None and normalizer.norm_obs:
            self._clip = normalizer.clip_obs
            keyed: Any = normalizer.obs_rms if isinstance(normalizer.obs_rms, dict) else {"observation": normalizer.obs_rms}
            self._moments = {name: _moments(rms, normalizer.epsilon, policy.device) for name, rms in keyed.items()}

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        policy = self._policy
        keyed = {name: self._normalize(name, obs) for name, obs in zip(self._names, observations, strict=True)}
        inputs = keyed if isinstance(policy.observation_space, spaces.Dict) else keyed["observation"]
        actions = policy._predict(inputs, deterministic=True)
        space = policy.action_space
        if not isinstance(space, spaces.Box):
            return actions
        low, high = (th.as_tensor(bound, device=policy.device).flatten() for bound in (space.low, space.high))
        actions = low + 0.5 * (actions + 1.0) * (high - low) if policy.squash_output else actions.clamp(low, high)
        return actions.reshape(-1, *space.shape)

    def _normalize(self, name: str, observations: th.Tensor) -> th.Tensor:
        if name not in self._moments:
            return observations
        mean, spread = self._moments[name]
        return ((observations.double() - mean) / spread).clamp(-self._clip, self._clip).float()


def _moments(rms: RunningMeanStd, epsilon: float, device: th.device) -> tuple[th.Tensor, th.Tensor]:
    return th.as_tensor(rms.mean, device=device), th.as_tensor(np.sqrt(rms.var + epsilon), device=device)
