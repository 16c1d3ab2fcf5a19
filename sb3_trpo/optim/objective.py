"""Forward passes over a rollout, and the two functions of TRPO's problem on them: surrogate objective and KL."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_trpo.distributed.process_group import ProcessGroup
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.distributions import Components, components, constant, detach, has_closed_form, joint_kl
from sb3_trpo.optim.layers import LayerCall, recorded_calls
from sb3_trpo.optim.line_search import Evaluation
from sb3_trpo.optim.parameters import flatten

PolicyFunction = Callable[[Inputs], Distribution]


class ModelOutput(NamedTuple):
    """
    The policy on some states.

    :param parts: components of the action distribution
    :param log_prob: log π(a|s) of the actions taken, shape ``(n_states,)``
    :param entropy: entropy in nats, shape ``(n_states,)``; None where the distribution has no formula for it
    :param calls: calls of the layers that were to be recorded, in order
    """

    parts: Components
    log_prob: th.Tensor
    entropy: th.Tensor | None
    calls: Sequence[LayerCall] = ()

    def detached(self) -> "ModelOutput":
        """
        Cut off from the graph.

        :return: the same numbers as constants
        """
        return ModelOutput(detach(self.parts), self.log_prob.detach(), None if self.entropy is None else self.entropy.detach())


def policy_forward(policy: PolicyFunction, rollout: RolloutBatch, layers: Sequence[nn.Module] = ()) -> ModelOutput:
    """
    Evaluate a policy on a rollout's states and actions.

    :param policy: observations ↦ SB3 action distribution
    :param rollout: states and actions
    :param layers: layers whose calls to record
    :return: its distribution, log-probabilities and entropy
    :raises ValueError: the distribution's log-probabilities are not one number a state
    """
    with recorded_calls(layers) as calls:
        distribution = policy(rollout.inputs)
    log_prob = distribution.log_prob(rollout.actions)
    if log_prob.shape != rollout.advantages.shape:
        raise ValueError(
            f"log_prob of {type(distribution).__name__} has shape {tuple(log_prob.shape)}; "
            f"it must be one number a state: {tuple(rollout.advantages.shape)}"
        )
    if rollout.length > 1:  # ratios of padding could be infinite, and no weight masks that
        log_prob = log_prob.where(rollout.is_real, 0.0)
    return ModelOutput(components(distribution), log_prob, distribution.entropy(), calls)


class RolloutObjective:
    """
    A model's forward passes over a rollout at the parameters it has now, θ_old: their numbers, and their graphs.

    Means over the rollout are sums over its chunks, so that memory is bounded by the largest chunk, and over all processes
    that have shares in it.

    :param forward: (rollout, layers to record) ↦ the model on its states
    :param chunks: the rollout, cut into pieces
    :param layers: layers whose calls the forward passes with graphs record
    """

    def __init__(
        self,
        forward: Callable[[RolloutBatch, Sequence[nn.Module]], ModelOutput],
        chunks: Sequence[RolloutBatch],
        layers: Sequence[nn.Module] = (),
    ) -> None:
        self._function = forward
        self._chunks = chunks
        self._layers = layers
        #: Whether products by differentiating twice have turned out right; None before the first.
        self.is_twice_differentiable: bool | None = None
        self._only_graph = self.forward(chunks[0], layers) if len(chunks) == 1 else None
        if self._only_graph is not None and has_closed_form(self._only_graph.parts):
            self._old = [self._only_graph.detached()]
        else:
            # A family of the user's own may hold the parameters themselves, which are about to change.
            with th.no_grad():
                self._old = [constant(self.forward(chunk)) for chunk in chunks]

    def forward(self, chunk: RolloutBatch, layers: Sequence[nn.Module] = ()) -> ModelOutput:
        """
        Evaluate the model at the parameters' present values.

        :param chunk: states
        :param layers: layers whose calls to record
        :return: the model on the states
        """
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            return self._function(chunk, layers)

    @property
    def ranks(self) -> ProcessGroup:
        """The processes that have shares in the rollout."""
        return self._chunks[0].ranks

    @property
    def has_closed_form(self) -> bool:
        """Whether the Fisher metric of the distribution's family is known in closed form."""
        return has_closed_form(self._old[0].parts)

    @property
    def is_one_graph(self) -> bool:
        """Whether :meth:`graphs` keeps its only graph."""
        return self._only_graph is not None

    def graphs(self) -> Iterator[tuple[RolloutBatch, ModelOutput, ModelOutput]]:
        """
        Forward passes at θ_old with their autograd graphs, for derivatives.

        A single chunk's graph is built once and kept; with several, each is built when its turn comes and freed after.

        :return: iterator over (chunk, π_old detached, π_θ with its graph)
        """
        for chunk, old in zip(self._chunks, self._old, strict=True):
            yield chunk, old, self._only_graph or self.forward(chunk, self._layers)

    def _gradient(
        self, function: Callable[[RolloutBatch, ModelOutput, ModelOutput], th.Tensor], theta: Sequence[th.Tensor]
    ) -> th.Tensor:
        total = th.zeros_like(flatten(theta), requires_grad=False)
        for chunk, old, new in self.graphs():
            value = function(chunk, old, new)
            total += flatten(th.autograd.grad(value, theta, retain_graph=self.is_one_graph, materialize_grads=True))
        return self.ranks.sum(total)


class Surrogate(RolloutObjective):
    """
    L(θ) = E[π_θ(a|s) / π_old(a|s) · Â] + c E[H(π_θ)] and D̄_KL(θ_old, θ) = E[KL(π_old(·|s) ‖ π_θ(·|s))] over a rollout.

    π_old is the policy as it is when the surrogate is made. Source: Schulman et al. 2015, equation 14, where c is 0.
    If another policy has collected the rollout, its ``ratios`` say so, and L is that policy's: π_θ/π_old · π_old/π_collecting.

    :param policy: observations ↦ SB3 action distribution, at the present θ
    :param chunks: the rollout, cut into pieces
    :param layers: layers whose calls the forward passes with graphs record
    :param ent_coef: c, the weight of the entropy
    """

    def __init__(
        self, policy: PolicyFunction, chunks: Sequence[RolloutBatch], layers: Sequence[nn.Module] = (), ent_coef: float = 0.0
    ) -> None:
        super().__init__(partial(policy_forward, policy), chunks, layers)
        self._ent_coef = ent_coef

    @property
    def entropy(self) -> float:
        """Mean entropy of π_old in nats."""
        return self._at_start[1]

    def gradient(self, actor: Sequence[th.Tensor]) -> th.Tensor:
        """
        g = ∇L at θ_old.

        :param actor: the parameters θ
        :return: flat gradient, shape ``(n_parameters,)``
        """
        return self._gradient(self._objective, actor)

    @th.no_grad()
    def evaluate(self) -> Evaluation:
        """
        Objective and KL at the present θ.

        :return: L(θ) and D̄_KL(θ_old, θ)
        """
        totals = self._zeros(2)
        for chunk, old in zip(self._chunks, self._old, strict=True):
            new = self.forward(chunk)
            kl = chunk.weights.dot(joint_kl(old.parts, new.parts))
            totals += th.stack([self._objective(chunk, old, new), kl])
        objective, kl_value = self.ranks.sum(totals).tolist()
        return Evaluation(objective, kl_value)

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
        π_θ(a|s) / π_old(a|s) at the present θ.

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
    """H(π_θ) in each state; where there is no formula, its estimate −log π_θ(a|s), importance-weighted."""
    return -ratio * new.log_prob if new.entropy is None else new.entropy
