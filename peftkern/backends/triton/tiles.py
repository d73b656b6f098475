"""Schedules and tiles as data, without Triton: the types, the legality predicate, the shipped tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peftkern._env import SCHEDULES
from peftkern.backends.triton import codes, quantised
from peftkern.backends.triton.arch import Arch
from peftkern.call import Problem

MAX_R = 512
ONE_PASS_R = 64  # the largest rank whose T is accumulated beside Z
FAR = 2**23  # a stride from here on, times a tile's 256 rows, is more than the kernels' 32-bit offsets within a tile
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


# Per chip: the product's tile (M, P, Q, warps, stages), and the highest ``pressure`` at which its binaries do not spill
# in recompute, shared and split. The limits are read off compiled kernels (Triton 3.6 and 3.9); _NO: not at all.
_ANY, _NO = 99, -1
_Shape = tuple[int, int, int, int, int]
_SHIPPED: dict[str, dict[_Shape, tuple[int, int, int]]] = {
    "sm_80": {
        (16, 64, 64, 4, 4): (_ANY, _NO, _ANY),
        (32, 64, 64, 4, 4): (10, _NO, _ANY),
        (64, 64, 64, 4, 3): (7, 6, _ANY),
        (64, 128, 32, 8, 4): (11, 8, _ANY),
        (128, 128, 32, 8, 4): (5, 7, _ANY),
        (128, 128, 64, 8, 3): (3, _NO, _ANY),
    },
    "sm_90": {
        (16, 64, 64, 4, 5): (10, _NO, _ANY),
        (32, 64, 64, 4, 4): (4, _NO, _ANY),
        (64, 64, 64, 4, 3): (9, 7, _ANY),
        (64, 128, 64, 4, 4): (9, 7, _ANY),
        (128, 128, 64, 8, 4): (9, 9, _ANY),
        (128, 256, 64, 8, 3): (5, 5, 7),
    },
    "sm_100": {
        (16, 64, 64, 4, 4): (10, _NO, _ANY),
        (32, 64, 64, 4, 4): (6, _NO, _ANY),
        (64, 64, 64, 4, 3): (8, 7, 6),
        (128, 64, 64, 4, 4): (3, 8, _ANY),
        (128, 128, 64, 8, 4): (3, 9, 7),
        (128, 256, 64, 8, 3): (_NO, _NO, _ANY),  # with T beside it Triton 3.6 compiles a bare trap
    },
    "gfx942": {
        (16, 64, 64, 4, 2): (_ANY, _NO, _ANY),
        (64, 64, 32, 4, 2): (_ANY, _NO, _ANY),
        (128, 128, 32, 8, 2): (_ANY, _NO, _ANY),
    },
    "interpreter": {(32, 128, 64, 8, 1): (_ANY, _ANY, _ANY), (32, 32, 64, 8, 1): (_ANY, _ANY, _ANY)},
}
# fp32 is multiplied without tensor cores unless torch's switch allows TF32.
_SHIPPED_FP32: dict[_Shape, tuple[int, int, int]] = {
    (16, 32, 16, 8, 3): (_ANY, _NO, _ANY),
    (32, 32, 16, 8, 3): (_ANY, _NO, _ANY),
    (64, 64, 16, 8, 3): (2, _NO, _NO),
}
_SLICES = (1, 2, 4, 8, 16)


def choices(launch: Pass, arch: Arch) -> list[Choice]:
    """Every legal choice among the shipped tiles, schedule by schedule."""
    made = [choice for schedule in SCHEDULES for choice in _candidates(schedule, launch, arch)]
    return [choice for choice in made if supports(launch, choice, arch) is None]


def refusals(launch: Pass, arch: Arch) -> dict[str, str]:
    """Each schedule that has no legal tile here, with the reason of its last one."""
    reasons = {}
    for schedule in SCHEDULES:
        found = [supports(launch, choice, arch) for choice in _candidates(schedule, launch, arch)]
        if None not in found:
            reasons[schedule] = str(found[-1])
    return reasons


def shipped(launch: Pass, arch: Arch) -> list[TileConfig]:
    """The product's tiles, before a schedule makes its own of them."""
    return [TileConfig(*shape) for shape in _shipped(launch, arch)]


def _candidates(schedule: str, launch: Pass, arch: Arch) -> list[Choice]:
    """A schedule on its tiles: a quantised weight is decoded in each, or once, or is multiplied as it is."""
    if launch.problem.base_compute is not None:
        return [Choice(schedule, tile) for tile in _variants(schedule, launch, arch)]
    once = [Choice(schedule, tile) for tile in _variants(schedule, dense(launch), arch)]
    if launch.problem.weight_format == "dense" or schedule == LIBRARY:
        return once
    in_the_tile = [Choice(schedule, tile) for tile in _variants(schedule, launch, arch)]
    return in_the_tile + [replace(choice, decoded=True) for choice in once]


def _shipped(launch: Pass, arch: Arch) -> dict[_Shape, tuple[int, int, int]]:
    if launch.problem.base_compute is not None:
        return codes.SHIPPED.get(arch.name, {})
    if arch.name == "interpreter":
        return _SHIPPED[arch.name]
    if launch.problem.weight_format in quantised.FORMATS:
        return quantised.tiles_on(arch, launch.problem)
    return _SHIPPED_FP32 if launch.problem.dtype == torch.float32 else _SHIPPED[arch.name]


def _variants(schedule: str, launch: Pass, arch: Arch) -> list[TileConfig]:
    """The shipped tiles as a schedule runs them."""
    narrow = launch.problem.dtype != torch.float32
    made = []
    for tile in shipped(launch, arch):
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


