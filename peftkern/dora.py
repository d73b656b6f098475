"""DoRA around the same products, with g = magnitude / ||W + c B A|| row by row:

    y = g h + bias,                                      h = x W^T + c x A^T B^T
    y = x W^T + bias + c s (g B)^T + (g - 1) h,          h = D(x) W^T, s = D(x) A^T, where dropout is active

The second is PEFT's: dropout falls on all that g multiplies, and the base sees x. Its first three terms are plain LoRA
with the factor g B, so there are two products with the frozen weight, and two in backward, where G is what plain LoRA
calls dB:

    dx = dy W + c D(dy (g B) A) + D((g - 1) dy W),       G = c dy^T s,  dB = g G
    dmagnitude = (sum over rows of dy h + sum over the rank of B G) / norm

The norm is a constant of the step (it has no gradient). Saved for backward: x, s, two vectors of length N, a snapshot
of the scaling, two RNG integers where there is dropout, and, where the magnitude is trained, h [M, N]: its gradient
would cost a product with the frozen weight without it.
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import dropout
from peftkern.ops import eager
from peftkern.saved_tensors import saved_tensors

_DIFFERENTIABLE = {"x": 0, "lora_A": 5, "lora_B": 6, "bias": 7, "magnitude": 8}
_ARGUMENTS = 15


def products(
    x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, magnitude, *settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [M, N], h [M, N], s [M, R], g [N] and the norm [N]; x is 2-D. With dropout, h is not scaled by it."""
    scaling, scaling_tensor, dropout_p, rng_state, _, backend = settings
    weight = (w_data, w_scale, w_format, group_size)
    norm = eager.row_norm(*weight, lora_A, lora_B, scaling, scaling_tensor)
    gain = magnitude.to(norm.dtype) / norm
    if rng_state is None:
        h, s = eager.forward(x, *weight, lora_A, lora_B, None, None, *settings)
        y = h * gain if bias is None else torch.addcmul(bias.to(norm.dtype), h, gain)
    else:
        plain, s = eager.forward(x, *weight, *_with_gain(lora_A, lora_B, gain), bias, None, *settings)
        h = eager.dropped_product(x, *weight, dropout_p, rng_state, False, backend)
        y = torch.addcmul(plain, h, (gain - 1) * dropout.scale(dropout_p))
    return y.to(x.dtype), h, s, gain, norm


def _with_gain(lora_A: Tensor, lora_B: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """A and g B, both in g's wide dtype: a product rounds them once."""
    return lora_A.to(gain.dtype), gain.unsqueeze(1) * lora_B


class DoRALinearFunction(torch.autograd.Function):
    """y of ``products``; once differentiable in x, A, B, bias and magnitude."""

    @staticmethod
    def forward(
        ctx: Any, x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, magnitude, *settings
    ) -> Tensor:
        scaling, scaling_tensor, dropout_p, rng_state, precision, backend = settings
        if scaling_tensor is not None:
            scaling_tensor = scaling_tensor.detach().clone()  # backward uses the value that forward saw
        y, h, s, gain, norm = products(
            x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, magnitude,
            scaling, scaling_tensor, dropout_p, rng_state, precision, backend,
        )  # fmt: skip
        need_x, need_A, need_B, _, need_magnitude = (ctx.needs_input_grad[i] for i in _DIFFERENTIABLE.values())
        need_G = need_B or (need_magnitude and rng_state is not None)
        need_lora_B = need_x or need_A or (need_magnitude and rng_state is not None)
        ctx.save_for_backward(
            x if need_A else None, s if need_G else None, h if need_magnitude else None, norm, gain, scaling_tensor,
            rng_state, w_data if need_x else None, w_scale if need_x else None, lora_A if need_x else None,
            lora_B if need_lora_B else None,
        )  # fmt: skip
        # Of what is not read, backward wants shapes and dtypes; it may be updated in place.
        ctx.unread = [None if tensor is None else tensor.detach() for tensor in (w_data, w_scale, lora_A, lora_B)]
        ctx.dtypes = None if bias is None else bias.dtype, magnitude.dtype
        ctx.settings = w_format, group_size, scaling, dropout_p, precision, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, h, norm, gain, scaling_tensor, rng_state, *read = saved_tensors(ctx)
        w_data, w_scale, lora_A, lora_B = (
            other if saved is None else saved for saved, other in zip(read, ctx.unread, strict=True)
        )
        w_format, group_size, scaling, dropout_p, precision, backend = ctx.settings
        needs = {name: ctx.needs_input_grad[position] for name, position in _DIFFERENTIABLE.items()}
        drops = rng_state is not None
        weight = (w_data, w_scale, w_format, group_size)
        rows, A, B = (dy, *_with_gain(lora_A, lora_B, gain)) if drops else ((dy * gain).to(dy.dtype), lora_A, lora_B)
        wanted = {name: needs[name] for name in ("x", "lora_A", "lora_B")}
        wanted["lora_B"] |= drops and needs["magnitude"]
        found: dict[str, Tensor] = {}
        if any(wanted.values()):
            gradients = eager.backward(
                rows, x if wanted["lora_A"] else None, s if wanted["lora_B"] else None, *weight, A, B, None, None,
                scaling, scaling_tensor, dropout_p, rng_state, precision, backend, *wanted.values(), False, False,
            )  # fmt: skip
            found = dict(zip((name for name in wanted if wanted[name]), gradients, strict=True))
        scale = dropout.scale(dropout_p)
        bias_dtype, magnitude_dtype = ctx.dtypes
        if needs["bias"]:
            found["bias"] = dy.sum(0, dtype=norm.dtype).to(bias_dtype)
        if needs["magnitude"]:
            total = (dy.to(norm.dtype) * h).sum(0)
            if drops:
                total = total * scale + (lora_B * found["lora_B"]).sum(1)
            found["magnitude"] = (total / norm).to(magnitude_dtype)
        if drops and needs["x"]:
            rows = (dy * (gain - 1)).to(dy.dtype)
            dropped = eager.dropped_product(rows, *weight, dropout_p, rng_state, True, backend)
            found["x"].add_(dropped, alpha=scale)
        if drops and needs["lora_A"]:
            found["lora_A"] = found["lora_A"].to(lora_A.dtype)
        if drops and needs["lora_B"]:
            found["lora_B"] = (gain.unsqueeze(1) * found["lora_B"]).to(lora_B.dtype)
        result: list[Tensor | None] = [None] * _ARGUMENTS
        for name, position in _DIFFERENTIABLE.items():
            result[position] = found[name] if needs[name] else None
        return tuple(result)
