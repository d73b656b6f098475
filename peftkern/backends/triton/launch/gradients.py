"""Launches of ``grad`` and ``reduce``: the parameters' gradients from x, t, dy and s."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from peftkern.backends.triton import tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.kernels.grad import grad as grad_body
from peftkern.backends.triton.kernels.grad import reduce as reduce_body
from peftkern.backends.triton.launch.operands import Direction, Launch, counters, masking, matrix, numerics, present
from peftkern.backends.triton.tiles import ThinConfig

_PARTIAL_BYTES = 64 * 2**20


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
    if t_out is not None and dy is not None:
        parts = dy.new_empty(triton.cdiv(dy.shape[1], tile.BLOCK_COLS), *t_out.shape, dtype=torch.float32)
    arguments = {
        **_side_arguments("X", of_x), **_side_arguments("DY", of_dy),
        "K": 0 if x is None else x.shape[1], "N": 0 if dy is None else dy.shape[1],
        "programs_x": 0 if of_x is None else of_x.programs, "SUMS": None if of_dy is None else of_dy.sums,
        "T": t_out, "T_PARTS": parts, "F": F, "f_strides": f_strides,
        "counters": None if t_out is None else counters(like), "M": like.shape[0], "R": R,
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
