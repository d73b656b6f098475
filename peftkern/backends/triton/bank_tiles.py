"""The tiles of a batch of several adapters, without Triton.

They do not depend on the adapters, their ranks or dtypes: a row of the base has the same bits whoever is beside it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.tiles import COUNTERS, Pass, ThinConfig, TileConfig, grad_tile, padded
from peftkern.call import Problem

_Three = tuple[TileConfig, TileConfig, TileConfig]  # decode, a few sequences, prefill

# None of their binaries spills, whatever the slots (``python -m peftkern kernels``).
_FEW = TileConfig(16, 64, 64, 4, 4, resident=2)
_SOME = TileConfig(64, 64, 64, 8, 3, resident=1)
_TILES: dict[str, _Three] = {
    "sm_80": (_FEW, _SOME, TileConfig(128, 128, 32, 8, 3, SUBTILES=4, resident=1)),
    "sm_90": (_FEW, replace(_SOME, tma=True), TileConfig(128, 128, 64, 8, 3, SUBTILES=2, resident=1, tma=True)),
    "sm_100": (_FEW, replace(_SOME, tma=True), TileConfig(128, 128, 64, 8, 3, SUBTILES=2, resident=1, tma=True)),
    "interpreter": (
        TileConfig(16, 32, 32, 4, 1, resident=1), TileConfig(32, 32, 64, 4, 1, SUBTILES=2, resident=1),
        TileConfig(64, 64, 64, 4, 1, resident=1, tma=True),
    ),
}  # fmt: skip
# Rows that begin unaligned: no descriptors, no wide loads, more registers.
_UNALIGNED: _Three = (
    TileConfig(16, 64, 32, 4, 4, resident=2), *(TileConfig(64, 64, 32, 8, 3, resident=1),) * 2
)  # fmt: skip
_WIDE: _Three = (
    TileConfig(16, 32, 16, 8, 3, resident=1), *(TileConfig(64, 64, 16, 8, 2, resident=1),) * 2
)  # fmt: skip


def bank_tile(launch: Pass, arch: Arch) -> TileConfig:
    """The tile; few rows are cut into slices of Q until there are programs for every unit."""
    few, some, many = _tiles(launch.problem, arch)
    if launch.invariant:
        return many
    if launch.problem.M > few.BLOCK_M:
        return some if launch.problem.M <= 2 * some.BLOCK_M else many
    produced, slices = -(-launch.P // few.BLOCK_P), 1
    while produced * slices < arch.units and slices * 8 * few.BLOCK_Q <= launch.Q and slices < 8:
        slices *= 2
    return replace(few, SLICES=slices if produced < COUNTERS // 2 else 1)


def _tiles(problem: Problem, arch: Arch) -> _Three:
    if arch.name == "interpreter":
        return _TILES[arch.name]
    if problem.dtype == torch.float32:
        return _WIDE
    aligned = (problem.K | problem.N) * problem.dtype.itemsize % 16 == 0
    if not aligned:
        return _UNALIGNED
    few, some, many = _TILES[arch.name]
    return (_UNALIGNED[0] if problem.precision == "fp32" else few), some, many


def bank_rank_block(R: int, precision: str, masks_out: bool) -> int:
    """The part of R that a chunk and an update hold at once; an adapter costs its own rank, rounded up to this."""
    return min(padded(R), 16 if precision == "fp32" or masks_out else 32)


def bank_grad_tile(dtype: torch.dtype, R: int, arch: Arch) -> ThinConfig:
    """The tile of ``grad`` with fewer rows a step: rows are gathered, which takes registers."""
    tile = grad_tile(dtype, R, False, arch)
    return replace(tile, BLOCK_M=16 if dtype == torch.float32 else 32)
