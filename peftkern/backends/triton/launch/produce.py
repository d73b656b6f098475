"""Launches of ``fused``, for one adapter and for rows with adapters of their own, and of ``shrink``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from peftkern.backends.triton import tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.kernels.fused import fused as fused_body
from peftkern.backends.triton.kernels.shrink import shrink as shrink_body
from peftkern.backends.triton.launch import bank_tables as tables
from peftkern.backends.triton.launch.operands import (
    UNMASKED,
    Direction,
    Launch,
    columns,
    counters,
    masking,
    matrix,
    near,
    numerics,
    present,
    weight_loader,
)
from peftkern.backends.triton.launch.quantise import Codes, loader
from peftkern.backends.triton.tiles import LIBRARY, RECOMPUTE, SHARED, SPLIT, Choice, Pass, TileConfig
from peftkern.call import Call, Update

_SOURCES = {RECOMPUTE: "recompute", SHARED: "shared", SPLIT: "ready", LIBRARY: "alone"}


def _tiled(X: Tensor, Z: Tensor, tile: TileConfig, Z_by_tma: bool = True) -> dict[str, Any]:
    """X and Z in the blocks of a tile, and the tile's constants."""
    return {
        **matrix("X", X, (tile.BLOCK_M, tile.BLOCK_Q), tile.tma),
        **matrix("Z", Z, (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES), tile.tma and Z_by_tma),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q,
        "GROUP_M": tile.GROUP_M, "SUBTILES": tile.SUBTILES, "SLICES": tile.SLICES,
    }  # fmt: skip


def fused(
    direction: Direction, rows: Tensor | Codes, T: Tensor, Z: Tensor, choice: Choice, arch: Arch,
    dependent: bool = False, onto: bool = False,
) -> Launch:  # fmt: skip
    """Z, and T where the choice is one_pass; else T holds what ``shrink`` wrote, or (``dependent``) still writes.

    By LIBRARY the frozen product is missing, or (``onto``) in Z already.
    ``rows`` are X, or the codes that ``quantise`` writes.
    """
    codes, X = (rows, rows.data) if isinstance(rows, Codes) else (None, rows)
    operands, backward, tile = direction.operands, direction.backward, choice.tile
    P, Q, R = direction.extents
    M = X.shape[0]
    F, f_strides = direction.first
    G, g_strides = direction.second
    library = choice.schedule == LIBRARY
    partials = X.new_empty(tile.SLICES, M, P + R, dtype=torch.float32) if tile.SLICES > 1 else None
    together = choice.schedule == SHARED or partials is not None
    tiles_m, tiles_p = triton.cdiv(M, tile.BLOCK_M), triton.cdiv(P, tile.BLOCK_P)
    blocks = tiles_m if partials is None else tiles_m * tiles_p
    low_rank_scale = direction.dropout_scale if direction.masks_out else 1.0
    arguments = {
        **_tiled(X, Z, tile, Z_by_tma=not library),
        **(weight_loader(operands.weight, backward, tile) if codes is None else loader(codes, backward, tile)),
        "T": T, "F": F, "f_strides": f_strides, "G": G, "g_strides": g_strides,
        "counters": counters(X, blocks) if together else None, "PARTIALS": partials,
        "t_scale": direction.dropout_scale if direction.masks_in else 1.0,
        "scaling": operands.scaling * low_rank_scale, "scaling_tensor": operands.scaling_tensor,
        "M": M, "P": P, "Q": Q, "R": R,
        **masking(operands, active=choice.one_pass or backward), **columns(operands.bias, operands.lora_bias, backward),
        **numerics(operands.precision, direction.dtype),
        "SOURCE": "onto" if onto else _SOURCES[choice.schedule], "BACKWARD": backward, "MASK_OUT": direction.masks_out,
        "DEPENDENT": dependent, "WGMMA": tile.by_wgmma(arch, direction.dtype),
        "BLOCK_R": (
            tiles.padded(R) if choice.one_pass else tiles.read_rank_block(R, operands.precision, direction.masks_out)
        ),
    }  # fmt: skip
    programs = tiles_m * tiles_p * tile.SLICES
    if tile.resident:
        programs = min(programs, arch.units * tile.resident)
    weight = operands.weight if codes is None else codes.weight
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
        reads=(*reads, *((F,) if choice.one_pass else ()), *((Z,) if onto else ()),
               *(() if choice.schedule == RECOMPUTE else (T,))),
        writes=present(Z, T if choice.one_pass else None, partials),
        flops=2 * M * ((0 if library else P * Q) + P * R + (Q * R if choice.one_pass else 0)),
        dependent=dependent,
        maxnreg=255 if weight.format == "mxfp4" else None,  # it fits 80 and 128 but for a few bytes
    )  # fmt: skip


