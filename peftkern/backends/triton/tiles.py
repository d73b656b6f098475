"""Schedules and tiles as data, without Triton: the types, the legality predicate, the choices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peftkern._env import SCHEDULES
from peftkern.backends.triton import shipped
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.shipped import TileConfig
from peftkern.call import Problem

MAX_R = 512
ONE_PASS_R = 64  # the largest rank whose T is accumulated beside Z
FAR = 2**23  # a stride from here on, times a tile's 256 rows, is more than the kernels' 32-bit offsets within a tile
COUNTERS = 2**16  # int32 counters of a launch's protocol: two, and one a block
RECOMPUTE, SHARED, SPLIT, LIBRARY = SCHEDULES
BANK = "bank"  # the schedule of rows that have adapters of their own, and theirs alone
_LARGEST_STEP = 128  # of codes: a block's, what is contracted between two looks at the scales
_SLICES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Pass:
    """One direction of a problem, as a schedule and a tile see it."""

    problem: Problem
    backward: bool
    invariant: bool = False  # M stands for any number of rows, and no row's result may depend on it

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
        """True where the dropout mask falls on the low-rank product, not on X."""
        return self.backward and self.problem.dropout

    @property
    def masks_in(self) -> bool:
        """True where the dropout mask falls on X."""
        return self.problem.dropout and not self.backward


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to run one direction of a problem."""

    schedule: str
    tile: TileConfig
    decoded: bool = False  # a quantised weight is decoded once, before, instead of in every tile

    @property
    def one_pass(self) -> bool:
        """True where T is accumulated beside Z."""
        return self.schedule in (RECOMPUTE, SHARED)


def choices(launch: Pass, arch: Arch) -> list[Choice]:
    """Every legal choice among the shipped tiles, schedule by schedule."""
    made = [choice for schedule in schedules(launch) for choice in _candidates(schedule, launch, arch)]
    return [choice for choice in made if supports(launch, choice, arch) is None]


def refusals(launch: Pass, arch: Arch) -> dict[str, str]:
    """Each schedule that has no legal tile here, with the reason of its last one."""
    reasons = {}
    for schedule in schedules(launch):
        found = [supports(launch, choice, arch) for choice in _candidates(schedule, launch, arch)]
        if None not in found:
            reasons[schedule] = str(found[-1])
    return reasons


def schedules(launch: Pass) -> tuple[str, ...]:
    """The schedules that there are for a direction."""
    return (BANK,) if launch.problem.several_adapters else SCHEDULES


def _candidates(schedule: str, launch: Pass, arch: Arch) -> list[Choice]:
    """A schedule on its tiles: a quantised weight is decoded in each, or once, or is multiplied as it is."""
    if schedule == BANK:
        return [Choice(BANK, _bank_tile(launch, arch))]
    if launch.problem.base_compute is not None:
        return [Choice(schedule, tile) for tile in _variants(schedule, launch, arch)]
    once = [Choice(schedule, tile) for tile in _variants(schedule, dense(launch), arch)]
    if launch.problem.weight_format == "dense" or schedule == LIBRARY:
        return once
    in_the_tile = [Choice(schedule, tile) for tile in _variants(schedule, launch, arch)]
    return in_the_tile + [replace(choice, decoded=True) for choice in once]


