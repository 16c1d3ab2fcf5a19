"""The LSTM with derivatives made for Gauss-Newton and Fisher products.

A product E[Jᵀ M J] v needs Jᵀu and J v, and never a derivative of J. Autograd takes both from a graph of some thirty nodes
for each step of the sequence; here each is one recursion of six tensor operations a step, on numbers that the forward pass
has left, and everything that does not depend on the step before is done for the whole sequence at once. No cuDNN is needed,
whose LSTM cannot be differentiated twice.

With gates (i, f, g, o) = (σ, σ, tanh, σ)(W x_t + U h_{t−1} + b), c_t = f c_{t−1} + i g and h_t = o tanh(c_t).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import nn

States = tuple[th.Tensor, th.Tensor]


class LSTMJacobian(NamedTuple):
    """
    J of the outputs of one LSTM layer with respect to its inputs and weights, the first states being constant.

    :param inputs: x, shape ``(length, n_sequences, n_inputs)``
    :param hidden_before: h_{t−1}, shape ``(length, n_sequences, hidden_size)``, as all that follow
    :param to_gates: slopes of c_t in the first three gates' pre-activations, shape ``(length, n_sequences, 3, hidden_size)``
    :param forget: slope of c_t in c_{t−1}
    :param cell: slope of h_t in c_t
    :param out: slope of h_t in the last gate's pre-activation
    :param W: weights of the inputs, shape ``(4 * hidden_size, n_inputs)``
    :param U: weights of the hidden state, shape ``(4 * hidden_size, hidden_size)``
    """

    inputs: th.Tensor
    hidden_before: th.Tensor
    to_gates: th.Tensor
    forget: th.Tensor
    cell: th.Tensor
    out: th.Tensor
    W: th.Tensor
    U: th.Tensor

    def push(self, inputs: th.Tensor | None, W: th.Tensor, U: th.Tensor, b: th.Tensor) -> th.Tensor:
        """
        Multiply J with a vector.

        :param inputs: its part that belongs to x; None for 0
        :param W: its part that belongs to W, and so on
        :return: J v, shaped as the outputs
        """
        direct = self.inputs @ W.t() + self.hidden_before @ U.t() + b
        if inputs is not None:
            direct += inputs @ self.W.t()
        _, n, size = self.forget.shape
        hidden = cell = self.forget.new_zeros(n, size)
        moved: list[th.Tensor] = []
        U_t = self.U.t()
        for row, to_gates, forget, from_cell, out in zip(direct, self.to_gates, self.forget, self.cell, self.out, strict=True):
            gates = th.addmm(row, hidden, U_t).view(n, 4, size)
            cell = th.addcmul((gates[:, :3] * to_gates).sum(dim=1), forget, cell)
            hidden = th.addcmul(from_cell * cell, out, gates[:, 3])
            moved.append(hidden)
        return th.stack(moved)

    def pull(self, cotangent: th.Tensor, with_inputs: bool) -> tuple[th.Tensor | None, th.Tensor, th.Tensor, th.Tensor]:
        """
        Multiply Jᵀ with a vector.

        :param cotangent: u, shaped as the outputs
        :param with_inputs: whether the part that belongs to x is needed
        :return: parts of Jᵀu that belong to x, W, U and b
        """
        length, n, size = self.forget.shape
        gates = self.forget.new_empty(length, n, 4, size)
        hidden = cell = self.forget.new_zeros(n, size)
        steps = zip(
            *(each.unbind() for each in (cotangent, gates, self.to_gates, self.forget, self.cell, self.out)), strict=True
        )
        for u, row, to_gates, forget, from_cell, out in reversed(list(steps)):
            hidden = u + hidden
            cell = th.addcmul(cell, hidden, from_cell)
            th.mul(cell.unsqueeze(1), to_gates, out=row[:, :3])
            th.mul(hidden, out, out=row[:, 3])
            cell = cell * forget
            hidden = row.view(n, -1) @ self.U
        rows = gates.view(length * n, -1)
        return (
            (rows @ self.W).view_as(self.inputs) if with_inputs else None,
            rows.t() @ self.inputs.flatten(end_dim=1),
            rows.t() @ self.hidden_before.flatten(end_dim=1),
            rows.sum(dim=0),
        )


def run_layer(
    inputs: th.Tensor, first: States, W: th.Tensor, U: th.Tensor, b: th.Tensor
) -> tuple[th.Tensor, States, LSTMJacobian]:
    """
    Run one LSTM layer through sequences.

    :param inputs: x, shape ``(length, n_sequences, n_inputs)``
    :param first: h and c before the first step, each of shape ``(n_sequences, hidden_size)``
    :param W: weights of the inputs
    :param U: weights of the hidden state
    :param b: sum of both biases
    :return: outputs, shape ``(length, n_sequences, hidden_size)``; states after the last step; Jacobian of the outputs
    """
    length, n, _ = inputs.shape
    size = U.shape[1]
    direct = inputs @ W.t() + b
    activated = inputs.new_empty(length, n, 4, size)
    hidden, cells = (state.new_empty(length + 1, n, size) for state in first)
    hidden[0], cells[0] = first
    squashed = inputs.new_empty(length, n, size)
    U_t = U.t()
    for t in range(length):
        gates = th.addmm(direct[t], hidden[t], U_t).view(n, 4, size)
        th.sigmoid(gates, out=activated[t])
        th.tanh(gates[:, 2], out=activated[t, :, 2])
        i, f, g, o = activated[t].unbind(dim=1)
        th.addcmul(f * cells[t], i, g, out=cells[t + 1])
        th.tanh(cells[t + 1], out=squashed[t])
        th.mul(o, squashed[t], out=hidden[t + 1])
    i, f, g, o = activated.unbind(dim=2)
    jacobian = LSTMJacobian(
        inputs=inputs,
        hidden_before=hidden[:-1],
        to_gates=th.stack([g * i * (1.0 - i), cells[:-1] * f * (1.0 - f), i * (1.0 - g * g)], dim=2),
        forget=f.contiguous(),
        cell=o * (1.0 - squashed * squashed),
        out=squashed * o * (1.0 - o),
        W=W,
        U=U,
    )
    return hidden[1:], (hidden[-1], cells[-1]), jacobian


class _Layer(th.autograd.Function):
    """Outputs and last states of one layer; the last states are constants to autograd."""

    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor, h: th.Tensor, c: th.Tensor, *weights: th.Tensor) -> tuple[th.Tensor, ...]:
        outputs, last, ctx.jacobian = run_layer(inputs.detach(), (h, c), *(weight.detach() for weight in weights))
        ctx.mark_non_differentiable(*last)
        return outputs, *last

    @staticmethod
    def backward(ctx: Any, cotangent: th.Tensor, *_: Any) -> tuple[th.Tensor | None, ...]:
        inputs, *weights = _Pull.apply(cotangent, ctx.jacobian, ctx.needs_input_grad[0])  # type: ignore[no-untyped-call]
        return inputs, None, None, *weights


class _Pull(th.autograd.Function):
    """u ↦ Jᵀu. It is linear in u, so that its derivative is v ↦ J v; J counts as constant."""

    @staticmethod
    def forward(ctx: Any, cotangent: th.Tensor, jacobian: LSTMJacobian, with_inputs: bool) -> tuple[th.Tensor | None, ...]:
        ctx.jacobian = jacobian
        ctx.set_materialize_grads(False)
        return jacobian.pull(cotangent, with_inputs)

    @staticmethod
    def backward(
        ctx: Any, inputs: th.Tensor | None, W: th.Tensor | None, U: th.Tensor | None, b: th.Tensor | None
    ) -> tuple[th.Tensor | None, None, None]:
        jacobian: LSTMJacobian = ctx.jacobian
        W = th.zeros_like(jacobian.W) if W is None else W
        U = th.zeros_like(jacobian.U) if U is None else U
        return jacobian.push(inputs, W, U, jacobian.U.new_zeros(len(U)) if b is None else b), None, None


def is_standard(lstm: nn.Module) -> bool:
    """
    Return True if :func:`gauss_newton_forward` serves a module that does what its class defines.

    :param lstm: any module
    """
    return (
        type(lstm) is nn.LSTM
        and not (lstm.bidirectional or lstm.batch_first or lstm.proj_size)
        and (lstm.dropout == 0.0 or not lstm.training)
    )


def gauss_newton_forward(lstm: nn.LSTM, inputs: th.Tensor, states: States) -> tuple[th.Tensor, States]:
    """
    Return what ``lstm(inputs, states)`` returns, differentiable once in inputs and weights, and twice for J v.

    Second derivatives leave out those of J itself, so that they are right in Gauss-Newton products and wrong in a Hessian.
    The last states are constants.

    :param lstm: a standard LSTM, of any number of layers
    :param inputs: shape ``(length, n_sequences, n_inputs)``
    :param states: first hidden and cell states, each of shape ``(n_layers, n_sequences, hidden_size)``
    :return: outputs and last states
    """
    last: list[Sequence[th.Tensor]] = []
    for layer in range(lstm.num_layers):
        W, U, *biases = lstm.all_weights[layer]
        b = biases[0] + biases[1] if biases else U.new_zeros(len(U))
        first = states[0][layer], states[1][layer]
        inputs, *after = _Layer.apply(inputs, *first, W, U, b)  # type: ignore[no-untyped-call]
        last.append(after)
    hidden, cells = (th.stack(each) for each in zip(*last, strict=True))
    return inputs, (hidden, cells)


@contextmanager
def gauss_newton_lstms(modules: Sequence[nn.LSTM]) -> Iterator[None]:
    """
    Let some LSTMs run by :func:`gauss_newton_forward` while the context lasts.

    :param modules: standard LSTMs
    :return: context manager
    """
    for lstm in modules:
        lstm.forward = partial(gauss_newton_forward, lstm)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for lstm in modules:
            del lstm.forward
