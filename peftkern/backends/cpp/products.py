"""Whose product with the frozen weight is taken, torch's or our own in one pass, by what was measured on a processor.

A class of processors is a maker's family and the instruction set in use ("amd-25-avx512bf16"). From how many rows on
our own y and our own dx are ahead there is measured: by ``python -m peftkern tune --cpu``, whose file holds for the
user's machine, or by us (MEASURED; benchmarks/NOTES.md). On a class that nobody has measured, torch's is taken.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from peftkern import _env
from peftkern._files import beside
from peftkern.backends.cpp.extension import extension
from peftkern.weights.saved import DTYPES, dtype_name

logger = logging.getLogger("peftkern")

# From how many rows on (y, dx) of a dtype are our own; None: never.
RowsFrom = Mapping[torch.dtype, tuple["int | None", "int | None"]]

VERSION = 1
_EVERY_ROW = (1, 1)
# Torch's dx of few rows is ahead there: 1.16x at 64 rows of 4096x4096, as fast at 256.
_AVX2: RowsFrom = {torch.float32: (1, 128), torch.bfloat16: _EVERY_ROW, torch.float16: _EVERY_ROW}
_ZEN4: RowsFrom = {torch.float32: _EVERY_ROW, torch.float16: _EVERY_ROW}
MEASURED: dict[str, RowsFrom] = {
    "avx2": _AVX2,
    "amd-25-avx512": _ZEN4,
    # In bf16 torch's products are ahead in a step of 512 tokens on two threads: 1.11x of the frozen step, ours 1.14x.
    "amd-25-avx512bf16": _ZEN4,
}


@functools.cache
def processor() -> str:
    """The maker and the family of this processor, as the extension reads them: "amd-25", "intel-6-143"."""
    return extension()[0].processor()


def own_rows(kernels: str, dtype: torch.dtype, forward: bool) -> int | None:
    """From how many rows on y, or dx, of a dense weight is our own with an instruction set's kernels; None: never."""
    name = f"{processor()}-{kernels}"
    found = tuned().get(name) or MEASURED.get(name) or MEASURED.get(kernels, {})
    rows = found.get(dtype)
    return None if rows is None else rows[0 if forward else 1]


def table_file() -> Path:
    """Where ``tune --cpu`` writes."""
    return _env.cache_folder() / "cpu.json"


@functools.cache
def tuned() -> Mapping[str, RowsFrom]:
    """The user's table, read once; one that cannot be read is ignored with a warning."""
    path: Path | None = None
    try:
        path = table_file()
        if not path.is_file():
            return {}
        content = json.loads(path.read_text("utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        return {name: _read(rows) for name, rows in content["rows_from"].items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # Path.home's is Runtime
        logger.warning("peftkern: %s is ignored: %s", path or "the table of tune --cpu", error)
        return {}


def _read(rows: Mapping[str, list[int | None]]) -> RowsFrom:
    found = {}
    for name, (y, dx) in rows.items():
        if not all(value is None or type(value) is int and value > 0 for value in (y, dx)):
            raise ValueError(f"{name}: rows are positive integers or null, not {y!r} and {dx!r}")
        found[DTYPES[name]] = (y, dx)
    return found


def write(name: str, rows: RowsFrom) -> Path:
    """Write what was measured for a class into the user's table, whose other classes stay; it holds from now on.

    Raises: OSError where the file cannot be written.
    """
    path, classes = table_file(), {**tuned(), name: rows}
    entries = {key: {dtype_name(dtype): list(pair) for dtype, pair in each.items()} for key, each in classes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path, json.dumps({"version": VERSION, "rows_from": entries}, indent=1).encode()) as made:
        made.replace(path)
    tuned.cache_clear()
    return path
