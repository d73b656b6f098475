"""The operators without torch's dispatcher where nobody watches it, which takes a third off the host's time of a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.ops import schema

# An operand of any other class may have operators of its own: a DTensor, a fake tensor.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), float, int, bool, str))


def forward(x: Tensor, *arguments: Any, w_tables: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``torch.ops.peftkern.forward``."""
    run = schema.forward if _watched(x, arguments, w_tables) else schema.forward_here
    return run(x, *arguments, w_tables=w_tables)


def backward(
    dy: Tensor, x: Tensor | None, s: Tensor | None, *arguments: Any, w_tables: list[Tensor] | None = None
) -> list[Tensor]:
    """``torch.ops.peftkern.backward``."""
    run = schema.backward if _watched(dy, (x, s, *arguments), w_tables) else schema.backward_here
    return run(dy, x, s, *arguments, w_tables=w_tables)


def _watched(rows: Tensor, arguments: Iterable[Any], tables: Iterable[Tensor] | None) -> bool:
    """Whether a compiler, a mode (FLOP counter, selective checkpoint), the profiler or an operand wants the operator."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or rows.is_meta
        or rows.__class__ not in _PLAIN
    ):
        return True
    for argument in arguments:
        if argument.__class__ not in _PLAIN:
            return True
    return tables is not None and any(table.__class__ not in _PLAIN for table in tables)
