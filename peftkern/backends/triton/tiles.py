"""Schedules and tiles as data: what one is, which are legal, which are shipped. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peftkern._env import SCHEDULES
from peftkern.backends.triton.arch import Arch
from peftkern.ops.problem import Problem

MAX_R = 512
COUNTERS = 2**16  # int32 counters of a launch's protocol: two, and one a block
RECOMPUTE, SHARED, SPLIT, LIBRARY = SCHEDULES


@dataclass(frozen=True, slots=True)
class TileConfig:
    """The tile of one launch of ``fused``: M x P produced, Q contracted a step.

    GROUP_M rows of tiles walk together; SUBTILES column blocks in the epilogue; SLICES of Q; ``resident`` programs a
    compute unit (0: one program a tile); ``tma``: operands by descriptors where their alignment allows.
    """

    BLOCK_M: int
    BLOCK_P: int
    BLOCK_Q: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    SUBTILES: int = 1
    SLICES: int = 1
    resident: int = 0
    tma: bool = False

    def __str__(self) -> str:
        text = f"{self.BLOCK_M}x{self.BLOCK_P}x{self.BLOCK_Q} warps={self.num_warps} stages={self.num_stages}"
        text += f" group={self.GROUP_M}"
        for name, value, usual in (
            ("subtiles", self.SUBTILES, 1), ("slices", self.SLICES, 1), ("resident", self.resident, 0)
        ):  # fmt: skip
            text += f" {name}={value}" if value != usual else ""
        return text + (" tma" if self.tma else "")


@dataclass(frozen=True, slots=True)
class Pass:
    """One direction of a problem, as a schedule and a tile see it."""

    problem: Problem
    backward: bool

    @property
    def P(self) -> int:
        """Columns produced."""
        return self.problem.K if self.backward else self.problem.N

    @property
    def Q(self) -> int:
        """Columns contracted."""
        return self.problem.N if self.backward else self.problem.K

    @property
    def masks_out(self) -> bool:
        """Whether the dropout mask falls on the low-rank product, not on X."""
        return self.backward and self.problem.dropout

    @property
    def masks_in(self) -> bool:
        """Whether the dropout mask falls on X."""
        return self.problem.dropout and not self.backward


@dataclass(frozen=True, slots=True)
class Choice:
    """How one direction of a problem is run."""

    schedule: str
    tile: TileConfig

    @property
    def one_pass(self) -> bool:
        """Whether T is accumulated beside Z."""
        return self.schedule in (RECOMPUTE, SHARED)


# (M, P, Q, warps, stages): the product's tile; ``_variants`` makes each schedule's of it.
_SMALL = ((16, 64, 128, 4, 4), (32, 64, 64, 4, 4), (64, 64, 64, 4, 3))
_SHIPPED = {
    "sm_80": (*_SMALL, (64, 128, 32, 8, 4), (128, 128, 32, 8, 4)),
    "sm_90": (*_SMALL, (64, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
    "sm_100": (*_SMALL, (128, 128, 64, 8, 4)),
    "gfx942": ((16, 64, 64, 4, 2), (64, 64, 32, 4, 2), (128, 128, 32, 8, 2)),
    "interpreter": ((32, 128, 64, 8, 1),),
}
# fp32 is multiplied without tensor cores unless torch's switch allows TF32.
_SHIPPED_FP32 = ((16, 32, 32, 4, 2), (64, 64, 32, 8, 2))
_SLICES = (1, 2, 4, 8, 16)


def choices(launch: Pass, arch: Arch) -> list[Choice]:
    """Every legal choice among the shipped tiles, schedule by schedule."""
    made = [Choice(schedule, tile) for schedule in SCHEDULES for tile in _variants(schedule, launch, arch)]
    return [choice for choice in made if supports(launch, choice, arch) is None]


def refusals(launch: Pass, arch: Arch) -> dict[str, str]:
    """Each schedule that has no legal tile here, with the reason of its last one."""
    reasons = {}
    for schedule in SCHEDULES:
        found = [supports(launch, Choice(schedule, tile), arch) for tile in _variants(schedule, launch, arch)]
        if None not in found:
            reasons[schedule] = str(found[-1])
    return reasons


def _variants(schedule: str, launch: Pass, arch: Arch) -> list[TileConfig]:
    """The shipped tiles as a schedule runs them."""
    narrow = launch.problem.dtype != torch.float32 or arch.name == "interpreter"
    made = []
    for shape in _SHIPPED[arch.name] if narrow else _SHIPPED_FP32:
        tile = TileConfig(*shape)
        if tile.BLOCK_M >= 64 and narrow and arch.name != "interpreter":
            tile = replace(tile, tma=arch.tma, SUBTILES=max(1, tile.BLOCK_P // 64))
        if schedule == SHARED:
            made.append(replace(tile, resident=1 if tile.BLOCK_P >= 128 else 2))
        elif schedule == RECOMPUTE and tile.BLOCK_M == 16:
            made += [replace(tile, SLICES=slices) for slices in _SLICES]
        else:
            made.append(tile)
    return made


def padded(R: int) -> int:
    """R as the bodies see it: a power of two that a matrix instruction accepts."""
    return max(16, 1 << (R - 1).bit_length())


def rank_block(R: int) -> int:
    """How much of R one step of a body holds; larger ranks are walked in chunks."""
    return min(padded(R), 64)


def fused_rank_block(problem: Problem, choice: Choice) -> int:
    """How much of R one step of ``fused`` holds: all of it where T is accumulated, little where T is read."""
    if choice.one_pass:
        return padded(problem.R)
    return min(padded(problem.R), 16 if problem.precision == "fp32" else 32)


def supports(launch: Pass, choice: Choice, arch: Arch) -> str | None:
    """Why ``choice`` cannot run this direction on ``arch``, or None: the one legality predicate."""
    tile = choice.tile
    blocks = (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES, tile.BLOCK_Q)
    if any(block < 16 or block & (block - 1) for block in blocks):
        return f"blocks {blocks} are not powers of two of at least 16"
    if choice.schedule not in SCHEDULES:
        return f"there is no schedule {choice.schedule!r}"
    reason = _protocol_refusal(launch, choice, arch)
    if reason is not None:
        return reason
    R = launch.problem.R
    if choice.one_pass and R > arch.one_pass_R:
        return f"one_pass keeps T in registers, which R={R} > {arch.one_pass_R} does not allow on {arch.name}"
    registers = registers_needed(launch, choice, arch)
    if registers > 165:
        return f"about {registers} registers a thread for what a {tile} tile keeps alive leave too few for the rest"
    needed = shared_memory(launch, choice)
    if needed > arch.shared_memory:
        return f"a {tile} tile needs about {needed} bytes of shared memory, {arch.name} has {arch.shared_memory}"
    return None


def _protocol_refusal(launch: Pass, choice: Choice, arch: Arch) -> str | None:
    """What the programs of one launch would have to do together, and cannot."""
    tile, problem = choice.tile, launch.problem
    tiles_m, tiles_p = -(-problem.M // tile.BLOCK_M), -(-launch.P // tile.BLOCK_P)
    if tile.SLICES > 1 and choice.schedule != RECOMPUTE:
        return f"{choice.schedule} does not slice Q"
    if tile.SLICES > -(-launch.Q // tile.BLOCK_Q):
        return f"Q={launch.Q} has fewer than {tile.SLICES} steps of {tile.BLOCK_Q}"
    if choice.schedule != SHARED and tile.SLICES == 1:
        return None
    what = f"{choice.schedule} with {tile.SLICES} slices"
    if not arch.protocols:
        return f"{what} needs one program to see what another stored, which {arch.name}'s binaries do not ensure"
    if choice.schedule == SHARED and tile.resident == 0:
        return f"{what} needs a persistent grid"
    if choice.schedule == SHARED and tiles_p == 1:
        return f"{what} has nothing to share where P={launch.P} is one tile"
    blocks = tiles_m if choice.schedule == SHARED else tiles_m * tiles_p
    if blocks > COUNTERS - 2:
        return f"{what} needs {blocks} counters, there are {COUNTERS - 2}"
    return None


def registers_needed(launch: Pass, choice: Choice, arch: Arch) -> int:
    """Registers a thread of the accumulators, and allowances for what else is alive, fitted to compiled kernels."""
    problem, tile = launch.problem, choice.tile
    threads = arch.warp * tile.num_warps
    total = produced = tile.BLOCK_M * tile.BLOCK_P // threads
    if launch.masks_out:  # the low-rank product is masked before it is added
        total += produced // tile.SUBTILES
    if choice.one_pass:
        rank = padded(problem.R)
        total += tile.BLOCK_M * rank // threads
        if problem.adapter_dtype != problem.dtype:  # the factor passes through registers, to be rounded or split
            total += tile.BLOCK_Q * rank // threads * (3 if problem.precision == "fp32" else 2)
        if launch.masks_in:  # so does x, to be masked
            total += tile.BLOCK_M * tile.BLOCK_Q // threads // 2
        if problem.weight_format != "dense":
            total += 8
    return total


def shared_memory(launch: Pass, choice: Choice) -> int:
    """Bytes of the operand buffers of the main loop."""
    problem, tile = launch.problem, choice.tile
    stage = tile.BLOCK_Q * (tile.BLOCK_M + tile.BLOCK_P) * problem.dtype.itemsize
    if choice.one_pass:
        stage += tile.BLOCK_Q * padded(problem.R) * problem.adapter_dtype.itemsize
    return stage * max(1, tile.num_stages)


@dataclass(frozen=True, slots=True)
class ThinConfig:
    """The tile of ``shrink`` (rows, contracted columns, slices of Q) or of ``grad`` (rows, columns, runs of rows)."""

    BLOCK_M: int
    BLOCK_COLS: int
    num_warps: int
    num_stages: int
    SLICES: int = 1

    def __str__(self) -> str:
        slices = f" slices={self.SLICES}" if self.SLICES > 1 else ""
        return f"{self.BLOCK_M}x{self.BLOCK_COLS} warps={self.num_warps} stages={self.num_stages}{slices}"


def shrink_tile(launch: Pass, arch: Arch) -> ThinConfig:
    """``shrink`` reads X once and multiplies little: few rows each, and slices of Q, for programs enough."""
    problem, Q = launch.problem, launch.Q
    if arch.name == "interpreter":
        return ThinConfig(64, 64, 8, 1)
    rows = 16 if problem.M <= 16 else 32
    programs = -(-problem.M // rows) * -(-problem.R // rank_block(problem.R))
    slices = 1
    while arch.protocols and programs * slices < arch.units and slices * 2 * 256 <= Q and slices < 16:
        slices *= 2
    stages = 2 if arch.name == "gfx942" or problem.dtype == torch.float32 else 4
    return ThinConfig(rows, 64, 4, stages, slices if programs <= COUNTERS - 2 else 1)


def grad_tile(dtype: torch.dtype, R: int, with_t: bool, arch: Arch) -> ThinConfig:
    """``grad``: BLOCK_M rows a step, BLOCK_COLS columns of wide."""
    if arch.name == "interpreter":
        return ThinConfig(32, 128, 8, 1)
    if dtype == torch.float32:
        return ThinConfig(32, 64, 4, 2)
    wide_rank = rank_block(R) == 64
    rows = 32 if with_t or (wide_rank and arch.name == "sm_80") else 64
    return ThinConfig(rows, 128, 8 if wide_rank else 4, 2 if arch.name == "gfx942" else 3)
