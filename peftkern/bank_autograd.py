"""Autograd for a batch of several adapters: which products run and what is saved; no mathematics.

Saved for backward: x, s, the weight and the factors. The masks are keyed by integers that the call carries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.ops import eager
from peftkern.saved_tensors import saved_tensors


class BankSettings(NamedTuple):
    """What a call has beside its differentiable tensors; sequences hold one entry per segment, ``rng`` two integers.

    ``rows`` and ``inside`` are those of ``segments.Plan``.
    """

    scaling: list[float]
    dropout_p: list[float]
    rng: list[int]
    rows: Tensor
    starts: list[int]
    counts: list[int]
    precision: str
    backend: str
    inside: Tensor | None = None


class BankFunction(torch.autograd.Function):
    """y of a batch of several adapters; factors are A and B of each segment in turn. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, settings: BankSettings, *factors) -> Tensor:
        y, s = eager.bank_forward(x, weight, bias, factors[::2], factors[1::2], *settings)
        wanted = ctx.needs_input_grad[4:]
        ctx.pairs = [a or b for a, b in zip(wanted[::2], wanted[1::2], strict=True)]
        any_pair = any(ctx.pairs)
        # The weight is read where x needs a gradient, and of the bias only its shape is.
        ctx.unread = None if ctx.needs_input_grad[0] else weight.detach(), None if bias is None else bias.detach()
        ctx.save_for_backward(
            x if any_pair else None, s if any_pair else None, weight if ctx.needs_input_grad[0] else None, *factors
        )
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, *factors = saved_tensors(ctx)
        unread_weight, bias = ctx.unread
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        found = iter(
            eager.bank_backward(
                dy, x, s, weight if need_x else unread_weight, bias, factors[::2], factors[1::2], *ctx.settings,
                need_x, ctx.pairs, need_bias,
            )
        )  # fmt: skip
        dx = next(found) if need_x else None
        gradients = [(next(found), next(found)) if pair else (None, None) for pair in ctx.pairs]
        dbias = next(found) if need_bias else None
        flat = [factor for pair in gradients for factor in pair]
        wanted = ctx.needs_input_grad[4:]
        return dx, None, dbias, None, *(g if need else None for g, need in zip(flat, wanted, strict=True))
