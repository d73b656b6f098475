"""The operators, as torch.library sees them: schemas, implementations, fake kernels.

They are opaque to the compiler and return fresh, contiguous tensors. ``backward`` returns only the gradients that are
asked for, in the order x, lora_A, lora_B, bias, lora_bias. The frozen weight's shape is that of lora_B and lora_A;
``w_tables`` are what its format needs beside data and scales.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftkern._on_import import on_import
from peftkern.ops import dispatch, flops, inputs, norm
from peftkern.ops.define import define
from peftkern.ops.problem import LoRAOperands, Needs
from peftkern.weights import FrozenWeight

_OPERANDS = (
    "Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, Tensor? lora_bias, float scaling, Tensor? scaling_tensor, float dropout_p, Tensor? rng_state, "
    "str precision, str backend"
)
_NEEDS = "bool need_x, bool need_A, bool need_B, bool need_bias, bool need_lora_bias"
_TABLES = "*, Tensor[]? w_tables=None"

_define = functools.partial(define, torch.library.Library("peftkern", "DEF"))


def _operands(tables, w_data, w_scale, w_format, group_size, lora_A, lora_B, *rest) -> LoRAOperands:
    shape = None if w_format == "dense" else (*lora_B.shape[:1], *lora_A.shape[1:])
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size, tables or (), shape)
    return LoRAOperands(weight, lora_A, lora_B, *rest)


def forward_here(x: Tensor, *arguments, w_tables=None) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    operands = _operands(w_tables, *fields)
    inputs.check_forward(operands, x)
    return dispatch.forward(operands, x, backend)


def _forward_fake(x: Tensor, *arguments, w_tables=None) -> tuple[Tensor, Tensor]:
    operands = _operands(w_tables, *arguments[:-1])
    inputs.check_forward(operands, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    N, R = operands.lora_B.shape
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], R, dtype=wide)


def backward_here(dy: Tensor, x: Tensor | None, s: Tensor | None, *arguments, w_tables=None) -> list[Tensor]:
    *fields, backend, need_x, need_A, need_B, need_bias, need_lora_bias = arguments
    operands, needs = _operands(w_tables, *fields), Needs(need_x, need_A, need_B, need_bias, need_lora_bias)
    inputs.check_backward(operands, dy, x, s, needs)
    gradients = dispatch.backward(operands, dy, x, s, needs, backend)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(dy: Tensor, x, s, *arguments, w_tables=None) -> list[Tensor]:
    *operands, _, need_x, need_A, need_B, need_bias, need_lora_bias = arguments
    fields = _operands(w_tables, *operands)
    inputs.check_backward(fields, dy, x, s, Needs(need_x, need_A, need_B, need_bias, need_lora_bias))
    shapes = [dy.new_empty(dy.shape[0], fields.weight.shape[1])] if need_x else []
    parameters = (fields.lora_A, fields.lora_B, fields.bias, fields.lora_bias)
    needs = (need_A, need_B, need_bias, need_lora_bias)
    return shapes + [p.new_empty(p.shape) for p, need in zip(parameters, needs, strict=True) if need and p is not None]


forward = _define(f"forward(Tensor x, {_OPERANDS}, {_TABLES}) -> (Tensor y, Tensor s)", forward_here, _forward_fake)
backward = _define(
    f"backward(Tensor dy, Tensor? x, Tensor? s, {_OPERANDS}, {_NEEDS}, {_TABLES}) -> Tensor[]",
    backward_here,
    _backward_fake,
)

# Several adapters on one weight, y = x W^T + bias + sum_i c_i (D_i(x) A_i^T B_i^T + lora_bias_i), in one call: the
# lists hold one entry for each. ``forward_adapters`` returns y and every s_i, ``backward_adapters`` the gradients asked
# for in the order x, bias, and for each adapter lora_A, lora_B, lora_bias.
_ADAPTERS = (
    "Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor?[] lora_bias, float[] scaling, Tensor?[] scaling_tensor, float[] dropout_p, Tensor?[] rng_state, "
    "str precision, str backend"
)


_LISTS = ("lora_A", "lora_B", "lora_bias", "scaling", "scaling_tensor", "dropout_p", "rng_state")


def _adapters(w_data, w_scale, w_format, group_size, bias, *lists_and_precision) -> list[LoRAOperands]:
    *lists, precision = lists_and_precision
    inputs.check_lists(1, **dict(zip(_LISTS, lists, strict=True)))
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    return [
        LoRAOperands(weight, A, B, None if i else bias, lora_bias, c, tensor, p, rng_state, precision)
        for i, (A, B, lora_bias, c, tensor, p, rng_state) in enumerate(zip(*lists, strict=True))
    ]


def _given_forward(x: Tensor, *operands) -> list[LoRAOperands]:
    adapters = _adapters(*operands)
    for i, one in enumerate(adapters):
        inputs.naming(f"adapter {i}", inputs.check_forward, one, x)
    return adapters


def forward_adapters_here(x: Tensor, *arguments) -> list[Tensor]:
    *operands, backend = arguments
    return dispatch.forward_adapters(_given_forward(x, *operands), x, backend)


def _forward_adapters_fake(x: Tensor, *arguments) -> list[Tensor]:
    adapters = _given_forward(x, *arguments[:-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    thin = [x.new_empty(x.shape[0], one.lora_A.shape[0], dtype=wide) for one in adapters]
    return [x.new_empty(x.shape[0], adapters[0].weight.shape[0]), *thin]


def _given_backward(dy: Tensor, x, thin, *arguments) -> tuple[list[LoRAOperands], list[Needs], str]:
    *operands, backend, need_x, need_bias, need_A, need_B, need_lora_bias = arguments
    adapters = _adapters(*operands)
    inputs.check_lists(1, lora_A=adapters, s=thin, need_A=need_A, need_B=need_B, need_lora_bias=need_lora_bias)
    needs = [
        Needs(need_x, A, B, need_bias and i == 0, lora_bias)
        for i, (A, B, lora_bias) in enumerate(zip(need_A, need_B, need_lora_bias, strict=True))
    ]
    for i, one in enumerate(adapters):
        inputs.naming(f"adapter {i}", inputs.check_backward, one, dy, x, thin[i], needs[i])
    return adapters, needs, backend


def backward_adapters_here(dy: Tensor, x: Tensor | None, thin: list[Tensor | None], *arguments) -> list[Tensor]:
    adapters, needs, backend = _given_backward(dy, x, thin, *arguments)
    found = dispatch.backward_adapters(adapters, dy, x, thin, needs, backend)
    ordered = [found[0].x, found[0].bias]
    for one in found:
        ordered += [one.lora_A, one.lora_B, one.lora_bias]
    return [gradient for gradient in ordered if gradient is not None]


def _backward_adapters_fake(dy: Tensor, x, thin, *arguments) -> list[Tensor]:
    adapters, needs, _ = _given_backward(dy, x, thin, *arguments)
    shapes = [dy.new_empty(dy.shape[0], adapters[0].weight.shape[1])] if needs[0].x else []
    wanted = [(needs[0].bias, adapters[0].bias)]
    for one, need in zip(adapters, needs, strict=True):
        wanted += [(need.lora_A, one.lora_A), (need.lora_B, one.lora_B), (need.lora_bias, one.lora_bias)]
    return shapes + [like.new_empty(like.shape) for need, like in wanted if need and like is not None]


forward_adapters = _define(
    f"forward_adapters(Tensor x, {_ADAPTERS}) -> Tensor[]", forward_adapters_here, _forward_adapters_fake
)
backward_adapters = _define(
    f"backward_adapters(Tensor dy, Tensor? x, Tensor?[] s, {_ADAPTERS}, bool need_x, bool need_bias, "
    "bool[] need_A, bool[] need_B, bool[] need_lora_bias) -> Tensor[]",
    backward_adapters_here,
    _backward_adapters_fake,
)


def _given_norm(w_data, w_scale, w_format, group_size, lora_A, lora_B, scaling_tensor) -> FrozenWeight:
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    inputs.check_norm(weight, lora_A, lora_B, scaling_tensor)
    return weight


def row_norm_here(w_data, w_scale, w_format, group_size, lora_A, lora_B, scaling, scaling_tensor) -> Tensor:
    weight = _given_norm(w_data, w_scale, w_format, group_size, lora_A, lora_B, scaling_tensor)
    return norm.row_norm(weight, lora_A, lora_B, scaling, scaling_tensor)


def _row_norm_fake(w_data, w_scale, w_format, group_size, lora_A, lora_B, _, scaling_tensor) -> Tensor:
    weight = _given_norm(w_data, w_scale, w_format, group_size, lora_A, lora_B, scaling_tensor)
    wide = torch.promote_types(weight.compute_dtype or lora_A.dtype, torch.float32)
    return lora_A.new_empty(weight.shape[0], dtype=wide)


# The row norms of W + c B A, for DoRA.
row_norm = _define(
    "row_norm(Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor? scaling_tensor) -> Tensor",
    row_norm_here,
    _row_norm_fake,
)


def dropped_product_here(
    rows, w_data, w_scale, w_format, group_size, dropout_p, rng_state, backward, backend
) -> Tensor:
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    inputs.check_product(weight, rows, dropout_p, rng_state, backward)
    return dispatch.dropped_product(weight, rows, dropout_p, rng_state, backward, backend)


def _dropped_product_fake(
    rows, w_data, w_scale, w_format, group_size, dropout_p, rng_state, backward, backend
) -> Tensor:
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    inputs.check_product(weight, rows, dropout_p, rng_state, backward)
    return rows.new_empty(rows.shape[0], weight.shape[1 if backward else 0])


# The product of DoRA that is dropped as a whole, unscaled: K(rows) W^T, or, in ``backward``, K(rows W); K keeps what
# dropout keeps.
dropped_product = _define(
    "dropped_product(Tensor rows, Tensor w_data, Tensor? w_scale, str w_format, int group_size, float dropout_p, "
    "Tensor rng_state, bool backward, str backend) -> Tensor",
    dropped_product_here,
    _dropped_product_fake,
)


def _register_sharding() -> None:
    from peftkern.ops import sharding

    sharding.register()


on_import("torch.utils.flop_counter", flops.register)  # it imports Triton
on_import("torch.distributed.tensor", _register_sharding)
