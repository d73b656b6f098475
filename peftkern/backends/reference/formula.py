"""The mathematics, written to be read; in fp64 this is the truth that every kernel is judged against.

The README's table in code. Nothing here is fast: masks are materialised, nothing is in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.ops.problem import Gradients, LoRAOperands


def _dropped(operands: LoRAOperands, value: Tensor) -> Tensor:
    """D(value) for a value shaped like x."""
    if operands.rng_state is None:
        return value
    M, K = value.shape
    keep = dropout.keep_mask(M, K, operands.dropout_p, operands.rng_state)
    return torch.where(keep, value * dropout.scale(operands.dropout_p), torch.zeros_like(value))


def _scaling(operands: LoRAOperands, dtype: torch.dtype) -> Tensor | float:
    if operands.scaling_tensor is None:
        return operands.scaling
    return operands.scaling_tensor.to(dtype) * operands.scaling


def _product(operands: LoRAOperands, rows: Tensor, backward: bool) -> Tensor:
    """rows W^T or rows W. Rounded rows count as the rows themselves where somebody differentiates through this."""
    factor, weight = operands.weight.factors(rows, backward)
    if factor is not rows and not backward:
        factor = rows + (factor - rows).detach()  # exact: they are within a factor of 2
    W = weight.materialize(rows.dtype)
    return factor @ (W if backward else W.T)


def forward(operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
    """y = x W^T + c s B^T + bias + c lora_bias, with s = D(x) A^T. All in x's dtype."""
    A, B = operands.lora_A.to(x.dtype), operands.lora_B.to(x.dtype)
    c = _scaling(operands, x.dtype)
    s = _dropped(operands, x) @ A.T
    y = _product(operands, x, False) + c * (s @ B.T)
    if operands.bias is not None:
        y = y + operands.bias.to(x.dtype)
    if operands.lora_bias is not None:
        y = y + c * operands.lora_bias.to(x.dtype)
    return y, s


def backward(operands: LoRAOperands, dy: Tensor, x: Tensor, s: Tensor) -> Gradients:
    """Every gradient of ``forward``, in dy's dtype.

    t  = dy B
    dx = dy W + c D(t A)
    dA = c t^T D(x),  dB = c dy^T s,  dbias = sum dy,  dlora_bias = c sum dy
    """
    A, B = operands.lora_A.to(dy.dtype), operands.lora_B.to(dy.dtype)
    c = _scaling(operands, dy.dtype)
    t = dy @ B
    return Gradients(
        x=_product(operands, dy, True) + c * _dropped(operands, t @ A),
        lora_A=c * (t.T @ _dropped(operands, x)),
        lora_B=c * (dy.T @ s),
        bias=dy.sum(0),
        lora_bias=c * dy.sum(0),
    )
