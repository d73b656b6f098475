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
from peftkern.autograd import snapshot
from peftkern.call import Call, Layout, Needs, join, split
from peftkern.ops import eager
from peftkern.saved_tensors import saved_tensors


def products(x: Tensor, call: Call, magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [M, N], h [M, N], s [M, R], g [N] and the norm [N]; x is 2-D. With dropout, h is not scaled by it.

    ``call`` is of one base and one update of all rows, without lora_bias.
    """
    ((weight, bias),), (update,) = call.bases, call.updates
    norm = eager.row_norm(weight, update.lora_A, update.lora_B, update.scaling, update.scaling_tensor)
    gain = magnitude.to(norm.dtype) / norm
    if update.rng_state is None:
        (h,), (s,) = eager.forward(_without_bias(call), x)
        y = h * gain if bias is None else torch.addcmul(bias.to(norm.dtype), h, gain)
    else:
        (plain,), (s,) = eager.forward(_with_gain(call, gain), x)
        h = eager.dropped_product(weight, x, update.dropout_p, update.rng_state, False, call.backend)
        y = torch.addcmul(plain, h, (gain - 1) * dropout.scale(update.dropout_p))
    return y.to(x.dtype), h, s, gain, norm


def _without_bias(call: Call) -> Call:
    return call._replace(bases=(call.bases[0]._replace(bias=None),))


def _with_gain(call: Call, gain: Tensor) -> Call:
    """The call with A and g B, both in g's wide dtype: a product rounds them once."""
    (update,) = call.updates
    A, B = update.lora_A.to(gain.dtype), gain.unsqueeze(1) * update.lora_B
    return call._replace(updates=(update._replace(lora_A=A, lora_B=B),))


def dora(x: Tensor, call: Call, magnitude: Tensor) -> Tensor:
    """``DoRAFunction`` of a call."""
    layout, tensors = split(call)
    return DoRAFunction.apply(x, magnitude, layout, *tensors)


class DoRAFunction(torch.autograd.Function):
    """y of ``products``; once differentiable in x, A, B, bias and magnitude. The call comes as ``split`` leaves it."""

    @staticmethod
    def forward(ctx: Any, x, magnitude, layout: Layout, *tensors) -> Tensor:
        call = join(layout, tensors)
        (update,) = call.updates
        update = update._replace(scaling_tensor=snapshot(update.scaling_tensor))
        call = call._replace(updates=(update,))
        y, h, s, gain, norm = products(x, call, magnitude)
        need_x, need_magnitude, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        drops = update.rng_state is not None
        need_G = need_B or (need_magnitude and drops)
        need_lora_B = need_x or need_A or (need_magnitude and drops)
        _, held = split(_without_bias(call))
        # bias, A, B and lora_bias stand before them, scaling_tensor and rng_state behind.
        weight_tensors = len(held) - 6
        read = [False, need_x, need_lora_B, False, *[need_x] * weight_tensors, True, True]
        ctx.save_for_backward(
            x if need_A else None, s if need_G else None, h if need_magnitude else None, norm, gain,
            *(one if reads else None for one, reads in zip(held, read, strict=True)),
        )  # fmt: skip
        # Of what is not read, backward wants shapes and dtypes; it may be updated in place.
        ctx.unread = [None if reads or one is None else one.detach() for one, reads in zip(held, read, strict=True)]
        ctx.dtypes = None if call.bases[0].bias is None else call.bases[0].bias.dtype, magnitude.dtype
        ctx.facts = layout, (need_x, need_magnitude, need_bias, need_A, need_B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layout, (need_x, need_magnitude, need_bias, need_A, need_B) = ctx.facts
        x, s, h, norm, gain, *read = saved_tensors(ctx)
        call = join(layout, [other if one is None else one for one, other in zip(read, ctx.unread, strict=True)])
        (update,), weight = call.updates, call.bases[0].weight
        drops, scale = update.rng_state is not None, dropout.scale(update.dropout_p)
        rows = dy if drops else (dy * gain).to(dy.dtype)
        need_G = need_B or (drops and need_magnitude)
        dx = dA = G = dmagnitude = dbias = None
        if need_x or need_A or need_G:
            needs = Needs(need_x, [False], [need_A], [need_G], [False])
            given = _with_gain(call, gain) if drops else call
            x, s = x if need_A else None, s if need_G else None
            dx, _, (dA,), (G,), _ = eager.backward(given, [rows], x, [s], needs)
        bias_dtype, magnitude_dtype = ctx.dtypes
        if need_bias:
            dbias = dy.sum(0, dtype=norm.dtype).to(bias_dtype)
        if need_magnitude:
            total = (dy.to(norm.dtype) * h).sum(0)
            if drops:
                assert G is not None
                total = total * scale + (update.lora_B * G).sum(1)
            dmagnitude = (total / norm).to(magnitude_dtype)
        if update.rng_state is not None and dx is not None:
            rows = (dy * (gain - 1)).to(dy.dtype)
            dropped = eager.dropped_product(weight, rows, update.dropout_p, update.rng_state, True, call.backend)
            dx.add_(dropped, alpha=scale)
        if drops and dA is not None:
            dA = dA.to(update.lora_A.dtype)
        dB = G if need_B else None
        if drops and dB is not None:
            dB = (gain.unsqueeze(1) * dB).to(update.lora_B.dtype)
        return dx, dmagnitude, None, dbias, dA, dB, *[None] * (len(ctx.needs_input_grad) - 6)
