"""What a file says of an optimizer: seen to fit its parameters when the file is loaded, not at the first step."""

from collections import defaultdict
from copy import copy
from typing import Any

import torch as th
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import optim

from sb3_trpo.errors import CorruptCheckpointError, Source

#: Optimizers that remember numbers of a parameter's shape, or single ones, whatever the parameter.
ELEMENTWISE = (
    *(optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.ASGD, optim.NAdam, optim.RAdam),
    *(optim.RMSprop, optim.Rprop, optim.SGD, RMSpropTFLike),
)
#: What they remember that has no parameter's shape.
SINGLE_NUMBERS = ("step", "eta", "mu", "mu_product")


def check_optimizer(optimizer: optim.Optimizer, path: Source, member: str) -> None:
    """
    See that an optimizer can go on from the state that it was given. Those of other classes are left alone.

    :param optimizer: the optimizer, with the state of a file
    :param path: what to call the file
    :param member: what to call the state
    :raises CorruptCheckpointError: tensors are of other shapes than their parameters, or numbers are missing
    """
    if type(optimizer) not in ELEMENTWISE:
        return
    groups: list[dict[str, Any]] = []
    states = defaultdict[th.Tensor, dict[str, Any]](dict)
    for group in optimizer.param_groups:
        small = [th.zeros(1, dtype=parameter.dtype, requires_grad=True) for parameter in group["params"]]
        for parameter, single in zip(group["params"], small, strict=True):
            single.grad = th.zeros_like(single)
            for name, value in optimizer.state.get(parameter, {}).items():
                states[single][name] = _one_of(value, parameter, name, path, member)
        kernels: dict[str, Any] = {name: False for name in ("foreach", "fused", "capturable") if name in group}
        groups.append({**group, **kernels, "params": small})
    trial = copy(optimizer)
    trial.param_groups, trial.state = groups, states
    try:
        trial.step()
    except Exception as error:
        raise CorruptCheckpointError(path, member, error) from error


def _one_of(value: Any, parameter: th.Tensor, name: str, path: Source, member: str) -> Any:
    """One of the numbers that are kept of a parameter."""
    if not isinstance(value, th.Tensor):
        return value
    if name in SINGLE_NUMBERS:
        return value.cpu().clone()
    if value.shape == parameter.shape:
        return value.new_zeros(1, device="cpu")
    what = f"{name[:50]!r} has shape {tuple(value.shape)}, and its parameter {tuple(parameter.shape)}"
    raise CorruptCheckpointError(path, member, what)
