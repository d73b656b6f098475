"""The tuner as this command uses it: a thin adapter around ``peftkern.backends.triton.tune``, which may be absent."""

from __future__ import annotations

import importlib
import importlib.util
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import backend
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import BF16, F32, NAMES, key_of
from benchmarks.gpu.task import REFUSED, Result, Task
from benchmarks.linear import Cell
from peftkern.backends.triton import tables

_MODULE = "peftkern.backends.triton.tune"
_FIRST_ROWS = (8192, 2048, 4096, 16, 16384, 1024, 256, 64, 4, 1)


def tasks(bench: Bench) -> list[Task]:
    """One task a batch of shapes with the same rows and adapter dtype, in order of value."""
    plan, found = bench.plan, []
    rows = [M for M in _FIRST_ROWS if M in plan.rows] or list(plan.rows)
    batches = [(M, adapter) for M in rows for adapter in (BF16, F32)]
    for M, adapter in batches:
        cells = [plan.cell(layer, M, adapter=adapter) for layer in plan.layers]
        key = f"tune M={M} bf16/{NAMES[adapter]}"
        minutes = max(0.2, bench.minutes / len(batches))
        limit = 60 * minutes + 120
        found.append(Task(key, lambda c=cells, m=minutes: tune_shapes(c, m, table_path(bench)), limit))
    return found


def table_path(bench: Bench) -> Path:
    """Where the table is: in the folder of the results, where later parts find it as the user's cache."""
    return bench.folder / f"{backend.arch_here(bench.plan.device).name}.json"


def tune_shapes(shapes: list[Cell], minutes: float, output: Path) -> Result:
    """Measure the shapes for at most so many minutes and leave the table at ``output``.

    The one place that knows the tuner's interface: ``tune_shapes(problems, minutes, output)``.
    """
    if importlib.util.find_spec(_MODULE) is None:
        return {
            "status": REFUSED,
            "error": "this tree has no tuner: selection goes by the shipped table or the estimate",
        }
    entry = getattr(importlib.import_module(_MODULE), "tune_shapes", None)
    if entry is None:
        return {"status": REFUSED, "error": f"{_MODULE} has no tune_shapes"}
    from peftkern.ops.problem import Problem

    problems = [
        Problem("cuda", c.M, c.K, c.N, c.r, c.dtype, c.adapter_dtype, dropout=c.p > 0) for c in shapes
    ]  # fmt: skip
    begin = time.monotonic()
    found: Any = entry(problems, minutes, output)
    result = {"shapes": [key_of(cell) for cell in shapes], "seconds": round(time.monotonic() - begin, 1)}
    return result | {"entries": _entries(output), "said": str(found)[:2000] if found is not None else ""}


def _entries(path: Path) -> int:
    try:
        return len(tables.parse(path.read_text(), path.stem).entries)
    except (OSError, ValueError, KeyError):
        return 0
