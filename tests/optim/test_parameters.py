import pytest
import torch as th
from torch import nn

from sb3_trpo.optim.parameters import Snapshot, all_finite, assign, flatten, unflatten

NAN, INF = float("nan"), float("inf")


def make_parameters():
    """A matrix, a vector, a scalar, an empty one, and a matrix that is not contiguous."""
    th.manual_seed(0)
    tensors = [th.randn(2, 3), th.randn(4), th.randn(()), th.randn(0), th.randn(3, 2).t()]
    return [nn.Parameter(tensor) for tensor in tensors]


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(th.uint8).tolist()


def test_flatten_concatenates_in_order():
    tensors = [th.tensor([[1.0, 2.0], [3.0, 4.0]]), th.tensor(5.0), th.tensor([[6.0], [7.0]]).t()]
    assert flatten(tensors).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_unflatten_inverts_flatten():
    parameters = make_parameters()
    for tensor, parameter in zip(unflatten(flatten(parameters), parameters), parameters, strict=True):
        assert th.equal(tensor, parameter)


def test_assign_inverts_flatten():
    parameters = make_parameters()
    target = th.randn_like(flatten(parameters)).detach()
    assign(parameters, target)
    assert th.equal(flatten(parameters), target)


def test_assign_writes_in_place_without_aliasing():
    parameters = make_parameters()
    addresses = [parameter.data_ptr() for parameter in parameters]
    vector = flatten(parameters).detach() + 1.0
    assign(parameters, vector)
    expected = vector.clone()
    vector.fill_(0.0)
    assert th.equal(flatten(parameters), expected)
    assert [parameter.data_ptr() for parameter in parameters] == addresses
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)


def test_assign_keeps_the_parameters_precision():
    (parameter,) = parameters = [nn.Parameter(th.zeros(2))]
    assign(parameters, th.tensor([0.1, 0.2], dtype=th.float64))
    assert parameter.dtype is th.float32
    assert th.equal(parameter, th.tensor([0.1, 0.2]))


@pytest.mark.parametrize("size", [12, 14])
def test_vector_of_another_size_is_refused(size):
    with pytest.raises(RuntimeError, match="split"):
        assign([nn.Parameter(th.zeros(13))], th.zeros(size))


@pytest.mark.parametrize(
    ("tensors", "finite"),
    [
        ([], True),
        ([th.ones(2), th.zeros(0), th.tensor(3)], True),
        ([th.ones(2), th.tensor([1.0, NAN])], False),
        ([th.tensor(INF), th.ones(2)], False),
        ([th.tensor([[-INF]])], False),
    ],
    ids=["none", "finite", "nan", "inf", "minus_inf"],
)
def test_all_finite(tensors, finite):
    assert all_finite(tensors) is finite


def test_snapshot_restores_bit_for_bit():
    """Negative zero, denormals, NaN and integers come back as they were."""
    odd = nn.Parameter(th.tensor([-0.0, 1e-45, NAN, INF, 0.1]))
    count = th.tensor(7)
    tensors = [*make_parameters(), odd, count]
    before = [bits(tensor) for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    snapshot = Snapshot(tensors)
    with th.no_grad():
        for tensor in tensors:
            tensor.fill_(3)
    snapshot.restore()
    assert [bits(tensor) for tensor in tensors] == before
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_snapshot_can_be_restored_again():
    (parameter,) = parameters = [nn.Parameter(th.ones(2))]
    snapshot = Snapshot(parameters)
    for value in (5.0, 6.0):
        assign(parameters, th.full((2,), value))
        snapshot.restore()
        assert parameter.tolist() == [1.0, 1.0]


def test_snapshot_may_be_made_from_an_iterator():
    parameters = make_parameters()
    before = flatten(parameters).detach().clone()
    snapshot = Snapshot(iter(parameters))
    assign(parameters, before + 1.0)
    snapshot.restore()
    assert th.equal(flatten(parameters), before)
