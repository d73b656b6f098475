"""Updates of some rows each: one C++ call per direction, with the base product in it or before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.base import add_lora_bias, fill_rows, no_gradients
from peftkern.backends.cpp import call as operands
from peftkern.backends.cpp.call import DTYPES, address, read_weight, unit_stride
from peftkern.backends.cpp.extension import extension
from peftkern.call import Call, Gradients, Needs, Update

if TYPE_CHECKING:
    from peftkern.backends.cpp.backend import CppBackend

_Pair = tuple[Tensor, Tensor]


def forward(backend: CppBackend, call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N], and s of all spans."""
    ((weight, bias),), rows = call.bases, call.rows
    assert rows is not None
    x, whole = unit_stride(x), operands.takes(weight, x)
    problem, _held = operands.of_base(weight.shape, x, whole, call.precision), None
    if whole:
        problem, _held = read_weight(problem, weight, x)
        y = x.new_empty(x.shape[0], weight.shape[0])
        bias = None if bias is None else bias.contiguous()
    else:
        y = backend.beneath(call.bases[0], x)
    s = x.new_empty(call.thin_size, dtype=torch.float32)
    factors = [_contiguous(update) for update in call.updates]
    entries = [_entry(update, pair, None) for update, pair in zip(call.updates, factors, strict=True)]
    extension()[0].bank_forward(
        problem, entries, rows.numbers.data_ptr(), x.data_ptr(), x.stride(0), address(bias), s.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    add_lora_bias(call, y)
    return [y], [s]


def backward(
    backend: CppBackend, call: Call, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
) -> Gradients:
    """dx, and dA and dB of each update that needs them."""
    weight, rows, found = call.bases[0].weight, call.rows, no_gradients(call)
    assert rows is not None
    dx, dy = None, unit_stride(dy)
    x = None if x is None else unit_stride(x)
    whole = operands.takes(weight, dy, False)
    problem, _held = operands.of_base(weight.shape, dy, whole, call.precision), None
    if needs.x and whole:
        problem, _held = read_weight(problem, weight, dy)
        dx = dy.new_empty(dy.shape[0], weight.shape[1])
    elif needs.x:
        dx = backend.product(weight, dy, True)
    factors = [_contiguous(update) for update in call.updates]  # alive until the call is over
    entries = []
    for i, (update, pair) in enumerate(zip(call.updates, factors, strict=True)):
        gradients = None
        if needs.lora_A[i] and update.span is not None and update.span.length and update.R:
            gradients = torch.empty_like(pair[0]), torch.empty_like(pair[1])
            found.lora_A[i], found.lora_B[i] = gradients
        entries.append(_entry(update, pair, gradients))
    extension()[0].bank_backward(
        problem, entries, rows.numbers.data_ptr(), dy.data_ptr(), dy.stride(0),
        address(x), 0 if x is None else x.stride(0), address(s), address(dx),
    )  # fmt: skip
    fill_rows(call, dy, needs, found)
    return found._replace(x=dx)


def _contiguous(update: Update) -> _Pair:
    return update.lora_A.contiguous(), update.lora_B.contiguous()


def _entry(update: Update, pair: _Pair, gradients: _Pair | None) -> tuple[int | float, ...]:
    A, B = pair
    assert update.span is not None
    start, count, seed, offset = update.span
    dA, dB = (0, 0) if gradients is None else (gradients[0].data_ptr(), gradients[1].data_ptr())
    return (
        A.data_ptr(), B.data_ptr(), update.R, DTYPES[A.dtype], update.scaling,
        dropout.threshold(update.dropout_p), seed, offset, start, count, dA, dB,
    )  # fmt: skip
