"""The two functions of TRPO's constrained problem over one rollout: the surrogate objective and the KL."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_trpo.distributions import Components, components, joint_kl
from sb3_trpo.line_search import Point
from sb3_trpo.parameters import flatten
from sb3_trpo.rollout import Inputs, Rollout

PolicyFunction = Callable[[Inputs], Distribution]


class Forward(NamedTuple):
    """
    The policy on some states.

    :param parts: components of the action distribution
    :param log_prob: log π(a|s) of the actions taken, shape ``(n_states,)``
    :param entropy: entropy estimate in nats, shape ``(n_states,)``
    """

    parts: Components
    log_prob: th.Tensor
    entropy: th.Tensor


def forward(policy: PolicyFunction, rollout: Rollout) -> Forward:
    """
    Evaluate a policy on a rollout's states and actions.

    :param policy: observations ↦ SB3 action distribution
    :param rollout: states and actions
    :return: its distribution, log-probabilities and entropy
    :raises ValueError: the distribution's log-probabilities are not one number a state
    """
    distribution = policy(rollout.inputs)
    log_prob = distribution.log_prob(rollout.actions)
    if log_prob.shape != rollout.advantages.shape:
        raise ValueError(
            f"log_prob of {type(distribution).__name__} has shape {tuple(log_prob.shape)}; "
            f"it must be one number a state: {tuple(rollout.advantages.shape)}"
        )
    entropy = distribution.entropy()
    # A squashed distribution has no closed form; −log π of the action taken is an unbiased estimate.
    return Forward(components(distribution), log_prob, -log_prob if entropy is None else entropy)


class Surrogate:
    """
    L(θ) = E[π_θ(a|s) / π_old(a|s) · Â] and D̄_KL(θ_old, θ) = E[KL(π_old(·|s) ‖ π_θ(·|s))] over a rollout.

    π_old is the policy as it is when the surrogate is made. Expectations are weighted means over the rollout's states,
    summed chunk by chunk so that memory is bounded by the largest chunk. Source: Schulman et al. 2015, equation 14.

    :param policy: observations ↦ SB3 action distribution, at the present θ
    :param chunks: the rollout, cut into pieces
    """

    def __init__(self, policy: PolicyFunction, chunks: Sequence[Rollout]) -> None:
        self._policy = policy
        self._chunks = chunks
        with th.no_grad():
            self._old = [forward(policy, chunk) for chunk in chunks]
        self._only_graph: Forward | None = None

    @property
    def entropy(self) -> float:
        """Mean entropy of π_old in nats."""
        return float(sum(chunk.weights.dot(old.entropy) for chunk, old in zip(self._chunks, self._old, strict=True)))

    def graphs(self) -> Iterator[tuple[Rollout, Forward, Forward]]:
        """
        Forward passes at θ_old with their autograd graphs, for derivatives.

        A single chunk's graph is built once and kept; with several, each is built when its turn comes and freed after.

        :return: iterator over (chunk, π_old detached, π_θ with its graph)
        """
        for chunk, old in zip(self._chunks, self._old, strict=True):
            if len(self._chunks) > 1:
                yield chunk, old, forward(self._policy, chunk)
            else:
                if self._only_graph is None:
                    self._only_graph = forward(self._policy, chunk)
                yield chunk, old, self._only_graph

    @property
    def is_one_graph(self) -> bool:
        """Whether :meth:`graphs` keeps its only graph."""
        return len(self._chunks) == 1

    def gradient(self, actor: Sequence[th.Tensor]) -> th.Tensor:
        """
        g = ∇L at θ_old.

        :param actor: the parameters θ
        :return: flat gradient, shape ``(n_parameters,)``
        """
        total = th.zeros_like(flatten(actor), requires_grad=False)
        for chunk, old, new in self.graphs():
            objective = _objective(chunk, old, new)
            total += flatten(th.autograd.grad(objective, actor, retain_graph=self.is_one_graph, materialize_grads=True))
        return total

    @th.no_grad()
    def evaluate(self) -> Point:
        """
        Objective and KL at the present θ.

        :return: L(θ) and D̄_KL(θ_old, θ)
        """
        totals = th.zeros(2, device=self._chunks[0].weights.device, dtype=self._chunks[0].weights.dtype)
        for chunk, old in zip(self._chunks, self._old, strict=True):
            new = forward(self._policy, chunk)
            kl = chunk.weights.dot(joint_kl(old.parts, new.parts))
            totals += th.stack([_objective(chunk, old, new), kl])
        objective, kl_value = totals.tolist()
        return Point(objective, kl_value)

    def start(self) -> Point:
        """
        Objective and KL at θ_old, where every ratio is 1.

        :return: E[Â] and 0
        """
        return Point(float(sum(chunk.weights.dot(chunk.advantages) for chunk in self._chunks)), 0.0)


def _objective(chunk: Rollout, old: Forward, new: Forward) -> th.Tensor:
    ratio = th.exp(new.log_prob - old.log_prob)
    return chunk.weights.dot(ratio * chunk.advantages)
