"""DoRA around the same products: y = g (x W^T + c x A^T B^T) + bias with g = magnitude / ||W + c B A|| row by row.

The norm is a constant of the step (it has no gradient). Saved for backward: x, s, the unscaled product h, two vectors
of length N and a snapshot of the scaling.
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.ops import eager

_DIFFERENTIABLE = {"x": 0, "lora_A": 5, "lora_B": 6, "bias": 7, "magnitude": 8}
_ARGUMENTS = 13


def products(
    x,
    w_data,
    w_scale,
    w_format,
    group_size,
    lora_A,
    lora_B,
    bias,
    magnitude,
    scaling,
    scaling_tensor,
    precision,
    backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [M, N], h = x W^T + c s B^T [M, N], s [M, R], g [N] and the norm [N]; x is 2-D."""
    norm = eager.row_norm(w_data, w_scale, w_format, group_size, lora_A, lora_B, scaling, scaling_tensor)
    gain = magnitude.to(norm.dtype) / norm
    h, s = eager.forward(
        x, w_data, w_scale, w_format, group_size, lora_A, lora_B, None, None,
        scaling, scaling_tensor, 0.0, None, precision, backend,
    )  # fmt: skip
    y = h * gain if bias is None else torch.addcmul(bias.to(norm.dtype), h, gain)
    return y.to(x.dtype), h, s, gain, norm


class DoRALinearFunction(torch.autograd.Function):
    """y of ``products``; once differentiable in x, A, B, bias and magnitude."""

    @staticmethod
    def forward(
        ctx: Any,
        x,
        w_data,
        w_scale,
        w_format,
        group_size,
        lora_A,
        lora_B,
        bias,
        magnitude,
        scaling,
        scaling_tensor,
        *rest,
    ) -> Tensor:
        precision, backend = rest
        if scaling_tensor is not None:
            scaling_tensor = scaling_tensor.detach().clone()  # backward uses the value that forward saw
        y, h, s, gain, norm = products(
            x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, magnitude,
            scaling, scaling_tensor, precision, backend,
        )  # fmt: skip
        need_x, need_A, need_B, _, need_magnitude = (ctx.needs_input_grad[i] for i in _DIFFERENTIABLE.values())
        ctx.save_for_backward(
            x if need_A else None, s if need_B else None, h if need_magnitude else None, norm, gain, scaling_tensor,
            w_data if need_x else None, w_scale if need_x else None, lora_A if need_x else None,
            lora_B if need_x or need_A else None,
        )  # fmt: skip
        # Of what is not read, backward wants shapes and dtypes; it may be updated in place.
        ctx.unread = [None if tensor is None else tensor.detach() for tensor in (w_data, w_scale, lora_A, lora_B)]
        ctx.dtypes = None if bias is None else bias.dtype, magnitude.dtype
        ctx.settings = w_format, group_size, scaling, precision, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, h, norm, gain, scaling_tensor, *read = ctx.saved_tensors
        w_data, w_scale, lora_A, lora_B = (
            other if saved is None else saved for saved, other in zip(read, ctx.unread, strict=True)
        )
        w_format, group_size, scaling, precision, backend = ctx.settings
        needs = {name: ctx.needs_input_grad[position] for name, position in _DIFFERENTIABLE.items()}
        found: dict[str, Tensor] = {}
        factors = [name for name in ("x", "lora_A", "lora_B") if needs[name]]
        if factors:
            gradients = eager.backward(
                (dy * gain).to(dy.dtype), x, s, w_data, w_scale, w_format, group_size, lora_A, lora_B, None, None,
                scaling, scaling_tensor, 0.0, None, precision, backend,
                needs["x"], needs["lora_A"], needs["lora_B"], False, False,
            )  # fmt: skip
            found |= dict(zip(factors, gradients, strict=True))
        bias_dtype, magnitude_dtype = ctx.dtypes
        if needs["bias"]:
            found["bias"] = dy.sum(0, dtype=norm.dtype).to(bias_dtype)
        if needs["magnitude"]:
            found["magnitude"] = ((dy.to(norm.dtype) * h).sum(0) / norm).to(magnitude_dtype)
        result: list[Tensor | None] = [None] * _ARGUMENTS
        for name, gradient in found.items():
            result[_DIFFERENTIABLE[name]] = gradient
        return tuple(result)
