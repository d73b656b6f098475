"""Tiles as data: what one is, which are legal, which are shipped, and what each would cost. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftkern.ops.problem import Problem

MAX_R = 512


@dataclass(frozen=True, slots=True)
class TileConfig:
    """The tile of one launch of ``fused``: M x P produced, Q contracted a step."""

    BLOCK_M: int
    BLOCK_P: int
    BLOCK_Q: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8

    def __str__(self) -> str:
        shape = f"{self.BLOCK_M}x{self.BLOCK_P}x{self.BLOCK_Q}"
        return f"{shape} warps={self.num_warps} stages={self.num_stages} group={self.GROUP_M}"


@dataclass(frozen=True, slots=True)
class Pass:
    """One launch of ``fused`` as the tile sees it: the problem, the direction, and where T comes from."""

    problem: Problem
    backward: bool
    one_pass: bool

    @property
    def P(self) -> int:
        """Columns produced."""
        return self.problem.K if self.backward else self.problem.N

    @property
    def Q(self) -> int:
        """Columns contracted."""
        return self.problem.N if self.backward else self.problem.K


@dataclass(frozen=True, slots=True)
class Arch:
    """What the model of a chip needs: compute units, shared memory a block, 16-bit FLOP/s, bytes/s, clock.

    ``one_pass_R`` is the largest rank whose low-rank accumulator fits into registers beside Z's, from compiled kernels.
    """

    name: str
    units: int
    shared_memory: int
    flops: float
    bandwidth: float
    clock: float
    warp: int = 32
    one_pass_R: int = 64


ARCHES = {
    "sm_80": Arch("sm_80", 108, 163 * 1024, 280e12, 1.7e12, 1.4e9, one_pass_R=16),
    "sm_90": Arch("sm_90", 132, 227 * 1024, 790e12, 4.3e12, 1.7e9),
    "sm_100": Arch("sm_100", 148, 227 * 1024, 1600e12, 7.0e12, 1.8e9),
    "gfx942": Arch("gfx942", 304, 64 * 1024, 900e12, 4.5e12, 2.1e9, warp=64),
    "interpreter": Arch("interpreter", 4, 163 * 1024, 1e9, 1e9, 1e9),
}

_SMALL = (TileConfig(16, 64, 128, 4, 4), TileConfig(32, 64, 64, 4, 4), TileConfig(64, 64, 64, 4, 3))
_SHIPPED = {
    "sm_80": (*_SMALL, TileConfig(64, 128, 32, 8, 4), TileConfig(128, 128, 32, 8, 4)),
    "sm_90": (*_SMALL, TileConfig(64, 128, 64, 4, 4), TileConfig(128, 128, 64, 8, 4), TileConfig(128, 256, 64, 8, 3)),
    "sm_100": (*_SMALL, TileConfig(128, 128, 64, 8, 4)),
    "gfx942": (TileConfig(16, 64, 64, 4, 2), TileConfig(64, 64, 32, 4, 2), TileConfig(128, 128, 32, 8, 2)),
    "interpreter": (TileConfig(32, 128, 64, 8, 1, 2),),
}
# fp32 is multiplied without tensor cores unless torch's switch allows TF32.
_SHIPPED_FP32 = (TileConfig(16, 32, 32, 4, 2), TileConfig(64, 64, 32, 8, 2))


def shipped(dtype: torch.dtype, arch: str) -> tuple[TileConfig, ...]:
    """The tiles to choose from."""
    if dtype == torch.float32 and arch != "interpreter":
        return _SHIPPED_FP32
    return _SHIPPED[arch]


def padded(R: int) -> int:
    """R as the bodies see it: a power of two that a matrix instruction accepts."""
    return max(16, 1 << (R - 1).bit_length())


def rank_block(R: int) -> int:
    """How much of R one step of a body holds; larger ranks are walked in chunks."""
    return min(padded(R), 64)


def fused_rank_block(launch: Pass) -> int:
    """How much of R one step of ``fused`` holds: all of it where T is accumulated, little where T is read."""
    if launch.one_pass:
        return padded(launch.problem.R)
    return min(padded(launch.problem.R), 16 if launch.problem.precision == "fp32" else 32)


def supports(launch: Pass, tile: TileConfig, arch: Arch) -> str | None:
    """Why ``tile`` cannot run this launch on ``arch``, or None: the one legality predicate."""
    problem = launch.problem
    blocks = (tile.BLOCK_M, tile.BLOCK_P, tile.BLOCK_Q)
    if any(block < 16 or block & (block - 1) for block in blocks):
        return f"blocks {blocks} are not powers of two of at least 16"
    if launch.one_pass and problem.R > arch.one_pass_R:
        return f"one_pass keeps T in registers, which R={problem.R} > {arch.one_pass_R} does not allow on {arch.name}"
    registers = registers_needed(launch, tile, arch)
    if registers > 165:
        return f"about {registers} registers a thread for what a {tile} tile keeps alive leave too few for the rest"
    needed = shared_memory(launch, tile)
    if needed > arch.shared_memory:
        return f"a {tile} tile needs about {needed} bytes of shared memory, {arch.name} has {arch.shared_memory}"
    return None


def registers_needed(launch: Pass, tile: TileConfig, arch: Arch) -> int:
    """Registers a thread of the accumulators, and allowances for what else is alive, fitted to compiled kernels."""
    problem, threads = launch.problem, arch.warp * tile.num_warps
    produced = tile.BLOCK_M * tile.BLOCK_P // threads
    total = produced
    if launch.backward and problem.dropout:
        total += produced if launch.one_pass else 40  # the low-rank product is masked before it is added
    if launch.one_pass:
        rank = padded(problem.R)
        total += tile.BLOCK_M * rank // threads
        if problem.adapter_dtype != problem.dtype:  # the factor passes through registers, to be rounded or split
            total += tile.BLOCK_Q * rank // threads * (3 if problem.precision == "fp32" else 2)
        if problem.dropout and not launch.backward:  # so does x, to be masked
            total += tile.BLOCK_M * tile.BLOCK_Q // threads // 2
        if problem.weight_format != "dense":
            total += 8
    return total


def shared_memory(launch: Pass, tile: TileConfig) -> int:
    """Bytes of the operand buffers of the main loop."""
    problem = launch.problem
    size = problem.dtype.itemsize
    stage = tile.BLOCK_Q * (tile.BLOCK_M + tile.BLOCK_P) * size
    if launch.one_pass:
        stage += tile.BLOCK_Q * padded(problem.R) * problem.adapter_dtype.itemsize
    return stage * max(1, tile.num_stages)


def estimate(launch: Pass, tile: TileConfig, arch: Arch) -> float:
    """Seconds that the launch, and the ``shrink`` that it needs unless it is one_pass, would take.

    A model, for choosing only: whole waves of tiles, each bound by its multiplications and its mask arithmetic, or the
    memory traffic of all; a launch of ``shrink`` reads X once more.
    """
    problem, P, Q = launch.problem, launch.P, launch.Q
    size = problem.dtype.itemsize
    weight_size = size if problem.weight_format == "dense" else 1
    tiles = -(-problem.M // tile.BLOCK_M) * -(-P // tile.BLOCK_P)
    waves = -(-tiles // arch.units)
    peak = arch.flops / arch.units / (1 if size == 2 else 8)
    # Loading a tile's operands costs as much time as multiplying them near 128 x 128.
    efficiency = tile.BLOCK_M * tile.BLOCK_P / (tile.BLOCK_M * tile.BLOCK_P + 32 * (tile.BLOCK_M + tile.BLOCK_P))
    columns = tile.BLOCK_P + (padded(problem.R) if launch.one_pass else 0)
    per_tile = 2 * tile.BLOCK_M * columns * Q / (peak * efficiency)
    mask = 14 / (4 * arch.warp * arch.clock)  # seconds per element on one unit
    if problem.dropout and launch.backward:
        per_tile += tile.BLOCK_M * tile.BLOCK_P * mask
    elif problem.dropout and launch.one_pass:
        per_tile += tile.BLOCK_M * Q * mask
    traffic = (problem.M * (Q + P) * size + P * Q * weight_size) / arch.bandwidth
    seconds = max(waves * per_tile, traffic)
    if not launch.one_pass:
        masked = problem.M * Q * mask / arch.units if problem.dropout and not launch.backward else 0.0
        seconds += 4e-6 + max(problem.M * Q * size / arch.bandwidth, masked)
    return seconds


def shrink_tile(dtype: torch.dtype, arch: Arch) -> TileConfig:
    """``shrink`` reads X once and multiplies little: few rows each, for programs enough. BLOCK_P is unused."""
    if arch.name == "interpreter":
        return TileConfig(64, 16, 64, 8, 1)
    return TileConfig(32, 16, 64, 4, 2 if arch.name == "gfx942" or dtype == torch.float32 else 4)


def grad_tile(dtype: torch.dtype, R: int, arch: Arch) -> TileConfig:
    """``grad``: BLOCK_M rows a step, BLOCK_P columns of wide. BLOCK_Q is unused."""
    if arch.name == "interpreter":
        return TileConfig(32, 128, 16, 8, 1)
    if dtype == torch.float32:
        return TileConfig(32, 64, 16, 4, 2)
    wide_rank = rank_block(R) == 64
    rows = 32 if wide_rank and arch.name == "sm_80" else 64
    return TileConfig(rows, 128, 16, 8 if wide_rank else 4, 2 if arch.name == "gfx942" else 3)
