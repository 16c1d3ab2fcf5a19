"""Running statistics of batch normalization: each update moves them with its rollout, and nothing else does."""

from collections.abc import Callable, Sequence

import torch as th
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

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

    The layers are in training mode for it; everything else stays as it is.

    :param layers: normalization layers
    :param function: observations ↦ anything that is computed with some of the layers
    :param batch: the rollout, or this process's shard of it
    :param chunk_size: most states in one forward pass; None for all
    :return: the layers that the function has used
    """
    used: list[_NormBase] = []
    handles = [layer.register_forward_pre_hook(lambda layer, _: used.append(layer)) for layer in layers]
    for layer in layers:
        layer.train()
    for chunk in batch.chunks(chunk_size):
        if chunk.n_states > 1:  # one state has no variance
            function(chunk.inputs)
    for layer, handle in zip(layers, handles, strict=True):
        layer.eval()
        handle.remove()
    for buffer in statistics(layers):
        buffer.copy_(batch.ranks.sum(buffer * batch.weights.sum()))
    return [layer for layer in layers if layer in used]


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
