"""Forward passes over a rollout, and the two functions of TRPO's problem: surrogate objective and KL."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch as th
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_trpo.optim.batch import RolloutBatch, map_inputs
from sb3_trpo.optim.distributions import Components, constant, detach, has_closed_form, joint_kl
from sb3_trpo.optim.layerwise import Layerwise
from sb3_trpo.optim.line_search import Evaluation
from sb3_trpo.optim.mlp import MLP, LayerCall
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.optim.reduction import Reduction
from sb3_trpo.optim.sequential import Sequential, to_channels_last


class ModelOutput(NamedTuple):
    """
    A model on some states.

    :param components: components of the action distribution
    :param log_prob: log π(a|s) of the actions taken, shape ``(n_states,)``
    :param entropy: entropy in nats, shape ``(n_states,)``; None if the distribution has no formula for it
    :param calls: calls of the recorded layers, in order
    """

    components: Components
    log_prob: th.Tensor
    entropy: th.Tensor | None
    calls: Sequence[LayerCall] = ()

    def detached(self) -> "ModelOutput":
        """
        Detach from the graph.

        :return: the same numbers as constants
        """
        entropy = None if self.entropy is None else self.entropy.detach()
        return ModelOutput(detach(self.components), self.log_prob.detach(), entropy)


@dataclass(frozen=True)
class Model:
    """
    A differentiable function of states, and what an optimizer may know of it.

    :param forward: (states, layers whose calls to record) ↦ the model on the states
    :param parameters: θ
    :param layers: the layers with a Kronecker-factored Fisher block
    :param mlp: the layers between observation and output, if they are a plain MLP
    :param sequential: the modules between observation and output, if they may be applied one after another
    """

    forward: Callable[[RolloutBatch, Sequence[nn.Module]], ModelOutput]
    parameters: Sequence[nn.Parameter]
    layers: Sequence[nn.Module] = ()
    mlp: MLP | None = None
    sequential: Sequential | None = None

    @property
    def recorded(self) -> Sequence[nn.Module]:
        """The modules whose calls derivatives need."""
        return self.layers if self.sequential is None else self.sequential.modules


class RolloutObjective:
    """
    A model's forward passes over a rollout at the current parameters, θ_old: their values and their graphs.

    Means over the rollout are sums over its chunks, which bounds memory by the largest chunk, and over all processes that
    hold shards of it.

    :param model: the model
    :param batch: the rollout
    :param chunk_size: most states in one forward pass; None for all
    """

    def __init__(self, model: Model, batch: RolloutBatch, chunk_size: int | None = None) -> None:
        self.model, self.batch, self.chunk_size = model, batch, chunk_size
        #: Whether products by differentiating twice proved right; None before the first.
        self.is_twice_differentiable: bool | None = None
        self._chunks = batch.chunks(chunk_size)
        self._only_graph = self.forward(self._chunks[0], model.recorded) if len(self._chunks) == 1 else None
        if self._only_graph is not None and has_closed_form(self._only_graph.components):
            self._old = [self._only_graph.detached()]
        else:
            # A custom family may hold the parameters themselves, which are about to change.
            with th.no_grad():
                self._old = [constant(self.forward(chunk)) for chunk in self._chunks]

    def forward(self, chunk: RolloutBatch, layers: Sequence[nn.Module] = ()) -> ModelOutput:
        """
        Evaluate the model at the current parameters.

        :param chunk: states
        :param layers: layers whose calls to record
        :return: the model on the states
        """
        if self.model.sequential is not None and self.model.sequential.channels_last:
            chunk = replace(chunk, inputs=map_inputs(to_channels_last, chunk.inputs))
        # The fused kernels of attention have no second derivative; an MLP has no attention.
        with nullcontext() if self.model.mlp else sdpa_kernel(SDPBackend.MATH):
            return self.model.forward(chunk, layers)

    @property
    def ranks(self) -> Reduction:
        """The processes that hold shards of the rollout."""
        return self.batch.ranks

    @property
    def has_closed_form(self) -> bool:
        """Whether the Fisher metric of the distribution's family is known in closed form."""
        return has_closed_form(self._old[0].components)

    @property
    def is_one_graph(self) -> bool:
        """Whether :meth:`linearized` keeps its only graph."""
        return self._only_graph is not None

    def linearized(self) -> Iterator[tuple[RolloutBatch, ModelOutput, ModelOutput]]:
        """
        Iterate over forward passes at θ_old with their graphs, for derivatives.

        The graph of a single chunk is built once and kept; those of several are rebuilt, one at a time.

        :return: iterator over (chunk, π_old detached, π_θ with its graph)
        """
        for chunk, old in zip(self._chunks, self._old, strict=True):
            yield chunk, old, self._only_graph or self.forward(chunk, self.model.recorded)

    def layerwise(self, new: ModelOutput) -> Layerwise | None:
        """
        Linearize the network of a forward pass, once if there is only one.

        :param new: a forward pass of :meth:`linearized`
        :return: the linearization; None unless the network is known to apply one layer after another
        """
        return self._only_layerwise if new is self._only_graph else Layerwise.of(self.model, new)

    @cached_property
    def _only_layerwise(self) -> Layerwise | None:
        assert self._only_graph is not None
        return Layerwise.of(self.model, self._only_graph)

    def _gradient(self, function: Callable[[RolloutBatch, ModelOutput, ModelOutput], th.Tensor]) -> th.Tensor:
        return self.ranks.sum(self._own_gradient(function))

    def _own_gradient(self, function: Callable[[RolloutBatch, ModelOutput, ModelOutput], th.Tensor]) -> th.Tensor:
        """This process's share of a function's gradient."""
        total = th.zeros_like(flatten(self.model.parameters), requires_grad=False)
        for chunk, old, new in self.linearized():
            total += self._derivative(function(chunk, old, new), new)
        return total

    def _derivative(self, value: th.Tensor, new: ModelOutput) -> th.Tensor:
        """∇value, a function of a forward pass."""
        theta, layers = self.model.parameters, self.layerwise(new)
        if layers is None:
            return flatten(th.autograd.grad(value, theta, retain_graph=self.is_one_graph, materialize_grads=True))
        ends = [new.calls[-1].edge, *(get_gradient_edge(theta[i]) for i in layers.rest)]
        cotangent, *slopes = th.autograd.grad(value, ends, retain_graph=self.is_one_graph)
        return layers.join(layers.jacobian.vjp(cotangent), slopes)