def bank(
    call: Call, X: Tensor, T: Tensor, Z: Tensor | None, tile: TileConfig, arch: Arch, backward: bool = False
) -> Launch:  # fmt: skip
    """Z [M, P], unless it is None, and T, all spans' [count, R] one behind the other.

    As many programs, and the same arguments, whatever ids on a device are: every adapter has chunks for all rows there,
    of which one without rows of its own stores zeros and multiplies nothing.
    """
    (((weight, bias),), rows), M, Q = (call.bases, call.rows), *X.shape
    assert rows is not None and rows.numbers is not None
    P = weight.shape[1 if backward else 0]
    updates = _alike([update for update in call.updates if update.span is not None and update.span.length and update.R])
    dropped = any(update.dropout_p for update in updates)
    R = max((update.R for update in updates), default=1)
    like = updates[0].lora_A if updates else X
    places = [number for u in updates if u.span is not None for number in (*u.span[:2], u.R)]
    factors = tables.on(X.device, tables.as_they_are, tables.lookups(updates))
    spans = tables.on(X.device, tables.spans, (tile.BLOCK_M, *places))
    chunks = sum(triton.cdiv(count, tile.BLOCK_M) for count in places[1::3])
    index, inside = rows if updates else (spans, None)
    A, B = [update.lora_A for update in updates], [update.lora_B for update in updates]
    looked_up = (
        factors, spans, index, None if inside is None else inside.view(torch.uint8),
        torch.empty(2, M, dtype=torch.int64, device=X.device), X, *X.stride(), like, _aligned(A), _aligned(B),
    )  # fmt: skip
    target = X.new_empty(1, P) if Z is None else Z  # of the same binary, which writes nothing there
    P = 0 if Z is None else P
    produced = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(P, tile.BLOCK_P)
    partials = None
    if tile.SLICES > 1:
        partials = X.new_empty(tile.SLICES * (M * P + T.numel()), dtype=torch.float32)
    arguments = {
        **_tiled(X, target, tile), **weight_loader(weight, backward, tile),
        "T": T, "F": None, "f_strides": (), "G": looked_up, "g_strides": (),
        "counters": counters(X, 1 + produced + chunks), "PARTIALS": partials,
        "t_scale": 1.0, "scaling": 1.0, "scaling_tensor": None,
        "M": M, "P": P, "Q": Q, "R": 1,
        **(tables.masking(updates, X.device) if dropped else UNMASKED),
        **columns(bias, None, backward),
        **numerics(call.precision, X.dtype),
        "SOURCE": "bank", "BACKWARD": backward, "MASK_OUT": backward and dropped, "DEPENDENT": False,
        "WGMMA": tile.by_wgmma(arch, X.dtype),
        "BLOCK_R": tiles.read_rank_block(R, call.precision, backward and dropped),
    }  # fmt: skip
    programs = min((chunks + produced) * tile.SLICES, arch.units * max(1, tile.resident))
    thin = sum(count * rank for count, rank in zip(places[1::3], places[2::3], strict=True))
    return Launch(
        fused_body, (programs,), arguments, tile.num_warps, tile.num_stages,
        reads=present(*(X, weight.data) * (Z is not None), *((X, T) if updates else ()), *A, *B, partials),
        writes=present(Z, T, partials), flops=2 * (M * P * Q + thin * (P + Q)),
        maxnreg=255,
    )  # fmt: skip


def _alike(updates: Sequence[Update]) -> list[Update]:
    """Factors of one dtype, the widest that there is, which is exact, with adjacent elements in their rows."""
    wide = torch.float32 if len({update.lora_A.dtype for update in updates}) > 1 else None

    def row_major(factor: Tensor) -> Tensor:
        factor = near(factor if wide is None else factor.to(wide))
        return factor if factor.stride(1) == 1 else factor.contiguous()

    return [update._replace(lora_A=row_major(update.lora_A), lora_B=row_major(update.lora_B)) for update in updates]


def _aligned(factors: Sequence[Tensor]) -> int | None:
    """1 where every row of every factor begins at a multiple of 16 bytes; None to the compiler otherwise."""
    places = [factor.stride(0) * factor.itemsize for factor in factors]
    places += [0 if factor.is_meta else factor.data_ptr() for factor in factors]
    return 1 if all(place % 16 == 0 for place in places) else None


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
        "counters": None if partials is None else counters(X, grid[0] * grid[1]), "PARTIALS": partials,
        "t_scale": direction.dropout_scale if direction.masks_in else 1.0, "M": M, "Q": Q, "R": R,
        **masking(operands, active=direction.masks_in), **numerics(operands.precision, direction.dtype),
        "FOLLOWED": followed,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_Q": tile.BLOCK_COLS, "BLOCK_R": BLOCK_R, "SLICES": tile.SLICES,
    }  # fmt: skip
    return Launch(
        shrink_body, grid, arguments, tile.num_warps, tile.num_stages,
        reads=present(X, F, partials), writes=present(T, partials), flops=2 * M * Q * R,
    )  # fmt: skip
