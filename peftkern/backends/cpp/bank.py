"""Several adapters in a batch: one C++ call per direction, with the base product in it or after torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.cpp import call
from peftkern.backends.cpp.call import DTYPES, address, read_weight, unit_stride
from peftkern.backends.cpp.extension import extension
from peftkern.ops.bank_problem import BankBackward, BankGradients, BankOperands, Segment
from peftkern.weights import DenseWeight

_Pair = tuple[Tensor, Tensor]


def forward(operands: BankOperands, x: Tensor) -> tuple[Tensor, Tensor]:
    """y [M, N] and s of all segments."""
    x, bias = unit_stride(x), operands.bias
    problem, _held = _problem(operands, x), None
    if call.one_pass(x.dtype, x.shape[0]):
        _held = read_weight(problem, DenseWeight(operands.weight), x, True)
        y = x.new_empty(x.shape[0], operands.weight.shape[0])
        bias = None if bias is None else bias.contiguous()
    else:
        y = torch.nn.functional.linear(x, operands.weight, bias)
    s = x.new_empty(operands.thin_size, dtype=torch.float32)
    factors = [_contiguous(segment) for segment in operands.segments]
    entries = [_entry(segment, pair, None) for segment, pair in zip(operands.segments, factors, strict=True)]
    extension()[0].bank_forward(
        problem, entries, operands.rows.data_ptr(), x.data_ptr(), x.stride(0),
        address(bias), s.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y, s


def backward(operands: BankOperands, given: BankBackward) -> BankGradients:
    """dx, and (dA, dB) of each segment whose pair is needed."""
    dx, dy, s, need_x = None, unit_stride(given.dy), given.s, given.need_x
    x = None if given.x is None else unit_stride(given.x)
    problem, _held = _problem(operands, dy, False), None
    if need_x and call.one_pass(dy.dtype, dy.shape[0], "dense", False):
        _held = read_weight(problem, DenseWeight(operands.weight), dy, False)
        dx = dy.new_empty(dy.shape[0], operands.weight.shape[1])
    elif need_x:
        dx = dy @ operands.weight
    factors = [_contiguous(segment) for segment in operands.segments]
    pairs: list[_Pair | None] = [
        _gradients(segment, pair) if need else None
        for segment, pair, need in zip(operands.segments, factors, given.need_pairs, strict=True)
    ]
    entries = list(map(_entry, operands.segments, factors, pairs))
    extension()[0].bank_backward(
        problem, entries, operands.rows.data_ptr(), dy.data_ptr(), dy.stride(0),
        address(x), 0 if x is None else x.stride(0), address(s), address(dx),
    )  # fmt: skip
    return dx, pairs


def _contiguous(segment: Segment) -> _Pair:
    return segment.lora_A.contiguous(), segment.lora_B.contiguous()


def _gradients(segment: Segment, pair: _Pair) -> _Pair:
    make = torch.empty_like if segment.length and segment.R else torch.zeros_like
    return make(pair[0]), make(pair[1])


def _entry(segment: Segment, pair: _Pair, gradients: _Pair | None) -> tuple[int | float, ...]:
    A, B = pair
    dA, dB = (0, 0) if gradients is None else (gradients[0].data_ptr(), gradients[1].data_ptr())
    return (
        A.data_ptr(), B.data_ptr(), segment.R, DTYPES[A.dtype], segment.scaling,
        dropout.threshold(segment.dropout_p), segment.seed, segment.offset, segment.start, segment.length, dA, dB,
    )  # fmt: skip


def _problem(operands: BankOperands, rows: Tensor, forward: bool = True) -> Any:
    whole = call.one_pass(rows.dtype, rows.shape[0], "dense", forward)
    return call.base_problem(operands.weight.shape, rows, whole, operands.precision)
