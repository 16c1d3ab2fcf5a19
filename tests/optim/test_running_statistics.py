"""Running statistics of batch normalization move with the rollout, and by no more than the trust region allows."""

from dataclasses import replace
from functools import partial

import pytest
import torch as th
from torch import nn

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.optim.line_search import Evaluation
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.optim.running_statistics import keep_within, statistics, track, tracking_layers


def rollout(n_states=20):
    inputs = 3.0 + 2.0 * th.randn(n_states, 4, generator=th.Generator().manual_seed(0))
    zeros = th.zeros(n_states)
    return RolloutBatch(inputs, zeros, zeros, zeros, zeros + 1.0 / n_states)


def network():
    return nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()


def test_statistics_move_by_the_momentum_toward_those_of_the_rollout():
    net, batch = network(), rollout()
    track(tracking_layers(net), net, batch, None)
    variance, mean = th.var_mean(batch.inputs, dim=0)
    th.testing.assert_close(net[0].running_mean, 0.1 * mean)
    th.testing.assert_close(net[0].running_var, 0.9 + 0.1 * variance)
    assert int(net[0].num_batches_tracked) == 1


def test_everything_is_in_evaluation_mode_before_and_after():
    net = network()
    modes = []
    net[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    track(tracking_layers(net), net, rollout(), 8)
    assert modes == [False] * 3  # three chunks
    assert not any(module.training or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_chunks_and_padding_move_nothing_else(chunk_size, momentum):
    """Every layer, whatever it normalizes, gets the statistics of all states that count."""
    images, batch = 3.0 + th.randn(20, 4, 5, generator=th.Generator().manual_seed(1)), rollout()
    padded = replace(batch, inputs=images, weights=th.cat([batch.weights[:14], th.zeros(6)]))
    nets = []
    for part, size in ((padded, chunk_size), (padded.select(slice(14)), None)):
        layers = [nn.BatchNorm1d(4, momentum=momentum), nn.InstanceNorm1d(4, track_running_stats=True)]
        net = nn.Sequential(layers[0], nn.Tanh(), layers[1]).eval()
        for _ in range(2):
            assert track(tracking_layers(net), lambda inputs, net=net: net[2](input=net[:2](inputs)), part, size) == layers
        nets.append(net)
    for (name, found), expected in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        th.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, partial(nn.InstanceNorm1d, track_running_stats=True)])
def test_statistics_are_those_that_torch_tracks(kind):
    values = 3.0 + th.randn(20, 4, 5, generator=th.Generator().manual_seed(1))
    ours, torchs = kind(4).eval(), kind(4)
    track([ours], ours, replace(rollout(), inputs=values), 7)
    torchs(values)
    th.testing.assert_close(ours.state_dict(), torchs.state_dict())


def test_layers_that_the_function_does_not_use_are_left_out():
    net, batch = network(), rollout()
    assert track(tracking_layers(net), net[0], batch, None) == [net[0]]
    assert not bool(net[3].running_mean.any())


def test_layers_without_running_statistics_are_left_out():
    modules = [nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.LayerNorm(3)]
    assert tracking_layers(nn.Sequential(*modules)) == []
    assert tracking_layers(nn.Sequential(*modules, norm := nn.InstanceNorm1d(3, track_running_stats=True))) == [norm]


def test_one_state_alone_moves_nothing():
    net = network()
    track(tracking_layers(net), net, rollout(1), None)
    assert float(net[0].running_mean.abs().sum()) == 0.0


@pytest.mark.parametrize("target_kl", [1e9, 0.5, 1e-6])
def test_move_is_shortened_to_the_trust_region(target_kl):
    net, batch = network(), rollout()
    layers = tracking_layers(net)
    old = flatten(statistics(layers))
    track(layers, net, batch, None)
    new = flatten(statistics(layers))

    def evaluate():
        return Evaluation(0.0, float((flatten(statistics(layers)) - old).square().sum()))

    point = keep_within(layers, old, evaluate, target_kl)
    moved = flatten(statistics(layers)) - old
    assert point == evaluate()
    assert 0.9 * min(target_kl, float((new - old).square().sum())) < point.kl <= target_kl
    th.testing.assert_close(moved / moved.norm(), (new - old) / (new - old).norm(), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), 1.0])
def test_move_without_a_finite_kl_is_taken_back(kl):
    net, batch = network(), rollout()
    layers = tracking_layers(net)
    old = flatten(statistics(layers))
    track(layers, net, batch, None)

    def evaluate():
        return Evaluation(0.0, 0.0 if th.equal(flatten(statistics(layers)), old) else kl)

    assert keep_within(layers, old, evaluate, 1e-3).kl == 0.0
    assert th.equal(flatten(statistics(layers)), old)
