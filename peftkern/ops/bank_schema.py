"""The operands of one call whose rows belong to several adapters, and its two operators.

    y[m]  = x[m] W^T + bias + c_e (D_e(x) A_e^T)[m] B_e^T      for a row m of adapter e, the base alone for the others
    dx[m] = dy[m] W + c_e D_e(t A_e)[m],   dA_e = c_e t_e^T D_e(x_e),   dB_e = c_e dy_e^T s_e

A segment is what one adapter has to do with a call: its factors, of its own rank, and its rows. Row number i of the
segment, not of x, keys the dropout mask, so an adapter's mask does not depend on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.ops import dispatch
from peftkern.ops.bank_problem import BankBackward, BankOperands, Segment

_OPERANDS = (
    "Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] dropout_p, int[] rng, "
    "Tensor rows, int[] starts, int[] counts, str precision, str backend, "
    "Tensor? inside"
)

_library = torch.library.Library("peftkern", "FRAGMENT")
_library.define(f"bank_forward(Tensor x, {_OPERANDS}) -> (Tensor y, Tensor s)")
_library.define(
    f"bank_backward(Tensor dy, Tensor? x, Tensor? s, {_OPERANDS}, bool need_x, bool[] need_pairs, bool need_bias)"
    " -> Tensor[]"
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
        """The same, by segment."""
        segments = [
            Segment(A, B, scaling, p, self.rng[2 * i], self.rng[2 * i + 1], start, count)
            for i, (A, B, scaling, p, start, count) in enumerate(
                zip(self.lora_A, self.lora_B, self.scaling, self.dropout_p, self.starts, self.counts, strict=True)
            )
        ]
        return BankOperands(self.weight, self.bias, segments, self.rows, self.precision, self.inside)


def forward_here(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    given = BankArguments(*arguments)
    return dispatch.bank_forward(given.operands(), x, given.backend)


def _forward_fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    given = BankArguments(*arguments)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape[0], given.weight.shape[0])
    return y, x.new_empty(given.operands().thin_size, dtype=wide)


def backward_here(dy: Tensor, x: Tensor | None, s: Tensor | None, *arguments) -> list[Tensor]:
    *shared, need_x, need_pairs, need_bias = arguments
    given = BankArguments(*shared)
    asked = BankBackward(dy, x, s, need_x, need_pairs)
    return dispatch.bank_backward(given.operands(), asked, need_bias, given.backend)


def _backward_fake(dy: Tensor, x, s, *arguments) -> list[Tensor]:
    *shared, need_x, need_pairs, need_bias = arguments
    given = BankArguments(*shared)
    found = [dy.new_empty(dy.shape[0], given.weight.shape[1])] if need_x else []
    for A, B, need in zip(given.lora_A, given.lora_B, need_pairs, strict=True):
        found += [A.new_empty(A.shape), B.new_empty(B.shape)] if need else []
    return found + ([given.bias.new_empty(given.bias.shape)] if need_bias and given.bias is not None else [])


for _name, _implementation, _fake in (
    ("bank_forward", forward_here, _forward_fake),
    ("bank_backward", backward_here, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{_name}", _fake, lib=_library)

forward = torch.ops.peftkern.bank_forward.default
backward = torch.ops.peftkern.bank_backward.default
