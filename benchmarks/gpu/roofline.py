"""The floor of a cell: its bytes and multiplications at the card's measured ceilings.

A pass takes max(flops / F, bytes / B). Frozen: x, W, y; dy, W, dx. LoRA adds the factors and the thin products to
both, and one more read of x and dy for dA and dB: after the big products ("ratio"), or beside them ("overlapped").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.linear import Cell


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large vendor product by dtype name, bytes/s of a large copy (read and written)."""

    flops: dict[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations of one pass."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Whichever ceiling is met first."""
        return max(self.flops / flops, self.bytes / bandwidth)


def frozen_pass(cell: Cell) -> Work:
    """y, or dx: both move x, W and y once."""
    M, K, N, size = cell.M, cell.K, cell.N, cell.dtype.itemsize
    return Work((M * K + N * K + M * N) * size, 2.0 * M * K * N)


def thin_pass(cell: Cell) -> Work:
    """What the low-rank pair adds to y, or to dx."""
    return Work(cell.r * (cell.K + cell.N) * cell.adapter_dtype.itemsize, 2.0 * cell.M * cell.r * (cell.K + cell.N))


def gradient_pass(cell: Cell) -> Work:
    """dA and dB: x and dy once more."""
    moved = cell.M * (cell.K + cell.N) * cell.dtype.itemsize
    return Work(moved + thin_pass(cell).bytes, thin_pass(cell).flops)


def floor(cell: Cell, phase: str, ceilings: Ceilings) -> dict[str, float]:
    """The cell's work and its ratio to the frozen products at the ceilings."""
    F = ceilings.flops.get(str(cell.dtype).removeprefix("torch."), max(ceilings.flops.values()))
    B = ceilings.bandwidth
    base, big = frozen_pass(cell), frozen_pass(cell) + thin_pass(cell)
    if phase == "forward":
        total, frozen, separate = big, base.seconds(F, B), big.seconds(F, B)
        overlapped = separate
    else:
        total = big + big + gradient_pass(cell)
        frozen = 2 * base.seconds(F, B)
        separate = 2 * big.seconds(F, B) + gradient_pass(cell).seconds(F, B)
        overlapped = total.seconds(F, B)
    return {
        "bytes": total.bytes, "flops": total.flops, "frozen_us": round(frozen * 1e6, 3),
        "us": round(separate * 1e6, 3), "ratio": round(separate / frozen, 5),
        "overlapped": round(overlapped / frozen, 5),
    }  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    """How ``Ceilings.flops`` names a dtype."""
    return str(dtype).removeprefix("torch.")
