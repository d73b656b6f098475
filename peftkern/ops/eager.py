"""The operators, past torch's dispatcher where nobody watches it: it costs as much as what they do on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.ops import bank_schema, schema

# An operand of any other class may have operators of its own: a DTensor, a fake tensor.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), float, int, bool, str))


def _watched(first: Tensor) -> bool:
    """Whether a compiler, a mode (FLOP counter, selective checkpoint), the profiler or ``first`` itself, an operand
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


def _plain(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        kind = argument.__class__
        if kind not in _PLAIN and not (kind in (list, tuple) and _plain(argument)):
            return False
    return True


def _shortened(operator: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **tables: Any) -> Any:
        if _watched(arguments[0]) or not _plain(arguments) or not _plain(tables.values()):
            return operator(*arguments, **tables)
        return implementation(*arguments, **tables)

    return call


forward = _shortened(schema.forward, schema.forward_here)
backward = _shortened(schema.backward, schema.backward_here)
forward_adapters = _shortened(schema.forward_adapters, schema.forward_adapters_here)
backward_adapters = _shortened(schema.backward_adapters, schema.backward_adapters_here)
row_norm = _shortened(schema.row_norm, schema.row_norm_here)
dropped_product = _shortened(schema.dropped_product, schema.dropped_product_here)
bank_forward = _shortened(bank_schema.forward, bank_schema.forward_here)
bank_backward = _shortened(bank_schema.backward, bank_schema.backward_here)
