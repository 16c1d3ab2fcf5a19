"""Action distributions: their parameters z, their joint KL, their Fisher matrix M.

A distribution is a tuple of independent torch distributions, its *components*. A bijection after sampling, as tanh, changes
neither KL nor Fisher matrix, so the components are those before it.
"""

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch as th
from torch.distributions import Bernoulli, Categorical, Normal
from torch.distributions import Distribution as TorchDistribution
from torch.distributions import kl_divergence as torch_kl_divergence

Components = tuple[TorchDistribution, ...]
Copied = TypeVar("Copied")


class _Validation:
    """Torch's default is global: the first of several threads switches it off, and the last restores it."""

    lock = threading.Lock()
    n_users = 0
    default = True


@contextmanager
def without_validation() -> Iterator[None]:
    """
    Switch off torch's checks of distribution arguments.

    They raise on the non-finite candidates that a line search is there to reject, and on a GPU each waits for the device.
    Several threads may do so at once; the default is restored when the last has left.

    :return: context manager, also usable as a decorator
    """
    with _Validation.lock:
        if _Validation.n_users == 0:
            _Validation.default = TorchDistribution._validate_args
            TorchDistribution.set_default_validate_args(False)
        _Validation.n_users += 1
    try:
        yield
    finally:
        with _Validation.lock:
            _Validation.n_users -= 1
            if _Validation.n_users == 0:
                TorchDistribution.set_default_validate_args(_Validation.default)


def joint_kl(old: Components, new: Components) -> th.Tensor:
    """
    KL(π_old ‖ π_new) of the joint action in each state: the sum over components and action dimensions.

    :param old: components of π_old
    :param new: components of π_new, of the same families
    :return: KL in nats, shape ``(n_states,)``
    :raises ValueError: torch knows no KL for the family
    """
    total: th.Tensor | None = None
    for p, q in zip(old, new, strict=True):
        try:
            kl = torch_kl_divergence(p, q)
        except NotImplementedError as error:
            raise ValueError(
                f"the action distribution {type(p).__name__} has no KL divergence in torch; "
                "register one with torch.distributions.kl.register_kl"
            ) from error
        kl = kl.flatten(start_dim=1).sum(dim=1) if kl.ndim > 1 else kl
        total = kl if total is None else total + kl
    assert total is not None, "a distribution has at least one component"
    return total


def has_closed_form(parts: Components) -> bool:
    """
    Whether :func:`outputs` and :func:`fisher_metric` know every component's family.

    :param parts: components of a policy's distribution
    :return: True for Normal, Categorical and Bernoulli components
    """
    return all(isinstance(part, (Normal, Categorical, Bernoulli)) for part in parts)


def outputs(parts: Components) -> list[th.Tensor]:
    """
    The parameters z in which the Fisher matrix is known: (μ, σ) of a Normal, the logits of the discrete families.

    :param parts: components with a closed form
    :return: tensors of shape ``(n_states, ...)``, connected to the policy's parameters
    """
    tensors: list[th.Tensor] = []
    for part in parts:
        tensors += [part.loc, part.scale] if isinstance(part, Normal) else [part.logits]  # type: ignore[attr-defined]
    return tensors


def detach(parts: Components) -> Components:
    """
    The same distributions as constants, which later changes of the policy's parameters do not reach.

    :param parts: components with a closed form
    :return: components without a graph or shared memory
    """
    constants: list[TorchDistribution] = []
    for part in parts:
        if isinstance(part, Normal):
            constants.append(Normal(part.loc.detach().clone(), part.scale.detach().clone()))
        else:
            family = Categorical if isinstance(part, Categorical) else Bernoulli
            constants.append(family(logits=part.logits.detach().clone()))  # type: ignore[attr-defined]
    return tuple(constants)


def constant(value: Copied) -> Copied:
    """
    A deep copy without graphs, of distributions whose families are not known.

    torch refuses to copy tensors that belong to a graph, and a distribution of the user's own may hold some.

    :param value: any object
    :return: its copy
    """
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (str, bytes, type, ModuleType, FunctionType)):
            continue
        seen.add(id(item))
        if isinstance(item, th.Tensor):
            if not item.is_leaf:
                memo[id(item)] = item.detach().clone()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        else:
            todo += vars(item).values() if hasattr(item, "__dict__") else ()
    return copy.deepcopy(value, memo)


def fisher_root(parts: Components, noise: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    The product B ε with B Bᵀ = M, so that cotangents with the Fisher metric as covariance come from white noise.

    Normal(μ, σ): diag(1/σ, √2/σ). Categorical with probabilities p: (diag(√p) − p√pᵀ). Bernoulli: √(p(1 − p)).

    :param parts: components with a closed form
    :param noise: ε with mean 0 and covariance I, shaped as :func:`outputs`
    :return: B ε, shaped as :func:`outputs`
    """
    rest = iter(noise)
    products: list[th.Tensor] = []
    for part in parts:
        if isinstance(part, Normal):
            inverse = part.scale.detach().reciprocal()
            products += [next(rest) * inverse, math.sqrt(2.0) * next(rest) * inverse]
        elif isinstance(part, Categorical):
            weighted = part.probs.detach().sqrt() * next(rest)
            products.append(weighted - part.probs.detach() * weighted.sum(dim=-1, keepdim=True))
        else:
            probability = part.probs.detach()  # type: ignore[attr-defined]
            products.append((probability * (1.0 - probability)).sqrt() * next(rest))
    return products


def fisher_metric(parts: Components, tangents: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    The product M u, where M is the Fisher information matrix of each state's distribution in its parameters z.

    Normal(μ, σ): diag(1/σ², 2/σ²). Categorical with probabilities p: diag(p) − ppᵀ on the logits.
    Bernoulli: p(1 − p) on the logits.

    :param parts: components with a closed form
    :param tangents: u, shaped as :func:`outputs`
    :return: M u, shaped as :func:`outputs`
    """
    rest = iter(tangents)
    products: list[th.Tensor] = []
    for part in parts:
        if isinstance(part, Normal):
            precision = part.scale.detach().square().reciprocal()
            products += [next(rest) * precision, 2.0 * next(rest) * precision]
        elif isinstance(part, Categorical):
            weighted = part.probs.detach() * next(rest)
            products.append(weighted - part.probs.detach() * weighted.sum(dim=-1, keepdim=True))
        else:
            probability = part.probs.detach()  # type: ignore[attr-defined]
            products.append(probability * (1.0 - probability) * next(rest))
    return products
