"""Several layers that read one x, as one autograd node: x is saved once, and dx is accumulated in one buffer.

y_i = x W_i^T + bias_i + c_i (D_i(x) A_i^T B_i^T + lora_bias_i). Saved for backward: x, every s_i, the parameters, the
RNG integers and a snapshot of the scalings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.ops import shared_input as ops
from peftkern.ops.problem import LoRAOperands, Needs
from peftkern.saved_tensors import saved_tensors

_FIELDS = 9  # of a layer among the arguments: weight, and LoRAOperands' others without the precision
_FIRST = 3  # behind x, precision and backend


def products(x: Tensor, members: Sequence[LoRAOperands], backend: str = "") -> list[Tensor]:
    """y [M, N_i] of each member; x is 2-D and in the compute dtype, the weights are dense."""
    fields = [(one.weight.data, *one[1:-1]) for one in members]
    trained = [tensor for field in fields for tensor in field[1:5] if tensor is not None]
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in trained)):
        flat = (value for field in fields for value in field)
        return list(SharedInputFunction.apply(x, members[0].precision, backend, *flat))
    lists = [list(column) for column in zip(*fields, strict=True)]
    return ops.forward(x, *lists, members[0].precision, backend)[: len(members)]


class SharedInputFunction(torch.autograd.Function):
    """Every y_i; once differentiable in x and each layer's A, B and biases. An output without a use costs nothing."""

    @staticmethod
    def forward(ctx: Any, x, precision, backend, *fields) -> tuple[Tensor, ...]:
        columns = [list(fields[i::_FIELDS]) for i in range(_FIELDS)]
        columns[6] = [c if c is None else c.detach().clone() for c in columns[6]]  # backward uses what forward saw
        outputs = ops.forward(x, *columns, precision, backend)
        E = len(columns[0])
        need_x = ctx.needs_input_grad[0]
        needs = [
            Needs(need_x, *ctx.needs_input_grad[i + 1 : i + 5]) for i in range(_FIRST, _FIRST + E * _FIELDS, _FIELDS)
        ]
        saved: list[Tensor | None] = [x if any(need.lora_A for need in needs) else None]
        ctx.unread = []
        for (weight, A, B, bias, lora_bias, _, tensor, _, rng_state), s, need in zip(
            zip(*columns, strict=True), outputs[E:], needs, strict=True
        ):
            # As in LoRALinearFunction: saved is what backward reads; of the rest it wants shapes and dtypes.
            read = (need_x, need_x, need_x or need.lora_A, False, False)
            operands = (weight, A, B, bias, lora_bias)
            saved += [s if need.lora_B else None, tensor, rng_state]
            saved += [one if reads else None for one, reads in zip(operands, read, strict=True)]
            ctx.unread.append(
                [None if reads or one is None else one.detach() for one, reads in zip(operands, read, strict=True)]
            )
        ctx.save_for_backward(*saved)
        ctx.needs, ctx.settings = needs, (columns[5], columns[7], precision, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y, need in zip(outputs, needs, strict=False) if not any(need)))
        return tuple(outputs[:E])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        scaling, dropout_p, precision, backend = ctx.settings
        x, *saved = saved_tensors(ctx)
        used = [i for i, (dy, need) in enumerate(zip(dys, ctx.needs, strict=True)) if dy is not None and any(need)]
        result: list[Tensor | None] = [None] * (_FIRST + _FIELDS * len(dys))
        if not used:
            return tuple(result)
        thin, members = [], []
        for i in used:
            s, tensor, rng_state, *read = saved[8 * i : 8 * i + 8]
            operands = [one if other is None else other for one, other in zip(read, ctx.unread[i], strict=True)]
            thin.append(s)
            members.append([*operands, scaling[i], tensor, dropout_p[i], rng_state])
        needs = [ctx.needs[i] for i in used]
        gradients = iter(
            ops.backward(
                [dys[i] for i in used],
                x if any(need.lora_A for need in needs) else None,
                thin,
                *map(list, zip(*members, strict=True)),
                precision,
                backend,
                needs[0].x,
                *(list(column) for column in list(zip(*needs, strict=True))[1:]),
            )  # fmt: skip
        )
        if needs[0].x:
            result[0] = next(gradients)
        for i, need in zip(used, needs, strict=True):
            first = _FIRST + _FIELDS * i + 1
            result[first : first + 4] = [next(gradients) if wanted else None for wanted in need[1:]]
        return tuple(result)
