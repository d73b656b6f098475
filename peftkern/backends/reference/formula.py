"""The mathematics, written to be read; in fp64 this is the truth that every kernel is judged against.

The table of docs/numerics.md in code. Nothing here is fast: masks are materialised, nothing is in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.call import Base, Call, Pair, PairGradients


def _dropped(pair: Pair, value: Tensor) -> Tensor:
    """D(value) for a value shaped like x."""
    if pair.rng_state is None:
        return value
    M, K = value.shape
    keep = dropout.keep_mask(M, K, pair.dropout_p, pair.rng_state)
    return torch.where(keep, value * dropout.scale(pair.dropout_p), torch.zeros_like(value))


def _scaling(pair: Pair, dtype: torch.dtype) -> Tensor | float:
    if pair.scaling_tensor is None:
        return pair.scaling
    return pair.scaling_tensor.to(dtype) * pair.scaling


def _product(base: Base, rows: Tensor, backward: bool) -> Tensor:
    """rows W^T or rows W. Rounded rows count as the rows themselves where somebody differentiates through this."""
    factor, weight = base.weight.factors(rows, backward)
    if factor is not rows and not backward:
        factor = rows + (factor - rows).detach()  # exact: they are within a factor of 2
    W = weight.materialize(rows.dtype)
    return factor @ (W if backward else W.T)


def _base(base: Base, x: Tensor) -> Tensor:
    """x W^T + bias."""
    y = _product(base, x, False)
    return y if base.bias is None else y + base.bias.to(x.dtype)


def _update(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """c (s B^T + lora_bias), and s = D(x) A^T."""
    A, B = pair.lora_A.to(x.dtype), pair.lora_B.to(x.dtype)
    c = _scaling(pair, x.dtype)
    s = _dropped(pair, x) @ A.T
    y = c * (s @ B.T)
    return (y if pair.lora_bias is None else y + c * pair.lora_bias.to(x.dtype)), s


def forward(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """y = x W^T + c s B^T + bias + c lora_bias, with s = D(x) A^T. All in x's dtype."""
    y, s = _update(pair, x)
    return _base(Base(pair.weight, pair.bias), x) + y, s


def forward_call(call: Call, x: Tensor) -> list[Tensor]:
    """Every y of a call, of all rows or of some."""
    ys = [_base(base, x) for base in call.bases]
    for i, update in enumerate(call.updates):
        pair = call.pair(i)
        if call.rows is None or update.span is None:
            ys[update.base] = ys[update.base] + _update(pair, x)[0]
            continue
        rows, inside = call.rows.of(update.span)
        if update.dropout_p:
            pair = pair._replace(rng_state=torch.tensor(update.span[2:], dtype=torch.int64, device=x.device))
        y = _update(pair, x[rows])[0]
        ys[0] = ys[0].index_add(0, rows, y if inside is None else torch.where(inside, y, torch.zeros_like(y)))
    return ys


def backward(pair: Pair, dy: Tensor, x: Tensor, s: Tensor) -> PairGradients:
    """Every gradient of ``forward``, in dy's dtype.

    t  = dy B
    dx = dy W + c D(t A)
    dA = c t^T D(x),  dB = c dy^T s,  dbias = sum dy,  dlora_bias = c sum dy
    """
    A, B = pair.lora_A.to(dy.dtype), pair.lora_B.to(dy.dtype)
    c = _scaling(pair, dy.dtype)
    t = dy @ B
    return PairGradients(
        x=_product(Base(pair.weight, None), dy, True) + c * _dropped(pair, t @ A),
        lora_A=c * (t.T @ _dropped(pair, x)),
        lora_B=c * (dy.T @ s),
        bias=dy.sum(0),
        lora_bias=c * dy.sum(0),
    )