class Surrogate(RolloutObjective):
    """
    L(θ) = E[π_θ(a|s) / π_old(a|s) · Â] + c E[H(π_θ)] and D̄_KL(θ_old, θ) = E[KL(π_old(·|s) ‖ π_θ(·|s))] over a rollout.

    π_old is the policy at the time the surrogate is made. Source: Schulman et al. 2015, equation 14, where c is 0. If
    another policy has collected the rollout, the batch has ``ratios``, and L is π_θ/π_old · π_old/π_collecting.

    :param model: the policy
    :param batch: the rollout
    :param chunk_size: most states in one forward pass; None for all
    :param ent_coef: c, the weight of the entropy
    """

    def __init__(self, model: Model, batch: RolloutBatch, chunk_size: int | None = None, ent_coef: float = 0.0) -> None:
        super().__init__(model, batch, chunk_size)
        self._ent_coef = ent_coef
        self._has_moved = False

    def _on(self, batch: RolloutBatch) -> "Surrogate":
        return Surrogate(self.model, batch, self.chunk_size, self._ent_coef)

    def relinearize(self, index: th.Tensor | None = None) -> "Surrogate":
        """
        Make the surrogate around the current policy, on some of the states.

        :param index: the sequences; None for all
        :return: the surrogate, with ratios to the policy that collected; itself on all states before any evaluation
        """
        if index is None and not self._has_moved:
            return self
        batch = replace(self.batch, ratios=self.ratios())
        return self._on(batch if index is None else batch.sample(index))

    def subsample(self, factor: int, size: int | None = None) -> "Surrogate":
        """
        Make the same surrogate on some of the sequences.

        :param factor: keep a fixed 1/``factor`` of them; 1 for all
        :param size: draw a random sample with at most so many states from those; None for all
        :return: the surrogate
        """
        batch = (self.batch if factor == 1 else self.batch.subsample(factor)).random_sample(size)
        return self if batch is self.batch else self._on(batch)

    @property
    def entropy(self) -> float:
        """Mean entropy of π_old in nats."""
        return self._at_start[1]

    def gradient(self) -> th.Tensor:
        """
        g = ∇L at θ_old.

        :return: flat gradient, shape ``(n_parameters,)``
        """
        return self._gradient(self._objective)

    @th.no_grad()
    def evaluate(self) -> Evaluation:
        """
        Objective and KL at the current θ.

        :return: L(θ), D̄_KL(θ_old, θ) and the largest KL in a state
        """
        self._has_moved = True
        totals, largest = self._zeros(2), self._zeros(self.ranks.size)  # one place a process: a sum gives all of them
        for chunk, old in zip(self._chunks, self._old, strict=True):
            new = self.forward(chunk)
            kl = joint_kl(old.components, new.components)
            totals += th.stack([self._objective(chunk, old, new), chunk.weights.dot(kl)])
            largest[self.ranks.rank] = th.maximum(largest[self.ranks.rank], kl.where(chunk.mask, 0.0).max())
        objective, mean_kl, *state_kls = self.ranks.sum(th.cat([totals, largest])).tolist()
        return Evaluation(objective, mean_kl, max(state_kls))

    def start(self) -> Evaluation:
        """
        Objective and KL at θ_old.

        :return: E[Â] + c E[H(π_old)] and 0
        """
        return Evaluation(self._at_start[0], 0.0)

    @cached_property
    def _at_start(self) -> tuple[float, float]:
        """Objective and entropy at θ_old."""
        totals = self._zeros(2)
        for chunk, old in zip(self._chunks, self._old, strict=True):
            entropy = chunk.weights.dot(_entropy(old, _ratio(chunk, old, old)))
            totals += th.stack([self._objective(chunk, old, old), entropy])
        objective, entropy_value = self.ranks.sum(totals).tolist()
        return objective, entropy_value

    @th.no_grad()
    def ratios(self) -> th.Tensor:
        """
        π_θ(a|s) / π_old(a|s) at the current θ.

        :return: ratios, shape ``(n_states,)``
        """
        chunks = zip(self._chunks, self._old, strict=True)
        return th.cat([th.exp(self.forward(chunk).log_prob - old.log_prob) for chunk, old in chunks])

    def _zeros(self, n: int) -> th.Tensor:
        return self._chunks[0].weights.new_zeros(n)

    def _objective(self, chunk: RolloutBatch, old: ModelOutput, new: ModelOutput) -> th.Tensor:
        ratio = _ratio(chunk, old, new)
        gain = ratio * chunk.advantages
        return chunk.weights.dot(gain + self._ent_coef * _entropy(new, ratio) if self._ent_coef else gain)


def _ratio(chunk: RolloutBatch, old: ModelOutput, new: ModelOutput) -> th.Tensor:
    """π_θ(a|s) / π_collecting(a|s)."""
    ratio = th.exp(new.log_prob - old.log_prob)
    return ratio if chunk.ratios is None else chunk.ratios * ratio


def _entropy(new: ModelOutput, ratio: th.Tensor) -> th.Tensor:
    """H(π_θ) in each state, or its importance-weighted estimate −log π_θ(a|s) if there is no formula."""
    return -ratio * new.log_prob if new.entropy is None else new.entropy
