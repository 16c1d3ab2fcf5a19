import pytest
import torch as th
from torch import nn

from sb3_trpo.rollouts.policy_state import COMPARED_ELEMENTS, PolicyState


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.temperature = 2.0
        self.options = {"a": 1}
        self.table = nn.Parameter(th.zeros(3 * COMPARED_ELEMENTS))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.second(self.norm(self.first(x))) / self.temperature + self.options["a"]


def fill_data(net: Network) -> None:
    net.first.weight.data[1, 2] += 1.0


def fill(net: Network) -> None:
    with th.no_grad():
        net.second.bias.add_(1.0)


def point(net: Network) -> None:
    net.first.weight.data = net.first.weight.detach() + 1.0


def replace_parameter(net: Network) -> None:
    net.first.weight = nn.Parameter(net.first.weight.detach() + 1.0)


def replace_module(net: Network) -> None:
    net.second = nn.Linear(4, 2)


def add_module(net: Network) -> None:
    net.second = nn.Sequential(net.second, nn.Tanh())


def move_buffer(net: Network) -> None:
    net.norm.running_mean += 1.0


def hook(net: Network) -> None:
    net.first.register_forward_hook(lambda module, arguments, output: 2.0 * output)


def patch(net: Network) -> None:
    net.second.forward = th.sin


def set_attribute(net: Network) -> None:
    net.temperature = 3.0


def set_option(net: Network) -> None:
    net.options["a"] = 2


def switch_mode(net: Network) -> None:
    net.train()


CHANGES = (
    fill_data,
    fill,
    point,
    replace_parameter,
    replace_module,
    add_module,
    move_buffer,
    hook,
    patch,
    set_attribute,
    set_option,
    switch_mode,
)


@pytest.fixture
def net() -> Network:
    th.manual_seed(0)
    return Network().eval()


def test_has_changed_is_false_for_a_policy_that_only_acts(net):
    state = PolicyState(net)
    net(th.randn(5, 3))
    net.second = net.second
    assert not state.has_changed()


@pytest.mark.parametrize("change", CHANGES)
def test_has_changed_notices(net, change):
    state = PolicyState(net)
    change(net)
    assert state.has_changed()


@pytest.mark.parametrize("change", CHANGES)
def test_restored_is_the_old_policy_for_a_while(net, change):
    inputs = th.randn(5, 3)
    with th.no_grad():
        old = net(inputs)
        state = PolicyState(net)
        change(net)
        parameters = [parameter.detach().clone() for parameter in net.parameters()]
        mode = net.training
        new = net.eval()(inputs)
        net.train(mode)
        with state.restored():
            th.testing.assert_close(net(inputs), old, rtol=0.0, atol=0.0)
        assert net.training == mode
        th.testing.assert_close(net.eval()(inputs), new, rtol=0.0, atol=0.0)
    for parameter, expected in zip(net.parameters(), parameters, strict=True):
        th.testing.assert_close(parameter.detach(), expected, rtol=0.0, atol=0.0)


def test_has_changed_notices_changes_all_over_a_large_tensor(net):
    state = PolicyState(net)
    net.table.data += 1e-3
    assert state.has_changed()


def test_restored_keeps_the_new_policy_when_an_error_is_raised(net):
    state = PolicyState(net)
    set_attribute(net)
    with pytest.raises(RuntimeError), state.restored():
        net(th.randn(5, 99))
    assert net.temperature == 3.0


WRITES = (fill_data, fill, point, move_buffer)


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in WRITES])
def test_has_changed_structure_notices(net, change):
    state = PolicyState(net)
    change(net)
    assert state.has_changed_structure()


def test_has_changed_structure_is_false_for_a_policy_that_only_acts(net):
    state = PolicyState(net)
    net(th.randn(5, 3))
    assert not state.has_changed_structure()


def test_has_changed_structure_notices_writes_into_shared_memory(net):
    array = next(net.parameters()).detach().numpy()
    state = PolicyState(net)
    array += 0.1
    assert state.has_changed_structure()
