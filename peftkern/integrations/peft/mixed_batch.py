"""PEFT's mixed batches: ``adapter_names`` says which adapter each sequence takes; one call of the bank a layer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.call import Rows, Span, Update
from peftkern.integrations import quantised
from peftkern.integrations.peft.read import Adapter, plain_parts, why_not_input
from peftkern.multi_lora import draw_states, run_rows
from peftkern.segments import Routing, plan_rows
from peftkern.weights import DenseWeight, FrozenWeight

BASE = "__base__"  # PEFT's name for no adapter


class _Routed(NamedTuple):
    """The rows of a batch by adapter: an id in ``plan`` is a position in ``names``."""

    names: tuple[str, ...]
    plan: Routing


@functools.lru_cache(maxsize=16)
def _rows(names: tuple[str, ...], tokens: int, device: torch.device, stream: int) -> _Routed:
    """Worked out once a batch, by its first layer, and not again while the same names come with as many tokens.

    A stream has its own: on another they might not be there yet, or be in use when the cache drops them.
    """
    used = tuple(dict.fromkeys(name for name in names if name != BASE))
    numbers = {name: i for i, name in enumerate(used)} | {BASE: -1}
    with torch.inference_mode(False):  # the next batch may be one of training
        ids = torch.tensor([numbers[name] for name in names], dtype=torch.int64, device="cpu")
        return _Routed(used, plan_rows(ids.repeat_interleave(tokens), device))


def mixed_batch(layer: Any, x: Tensor, names: Any) -> Tensor | str:
    """y of a layer for the adapters that the sequences of x [batch, ..., K] name, or why PEFT has to run.

    That is also where PEFT raises: names that are not as many as the sequences, merged adapters, DoRA. A name that
    the layer does not have is the base, as in PEFT. Differences: an update is added to y before it is rounded to
    its dtype, and dropout, where the layer trains, draws from another stream.
    """
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return "a graph would hold on to the rows of a mixed batch"  # which the cache may drop
    if not isinstance(names, (list, tuple)) or not x.numel() or x.ndim < 2 or len(names) != len(x):
        return "the names of a mixed batch are not one for each sequence"
    used, plan = _rows(tuple(names), x.shape[1:-1].numel(), x.device, _stream(x))
    present = layer._modules["lora_A"]._modules
    spans = [span for span in plan.spans if used[span.id] in present]
    parts = plain_parts(layer, [used[span.id] for span in spans])
    if isinstance(parts, str):
        return parts
    if parts.units:
        return "a mixed batch over units of FSDP"
    if not all(map(_is_plain, parts.adapters)):
        return "a mixed batch with DoRA or a tensor as scaling"
    reason = why_not_input(parts, x)
    if reason is not None:
        return reason
    updates = []
    states = draw_states([adapter.dropout_p for adapter in parts.adapters])
    for (A, B, lora_bias, p, scaling, _), (_, start, count), state in zip(parts.adapters, spans, states, strict=True):
        assert isinstance(scaling, (int, float))  # see _is_plain
        updates.append(Update(A, B, lora_bias, None, None, float(scaling), p, 0, Span(start, count, *state)))
    rows = Rows(plan.rows, plan.inside)
    if not isinstance(parts.weight, FrozenWeight):
        return run_rows(x, DenseWeight(parts.weight), parts.bias, updates, rows)
    return quantised.run_rows(x, parts.weight, parts.bias, parts.compute, updates, rows, parts.follows_autocast)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _is_plain(adapter: Adapter) -> bool:
    """True where an adapter can have rows of its own: its scaling is a number, and it has no magnitude."""
    return adapter.magnitude is None and not isinstance(adapter.scaling, Tensor)