def dense(launch: Pass) -> Pass:
    """The same direction with a dense weight."""
    return replace(launch, problem=replace(launch.problem, weight_format="dense"))


def decodes(weight_format: str, choice: Choice) -> bool:
    """True where a choice decodes the weight before it multiplies."""
    return weight_format != "dense" and (choice.decoded or choice.schedule == LIBRARY)


def padded(R: int) -> int:
    """R as the bodies see it: a power of two that a matrix instruction accepts."""
    return max(16, 1 << (R - 1).bit_length())


def rank_block(R: int) -> int:
    """The part of R that one step of a body holds; larger ranks are walked in chunks."""
    return min(padded(R), 64)


def fused_rank_block(problem: Problem, choice: Choice) -> int:
    """The part of R that one step of ``fused`` holds: all of it where T is accumulated, little where T is read."""
    if choice.one_pass:
        return padded(problem.R)
    return min(padded(problem.R), 16 if problem.precision == "fp32" else 32)


def supports(launch: Pass, choice: Choice, arch: Arch) -> str | None:
    """The reason why ``choice`` cannot run this direction on ``arch``, or None: the one legality predicate."""
    tile = choice.tile
    if launch.problem.base_compute is not None:
        plain = choice.schedule == SPLIT and not choice.decoded
        reason = codes.refusal(launch.problem, tile.BLOCK_Q, arch) if plain else codes.TWO_READS
        if reason is not None:
            return reason
    if choice.decoded and (launch.problem.weight_format == "dense" or choice.schedule == LIBRARY):
        return f"{choice.schedule} of a {launch.problem.weight_format} weight has no decoding to choose"
    if decodes(launch.problem.weight_format, choice):
        return supports(dense(launch), replace(choice, decoded=False), arch)
    reason = quantised.refusal(launch.problem, arch)
    if reason is not None:
        return reason
    blocks = (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES, tile.BLOCK_Q)
    if min(blocks) < 16 or any(size & (size - 1) for size in (*blocks, tile.BLOCK_P, tile.num_warps)):
        return f"blocks {blocks} are not powers of two of at least 16, or BLOCK_P and num_warps no powers of two"
    if tile.GROUP_M < 1:
        return f"GROUP_M={tile.GROUP_M} is no number of rows"
    if choice.schedule not in SCHEDULES:
        return f"there is no schedule {choice.schedule!r}"
    reason = _protocol_refusal(launch, choice, arch)
    if reason is not None:
        return reason
    R = launch.problem.R
    if choice.one_pass and R > ONE_PASS_R:
        return f"one_pass keeps T in registers, which R={R} > {ONE_PASS_R} does not allow"
    found, limit = pressure(launch, choice), _pressure_limit(launch, choice, arch)
    if found > limit:
        return f"a {tile} tile would spill registers on {arch.name} (pressure {found} > {limit})"
    needed = shared_memory(launch, choice)
    if needed > arch.shared_memory:
        return f"a {tile} tile needs about {needed} bytes of shared memory, {arch.name} has {arch.shared_memory}"
    return None


def _protocol_refusal(launch: Pass, choice: Choice, arch: Arch) -> str | None:
    """The reason why the programs of one launch cannot do together what ``choice`` asks of them, or None."""
    tile, problem = choice.tile, launch.problem
    tiles_m, tiles_p = -(-problem.M // tile.BLOCK_M), -(-launch.P // tile.BLOCK_P)
    if tile.SLICES > 1 and choice.schedule != RECOMPUTE:
        return f"{choice.schedule} does not slice Q"
    if tile.SLICES > 1 and tile.SUBTILES > 1:
        return "slices are stored as whole tiles, not in sub-tiles"
    if launch.invariant and (tile.SLICES > 1 or choice.schedule in (SHARED, LIBRARY)):
        return f"{choice.schedule} with {tile.SLICES} slices is not the same for every number of rows"
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


def _pressure_limit(launch: Pass, choice: Choice, arch: Arch) -> int:
    """The pressure that a tile bears; of a tile that is not shipped only its accumulator is known."""
    tile = choice.tile
    shape = (tile.BLOCK_M, tile.BLOCK_P, tile.BLOCK_Q, tile.num_warps, tile.num_stages)
    limits = _shipped(launch, arch).get(shape)
    if limits is None:
        produced = tile.BLOCK_M * tile.BLOCK_P // (arch.warp * tile.num_warps)
        return _ANY if produced <= 64 else 0 if produced <= 128 else _NO
    return limits[{RECOMPUTE: 0, SHARED: 1}.get(choice.schedule, 2)]


def pressure(launch: Pass, choice: Choice) -> int:
    """The registers that slots keep beside the tile, in units that tell compiled kernels that spill from the others."""
    problem, narrow = launch.problem, launch.problem.dtype != torch.float32
    total = int(launch.backward) + 2 * problem.dropout
    if choice.one_pass:
        total += {16: 0, 32: 2}.get(padded(problem.R), 4) + (3 if problem.R % 16 else 0)
    if problem.K * problem.dtype.itemsize % 16 or problem.N * problem.dtype.itemsize % 16:
        total += 6  # rows that begin unaligned: no descriptors, no wide loads
    if narrow and problem.adapter_dtype == torch.float32:
        total += 3 if problem.dtype == torch.float16 else 2  # a narrow range is normalised
    if narrow and problem.precision == "fp32":
        total += 2
    if problem.weight_format != "dense":
        total += 5 if choice.tile.tma else 2 if narrow else 3  # decoded in registers, from pointers
    if problem.scaled_steps:
        total += codes.SCALED_STEPS
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
