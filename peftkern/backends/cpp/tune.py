"""``python -m peftkern tune --cpu``: from how many rows on our own product with a frozen weight is ahead of torch's.

Both products of a cell are timed in turn after ours has been held to fp64, and the median of their ratios counts. Ours
is taken from the smallest measured number of rows at which, and at all larger ones, it is not slower by more than 3 %
in the geometric mean over the shapes; from the first row on where that is the smallest measured number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from peftkern.backends.cpp import products
from peftkern.backends.cpp.backend import CppBackend
from peftkern.backends.cpp.extension import extension
from peftkern.testing.numerics import relative_error
from peftkern.weights import DenseWeight
from peftkern.weights.saved import dtype_name

SHAPES = ((576, 576), (576, 1536), (2048, 2048))  # N, K
ROWS = (8, 32, 128, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 15
ALLOWED = 1.03
SECONDS = 0.8  # of a cell; three rounds are taken whatever they cost


def run(report: Callable[[str], None] = print) -> str:
    """Measure this processor in up to two minutes, with torch's threads, and write the user's table.

    Returns: where it is. Raises: ValueError where there is no extension or a product is wrong; OSError where the table
        cannot be written.
    """
    module, why, _ = extension()
    if module is None:
        raise ValueError(f"there is no product of our own to measure: {why}")
    kernels, found = module.instruction_set(), {}
    name = f"{products.processor()}-{kernels}"
    report(f"{name}, {torch.get_num_threads()} threads: our time over torch's, at {', '.join(map(str, ROWS))} rows")
    for dtype in DTYPES:
        ratios = {forward: [_ratio_of_rows(dtype, M, forward) for M in ROWS] for forward in (True, False)}
        found[dtype] = rows_from(ratios[True]), rows_from(ratios[False])
        for forward, text in ((True, "y"), (False, "dx")):
            report(f"{dtype_name(dtype):>9} {text:>2}  {'  '.join(f'{ratio:.2f}' for ratio in ratios[forward])}")
    return f"written: {products.write(name, found)}"


def rows_from(ratios: list[float]) -> int | None:
    """From how many rows on ours is taken, by our time over torch's at each of ROWS."""
    first = len(ROWS)
    while first and ratios[first - 1] <= ALLOWED:
        first -= 1
    return None if first == len(ROWS) else ROWS[first] if first else 1


def _ratio_of_rows(dtype: torch.dtype, M: int, forward: bool) -> float:
    return statistics.geometric_mean(_ratio(dtype, M, N, K, forward) for N, K in SHAPES)


def _ratio(dtype: torch.dtype, M: int, N: int, K: int, forward: bool) -> float:
    """Our time over torch's for y, or dx, of M rows and a weight [N, K]."""
    backend, generator = CppBackend(), torch.Generator().manual_seed(M + N + K)
    W = torch.randn(N, K, generator=generator).to(dtype)
    rows = torch.randn(M, K if forward else N, generator=generator).to(dtype)
    weight, factor = DenseWeight(W), W.T if forward else W

    def own() -> Tensor:
        return backend.own_product(weight, rows, not forward)

    def torchs() -> Tensor:
        return rows @ factor

    truth = rows[:16].double() @ factor.double()
    errors = [relative_error(product()[:16], truth) for product in (own, torchs)]
    if not errors[0] <= 2 * errors[1] + 1e-6:
        raise ValueError(
            f"our {dtype} product of [{M}] rows and [{N}, {K}] is wrong: {errors[0]:.1e}, torch {errors[1]:.1e}"
        )
    ratios: list[float] = []
    begin = time.perf_counter()
    while len(ratios) < 3 or (len(ratios) < ROUNDS and time.perf_counter() - begin < SECONDS):
        first, second = (own, torchs) if len(ratios) % 2 else (torchs, own)
        took = {product: _seconds(product) for product in (first, second)}
        ratios.append(took[own] / took[torchs])
    return statistics.median(ratios)


def _seconds(product: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    product()
    return time.perf_counter() - begin
