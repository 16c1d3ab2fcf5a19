"""A network of successive layers, linearized at a forward pass: derivatives without an autograd graph of the layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch as th
from torch.distributions import Normal

from sb3_trpo.optim.distributions import outputs
from sb3_trpo.optim.mlp import MLPJacobian
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.optim.sequential import SequentialJacobian, are_sequential

if TYPE_CHECKING:
    from sb3_trpo.optim.objective import Model, ModelOutput


class Layerwise:
    """
    A model whose output is the distribution's location or logits, and whose network applies one layer after another.

    The only other parameter may be the state-independent ``log_std`` of a Gaussian.

    :param jacobian: J of the network's output with respect to its parameters
    :param model: the model
    :param new: the model on the states, with the calls of the network's modules
    """

    def __init__(self, jacobian: MLPJacobian | SequentialJacobian, model: "Model", new: "ModelOutput") -> None:
        position = {id(parameter): i for i, parameter in enumerate(model.parameters)}
        self.jacobian = jacobian
        #: Where in θ the layers' parameters are; -1 for one that is not there.
        self.positions = [position.get(id(parameter), -1) for parameter in jacobian.parameters]
        #: Where in θ the other parameters are.
        self.rest = [i for i in range(len(model.parameters)) if i not in self.positions]
        self.is_gaussian = isinstance(new.components[0], Normal)
        #: Widths of the parts of the output: locations, or logits of each component.
        self.widths = [z.shape[1] for z in outputs(new.components)][: 1 if self.is_gaussian else None]

    @classmethod
    def of(cls, model: "Model", new: "ModelOutput") -> "Layerwise | None":
        """
        Linearize.

        :param model: the model
        :param new: the model on some states, with the calls of the network's modules
        :return: the linearization; None if θ is not the layers' parameters and ``log_std``
        """
        jacobian = _jacobian(model, new)
        if jacobian is None:
            return None
        layers = cls(jacobian, model, new)
        has_log_std = layers.is_gaussian and outputs(new.components)[1].requires_grad
        rest_fits = [model.parameters[i].shape for i in layers.rest] == ([th.Size(layers.widths)] if has_log_std else [])
        is_bijection = -1 not in layers.positions and len(set(layers.positions)) == len(layers.positions)
        return layers if rest_fits and is_bijection else None

    def join(self, parts: Sequence[th.Tensor], rest: Sequence[th.Tensor]) -> th.Tensor:
        """
        Make a flat vector of parts.

        :param parts: one for each parameter of the layers
        :param rest: one for each other parameter
        :return: all of them, in the order of θ
        """
        pairs = zip([*self.positions, *self.rest], [*parts, *rest], strict=True)
        return flatten([part for _, part in sorted(pairs, key=lambda pair: pair[0])])


def _jacobian(model: "Model", new: "ModelOutput") -> MLPJacobian | SequentialJacobian | None:
    """J of the network's output, if the recorded calls show that the layers were applied as the model says."""
    if any(call.output.dtype != model.parameters[0].dtype for call in new.calls):  # autocast
        return None
    if model.mlp is not None:
        return MLPJacobian(new.calls, model.mlp.activations) if [c.layer for c in new.calls] == model.mlp.layers else None
    if model.sequential is not None and are_sequential(new.calls, model.sequential.output):
        return SequentialJacobian(new.calls)
    return None
