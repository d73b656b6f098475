"""The launch of ``bank_grad``: dA and dB of the adapters of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from peftkern.backends.triton import tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.bank_tiles import bank_grad_tile
from peftkern.backends.triton.kernels.bank_grad import bank_grad as bank_grad_body
from peftkern.backends.triton.launch import bank_tables as tables
from peftkern.backends.triton.launch.operands import UNMASKED, Launch, counters, matrix, numerics, present
from peftkern.call import Call, Span, Update

_APART = 64  # elements: a gradient begins at a multiple of them

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Parted:
    """Gradients that lie in one tensor, each into one of its own: what an operator returns may share no memory."""

    together: list[Tensor]
    own: list[Tensor]
    name: ClassVar[str] = "part"
    flops: ClassVar[int] = 0

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """The tensors that ``bank_grad`` has written."""
        return tuple(self.together)

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """The gradients, in the dtypes of their factors."""
        return tuple(self.own)

    def run(self) -> None:
        """Start it on the current device and stream."""
        torch._foreach_copy_(self.own, self.together)


def bank_grad(
    call: Call, x: Tensor, t: Tensor, dy: Tensor, s: Tensor, asked: Sequence[int], arch: Arch
) -> tuple[Launch, Parted, Pairs]:
    """dA [R, K] and dB [N, R] of the updates numbered ``asked``; t and s are ``bank``'s T.

    The launch leaves them in one tensor, in which the place of each does not depend on the call, so that the table that
    says it is sent once.
    """
    updates = [call.updates[number] for number in asked]
    R, shape, index = max(update.R for update in updates), call.bases[0].weight.shape, call.rows
    assert index is not None
    counts_of = [_span(update).length for update in updates]
    tile, BLOCK_R = bank_grad_tile(x.dtype, R, arch), tiles.rank_block(R)
    columns = sum(triton.cdiv(extent, tile.BLOCK_COLS) for extent in shape)
    chunks = [triton.cdiv(update.R, BLOCK_R) for update in updates]
    work = sum(chunk * count for chunk, count in zip(chunks, counts_of, strict=True)) * columns
    rows = max(2, triton.cdiv(triton.cdiv(work, 2 * arch.units), tile.BLOCK_M)) * tile.BLOCK_M
    counts = [(chunk, tables.count_runs(count, rows)) for chunk, count in zip(chunks, counts_of, strict=True)]
    parts = sum(chunk * runs for chunk, runs in counts if runs > 1) * columns
    partial = x.new_empty(parts, tile.BLOCK_COLS, BLOCK_R, dtype=torch.float32) if parts else None
    factors = [factor for update in updates for factor in update[:2] if factor is not None]
    out, places = _fresh(factors)
    own = [torch.empty_like(factor, memory_format=torch.contiguous_format) for factor in factors]
    together = [
        out[place : place + factor.numel()].view(factor.shape) for place, factor in zip(places, factors, strict=True)
    ]
    dropped = any(update.dropout_p for update in updates)
    arguments: dict[str, Any] = {
        **matrix("X", x, (0, 0), tma=False), **matrix("DY", dy, (0, 0), tma=False), "T": t, "S": s, "OUT": out,
        "PIECES": tables.on(x.device, tables.pieces, (rows, BLOCK_R, *_fields(call, asked, places))),
        "ROWS": index.numbers, "INSIDE": None if index.inside is None else index.inside.view(torch.uint8),
        "PARTIAL": partial,
        "counters": None if partial is None else counters(x), "rows": rows,
        "K": x.shape[1], "N": dy.shape[1],
        **(tables.masking(updates, x.device) if dropped else UNMASKED),
        **numerics(call.precision, x.dtype),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_C": tile.BLOCK_COLS, "BLOCK_R": BLOCK_R,
    }  # fmt: skip
    programs = sum(chunk * runs for chunk, runs in counts) * columns
    flops = 2 * sum(count * update.R for count, update in zip(counts_of, updates, strict=True)) * sum(shape)
    launch = Launch(
        bank_grad_body, (programs,), arguments, tile.num_warps, tile.num_stages,
        reads=present(x, t, dy, s, partial), writes=present(out, partial), flops=flops,
        maxnreg=255 if call.precision == "fp32" and x.dtype != torch.float32 else None,
    )  # fmt: skip
    return launch, Parted(together, own), list(zip(own[::2], own[1::2], strict=True))


def _fresh(factors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """One tensor for all gradients, in fp32 where the factors' dtypes differ, and the place where each begins."""
    places = [0, *itertools.accumulate(triton.cdiv(factor.numel(), _APART) * _APART for factor in factors)]
    dtypes = {factor.dtype for factor in factors}
    return factors[0].new_empty(places.pop(), dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32), places


def _fields(call: Call, asked: Sequence[int], places: Sequence[int]) -> list[int]:
    """The FIELDS that PIECES has of each update."""
    origins = [0, *itertools.accumulate(_span(update).length * update.R for update in call.updates)]
    fields: list[int] = []
    for i, number in enumerate(asked):
        one, place = call.updates[number], places[2 * i : 2 * i + 2]
        fields += [*_span(one)[:2], origins[number], one.R, tables.bits(one.scaling), *place]
    return fields


def _span(update: Update) -> Span:
    assert update.span is not None  # check has seen to it
    return update.span
