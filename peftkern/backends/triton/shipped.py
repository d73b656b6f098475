"""The shipped tiles, in one table, without Triton: by what is multiplied, and by chip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peftkern.backends.triton.arch import Arch
from peftkern.call import Problem


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

    def by_wgmma(self, arch: Arch, dtype: torch.dtype) -> bool:
        """Whether a warpgroup multiplies the tile; fewer rows than it has are left to warps."""
        return arch.wgmma and self.BLOCK_M >= 64 and dtype != torch.float32

    def __str__(self) -> str:
        text = f"{self.BLOCK_M}x{self.BLOCK_P}x{self.BLOCK_Q} warps={self.num_warps} stages={self.num_stages}"
        text += f" group={self.GROUP_M}"
        for name, value, usual in (
            ("subtiles", self.SUBTILES, 1), ("slices", self.SLICES, 1), ("resident", self.resident, 0)
        ):  # fmt: skip
            text += f" {name}={value}" if value != usual else ""
        return text + (" tma" if self.tma else "")


PACKED = ("int4", "nf4", "fp4", "mxfp4", "nvfp4", "fp8")  # weights whose loader holds more than int8's
ANY, NO = 99, -1
_Shape = tuple[int, int, int, int, int]
_Tiles = dict[_Shape, tuple[int, int, int]]
_INTERPRETED = (32, 128, 64, 8, 1), (32, 32, 64, 8, 1)

# Per chip: the product's tile (M, P, Q, warps, stages), and the highest ``pressure`` at which its binaries do not spill
# in recompute, shared and split. The limits are read off compiled kernels (Triton 3.6 and 3.9); NO: not at all.
SHIPPED: dict[str, dict[str, _Tiles]] = {
    "plain": {
        "sm_80": {
            (16, 64, 64, 4, 4): (ANY, NO, ANY),
            (32, 64, 64, 4, 4): (10, NO, ANY),
            (64, 64, 64, 4, 3): (7, 5, ANY),
            (64, 128, 32, 8, 4): (11, 8, ANY),
            (128, 128, 32, 8, 4): (5, 6, ANY),
            (128, 128, 64, 8, 3): (2, NO, ANY),
        },
        "sm_90": {
            (16, 64, 64, 4, 5): (10, NO, ANY),
            (32, 64, 64, 4, 4): (4, NO, ANY),
            (64, 64, 64, 4, 3): (9, 7, ANY),
            (64, 128, 64, 4, 4): (9, 7, ANY),
            (128, 128, 64, 8, 4): (9, 7, ANY),
            (128, 256, 64, 8, 3): (5, 5, 6),
            (128, 128, 64, 8, 3): (9, 7, ANY),
            (128, 256, 64, 8, 4): (5, 3, 6),
        },
        "sm_100": {
            (16, 64, 64, 4, 4): (10, NO, ANY),
            (32, 64, 64, 4, 4): (6, NO, 9),
            (64, 64, 64, 4, 3): (8, 6, 6),
            (128, 64, 64, 4, 4): (3, 8, ANY),
            (128, 128, 64, 8, 4): (3, 9, 7),
            (128, 256, 64, 8, 3): (NO, NO, ANY),  # with T beside it Triton 3.6 compiles a bare trap
        },
        "gfx942": {
            (16, 64, 64, 4, 2): (ANY, NO, ANY),
            (64, 64, 32, 4, 2): (ANY, NO, ANY),
            (128, 128, 32, 8, 2): (ANY, NO, ANY),
        },
        "interpreter": dict.fromkeys(_INTERPRETED, (ANY, ANY, ANY)),
    },
    "packed": {  # eight warps: what is decoded is few registers a thread
        "sm_80": {
            (16, 64, 64, 8, 3): (14, NO, ANY),
            (32, 64, 64, 8, 3): (14, NO, 8),
            (64, 64, 64, 8, 3): (8, 7, ANY),
            (64, 128, 64, 8, 3): (6, NO, ANY),
            (128, 128, 32, 8, 4): (NO, NO, ANY),
        },
        "sm_90": {
            (16, 64, 64, 8, 3): (14, NO, ANY),
            (32, 64, 64, 8, 3): (12, NO, NO),
            (32, 128, 64, 8, 3): (NO, NO, ANY),
            (64, 64, 64, 8, 3): (13, 13, ANY),
            (64, 128, 64, 8, 3): (12, 12, ANY),
            (128, 128, 64, 8, 3): (12, 12, ANY),
        },
        "sm_100": {
            (16, 64, 64, 8, 3): (14, NO, ANY),
            (32, 64, 64, 8, 4): (12, NO, NO),
            (32, 128, 64, 8, 3): (NO, NO, ANY),
            (64, 64, 64, 8, 3): (12, NO, ANY),
            (128, 64, 64, 8, 3): (13, 13, NO),
            (128, 128, 64, 8, 3): (11, 11, ANY),
        },
    },
    "codes": {  # e4m3 on both sides, on FP8 tensor cores
        "sm_90": {
            (16, 64, 128, 4, 4): (NO, NO, ANY),
            (64, 64, 128, 4, 4): (NO, NO, ANY),
            (64, 128, 128, 4, 4): (NO, NO, ANY),
            (128, 128, 128, 8, 4): (NO, NO, 14),
        },
        "sm_100": {
            (16, 64, 128, 4, 4): (NO, NO, ANY),
            (64, 64, 128, 4, 4): (NO, NO, ANY),
            (128, 64, 128, 8, 4): (NO, NO, ANY),
            (128, 128, 128, 8, 4): (NO, NO, 14),
            (128, 256, 128, 8, 3): (NO, NO, 14),
        },
        "interpreter": dict.fromkeys(_INTERPRETED, (NO, NO, ANY)),
    },
}
# fp32 is multiplied without tensor cores unless torch's switch allows TF32; on every chip alike.
_FP32: dict[str, _Tiles] = {
    "plain": {
        (16, 32, 16, 8, 3): (ANY, NO, ANY),
        (32, 32, 16, 8, 3): (ANY, NO, ANY),
        (64, 64, 16, 8, 3): (1, NO, NO),
    },
    "packed": {(16, 32, 16, 8, 3): (12, NO, ANY)},
}


def shapes(problem: Problem, arch: Arch) -> _Tiles:
    """The shipped tiles that multiply a weight as it is stored, with their limits."""
    kind = "codes" if problem.base_compute is not None else "packed" if problem.weight_format in PACKED else "plain"
    if arch.name == "interpreter":
        return SHIPPED["codes" if kind == "codes" else "plain"][arch.name]
    found = SHIPPED[kind].get(arch.name, {})
    return _FP32.get(kind, found) if found and problem.dtype == torch.float32 else found


# A bank's: for decode, a few sequences, prefill. They do not depend on the adapters, their ranks or dtypes: a row of
# the base has the same bits whoever is beside it. None of their binaries spills, whatever the slots.
_Three = tuple[TileConfig, TileConfig, TileConfig]
_FEW = TileConfig(16, 64, 64, 4, 4, resident=2)
_SOME = TileConfig(64, 64, 64, 8, 3, resident=1)
_BANK: dict[str, _Three] = {
    "sm_80": (_FEW, _SOME, TileConfig(128, 128, 32, 8, 3, SUBTILES=8, resident=1)),
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


def of_bank(problem: Problem, arch: Arch) -> _Three:
    """The tiles of a batch whose rows have adapters of their own."""
    if arch.name == "interpreter":
        return _BANK[arch.name]
    if problem.dtype == torch.float32:
        return _WIDE
    if (problem.K | problem.N) * problem.dtype.itemsize % 16:
        return _UNALIGNED
    few, some, many = _BANK[arch.name]
    return (_UNALIGNED[0] if problem.precision == "fp32" else few), some, many
