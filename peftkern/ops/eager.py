"""The operators, past torch's dispatcher where nobody watches it: it costs as much as what they do on the host.

What comes this way has been checked: by ``functional``, by who patches a layer, or by autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from peftkern import call as calls
from peftkern.call import Call, Gradients, Needs
from peftkern.ops import dispatch, flops, norm, schema
from peftkern.weights import FrozenWeight

# An operand of any other class may have operators of its own: a DTensor, a fake tensor.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
_told: set[str] = set()  # of whom ``_tell`` has told what the operators are


def watched(first: Tensor) -> bool:
    """True where a compiler, a mode (FLOP counter, selective checkpoint), the profiler or ``first`` itself, an operand
    without data of its own (on meta, batched by vmap or by is_grads_batched), wants the operator.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or first.is_meta
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(first)
    )


def taken(first: Tensor, tensors: Iterable[Any], call: Call | None = None) -> bool:
    """True where the operator is taken: somebody watches, or an operand is one that has operators of its own."""
    if watched(first):
        return True
    held = () if call is None else (*call.flat_parameters(), *calls.others(call))
    return not _PLAIN.issuperset(map(type, (*tensors, *held)))


def _tell() -> None:
    """Tell those parts of torch that count and shard operators what these are: importing them costs seconds, but where
    they watch, or an operand is theirs, they have been imported.
    """
    if "torch.distributed.tensor" in sys.modules and "sharding" not in _told:
        from peftkern.ops import sharding

        _told.add("sharding")
        sharding.register()
    if "torch.utils.flop_counter" in sys.modules:
        if "flops" not in _told:
            _told.add("flops")
            flops.register()
        flops.tell(_get_current_dispatch_mode_stack())


_tell._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports the compiler


def forward(call: Call, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Every y and every s; see ``schema``."""
    if taken(x, (x,), call):
        _tell()
        found = schema.forward(x, *calls.arguments(call))
        return found[: len(call.bases)], found[len(call.bases) :]
    return dispatch.forward(call, x)


def backward(
    call: Call, dys: Sequence[Tensor], x: Tensor | None, thin: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """The gradients that are needed."""
    if taken(dys[0], (*dys, x, *thin), call):
        _tell()
        found = schema.backward(list(dys), x, list(thin), *calls.arguments(call), needs.x, *map(list, needs[1:]))
        return calls.returned(needs, found)
    return dispatch.backward(call, dys, x, thin, needs)


def row_norm(
    weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, scaling_tensor: Tensor | None
) -> Tensor:
    """The row norms of W + c B A."""
    if taken(lora_A, (*weight.tensors, lora_A, lora_B, scaling_tensor)):
        _tell()
        return schema.row_norm(*schema.weight_arguments(weight), lora_A, lora_B, scaling, scaling_tensor)
    return norm.row_norm(weight, lora_A, lora_B, scaling, scaling_tensor)


def dropped_product(
    weight: FrozenWeight, rows: Tensor, dropout_p: float, rng_state: Tensor, backward: bool, backend: str
) -> Tensor:
    """K(rows) W^T, or, in ``backward``, K(rows W)."""
    if taken(rows, (*weight.tensors, rows, rng_state)):
        _tell()
        given = schema.weight_arguments(weight)
        return schema.dropped_product(rows, *given, dropout_p, rng_state, backward, backend)
    return dispatch.dropped_product(weight, rows, dropout_p, rng_state, backward, backend)
