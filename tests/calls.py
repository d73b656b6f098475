"""Calls of every form, from pairs or from the parts of a bank, and the operators' arguments of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.call import Base, Call, Needs, Pair, Rows, Span, Update, arguments
from peftkern.weights import DenseWeight, FrozenWeight


def call_of(pairs: Sequence[Pair], shared: bool = False, backend: str = "") -> Call:
    """The updates of all pairs on the first one's base, or (``shared``) on a base each."""
    bases = [Base(pair.weight, pair.bias) for pair in (pairs if shared else pairs[:1])]
    updates = [
        Update(p.lora_A, p.lora_B, p.lora_bias, p.scaling_tensor, p.rng_state, p.scaling, p.dropout_p, i * shared)
        for i, p in enumerate(pairs)
    ]
    return Call(tuple(bases), tuple(updates), pairs[0].precision, backend)


def bank_of(
    W: Tensor | FrozenWeight, bias: Tensor | None, factors: Sequence[tuple[Tensor, Tensor]], spans: Sequence[Span],
    numbers: Tensor, inside: Tensor | None = None, *, scaling: Sequence[float] | None = None,
    p: Sequence[float] | None = None, precision: str = "base", backend: str = "",
) -> Call:  # fmt: skip
    """A call with rows; by default nothing is dropped and every scaling is 1."""
    weight = W if isinstance(W, FrozenWeight) else DenseWeight(W)
    E = len(factors)
    updates = [
        Update(A, B, None, None, None, c, dropped, 0, span)
        for (A, B), c, dropped, span in zip(factors, scaling or [1.0] * E, p or [0.0] * E, spans, strict=True)
    ]
    return Call((Base(weight, bias),), tuple(updates), precision, backend, Rows(numbers, inside))


def all_of(call: Call, x: bool = True, bias: bool = True, updates: Sequence[bool] | None = None) -> Needs:
    """Every gradient that there is, or those of some updates."""
    some = [True] * len(call.updates) if updates is None else list(updates)
    biases = [need and u.lora_bias is not None for need, u in zip(some, call.updates, strict=True)]
    return Needs(x, [bias and base.bias is not None for base in call.bases], some, some, biases)


def check_operators(
    call: Call, x: Tensor, dys: Sequence[Tensor], needs: Needs, checks: Sequence[str] | None = None
) -> None:
    """torch.library.opcheck of forward, and of backward with what forward has left and ``needs`` asks for; ``checks``:
    some of its own.
    """
    from peftkern.ops import schema

    given: Any = arguments(call)
    which = {} if checks is None else {"test_utils": checks}
    torch.library.opcheck(schema.forward, (x, *given), **which)
    thin = schema.forward(x, *given)[len(call.bases) :]
    if call.rows is None:
        thin = [s if need else None for s, need in zip(thin, needs.lora_B, strict=True)]
    torch.library.opcheck(schema.backward, (list(dys), x, thin, *given, needs.x, *map(list, needs[1:])), **which)
