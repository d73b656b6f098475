"""Which products run and what is saved; no mathematics.

Saved for backward: x, s, the parameters, two RNG integers and a snapshot of the scaling. Never a dropout mask, a
dropped or widened copy of x, or a product with the frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.ops import schema

# Positions in LoRALinearFunction.forward's argument list of what can have a gradient.
_DIFFERENTIABLE = {"x": 0, "lora_A": 5, "lora_B": 6, "bias": 7, "lora_bias": 8}
_ARGUMENTS = 15  # and the weight's tables


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + c D(x) A^T B^T + bias + c lora_bias on 2-D x; once differentiable in x, A, B and the biases."""

    @staticmethod
    def forward(
        ctx: Any, x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, lora_bias, *settings
    ) -> Tensor:
        scaling, scaling_tensor, dropout_p, rng_state, precision, backend, *w_tables = settings
        if scaling_tensor is not None:
            scaling_tensor = scaling_tensor.detach().clone()  # backward uses the value that forward saw
        y, s = schema.forward(
            x, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, lora_bias,
            scaling, scaling_tensor, dropout_p, rng_state, precision, backend, w_tables=w_tables or None,
        )  # fmt: skip
        need_x, need_A, need_B = (ctx.needs_input_grad[_DIFFERENTIABLE[name]] for name in ("x", "lora_A", "lora_B"))
        # Only what backward reads is saved, so that an in-place update of anything else is not held against the caller;
        # of the rest backward wants shapes and dtypes.
        read = {"w_data": need_x, "w_scale": need_x, "lora_A": need_x, "lora_B": need_x or need_A}
        operands = {"w_data": w_data, "w_scale": w_scale, "lora_A": lora_A, "lora_B": lora_B}
        operands |= {"bias": bias, "lora_bias": lora_bias}
        ctx.save_for_backward(
            x if need_A else None, s if need_B else None, scaling_tensor, rng_state,
            *(w_tables if need_x else ()),
            *(tensor if read.get(name) else None for name, tensor in operands.items()),
        )  # fmt: skip
        ctx.unread = [
            None if read.get(name) or tensor is None else tensor.detach() for name, tensor in operands.items()
        ]
        ctx.tables, ctx.saved_tables = len(w_tables), len(w_tables) if need_x else 0
        ctx.settings = w_format, group_size, scaling, dropout_p, precision, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, scaling_tensor, rng_state, *read = ctx.saved_tensors
        w_tables, read = read[: ctx.saved_tables], read[ctx.saved_tables :]
        w_data, w_scale, lora_A, lora_B, bias, lora_bias = (
            saved if unread is None else unread for saved, unread in zip(read, ctx.unread, strict=True)
        )
        w_format, group_size, scaling, dropout_p, precision, backend = ctx.settings
        needed = [position for position in _DIFFERENTIABLE.values() if ctx.needs_input_grad[position]]
        gradients = schema.backward(
            dy, x, s, w_data, w_scale, w_format, group_size, lora_A, lora_B, bias, lora_bias,
            scaling, scaling_tensor, dropout_p, rng_state, precision, backend,
            *(ctx.needs_input_grad[position] for position in _DIFFERENTIABLE.values()),
            w_tables=w_tables or None,
        )  # fmt: skip
        result: list[Tensor | None] = [None] * (_ARGUMENTS + ctx.tables)
        for position, gradient in zip(needed, gradients, strict=True):
            result[position] = gradient
        return tuple(result)


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
        y, *thin = schema.forward_adapters(
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
        x, *saved = ctx.saved_tensors
        E = len(scaling)
        thin, scaling_tensor, rng_state, read = saved[:E], saved[E : 2 * E], saved[2 * E : 3 * E], saved[3 * E :]
        w_data, w_scale, bias, *factors = (
            one if other is None else other for one, other in zip(read, ctx.unread, strict=True)
        )
        gradients = iter(
            schema.backward_adapters(
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
