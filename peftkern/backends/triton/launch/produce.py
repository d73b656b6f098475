"""Launches of ``fused`` and ``shrink``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peftkern.backends.triton import tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.kernels.fused import fused as fused_body
from peftkern.backends.triton.kernels.shrink import shrink as shrink_body
from peftkern.backends.triton.launch.operands import (
    Direction,
    Launch,
    columns,
    counters,
    masking,
    matrix,
    numerics,
    present,
)
from peftkern.backends.triton.launch.quantise import Codes, loader
from peftkern.backends.triton.tiles import LIBRARY, RECOMPUTE, SHARED, SPLIT, Choice, Pass

_SOURCES = {RECOMPUTE: "recompute", SHARED: "shared", SPLIT: "ready", LIBRARY: "library"}


def fused(
    direction: Direction, rows: Tensor | Codes, T: Tensor, Z: Tensor, choice: Choice, arch: Arch,
    dependent: bool = False,
) -> Launch:  # fmt: skip
    """Z, and T where the choice is one_pass; else T holds what ``shrink`` wrote, or (``dependent``) still writes.

    ``rows`` are X, or the codes that ``quantise`` writes.
    """
    codes, X = (rows, rows.data) if isinstance(rows, Codes) else (None, rows)
    operands, backward, tile = direction.operands, direction.backward, choice.tile
    P, Q, R = direction.extents
    M = X.shape[0]
    F, f_strides = direction.first
    G, g_strides = direction.second
    produced = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(P, tile.BLOCK_P)
    partials = X.new_empty(tile.SLICES, M, P + R, dtype=torch.float32) if tile.SLICES > 1 else None
    together = choice.schedule == SHARED or partials is not None
    low_rank_scale = direction.dropout_scale if direction.masks_out else 1.0
    arguments = {
        **matrix("X", X, (tile.BLOCK_M, tile.BLOCK_Q), tile.tma),
        **matrix("Z", Z, (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES), tile.tma and choice.schedule != LIBRARY),
        **(direction.loader(tile.BLOCK_Q, tile.BLOCK_P, tile.tma) if codes is None else loader(codes, backward, tile)),
        "T": T, "F": F, "f_strides": f_strides, "G": G, "g_strides": g_strides,
        "counters": counters(X) if together else None, "PARTIALS": partials,
        "t_scale": direction.dropout_scale if direction.masks_in else 1.0,
        "scaling": operands.scaling * low_rank_scale, "scaling_tensor": operands.scaling_tensor,
        "M": M, "P": P, "Q": Q, "R": R,
        **masking(operands, active=choice.one_pass or backward), **columns(operands.bias, operands.lora_bias, backward),
        **numerics(operands.precision, direction.dtype),
        "SOURCE": _SOURCES[choice.schedule], "BACKWARD": backward, "MASK_OUT": direction.masks_out,
        "DEPENDENT": dependent,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q,
        "BLOCK_R": tiles.fused_rank_block(operands.problem(M, direction.dtype), choice),
        "GROUP_M": tile.GROUP_M, "SUBTILES": tile.SUBTILES, "SLICES": tile.SLICES,
    }  # fmt: skip
    programs = produced * tile.SLICES
    if tile.resident:
        programs = min(programs, arch.units * tile.resident)
    weight, library = operands.weight if codes is None else codes.weight, choice.schedule == LIBRARY
    reads = present(
        *(() if library else (X, *weight.tensors)),
        None if codes is None else codes.scale,
        G,
        operands.bias,
        operands.lora_bias,
        partials,
    )
    return Launch(
        fused_body, (programs,), arguments, tile.num_warps, tile.num_stages,
        reads=(*reads, *((F,) if choice.one_pass else ()), *((Z,) if library else ()),
               *(() if choice.schedule == RECOMPUTE else (T,))),
        writes=present(Z, T if choice.one_pass else None, partials),
        flops=2 * M * ((0 if library else P * Q) + P * R + (Q * R if choice.one_pass else 0)),
        dependent=dependent,
    )  # fmt: skip


def shrink(direction: Direction, X: Tensor, T: Tensor, launch: Pass, arch: Arch, followed: bool = False) -> Launch:
    """T = D(X) F^T. ``followed``: the next launch is dependent on it."""
    operands = direction.operands
    F, f_strides = direction.first
    _, Q, R = direction.extents
    tile = tiles.shrink_tile(launch, arch)
    M, BLOCK_R = X.shape[0], tiles.rank_block(R)
    grid = (triton.cdiv(M, tile.BLOCK_M), triton.cdiv(R, BLOCK_R), tile.SLICES)
    partials = X.new_empty(tile.SLICES, M, R, dtype=torch.float32) if tile.SLICES > 1 else None
    arguments = {
        **matrix("X", X, (tile.BLOCK_M, tile.BLOCK_COLS), tma=False),
        "T": T, "F": F, "f_strides": f_strides,
        "counters": None if partials is None else counters(X), "PARTIALS": partials,
        "t_scale": direction.dropout_scale if direction.masks_in else 1.0, "M": M, "Q": Q, "R": R,
        **masking(operands, active=direction.masks_in), **numerics(operands.precision, direction.dtype),
        "FOLLOWED": followed,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_Q": tile.BLOCK_COLS, "BLOCK_R": BLOCK_R, "SLICES": tile.SLICES,
    }  # fmt: skip
    return Launch(
        shrink_body, grid, arguments, tile.num_warps, tile.num_stages,
        reads=present(X, F, partials), writes=present(T, partials), flops=2 * M * Q * R,
    )  # fmt: skip
