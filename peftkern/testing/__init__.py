"""The common ground of tests and benchmarks: named problems, the error rule, and the dropout mask."""

from __future__ import annotations

from torch import Tensor

from peftkern import dropout


def dropout_mask(M: int, K: int, p: float, rng_state: Tensor) -> Tensor:
    """The keep mask that every backend applies to an x of M rows and K columns.

    Formula: element (row, col) is kept iff its 16-bit Philox4x32-10 lane is at least round(65536 p); kept elements are
        scaled by 65536 / (65536 - round(65536 p)). ``peftkern.dropout`` defines it in full.
    Args: M, K: shape of the flattened x; p: probability; rng_state: int64 [2] (seed, offset).
    Returns: bool [M, K] on rng_state's device, True where kept. Deterministic.
    """
    return dropout.keep_mask(M, K, p, rng_state)
