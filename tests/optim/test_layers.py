import pytest
import torch as th
from torch import nn

from sb3_trpo.optim.mlp import recorded_calls


def network():
    th.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def inputs():
    return th.randn(5, 3, dtype=th.float64)


def hooks(module):
    return [len(layer._forward_hooks) for layer in module.modules()]


def test_calls_hold_what_went_in_and_what_came_out_in_order():
    net, x = network(), inputs()
    with recorded_calls([net[2], net[0]]) as calls:
        result = net(x)
    assert [call.layer for call in calls] == [net[0], net[2]]
    assert th.equal(calls[0].input, x)
    assert th.equal(calls[0].output, net[0](x))
    assert th.equal(calls[1].input, th.tanh(net[0](x)))
    assert calls[1].output is result


def test_inputs_are_constants_and_outputs_are_in_the_graph():
    net = network()
    with recorded_calls([net[0], net[2]]) as calls:
        result = net(inputs())
    assert not any(call.input.requires_grad for call in calls)
    (slope,) = th.autograd.grad(result.sum(), calls[0].output)
    assert slope.shape == (5, 4)


def test_a_layer_called_twice_is_there_twice():
    layer = nn.Linear(3, 3).double()
    x = inputs()
    with recorded_calls([layer]) as calls:
        layer(layer(x))
    assert [call.layer for call in calls] == [layer, layer]
    assert th.equal(calls[1].input, calls[0].output)


def test_layers_that_were_not_asked_for_are_left_out():
    net = network()
    with recorded_calls([]) as nothing, recorded_calls([net[1]]) as calls:
        net(inputs())
    assert nothing == []
    assert [call.layer for call in calls] == [net[1]]


def test_nothing_is_recorded_outside_of_the_context():
    net = network()
    with recorded_calls([net[0]]) as calls:
        net(inputs())
    net(inputs())
    assert len(calls) == 1


def test_hooks_are_removed():
    net = network()
    net[0].register_forward_hook(lambda *_: None)  # a user's own stays
    before = hooks(net)
    with recorded_calls([net[0], net[2]]):
        assert hooks(net) != before
    assert hooks(net) == before


def test_hooks_are_removed_after_an_exception_too():
    net = network()
    before = hooks(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), recorded_calls([net[0], net[2]]):
        net(inputs()[:, :2])
    assert hooks(net) == before
    with recorded_calls([net[0]]) as calls:
        net(inputs())
    assert len(calls) == 1


def test_contexts_inside_each_other_record_for_themselves():
    net = network()
    with recorded_calls([net[0]]) as outer:
        net(inputs())
        with recorded_calls([net[0], net[2]]) as inner:
            net(inputs())
        net(inputs())
    assert (len(outer), len(inner)) == (3, 2)
