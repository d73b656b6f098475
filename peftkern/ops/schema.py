"""The operators, as torch.library sees them: schemas, implementations, fake kernels.

They are opaque to the compiler and return fresh, contiguous tensors. ``backward`` returns only the gradients that are
asked for, in the order x, lora_A, lora_B, bias, lora_bias. The frozen weight's shape is that of lora_B and lora_A;
``w_tables`` are what its format needs beside data and scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern._on_import import on_import
from peftkern.ops import dispatch, flops, inputs, norm
from peftkern.ops.problem import LoRAOperands, Needs
from peftkern.weights import FrozenWeight

_OPERANDS = (
    "Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, Tensor? lora_bias, float scaling, Tensor? scaling_tensor, float dropout_p, Tensor? rng_state, "
    "str precision, str backend"
)
_NEEDS = "bool need_x, bool need_A, bool need_B, bool need_bias, bool need_lora_bias"
_TABLES = "*, Tensor[]? w_tables=None"

_library = torch.library.Library("peftkern", "DEF")
_library.define(f"forward(Tensor x, {_OPERANDS}, {_TABLES}) -> (Tensor y, Tensor s)")
_library.define(f"backward(Tensor dy, Tensor? x, Tensor? s, {_OPERANDS}, {_NEEDS}, {_TABLES}) -> Tensor[]")


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


# Several adapters on one weight, y = x W^T + bias + sum_i c_i (D_i(x) A_i^T B_i^T + lora_bias_i), in one call: the
# lists hold one entry for each. ``forward_adapters`` returns y and every s_i, ``backward_adapters`` the gradients asked
# for in the order x, bias, and for each adapter lora_A, lora_B, lora_bias.
_ADAPTERS = (
    "Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor?[] lora_bias, float[] scaling, Tensor?[] scaling_tensor, float[] dropout_p, Tensor?[] rng_state, "
    "str precision, str backend"
)
_library.define(f"forward_adapters(Tensor x, {_ADAPTERS}) -> Tensor[]")
_library.define(
    f"backward_adapters(Tensor dy, Tensor? x, Tensor?[] s, {_ADAPTERS}, bool need_x, bool need_bias, "
    "bool[] need_A, bool[] need_B, bool[] need_lora_bias) -> Tensor[]"
)


def _adapters(w_data, w_scale, w_format, group_size, bias, *lists_and_precision) -> list[LoRAOperands]:
    *lists, precision = lists_and_precision
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    return [
        LoRAOperands(weight, A, B, None if i else bias, lora_bias, c, tensor, p, rng_state, precision)
        for i, (A, B, lora_bias, c, tensor, p, rng_state) in enumerate(zip(*lists, strict=True))
    ]


def forward_adapters_here(x: Tensor, *arguments) -> list[Tensor]:
    *operands, backend = arguments
    return dispatch.forward_adapters(_adapters(*operands), x, backend)


def _forward_adapters_fake(x: Tensor, *arguments) -> list[Tensor]:
    *operands, _ = arguments
    adapters = _adapters(*operands)
    wide = torch.promote_types(x.dtype, torch.float32)
    thin = [x.new_empty(x.shape[0], one.lora_A.shape[0], dtype=wide) for one in adapters]
    return [x.new_empty(x.shape[0], adapters[0].weight.shape[0]), *thin]


def backward_adapters_here(dy: Tensor, x: Tensor | None, thin: list[Tensor | None], *arguments) -> list[Tensor]:
    *operands, backend, need_x, need_bias, need_A, need_B, need_lora_bias = arguments
    needs = [
        Needs(need_x, A, B, need_bias and i == 0, lora_bias)
        for i, (A, B, lora_bias) in enumerate(zip(need_A, need_B, need_lora_bias, strict=True))
    ]
    found = dispatch.backward_adapters(_adapters(*operands), dy, x, thin, needs, backend)
    ordered = [found[0].x, found[0].bias]
    for one in found:
        ordered += [one.lora_A, one.lora_B, one.lora_bias]
    return [gradient for gradient in ordered if gradient is not None]


def _backward_adapters_fake(dy: Tensor, x, thin, *arguments) -> list[Tensor]:
    *operands, backend, need_x, need_bias, need_A, need_B, need_lora_bias = arguments
    adapters = _adapters(*operands)
    shapes = [dy.new_empty(dy.shape[0], adapters[0].weight.shape[1])] if need_x else []
    wanted = [(need_bias, adapters[0].bias)]
    for one, *needs in zip(adapters, need_A, need_B, need_lora_bias, strict=True):
        wanted += zip(needs, (one.lora_A, one.lora_B, one.lora_bias), strict=True)
    return shapes + [like.new_empty(like.shape) for need, like in wanted if need and like is not None]


# The row norms of W + c B A, for DoRA.
_library.define(
    "row_norm(Tensor w_data, Tensor? w_scale, str w_format, int group_size, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor? scaling_tensor) -> Tensor"
)


def row_norm_here(w_data, w_scale, w_format, group_size, *rest) -> Tensor:
    return norm.row_norm(FrozenWeight.from_operands(w_format, w_data, w_scale, group_size), *rest)


def _row_norm_fake(w_data, w_scale, w_format, group_size, lora_A, *_) -> Tensor:
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    wide = torch.promote_types(weight.compute_dtype or lora_A.dtype, torch.float32)
    return lora_A.new_empty(weight.shape[0], dtype=wide)


# The product of DoRA that is dropped as a whole, unscaled: K(rows) W^T, or, in ``backward``, K(rows W); K keeps what
# dropout keeps.
_library.define(
    "dropped_product(Tensor rows, Tensor w_data, Tensor? w_scale, str w_format, int group_size, float dropout_p, "
    "Tensor rng_state, bool backward, str backend) -> Tensor"
)


def dropped_product_here(
    rows, w_data, w_scale, w_format, group_size, dropout_p, rng_state, backward, backend
) -> Tensor:
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    inputs.check_product(weight, rows, rng_state, backward)
    return dispatch.dropped_product(weight, rows, dropout_p, rng_state, backward, backend)


def _dropped_product_fake(rows, w_data, w_scale, w_format, group_size, _, rng_state, backward, backend) -> Tensor:
    weight = FrozenWeight.from_operands(w_format, w_data, w_scale, group_size)
    inputs.check_product(weight, rows, rng_state, backward)
    return rows.new_empty(rows.shape[0], weight.shape[1 if backward else 0])


_library.impl("forward", forward_here, "CompositeExplicitAutograd")
_library.impl("backward", backward_here, "CompositeExplicitAutograd")
torch.library.register_fake("peftkern::forward", _forward_fake, lib=_library)
torch.library.register_fake("peftkern::backward", _backward_fake, lib=_library)
_library.impl("forward_adapters", forward_adapters_here, "CompositeExplicitAutograd")
_library.impl("backward_adapters", backward_adapters_here, "CompositeExplicitAutograd")
torch.library.register_fake("peftkern::forward_adapters", _forward_adapters_fake, lib=_library)
torch.library.register_fake("peftkern::backward_adapters", _backward_adapters_fake, lib=_library)
_library.impl("row_norm", row_norm_here, "CompositeExplicitAutograd")
torch.library.register_fake("peftkern::row_norm", _row_norm_fake, lib=_library)
_library.impl("dropped_product", dropped_product_here, "CompositeExplicitAutograd")
torch.library.register_fake("peftkern::dropped_product", _dropped_product_fake, lib=_library)

forward = torch.ops.peftkern.forward.default
backward = torch.ops.peftkern.backward.default
forward_adapters = torch.ops.peftkern.forward_adapters.default
backward_adapters = torch.ops.peftkern.backward_adapters.default
row_norm = torch.ops.peftkern.row_norm.default
dropped_product = torch.ops.peftkern.dropped_product.default


def _register_sharding() -> None:
    from peftkern.ops import sharding

    sharding.register()


on_import("torch.utils.flop_counter", flops.register)  # it imports Triton
on_import("torch.distributed.tensor", _register_sharding)
