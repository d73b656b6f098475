"""Launches of ``grad`` and ``reduce``, and of ``bank_grad``: the parameters' gradients from x, t, dy and s."""

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
from peftkern.backends.triton.kernels.bank_grad import bank_grad as bank_grad_body
from peftkern.backends.triton.kernels.grad import grad as grad_body
from peftkern.backends.triton.kernels.grad import reduce as reduce_body
from peftkern.backends.triton.launch import bank_tables as tables
from peftkern.backends.triton.launch.operands import (
    UNMASKED,
    Direction,
    Launch,
    counters,
    masking,
    matrix,
    numerics,
    present,
)
from peftkern.backends.triton.tiles import ThinConfig
from peftkern.call import Call, Span, Update

_PARTIAL_BYTES = 64 * 2**20
_APART = 64  # elements: a bank's gradient begins at a multiple of them


@dataclass(frozen=True)
class Side:
    """One side of ``grad``: wide [M, C] with thin [M, R] (or column sums alone), and its partials."""

    wide: Tensor
    thin: Tensor | None
    rows: int  # a run's
    programs: int
    partial: Tensor | None  # [runs, C, R]
    sums: Tensor | None  # [runs, C]

    @property
    def runs(self) -> int:
        """The number of partials."""
        return triton.cdiv(self.wide.shape[0], self.rows)