def _variants(schedule: str, launch: Pass, arch: Arch) -> list[TileConfig]:
    """The shipped tiles as a schedule runs them."""
    narrow = launch.problem.dtype != torch.float32
    made = []
    for shape in shipped.shapes(launch.problem, arch):
        tile = TileConfig(*shape)
        if tile.BLOCK_M >= 64 and narrow:
            tile = replace(tile, tma=arch.tma, SUBTILES=max(1, tile.BLOCK_P // 64))
        if schedule == SHARED:
            small = tile.BLOCK_M * tile.BLOCK_P <= 64 * 64 and tile.num_warps == 4
            made.append(replace(tile, resident=2 if small else 1))
        elif schedule == RECOMPUTE and tile.BLOCK_M == 16:
            made += [replace(tile, SLICES=slices) for slices in _SLICES]
        else:
            made.append(tile)
            if tile.tma and schedule != LIBRARY:  # the same binary on a persistent grid, for the tuner to compare
                made.append(replace(tile, resident=1))
    return made


def _bank_tile(launch: Pass, arch: Arch) -> TileConfig:
    """The tile by the rows; few of them are cut into slices of Q until there are programs for every unit."""
    few, some, many = shipped.of_bank(launch.problem, arch)
    if launch.invariant:
        return many
    if launch.problem.M > few.BLOCK_M:
        return some if launch.problem.M <= 2 * some.BLOCK_M else many
    produced, slices = -(-launch.P // few.BLOCK_P), 1
    while produced * slices < arch.units and slices * 8 * few.BLOCK_Q <= launch.Q and slices < 8:
        slices *= 2
    return replace(few, SLICES=slices if 2 * produced <= COUNTERS - 2 else 1)


def dense(launch: Pass) -> Pass:
    """The same direction with a dense weight."""
    return replace(launch, problem=replace(launch.problem, weight_format="dense"))


def decodes(weight_format: str, choice: Choice) -> bool:
    """True where a choice decodes the weight before it multiplies."""
    return weight_format != "dense" and (choice.decoded or choice.schedule in (LIBRARY, BANK))


def padded(R: int) -> int:
    """R as the bodies see it: a power of two that a matrix instruction accepts."""
    return max(16, 1 << (R - 1).bit_length())


def rank_block(R: int) -> int:
    """The part of R that one step of a body holds; larger ranks are walked in chunks."""
    return min(padded(R), 64)


def read_rank_block(R: int, precision: str, masks_out: bool) -> int:
    """The part of R that one step holds where T is read; ``masks_out`` takes registers too."""
    return min(padded(R), 16 if precision == "fp32" or masks_out else 32)


def supports(launch: Pass, choice: Choice, arch: Arch) -> str | None:
    """The reason why ``choice`` cannot run this direction on ``arch``, or None: the one legality predicate."""
    tile = choice.tile
    if launch.problem.base_compute is not None:
        if choice.schedule != SPLIT or choice.decoded:
            return "its programs read the same rows for both products, and e4m3 ones are for the frozen one alone"
        reason = codes_refusal(launch.problem, tile.BLOCK_Q, arch)
        if reason is not None:
            return reason
    if choice.decoded and (launch.problem.weight_format == "dense" or choice.schedule == LIBRARY):
        return f"{choice.schedule} of a {launch.problem.weight_format} weight has no decoding to choose"
    if decodes(launch.problem.weight_format, choice):
        return supports(dense(launch), replace(choice, decoded=False), arch)
    reason = packed_refusal(launch.problem, arch)
    if reason is not None:
        return reason
    blocks = (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES, tile.BLOCK_Q)
    if min(blocks) < 16 or any(size & (size - 1) for size in (*blocks, tile.BLOCK_P, tile.num_warps)):
        return f"blocks {blocks} are not powers of two of at least 16, or BLOCK_P and num_warps no powers of two"
    if tile.GROUP_M < 1:
        return f"GROUP_M={tile.GROUP_M} is no number of rows"
    if choice.schedule not in schedules(launch):
        return f"there is no schedule {choice.schedule!r} among {', '.join(schedules(launch))}"
    reason = _protocol_refusal(launch, choice, arch)
    if reason is not None:
        return reason
    R = launch.problem.R
    if choice.one_pass and R > ONE_PASS_R:
        return f"one_pass keeps T in registers, which R={R} > {ONE_PASS_R} does not allow"
    if choice.one_pass and tile.BLOCK_M >= 64 and launch.problem.weight_format == "fp8" and not arch.fp8:
        return f"{arch.name} converts e4m3 by many instructions, which leave one_pass too few registers in 64 rows"
    found, limit = pressure(launch, choice), _pressure_limit(launch, choice, arch)
    if found > limit:
        return f"a {tile} tile would spill registers on {arch.name} (pressure {found} > {limit})"
    needed = shared_memory(launch, choice)
    if needed > arch.shared_memory:
        return f"a {tile} tile needs about {needed} bytes of shared memory, {arch.name} has {arch.shared_memory}"
    return None


def codes_refusal(problem: Problem, block_q: int, arch: Arch) -> str | None:
    """The reason why e4m3 codes cannot be multiplied with each other in steps of ``block_q``, or None."""
    if problem.dtype == torch.float32:
        return "FP8 tensor cores add in too few bits for float32 rows"
    if not arch.fp8:
        return f"there are no kernels for FP8 tensor cores on {arch.name}"
    if block_q > _LARGEST_STEP:
        return f"a step of {block_q} is more than a block of {_LARGEST_STEP}, which has a scale of its own"
    return None


def packed_refusal(problem: Problem, arch: Arch) -> str | None:
    """The reason why no tile decodes this weight, or None."""
    if arch.name == "interpreter" or problem.weight_format not in shipped.PACKED:
        return None
    if arch.name not in shipped.SHIPPED["packed"]:
        return f"no tile is known that decodes {problem.weight_format} on {arch.name}"
    if problem.weight_format in ("nf4", "fp4") and problem.K % 16:
        return f"rows of {problem.K} begin within a run of 16 or a byte, and are decoded number by number, once"
    return None


def _protocol_refusal(launch: Pass, choice: Choice, arch: Arch) -> str | None:
    """The reason why the programs of one launch cannot do together what ``choice`` asks of them, or None."""
    tile, problem = choice.tile, launch.problem
    tiles_m, tiles_p = -(-problem.M // tile.BLOCK_M), -(-launch.P // tile.BLOCK_P)
    if tile.SLICES > 1 and choice.schedule not in (RECOMPUTE, BANK):
        return f"{choice.schedule} does not slice Q"
    if tile.SLICES > 1 and tile.SUBTILES > 1:
        return "slices are stored as whole tiles, not in sub-tiles"
    if launch.invariant and (tile.SLICES > 1 or choice.schedule in (SHARED, LIBRARY)):
        return f"{choice.schedule} with {tile.SLICES} slices is not the same for every number of rows"
    if tile.SLICES > -(-launch.Q // tile.BLOCK_Q):
        return f"Q={launch.Q} has fewer than {tile.SLICES} steps of {tile.BLOCK_Q}"
    if choice.schedule not in (SHARED, BANK) and tile.SLICES == 1:
        return None
    what = f"{choice.schedule} with {tile.SLICES} slices"
    if not arch.protocols:
        return f"{what} needs one program to see what another stored, which {arch.name}'s binaries do not ensure"
    if choice.schedule == SHARED and tile.resident == 0:
        return f"{what} needs a persistent grid"
    if choice.schedule == SHARED and tiles_p == 1:
        return f"{what} has nothing to share where P={launch.P} is one tile"
    blocks = tiles_m if choice.schedule == SHARED else tiles_m * tiles_p
    if choice.schedule == BANK:  # the chunks of T, and, where they and the tiles are in slices, each of these
        blocks = 1 if tile.SLICES == 1 else 2 * blocks
    if blocks > COUNTERS - 2:
        return f"{what} needs {blocks} counters, there are {COUNTERS - 2}"
    return None


def _pressure_limit(launch: Pass, choice: Choice, arch: Arch) -> int:
    """The pressure that a tile bears; of a tile that is not shipped only its accumulator is known."""
    tile = choice.tile
    shape = (tile.BLOCK_M, tile.BLOCK_P, tile.BLOCK_Q, tile.num_warps, tile.num_stages)
    if choice.schedule == BANK:
        return shipped.ANY
    limits = shipped.shapes(launch.problem, arch).get(shape)
    if limits is None:
        produced = tile.BLOCK_M * tile.BLOCK_P // (arch.warp * tile.num_warps)
        return shipped.ANY if produced <= 64 else 0 if produced <= 128 else shipped.NO
    return limits[{RECOMPUTE: 0, SHARED: 1}.get(choice.schedule, 2)]


def pressure(launch: Pass, choice: Choice) -> int:
    """The registers that slots keep beside the tile, in units that tell compiled kernels that spill from the others."""
    problem, tile, narrow = launch.problem, choice.tile, launch.problem.dtype != torch.float32
    masks = launch.masks_out or (launch.masks_in and choice.one_pass)
    total = int(launch.backward) + 2 * masks + (5 if problem.R % 16 else 0)
    if choice.one_pass:
        total += {16: 0, 32: 3}.get(padded(problem.R), 8)
        if padded(problem.R) > 16 and tile.BLOCK_M * tile.BLOCK_P > 64 * 32 * tile.num_warps:
            total += 4  # T beside an accumulator of more than 64 registers
        if narrow and problem.adapter_dtype == problem.dtype and launch.masks_in:
            total += 4  # the masked rows and the frozen product's own lie beside each other
    elif read_rank_block(problem.R, problem.precision, launch.masks_out) > 16:
        total += 2
    if problem.K * problem.dtype.itemsize % 16 or problem.N * problem.dtype.itemsize % 16:
        total += 6  # rows that begin unaligned: no descriptors, no wide loads
    if narrow and problem.adapter_dtype == torch.float32:
        total += 3 if problem.dtype == torch.float16 else 2  # a narrow range is normalised
    if narrow and problem.precision == "fp32":
        total += 2
    if problem.weight_format != "dense":
        total += 5 if tile.tma else 2 if narrow else 3  # decoded in registers, from pointers
    if problem.scaled_steps:
        total += 10  # a step's sum beside the accumulator
    return total


def shared_memory(launch: Pass, choice: Choice) -> int:
    """Bytes of the operand buffers of the main loop."""
    problem, tile = launch.problem, choice.tile
    size = 1 if problem.base_compute is not None else problem.dtype.itemsize
    stage = tile.BLOCK_Q * (tile.BLOCK_M + tile.BLOCK_P) * size
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
    while (
        arch.protocols
        and not launch.invariant
        and programs * slices < arch.units
        and slices * 2 * 256 <= Q
        and slices < 16
    ):
        slices *= 2
    stages = 2 if arch.name == "gfx942" or problem.dtype == torch.float32 else 4
    wide = problem.dtype == torch.float32 or (problem.dtype == torch.float16 and problem.precision == "fp32")
    columns = 32 if wide else 64  # of wide operands more would spill
    return ThinConfig(rows, columns, 4, stages, slices if programs <= COUNTERS - 2 else 1)


def grad_gives_t(dtype: torch.dtype, R: int, precision: str, arch: Arch) -> bool:
    """True where the side of dy computes t beside dB: from R=32 on, t's parts weigh as much as a second read of dy."""
    return arch.protocols and R < 32 and dtype != torch.float32 and precision == "base"


def grad_tile(dtype: torch.dtype, R: int, with_t: bool, arch: Arch) -> ThinConfig:
    """``grad``: BLOCK_M rows a step, BLOCK_COLS columns of wide."""
    if arch.name == "interpreter":
        return ThinConfig(32, 128, 8, 1)
    wide_rank = rank_block(R) == 64
    if dtype == torch.float32:
        return ThinConfig(32, 64, 8 if wide_rank else 4, 2)
    rows = 32 if with_t or (wide_rank and arch.name == "sm_80") else 64
    return ThinConfig(rows, 128, 8 if wide_rank else 4, 2 if arch.name == "gfx942" else 3)


def bank_grad_tile(dtype: torch.dtype, R: int, arch: Arch) -> ThinConfig:
    """The tile of ``grad`` with fewer rows a step: rows are gathered, which takes registers."""
    tile = grad_tile(dtype, R, False, arch)
    return replace(tile, BLOCK_M=16 if dtype == torch.float32 else 32)
