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
