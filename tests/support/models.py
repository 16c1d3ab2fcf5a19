"""Models for the numerics, of functions that tests give."""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_trpo.adapters.models import policy_output
from sb3_trpo.optim.batch import Inputs
from sb3_trpo.optim.critic import value_output
from sb3_trpo.optim.mlp import MLP
from sb3_trpo.optim.objective import Model


def policy_model(
    distribution: Callable[[Inputs], Any],
    parameters: Sequence[nn.Parameter],
    layers: Sequence[nn.Module] = (),
    mlp: MLP | None = None,
) -> Model:
    """A policy by its distribution function; it records the MLP's layers if none are given."""
    layers = layers or (mlp.layers if mlp else ())
    return Model(lambda batch, recorded: policy_output(distribution, batch, recorded), parameters, layers, mlp)


def value_model(
    values: Callable[[Inputs], th.Tensor],
    parameters: Sequence[nn.Parameter],
    layers: Sequence[nn.Module] = (),
    mlp: MLP | None = None,
) -> Model:
    """A critic by its value function."""
    return Model(lambda batch, recorded: value_output(values, batch, recorded), parameters, layers, mlp)
