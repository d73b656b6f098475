"""The operators, as torch.library sees them: schemas, implementations, fake kernels.

    forward           every y [M, N_b] of a call, then every s [M, R_u]; with rows one s, span after span
    backward          the gradients asked for: x, each base's bias, each update's lora_A, each lora_B, each lora_bias
    row_norm          of W + c B A, for DoRA
    dropped_product   of DoRA, dropped as a whole, unscaled: K(rows) W^T, or K(rows W); K keeps what dropout keeps

They are opaque to the compiler and return fresh, contiguous tensors. Every one checks every operand, real and fake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkern import call as calls
from peftkern.call import Call, Needs
from peftkern.ops import check, dispatch, norm
from peftkern.weights import FrozenWeight

_NEEDS = "bool need_x, bool[] need_bias, bool[] need_A, bool[] need_B, bool[] need_lora_bias"
_WEIGHT = "Tensor w_data, Tensor? w_scale, Tensor[] w_tables, str w_format, int[] w_facts"
_library = torch.library.Library("peftkern", "DEF")


def _define(
    schema: str, given: Callable[..., tuple[Any, ...]], real: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """``peftkern::name`` with its implementation for every device, and its fake one.

    ``given`` checks the operator's arguments and makes of them what both take. The dispatcher takes None where a schema
    says ``Tensor``: here that is a TypeError.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    operator = getattr(torch.ops.peftkern, name).default
    positions = [
        (i, a.name) for i, a in enumerate(operator._schema.arguments) if str(a.type) in ("Tensor", "List[Tensor]")
    ]

    def complete(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            for i, argument in positions:
                value = arguments[i]
                if value is None or (value.__class__ is list and any(entry is None for entry in value)):
                    raise TypeError(f"{name}: {argument} is missing")
            return implementation(*given(*arguments))

        return call

    _library.impl(name, complete(real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{name}", complete(fake), lib=_library)
    return operator


def _given_forward(x: Tensor, *arguments: Any) -> tuple[Call, Tensor]:
    call = calls.from_arguments(*arguments)
    check.forward(call, x)
    return call, x


def _forward(call: Call, x: Tensor) -> list[Tensor]:
    check.values_of_rows(call, x.shape[0])
    ys, thin = dispatch.forward(call, x)
    return [*ys, *thin]


def _forward_fake(call: Call, x: Tensor) -> list[Tensor]:
    ys, thin = dispatch.empty_results(call, x)
    return [*ys, *thin]


def _given_backward(dys, x, thin, *arguments: Any) -> tuple[Any, ...]:
    *fields, need_x, need_bias, need_A, need_B, need_lora_bias = arguments
    call, needs = calls.from_arguments(*fields), Needs(need_x, need_bias, need_A, need_B, need_lora_bias)
    check.backward(call, dys, x, thin, needs)
    return call, dys, x, thin, needs


def _backward(call: Call, dys: list[Tensor], x: Tensor | None, thin: list[Tensor | None], needs: Needs) -> list[Tensor]:
    check.values_of_rows(call, dys[0].shape[0])
    return dispatch.backward(call, dys, x, thin, needs).asked_for()


def _backward_fake(call: Call, dys: list[Tensor], x: Any, thin: Any, needs: Needs) -> list[Tensor]:
    return dispatch.zero_gradients(call, dys[0], needs).asked_for()


forward = _define(f"forward(Tensor x, {calls.SCHEMA}) -> Tensor[]", _given_forward, _forward, _forward_fake)
backward = _define(
    f"backward(Tensor[] dy, Tensor? x, Tensor?[] s, {calls.SCHEMA}, {_NEEDS}) -> Tensor[]",
    _given_backward,
    _backward,
    _backward_fake,
)


def weight_arguments(weight: FrozenWeight) -> tuple[Any, ...]:
    """A weight as the other two operators take it."""
    facts = [*weight.shape, weight.group_size, len(weight.tables)]
    return weight.data, weight.scale, list(weight.tables), weight.format, facts


def _given_norm(*arguments: Any) -> tuple[Any, ...]:
    *fields, lora_A, lora_B, scaling, scaling_tensor = arguments
    weight = calls.weight_of(*fields)
    check.norm(weight, lora_A, lora_B, scaling_tensor)
    return weight, lora_A, lora_B, scaling, scaling_tensor


def _row_norm_fake(weight: FrozenWeight, lora_A: Tensor, *unused: Any) -> Tensor:
    wide = torch.promote_types(weight.compute_dtype or lora_A.dtype, torch.float32)
    return lora_A.new_empty(weight.shape[0], dtype=wide)


row_norm = _define(
    f"row_norm({_WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? scaling_tensor) -> Tensor",
    _given_norm,
    norm.row_norm,
    _row_norm_fake,
)


def _given_product(rows: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *fields, dropout_p, rng_state, backward, backend = arguments
    weight = calls.weight_of(*fields)
    check.product(weight, rows, dropout_p, rng_state, backward)
    return weight, rows, dropout_p, rng_state, backward, backend


def _dropped_product_fake(weight: FrozenWeight, rows: Tensor, p: Any, state: Any, backward: bool, _: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1 if backward else 0])


dropped_product = _define(
    f"dropped_product(Tensor rows, {_WEIGHT}, float dropout_p, Tensor rng_state, bool backward, str backend) -> Tensor",
    _given_product,
    dispatch.dropped_product,
    _dropped_product_fake,
)
