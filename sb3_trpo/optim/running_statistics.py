"""Running statistics of batch normalization: each update moves them with its rollout, and nothing else does."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch as th
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.line_search import Evaluation
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import assign, flatten

#: Share of the trust region that the statistics of the policy may use, so that the step has the rest.
STATISTICS_SHARE = 0.5


def tracking_layers(module: nn.Module) -> list[_NormBase]:
    """
    Find the normalization layers that keep running statistics.

    :param module: the policy
    :return: the layers
    """
    return [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.running_mean is not None]


@th.no_grad()
def track(
    layers: Sequence[_NormBase], function: Callable[[Inputs], object], batch: RolloutBatch, chunk_size: int | None
) -> list[_NormBase]:
    """
    Move running statistics toward those of a rollout, by the layers' own momentum, in one pass.

    The layers stay in evaluation mode, so that chunks, processes and padding change nothing: each sees the inputs that it has
    when the policy acts.

    :param layers: normalization layers
    :param function: observations ↦ anything that is computed with some of the layers
    :param batch: the rollout, or this process's shard of it
    :param chunk_size: most states in one forward pass; None for all
    :return: the layers that the function has used
    """
    calls: dict[_NormBase, list[th.Tensor]] = {layer: [] for layer in layers}
    for chunk in batch.chunks(chunk_size):
        keep = partial(_keep_moments, calls, chunk.weights > 0)
        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
            function(chunk.inputs)
    used = [layer for layer in layers if calls[layer]]
    for layer in used:
        here = _pooled(layer, th.stack(calls[layer]))
        _move(layer, *_pooled(layer, batch.ranks.gather(here)))
    return used


def _keep_moments(
    calls: dict[_NormBase, list[th.Tensor]], is_real: th.Tensor, layer: _NormBase, args: tuple[th.Tensor, ...], kwargs: Any
) -> None:
    """Append count, mean and variance of a layer's inputs, shape ``(3, n_features)``, without the states of padding."""
    assert layer.running_mean is not None
    inputs = (args[0] if args else kwargs["input"]).to(layer.running_mean.dtype)
    inputs = inputs[is_real] if len(inputs) == len(is_real) and not bool(is_real.all()) else inputs
    if not len(inputs):
        return
    if isinstance(layer, _InstanceNorm):  # the mean over instances of the moments of each
        instances = inputs.reshape(-1, layer.num_features, inputs[0, 0].numel()) if inputs.ndim > 2 else inputs.unsqueeze(0)
        variance, mean = (each.mean(dim=0) for each in th.var_mean(instances, dim=2))
        count = len(instances)
    else:
        variance, mean = th.var_mean(inputs.transpose(0, 1).flatten(1), dim=1, correction=0)
        count = inputs.numel() // layer.num_features
    calls[layer].append(th.stack([th.full_like(mean, count), mean, variance]))


def _pooled(layer: _NormBase, parts: th.Tensor) -> th.Tensor:
    """Moments of all values from those of their parts. Source: Chan, Golub & LeVeque 1983, equation 2.1."""
    counts, means, variances = parts.unbind(dim=1)
    shares = counts / counts.sum(dim=0)
    mean = means[0] + (shares * (means - means[0])).sum(dim=0)
    spread = 0.0 if isinstance(layer, _InstanceNorm) else (means - mean).square()
    return th.stack([counts.sum(dim=0), mean, (shares * (variances + spread)).sum(dim=0)])


def _move(layer: _NormBase, counts: th.Tensor, mean: th.Tensor, variance: th.Tensor) -> None:
    """Do what the layer does in training mode, from the moments of its inputs."""
    count = float(counts[0])
    if isinstance(layer, _InstanceNorm):
        momentum = layer.momentum or 0.0
    elif count > 1:  # one value has no variance
        variance = variance * (count / (count - 1.0))
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked += 1
        momentum = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    else:
        return
    for buffer, target in zip(statistics([layer]), (mean, variance), strict=True):
        buffer.lerp_(target, momentum)


class RunningStatistics:
    """
    The running statistics of a policy and its critic, which each update moves once.

    :param policy: module that holds all normalization layers
    """

    def __init__(self, policy: nn.Module) -> None:
        self._layers = tracking_layers(policy)  # those that have not been moved yet

    def follow_policy(self, function: Callable[[Inputs], object], surrogate: Surrogate, target_kl: float) -> Evaluation:
        """
        Move those that the policy depends on as :func:`track` does, as far as their share of the trust region allows.

        :param function: observations ↦ distribution
        :param surrogate: L and D̄_KL on the rollout
        :param target_kl: δ in nats
        :return: L and D̄_KL afterwards
        """
        old = {layer: flatten(statistics([layer])) for layer in self._layers}
        used = track(self._layers, function, surrogate.batch, surrogate.chunk_size) if old else []
        if not used:
            return surrogate.start()
        self._layers = [layer for layer in self._layers if layer not in used]
        return keep_within(used, th.cat([old[layer] for layer in used]), surrogate.evaluate, STATISTICS_SHARE * target_kl)

    def follow_critic(self, function: Callable[[Inputs], object], batch: RolloutBatch, chunk_size: int | None) -> None:
        """
        Move the others as :func:`track` does.

        :param function: observations ↦ values
        :param batch: the rollout, or this process's shard of it
        :param chunk_size: most states in one forward pass; None for all
        """
        if self._layers:
            track(self._layers, function, batch, chunk_size)


@th.no_grad()
def keep_within(
    layers: Sequence[_NormBase], old: th.Tensor, evaluate: Callable[[], Evaluation], target_kl: float
) -> Evaluation:
    """
    Take back as much of a move of running statistics as the trust region asks for.

    :param layers: normalization layers of the policy, with their new statistics
    :param old: their :func:`statistics` before the move, flat
    :param evaluate: objective and KL at the present statistics
    :param target_kl: bound on the KL of the move
    :return: objective and KL where the statistics end
    """
    moving = statistics(layers)
    new = flatten(moving)
    fraction = 1.0
    for _ in range(10):
        assign(moving, old + fraction * (new - old))
        point = evaluate()
        if point.kl <= target_kl:
            return point
        fraction *= 0.99 * (target_kl / point.kl) ** 0.5 if target_kl < point.kl < float("inf") else 0.5
    assign(moving, old)
    return evaluate()


def statistics(layers: Sequence[_NormBase]) -> list[th.Tensor]:
    """
    List the running means and variances.

    :param layers: normalization layers
    :return: their buffers
    """
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    return [buffer for buffer in buffers if buffer is not None]
