"""The LSTM's own derivatives against autograd through torch's."""

import pytest
import torch as th
from torch import nn

from sb3_trpo.optim.fisher import reverse_jvp
from sb3_trpo.optim.lstm import gauss_newton_forward, gauss_newton_lstms, is_standard
from sb3_trpo.optim.parameters import flatten

LENGTH, N, N_INPUTS, SIZE = 5, 3, 2, 4


class Case:
    """A layer below the LSTM, so that its inputs are moved too, and one above."""

    def __init__(self, n_layers: int, bias: bool) -> None:
        th.manual_seed(0)
        double = {"dtype": th.float64}
        self.below, self.above = nn.Linear(N_INPUTS, N_INPUTS, **double), nn.Linear(SIZE, 2, **double)
        self.lstm = nn.LSTM(N_INPUTS, SIZE, n_layers, bias=bias, **double)
        self.x = th.randn(LENGTH, N, N_INPUTS, **double)
        self.states = tuple(th.randn(n_layers, N, SIZE, **double) for _ in range(2))
        self.theta = [p for module in (self.below, self.lstm, self.above) for p in module.parameters()]

    def outputs(self) -> th.Tensor:
        return self.above(self.lstm(th.tanh(self.below(self.x)), self.states)[0]).flatten(end_dim=1)

    def product(self, v: th.Tensor) -> th.Tensor:
        """Jᵀ W J v."""
        z = self.outputs()
        (moved,) = reverse_jvp([z], self.theta)(v)
        weights = th.linspace(0.0, 1.0, LENGTH * N, dtype=th.float64).unsqueeze(1)
        return flatten(th.autograd.grad(z, self.theta, weights * moved))


@pytest.fixture(params=[(1, True), (2, True), (1, False)], ids=["one_layer", "two_layers", "no_bias"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def assert_close(actual: th.Tensor, expected: th.Tensor) -> None:
    th.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


def test_gauss_newton_forward_returns_what_the_lstm_returns(case):
    expected, (hidden, cells) = case.lstm(case.x, case.states)
    outputs, last = gauss_newton_forward(case.lstm, case.x, case.states)
    for actual, wanted in zip((outputs, *last), (expected, hidden, cells), strict=True):
        assert_close(actual, wanted)


def test_gauss_newton_forward_has_the_gradient_of_the_lstm(case):
    cotangent = th.randn(LENGTH * N, 2, dtype=th.float64)
    expected = th.autograd.grad(case.outputs(), case.theta, cotangent)
    with gauss_newton_lstms([case.lstm]):
        found = th.autograd.grad(case.outputs(), case.theta, cotangent)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)


def test_gauss_newton_forward_gives_the_products_of_the_lstm(case):
    for v in th.randn(3, sum(parameter.numel() for parameter in case.theta), dtype=th.float64):
        expected = case.product(v)
        with gauss_newton_lstms([case.lstm]):
            assert_close(case.product(v), expected)


def test_gauss_newton_lstms_restores_the_module(case):
    with pytest.raises(RuntimeError, match="on purpose"), gauss_newton_lstms([case.lstm]):
        raise RuntimeError("on purpose")
    assert "forward" not in vars(case.lstm)


@pytest.mark.parametrize(
    "lstm",
    [
        nn.LSTM(2, 3, bidirectional=True),
        nn.LSTM(2, 3, batch_first=True),
        nn.LSTM(2, 3, proj_size=2),
        nn.LSTM(2, 3, 2, dropout=0.5),
        nn.GRU(2, 3),
        type("OwnLSTM", (nn.LSTM,), {})(2, 3),
    ],
    ids=["bidirectional", "batch_first", "projected", "dropout", "gru", "subclass"],
)
def test_is_standard_refuses(lstm):
    assert not is_standard(lstm)
