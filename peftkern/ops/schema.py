"""The two operators, as torch.library sees them: schemas, implementations, fake kernels.

They are opaque to the compiler and return fresh, contiguous tensors. ``backward`` returns only the gradients that are
asked for, in the order x, lora_A, lora_B, bias, lora_bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops import dispatch, inputs
from peftkern.ops.problem import LoRAOperands, Needs
from peftkern.weights import FrozenWeight

_OPERANDS = (
    "Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, Tensor? lora_bias, float scaling, Tensor? scaling_tensor, float dropout_p, Tensor? rng_state, "
    "str precision, str backend"
)
_NEEDS = "bool need_x, bool need_A, bool need_B, bool need_bias, bool need_lora_bias"

_library = torch.library.Library("peftkern", "DEF")
_library.define(f"forward(Tensor x, {_OPERANDS}) -> (Tensor y, Tensor s)")
_library.define(f"backward(Tensor dy, Tensor? x, Tensor? s, {_OPERANDS}, {_NEEDS}) -> Tensor[]")


def _operands(w_data, w_scale, w_format, group_size, *rest) -> LoRAOperands:
    return LoRAOperands(FrozenWeight.from_operands(w_format, w_data, w_scale, group_size), *rest)


def _forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    operands = _operands(*fields)
    inputs.check_forward(operands, x)
    return dispatch.forward(operands, x, backend)


def _forward_fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    operands = _operands(*arguments[:-1])
    inputs.check_forward(operands, x)
    N, R = operands.lora_B.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], R, dtype=wide)


def _backward(dy: Tensor, x: Tensor | None, s: Tensor | None, *arguments) -> list[Tensor]:
    *fields, backend, need_x, need_A, need_B, need_bias, need_lora_bias = arguments
    operands, needs = _operands(*fields), Needs(need_x, need_A, need_B, need_bias, need_lora_bias)
    inputs.check_backward(operands, dy, x, s, needs)
    gradients = dispatch.backward(operands, dy, x, s, needs, backend)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(dy: Tensor, x, s, *arguments) -> list[Tensor]:
    *operands, _, need_x, need_A, need_B, need_bias, need_lora_bias = arguments
    fields = _operands(*operands)
    inputs.check_backward(fields, dy, x, s, Needs(need_x, need_A, need_B, need_bias, need_lora_bias))
    shapes = [dy.new_empty(dy.shape[0], fields.weight.shape[1])] if need_x else []
    parameters = (fields.lora_A, fields.lora_B, fields.bias, fields.lora_bias)
    needs = (need_A, need_B, need_bias, need_lora_bias)
    return shapes + [p.new_empty(p.shape) for p, need in zip(parameters, needs, strict=True) if need and p is not None]


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("peftkern::forward", _forward_fake, lib=_library)
torch.library.register_fake("peftkern::backward", _backward_fake, lib=_library)

forward = torch.ops.peftkern.forward.default
backward = torch.ops.peftkern.backward.default
