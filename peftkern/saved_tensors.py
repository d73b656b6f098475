"""Backward's reading of the tensors that forward saved, with an error that a user of layers understands."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

# Who knows layers by name: functions of the ids of some of a layer's parameters. Asked when there is an error.
name_finders: list[Callable[[Collection[int]], str | None]] = []


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors``. Raises: autograd's error for one that was modified in place, with the layer's name."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(f"{_layer(ctx)}: {error}\n{_ADVICE}") from error


_ADVICE = (
    "peftkern saves x itself, also where PEFT saves a copy (dropout, fp32 adapters beside a 16-bit base): change x "
    "out of place after the layer, h = h + layer(h) instead of h += layer(h), or run it in peftkern.disabled()"
)


def _layer(ctx: Any) -> str:
    parameters = {id(node.variable) for node, _ in ctx.next_functions if hasattr(node, "variable")}
    for find in name_finders:
        name = find(parameters)
        if name is not None:
            return f"layer {name}"
    return "a fused LoRA layer"
