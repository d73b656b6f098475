"""Whose product with the frozen weight is taken, torch's or our own in one pass, by what was measured on a processor.

A class of processors is a maker's family (``processor``) and the instruction set in use. Which rows our own product
takes there is measured (benchmarks/NOTES.md); on a class that nobody has measured, torch's is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from peftkern.backends.cpp.extension import extension

# A dtype's own y and own dx: from how many rows on; a dtype that is missing has torch's.
RowsFrom = Mapping[torch.dtype, tuple[int, int]]

_EVERY_ROW = (1, 1)
# Torch's dx of few rows is ahead there: 1.16x at 64 rows of 4096x4096, as fast at 256.
_AVX2: RowsFrom = {torch.float32: (1, 128), torch.bfloat16: _EVERY_ROW, torch.float16: _EVERY_ROW}
_ZEN4: RowsFrom = {torch.float32: _EVERY_ROW, torch.float16: _EVERY_ROW}
MEASURED: dict[str, RowsFrom] = {
    "avx2": _AVX2,
    "amd-25-avx512": _ZEN4,
    "amd-25-avx512bf16": {**_ZEN4, torch.bfloat16: _EVERY_ROW},
}


@functools.cache
def processor() -> str:
    """The maker and the family of this processor, as the extension reads them: "amd-25", "intel-6-143"."""
    return extension()[0].processor()


def own_rows(kernels: str, dtype: torch.dtype, forward: bool) -> int | None:
    """From how many rows on y, or dx, of a dense weight is our own with an instruction set's kernels; None: never."""
    found = MEASURED.get(f"{processor()}-{kernels}") or MEASURED.get(kernels, {})
    rows = found.get(dtype)
    return None if rows is None else rows[0 if forward else 1]
