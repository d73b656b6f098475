"""The operands of one call whose rows belong to several adapters, and its two operators.

    y[m]  = x[m] W^T + bias + c_e (D_e(x) A_e^T)[m] B_e^T      for a row m of adapter e, the base alone for the others
    dx[m] = dy[m] W + c_e D_e(t A_e)[m],   dA_e = c_e t_e^T D_e(x_e),   dB_e = c_e dy_e^T s_e

A segment is what one adapter has to do with a call: its factors, of its own rank, and its rows. Row number i of the
segment, not of x, keys the dropout mask, so an adapter's mask does not depend on who else is in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.ops import dispatch, inputs
from peftkern.ops.bank_problem import BankBackward, BankOperands, Segment
from peftkern.ops.define import define

_OPERANDS = (
    "Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] dropout_p, int[] rng, "
    "Tensor rows, int[] starts, int[] counts, str precision, str backend, "
    "Tensor? inside"
)


class BankArguments(NamedTuple):
    """What both operators take, as they take it. ``rng`` is seed and offset of each segment."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Sequence[float]
    dropout_p: Sequence[float]
    rng: Sequence[int]
    rows: Tensor
    starts: Sequence[int]
    counts: Sequence[int]
    precision: str
    backend: str
    inside: Tensor | None = None

    def operands(self) -> BankOperands:
        """The same, by segment. Raises: ValueError for lists that are not as long as each other."""
        inputs.check_lists(
            0, lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling, dropout_p=self.dropout_p,
            rng=self.rng[::2], starts=self.starts, counts=self.counts,
        )  # fmt: skip
        if len(self.rng) % 2:
            raise ValueError(f"rng is a seed and an offset for each segment, got {len(self.rng)} numbers")
        segments = [
            Segment(A, B, scaling, p, self.rng[2 * i], self.rng[2 * i + 1], start, count)
            for i, (A, B, scaling, p, start, count) in enumerate(
                zip(self.lora_A, self.lora_B, self.scaling, self.dropout_p, self.starts, self.counts, strict=True)
            )
        ]
        return BankOperands(self.weight, self.bias, segments, self.rows, self.precision, self.inside)


def _given_forward(x: Tensor, *arguments) -> tuple[BankOperands, str]:
    given = BankArguments(*arguments)
    operands = given.operands()
    inputs.check_bank(operands, x)
    return operands, given.backend


def forward_here(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """The operator behind ``check_index``: for callers that have their rows from a plan."""
    operands, backend = _given_forward(x, *arguments)
    return dispatch.bank_forward(operands, x, backend)


def _forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    operands, backend = _given_forward(x, *arguments)
    inputs.check_index(operands.rows, x.shape[0])
    return dispatch.bank_forward(operands, x, backend)


def _forward_fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    operands, _ = _given_forward(x, *arguments)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape[0], operands.weight.shape[0])
    return y, x.new_empty(operands.thin_size, dtype=wide)


def _given_backward(dy, x, s, *arguments) -> tuple[BankOperands, BankBackward, bool, str]:
    *shared, need_x, need_pairs, need_bias = arguments
    given = BankArguments(*shared)
    operands, asked = given.operands(), BankBackward(dy, x, s, need_x, need_pairs)
    inputs.check_bank_backward(operands, asked)
    return operands, asked, need_bias, given.backend


def backward_here(dy: Tensor, x: Tensor | None, s: Tensor | None, *arguments) -> list[Tensor]:
    """The operator behind ``check_index``."""
    return dispatch.bank_backward(*_given_backward(dy, x, s, *arguments))


def _backward(dy: Tensor, x: Tensor | None, s: Tensor | None, *arguments) -> list[Tensor]:
    given = _given_backward(dy, x, s, *arguments)
    inputs.check_index(given[0].rows, dy.shape[0])
    return dispatch.bank_backward(*given)


def _backward_fake(dy: Tensor, x, s, *arguments) -> list[Tensor]:
    (weight, bias, segments, *_), asked, need_bias, _ = _given_backward(dy, x, s, *arguments)
    found = [dy.new_empty(dy.shape[0], weight.shape[1])] if asked.need_x else []
    for (A, B, *_), need in zip(segments, asked.need_pairs, strict=True):
        found += [A.new_empty(A.shape), B.new_empty(B.shape)] if need else []
    return found + ([bias.new_empty(bias.shape)] if need_bias and bias is not None else [])


_define = functools.partial(define, torch.library.Library("peftkern", "FRAGMENT"))
forward = _define(f"bank_forward(Tensor x, {_OPERANDS}) -> (Tensor y, Tensor s)", _forward, _forward_fake)
backward = _define(
    f"bank_backward(Tensor dy, Tensor? x, Tensor? s, {_OPERANDS}, bool need_x, bool[] need_pairs, bool need_bias)"
    " -> Tensor[]",
    _backward,
    _backward_fake,
)
