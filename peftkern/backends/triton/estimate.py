"""The analytic cost of a choice, for chips that nobody has tuned: a model to choose by, never quoted as a time."""

from __future__ import annotations

import dataclasses

import torch

from peftkern.backends.triton import shipped, tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.tiles import LIBRARY, RECOMPUTE, SHARED, Choice, Pass, TileConfig

_LAUNCH = 2e-6  # seconds between dependent launches
_MASK = 14  # instructions an element
_VENDOR = 0.88  # the time of the vendor's product over ours of the same tile: until it is measured
_FP32 = 3.0  # ours in fp32 over the same in theory: no tensor cores, operands through registers
# Instructions an element of W.
_DECODE = {"dense": 0, "int8": 3, "fp8": 7, "int4": 7, "nf4": 10, "fp4": 10, "mxfp4": 8, "nvfp4": 9, "fp8xfp8": 0}
# Bits a weight.
_BITS = {
    "dense": 0, "int8": 8, "fp8": 8, "int4": 4.3, "nf4": 4.1, "fp4": 4.1, "mxfp4": 4.3, "nvfp4": 4.5, "fp8xfp8": 8,
}  # fmt: skip


def estimate(launch: Pass, choice: Choice, arch: Arch) -> float:
    """Seconds of one direction: whole waves of tiles, each bound by its multiplications and its mask arithmetic, or the
    memory traffic of all; then what the schedule adds to the frozen product.
    """
    if tiles.decodes(launch.problem.weight_format, choice):
        plain = dataclasses.replace(choice, decoded=False)
        return _decode_seconds(launch, arch) + estimate(tiles.dense(launch), plain, arch)
    problem, tile, P, Q = launch.problem, choice.tile, launch.P, launch.Q
    size = problem.dtype.itemsize
    tiles_m, tiles_p = -(-problem.M // tile.BLOCK_M), -(-P // tile.BLOCK_P)
    per_tile = _tile_seconds(launch, tile, arch) * (_FP32 if problem.dtype == torch.float32 else 1.0)
    bare = per_tile
    decoding = _DECODE[problem.weight_format] / (4 * arch.warp * arch.clock)
    per_tile += tile.BLOCK_P * Q * decoding
    thin = bare * tiles.padded(problem.R) / tile.BLOCK_P
    mask = _MASK / (4 * arch.warp * arch.clock)  # seconds an element on one unit
    thin_masked = thin + (tile.BLOCK_M * Q * mask / tile.SLICES if launch.masks_in else 0.0)
    out_mask = tile.BLOCK_M * tile.BLOCK_P * mask if launch.masks_out else 0.0
    once = 0.0
    if choice.schedule == RECOMPUTE:
        per_tile += thin_masked
    elif choice.schedule == SHARED:  # producers come first: what they take longer, their readers wait once
        once = thin_masked * -(-tiles_m // (arch.units * tile.resident)) + _LAUNCH
    else:
        once = _shrink_seconds(launch, arch) + (0.5 if arch.dependent_launch else 1.0) * _LAUNCH
    if choice.schedule == LIBRARY:  # Z is written and read once more, G read by every row of tiles
        again = 2 * problem.M * P * size + tiles_m * P * problem.R * problem.adapter_dtype.itemsize
        return once + _vendor_seconds(launch, arch) + _LAUNCH + again / arch.bandwidth / _fill(launch, tile, arch)
    waves = -(-tiles_m * tiles_p * tile.SLICES // arch.units)
    memory = _traffic(launch) / arch.bandwidth / _fill(launch, tile, arch)
    seconds = max(waves * (per_tile / tile.SLICES + out_mask), memory)
    if tile.SLICES > 1:
        once += _LAUNCH / 2 + 2 * tile.SLICES * problem.M * P * 4 / arch.bandwidth
    return seconds + once


def _decode_seconds(launch: Pass, arch: Arch) -> float:
    """The quantised weight read and the dense one written, by one launch."""
    problem = launch.problem
    moved = _BITS[problem.weight_format] / 8 + problem.dtype.itemsize
    return problem.N * problem.K * moved / arch.bandwidth + _LAUNCH


def _peak(launch: Pass, arch: Arch) -> float:
    if launch.problem.base_compute is not None:
        return 2 * arch.flops
    return arch.flops / (1 if launch.problem.dtype.itemsize == 2 else 8)


def _tile_seconds(launch: Pass, tile: TileConfig, arch: Arch) -> float:
    """One whole tile of the product on one unit; the smaller it is, the more its operands' loads weigh."""
    area = tile.BLOCK_M * tile.BLOCK_P
    efficiency = area / (area + 6 * (tile.BLOCK_M + tile.BLOCK_P))
    return 2 * area * launch.Q / (_peak(launch, arch) / arch.units * efficiency)


def _vendor_seconds(launch: Pass, arch: Arch) -> float:
    """The vendor's GEMM: whole waves of the tile that suits it best, better than ours."""
    problem, found = launch.problem, []
    for shape in shipped.shapes(launch.problem, arch):
        tile = TileConfig(*shape)
        count = -(-problem.M // tile.BLOCK_M) * -(-launch.P // tile.BLOCK_P)
        seconds = -(-count // arch.units) * _tile_seconds(launch, tile, arch)
        found.append(max(_VENDOR * seconds, _traffic(launch) / arch.bandwidth / _fill(launch, tile, arch)))
    return min(found)


def _traffic(launch: Pass) -> float:
    """Bytes of the frozen product."""
    problem, P, Q = launch.problem, launch.P, launch.Q
    size = problem.dtype.itemsize
    weight = _BITS[problem.weight_format] / 8 or size
    return problem.M * (Q + P) * size + P * Q * weight


def _fill(launch: Pass, tile: TileConfig, arch: Arch) -> float:
    """The share of the memory bandwidth that the programs in flight can ask for."""
    programs = -(-launch.problem.M // tile.BLOCK_M) * -(-launch.P // tile.BLOCK_P) * tile.SLICES
    return min(1.0, programs / (2 * arch.units))


def _shrink_seconds(launch: Pass, arch: Arch) -> float:
    problem = launch.problem
    elements = problem.M * launch.Q
    tile = tiles.shrink_tile(launch, arch)
    fill = min(1.0, -(-problem.M // tile.BLOCK_M) * tile.SLICES / arch.units)
    masked = elements * _MASK / (4 * arch.warp * arch.clock) / arch.units if launch.masks_in else 0.0
    return max(elements * problem.dtype.itemsize / arch.bandwidth, masked) / fill
