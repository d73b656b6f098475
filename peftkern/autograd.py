"""Which products run and what is saved; no mathematics.

Saved for backward: x, s, the parameters, two RNG integers and a snapshot of the scaling. Never a dropout mask, a
dropped or widened copy of x, or a product with the frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.ops import eager
from peftkern.saved_tensors import saved_tensors

_ARGUMENTS = 15  # of LoRALinearFunction, and the weight's tables


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + c D(x) A^T B^T + bias + c lora_bias on 2-D x; once differentiable in x, A, B and the biases."""

    @staticmethod
    def forward(
        ctx: Any, x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, lora_bias, *settings
    ) -> Tensor:
        scaling, scaling_tensor, dropout_p, rng_state, precision, backend, *w_tables = settings
        if scaling_tensor is not None:
            scaling_tensor = scaling_tensor.detach().clone()  # backward uses the value that forward saw
        y, s = eager.forward(
            x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, lora_bias,
            scaling, scaling_tensor, dropout_p, rng_state, precision, backend, w_tables=w_tables or None,
        )  # fmt: skip
        need_x, _, _, _, _, need_A, need_B, need_bias, need_lora_bias, *_ = ctx.needs_input_grad
        need_lora_B = need_x or need_A
        # Only what backward reads is saved, so that an in-place update of anything else is not held against the caller;
        # of the rest backward wants shapes and dtypes.
        ctx.save_for_backward(
            x if need_A else None, s if need_B else None, scaling_tensor, rng_state,
            w_data if need_x else None, w_scale if need_x else None, lora_A if need_x else None,
            lora_B if need_lora_B else None, *(w_tables if need_x else ()),
        )  # fmt: skip
        ctx.unread = (
            None if need_x else w_data.detach(), None if need_x or w_scale is None else w_scale.detach(),
            None if need_x else lora_A.detach(), None if need_lora_B else lora_B.detach(),
            bias.detach() if need_bias else None, lora_bias.detach() if need_lora_bias else None,
        )  # fmt: skip
        ctx.tables = len(w_tables)
        ctx.settings = w_format, group_size, scaling, dropout_p, precision, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable costs 7 us, and says something where a graph of backward is made, alone.
        return _graphed_backward(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, s, scaling_tensor, rng_state, w_data, w_scale, lora_A, lora_B, *w_tables = saved_tensors(ctx)
    other_data, other_scale, other_A, other_B, bias, lora_bias = ctx.unread
    w_format, group_size, scaling, dropout_p, precision, backend = ctx.settings
    need_x, _, _, _, _, need_A, need_B, need_bias, need_lora_bias, *_ = ctx.needs_input_grad
    gradients = iter(
        eager.backward(
            dy, x, s, other_data if w_data is None else w_data, other_scale if w_scale is None else w_scale,
            w_format, group_size, other_A if lora_A is None else lora_A, other_B if lora_B is None else lora_B,
            bias, lora_bias, scaling, scaling_tensor, dropout_p, rng_state, precision, backend,
            need_x, need_A, need_B, need_bias, need_lora_bias, w_tables=w_tables or None,
        )
    )  # fmt: skip
    dx = next(gradients) if need_x else None
    factors = (next(gradients) if need else None for need in (need_A, need_B, need_bias, need_lora_bias))
    return dx, None, None, None, None, *factors, *[None] * (_ARGUMENTS - 9 + ctx.tables)


_graphed_backward = once_differentiable(_backward)


def lora_linear(*arguments: Any) -> Tensor:
    """``LoRALinearFunction.apply`` without its search for torch.func's wrappers, which the caller has ruled out."""
    if torch.compiler.is_compiling():
        return LoRALinearFunction.apply(*arguments)
    return super(torch.autograd.Function, LoRALinearFunction).apply(*arguments)


class LoRALinearInHalfFunction(torch.autograd.Function):
    """``LoRALinearFunction`` in fp16 of an x in another dtype, which y and dx have.

    dy may lie where fp16 has few digits or none: it is brought to about 2^-4 by a power of two, which is taken out
    of every gradient again. A NaN or an infinity in dy leaves it as it is.
    """

    @staticmethod
    def forward(ctx: Any, x, *arguments) -> Tensor:
        return LoRALinearFunction.forward(ctx, x.to(torch.float16), *arguments).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        power = _power_of(dy)
        dx, *others = _backward(ctx, (dy * power).to(torch.float16))
        dx = None if dx is None else (dx.float() / power).to(dy.dtype)
        return dx, *(None if gradient is None else (gradient / power) for gradient in others)


def _power_of(dy: Tensor) -> Tensor:
    """The power of two that takes the largest |dy| to between 2^-5 and 2^-4, fp32; 1 where there is none."""
    size = dy.abs().amax().float() if dy.numel() else dy.new_zeros((), dtype=torch.float32)
    usable = (size > 0) & (size < torch.inf)
    exponent = torch.frexp(torch.where(usable, size, 2.0**-4)).exponent
    return torch.ldexp(torch.ones_like(size), (-4 - exponent).clamp(-100, 100))


_FIELDS = 7  # of an adapter among LoRAAdaptersFunction's arguments


class LoRAAdaptersFunction(torch.autograd.Function):
    """y = x W^T + bias + sum_i c_i (D_i(x) A_i^T B_i^T + lora_bias_i) on 2-D x, as one node.

    ``fields``, adapter by adapter: lora_A, lora_B, lora_bias, scaling, scaling_tensor, dropout_p, rng_state.
    """

    @staticmethod
    def forward(ctx: Any, x, w_data, w_scale, w_format, group_size, bias, precision, backend, *fields) -> Tensor:
        lora_A, lora_B, lora_bias, scaling, scaling_tensor, dropout_p, rng_state = (
            list(fields[i::_FIELDS]) for i in range(_FIELDS)
        )
        scaling_tensor = [c if c is None else c.detach().clone() for c in scaling_tensor]
        y, *thin = eager.forward_adapters(
            x, w_data, w_scale, w_format, group_size, bias, lora_A, lora_B, lora_bias,
            scaling, scaling_tensor, dropout_p, rng_state, precision, backend,
        )  # fmt: skip
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        need_A, need_B, need_lora_bias = (list(ctx.needs_input_grad[8 + i :: _FIELDS]) for i in range(3))
        # As in LoRALinearFunction: saved is what backward reads; of the rest it wants shapes and dtypes.
        operands = [w_data, w_scale, bias, *lora_A, *lora_B, *lora_bias]
        read = [need_x, need_x, False, *[need_x] * len(lora_A), *(need_x or need for need in need_A)]
        read += [False] * len(lora_bias)
        ctx.save_for_backward(
            x if any(need_A) else None, *(s if need else None for s, need in zip(thin, need_B, strict=True)),
            *scaling_tensor, *rng_state,
            *(tensor if reads else None for tensor, reads in zip(operands, read, strict=True)),
        )  # fmt: skip
        ctx.unread = [
            None if reads or tensor is None else tensor.detach() for tensor, reads in zip(operands, read, strict=True)
        ]
        ctx.needs = need_x, need_bias, need_A, need_B, need_lora_bias
        ctx.settings = w_format, group_size, scaling, dropout_p, precision, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w_format, group_size, scaling, dropout_p, precision, backend = ctx.settings
        need_x, need_bias, *needs = ctx.needs
        x, *saved = saved_tensors(ctx)
        E = len(scaling)
        thin, scaling_tensor, rng_state, read = saved[:E], saved[E : 2 * E], saved[2 * E : 3 * E], saved[3 * E :]
        w_data, w_scale, bias, *factors = (
            one if other is None else other for one, other in zip(read, ctx.unread, strict=True)
        )
        gradients = iter(
            eager.backward_adapters(
                dy,
                x,
                thin,
                w_data,
                w_scale,
                w_format,
                group_size,
                bias,
                factors[:E],
                factors[E : 2 * E],
                factors[2 * E :],
                scaling,
                scaling_tensor,
                dropout_p,
                rng_state,
                precision,
                backend,
                need_x,
                need_bias,
                *needs,
            )  # fmt: skip
        )
        result: list[Tensor | None] = [next(gradients) if need_x else None, None, None, None, None]
        result += [next(gradients) if need_bias else None, None, None]
        for needed in zip(*needs, strict=True):
            result += [*(next(gradients) if need else None for need in needed), None, None, None, None]
        return tuple(result)