def side(wide: Tensor, thin: Tensor | None, R: int, sums: bool, programs: int, tile: ThinConfig) -> Side:
    """Cut a side into tiles and runs of rows, for about ``programs`` programs."""
    M, C = wide.shape
    columns = triton.cdiv(C, tile.BLOCK_COLS)
    chunks = triton.cdiv(R, tiles.rank_block(R)) if thin is not None else 1
    runs = min(
        max(1, programs // (columns * chunks)), triton.cdiv(M, 2 * tile.BLOCK_M), max(1, _PARTIAL_BYTES // (4 * C * R))
    )
    rows = triton.cdiv(triton.cdiv(M, runs), tile.BLOCK_M) * tile.BLOCK_M
    runs = triton.cdiv(M, rows)
    partial = None if thin is None else wide.new_empty(runs, C, R, dtype=torch.float32)
    total = wide.new_empty(runs, C, dtype=torch.float32) if sums else None
    return Side(wide, thin, rows, columns * chunks * runs, partial, total)


@dataclass(frozen=True)
class Gradient:
    """The sides that stage one leaves for stage two."""

    x: Side | None
    dy: Side | None


def grad(
    direction: Direction, x: Tensor | None, t: Tensor | None, dy: Tensor | None, s: Tensor | None, sums: bool,
    arch: Arch, t_out: Tensor | None = None,
) -> tuple[Launch, Gradient]:  # fmt: skip
    """Stage one, for either side or both. ``t_out``: the side of dy computes t as well, into it (no side of x then)."""
    operands = direction.operands
    like = x if x is not None else dy
    assert like is not None
    R = operands.lora_A.shape[0]
    tile = tiles.grad_tile(like.dtype, R, t_out is not None, arch)
    of_x = None if x is None else side(x, t, R, False, arch.units, tile)
    of_dy = None if dy is None else side(dy, s, R, sums, arch.units, tile)
    F, f_strides = direction.first
    parts = None
    counting = None
    if t_out is not None and dy is not None and of_dy is not None:
        counting = counters(like, of_dy.programs)
        parts = dy.new_empty(triton.cdiv(dy.shape[1], tile.BLOCK_COLS), *t_out.shape, dtype=torch.float32)
    arguments = {
        **_side_arguments("X", of_x), **_side_arguments("DY", of_dy),
        "K": 0 if x is None else x.shape[1], "N": 0 if dy is None else dy.shape[1],
        "programs_x": 0 if of_x is None else of_x.programs, "SUMS": None if of_dy is None else of_dy.sums,
        "T": t_out, "T_PARTS": parts, "F": F, "f_strides": f_strides,
        "counters": counting, "M": like.shape[0], "R": R,
        **masking(operands, active=x is not None), **numerics(operands.precision, like.dtype),
        "WITH_T": t_out is not None,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_C": tile.BLOCK_COLS, "BLOCK_R": tiles.rank_block(R),
    }  # fmt: skip
    made = [one for one in (of_x, of_dy) if one is not None]
    wide = present(*(tensor for one in made for tensor in (one.wide, one.thin)))
    launch = Launch(
        grad_body, (sum(one.programs for one in made),), arguments, tile.num_warps, tile.num_stages,
        reads=(*wide, *present(parts, F if t_out is not None else None)),
        writes=present(*(tensor for one in made for tensor in (one.partial, one.sums)), parts, t_out),
        flops=sum(2 * one.wide.numel() * R for one in made if one.thin is not None)
        + (0 if parts is None else 2 * like.numel() * R),
        maxnreg=255 if arch.name == "sm_100" else None,
    )  # fmt: skip
    return launch, Gradient(of_x, of_dy)


def _side_arguments(name: str, one: Side | None) -> dict:
    if one is None:
        return {name: None, f"{name.lower()}_strides": (), f"THIN_{name}": None, f"PARTIAL_{name}": None,
                f"rows_{name.lower()}": 0}  # fmt: skip
    return {**matrix(name, one.wide, (0, 0), tma=False), f"THIN_{name}": one.thin, f"PARTIAL_{name}": one.partial,
            f"rows_{name.lower()}": one.rows}  # fmt: skip


def reduce(
    direction: Direction, found: Gradient, dA: Tensor | None, dB: Tensor | None, bias: Tensor | None,
    lora_bias: Tensor | None,
) -> Launch:  # fmt: skip
    """Stage two: what is not None of dA [R, K], dB [N, R], dbias and dlora_bias [N], in its own dtype."""
    operands = direction.operands
    R = operands.lora_A.shape[0]
    BLOCK_R = min(triton.next_power_of_2(R), 64)
    BLOCK_C = max(16, 1024 // BLOCK_R)
    of_x, of_dy = found.x, found.dy
    partial_x = None if of_x is None else of_x.partial
    partial_dy = None if of_dy is None else of_dy.partial
    sums = None if of_dy is None else of_dy.sums

    def programs(partial: Tensor | None) -> int:
        return 0 if partial is None else triton.cdiv(partial.shape[1], BLOCK_C) * triton.cdiv(R, BLOCK_R)

    arguments = {
        "PARTIAL_X": partial_x, "DA": dA, "da_strides": () if dA is None else (dA.stride(1), dA.stride(0)),
        "runs_x": 0 if of_x is None else of_x.runs, "K": 0 if of_x is None else of_x.wide.shape[1],
        "programs_x": programs(partial_x),
        "PARTIAL_DY": partial_dy, "DB": dB, "db_strides": () if dB is None else dB.stride(),
        "runs_dy": 0 if of_dy is None else of_dy.runs, "N": 0 if of_dy is None else of_dy.wide.shape[1],
        "programs_dy": programs(partial_dy),
        "SUMS": sums, "BIAS": bias, "LORA_BIAS": lora_bias,
        "scale_x": operands.scaling * direction.dropout_scale, "scaling": operands.scaling,
        "scaling_tensor": operands.scaling_tensor, "R": R, "BLOCK_C": BLOCK_C, "BLOCK_R": BLOCK_R,
    }  # fmt: skip
    total = programs(partial_x) + programs(partial_dy) + (0 if sums is None else triton.cdiv(sums.shape[1], BLOCK_C))
    partials = present(partial_x, partial_dy, sums)
    return Launch(
        reduce_body, (total,), arguments, 4, 2,
        reads=partials, writes=present(dA, dB, bias, lora_bias), flops=sum(partial.numel() for partial in partials),
    )  # fmt: skip


@dataclass(frozen=True)
class Parted:
    """Gradients that lie in one tensor, each into one of its own: what an operator returns may share no memory."""

    reads: tuple[Tensor, ...]  # views of what ``bank_grad`` has written
    writes: tuple[Tensor, ...]  # the gradients, in the dtypes of their factors
    name: ClassVar[str] = "part"
    flops: ClassVar[int] = 0

    def run(self) -> None:
        """Start it on the current device and stream."""
        torch._foreach_copy_(self.writes, self.reads)


def bank_grad(
    call: Call, x: Tensor, t: Tensor, dy: Tensor, s: Tensor, asked: Sequence[int], arch: Arch
) -> tuple[Launch, Parted, list[tuple[Tensor, Tensor]]]:
    """dA [R, K] and dB [N, R] of the updates numbered ``asked``; t and s are ``bank``'s T.

    The launch leaves them in one tensor, in which the place of each does not depend on the call, so that the table that
    says it is sent once.
    """
    updates = [call.updates[number] for number in asked]
    R, shape, index = max(update.R for update in updates), call.bases[0].weight.shape, call.rows
    assert index is not None
    counts_of = [_span(update).length for update in updates]
    tile, BLOCK_R = tiles.bank_grad_tile(x.dtype, R, arch), tiles.rank_block(R)
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
    programs = sum(chunk * runs for chunk, runs in counts) * columns
    arguments: dict[str, Any] = {
        **matrix("X", x, (0, 0), tma=False), **matrix("DY", dy, (0, 0), tma=False), "T": t, "S": s, "OUT": out,
        "PIECES": tables.on(x.device, tables.pieces, (rows, BLOCK_R, *_fields(call, asked, places))),
        "ROWS": index.numbers, "INSIDE": None if index.inside is None else index.inside.view(torch.uint8),
        "PARTIAL": partial,
        "counters": None if partial is None else counters(x, programs), "rows": rows,
        "K": x.shape[1], "N": dy.shape[1],
        **(tables.masking(updates, x.device) if dropped else UNMASKED),
        **numerics(call.precision, x.dtype),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_C": tile.BLOCK_COLS, "BLOCK_R": BLOCK_R,
    }  # fmt: skip
    flops = 2 * sum(count * update.R for count, update in zip(counts_of, updates, strict=True)) * sum(shape)
    launch = Launch(
        bank_grad_body, (programs,), arguments, tile.num_warps, tile.num_stages,
        reads=present(x, t, dy, s, partial), writes=present(out, partial), flops=flops,
        maxnreg=255 if call.precision == "fp32" and x.dtype != torch.float32 else None,
    )  # fmt: skip
    return launch, Parted(tuple(together), tuple(own)), list(zip(own[::2], own[1::2], strict=True))


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
