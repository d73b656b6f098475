"""The tuner as this command uses it: a thin adapter around ``peftkern.backends.triton.tune``, which may be absent.

The table is the user's cache of ``PEFTKERN_CACHE``, which a worker sets to the folder of the results: it comes back
with them, and the parts after this one select by it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import time
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import BF16, F32, key_of
from benchmarks.gpu.task import REFUSED, Result, Task
from benchmarks.linear import Cell
from peftkern.ops import dispatch

_COMMAND = "peftkern.backends.triton.tune.command"
_MINUTES = 0.3  # that a layer at one M may take, both directions
_LIMIT = 120.0
_ROWS = (8192, 2048, 4096, 16, 16384, 1024, 1, 256, 64, 4)


def tasks(bench: Bench) -> list[Task]:
    """One task a layer, M and adapter dtype, in order of value."""
    plan = bench.plan
    rows = [M for M in _ROWS if M in plan.rows]
    cells = [plan.cell(layer, M, adapter=adapter) for M in rows for adapter in (BF16, F32) for layer in plan.layers]
    return [
        Task(f"tune {key_of(cell)}", functools.partial(tune_shapes, [cell], _MINUTES), _LIMIT) for cell in cells
    ]  # fmt: skip


def tune_shapes(shapes: list[Cell], minutes: float) -> Result:
    """Measure some shapes, which differ in K and N alone, for at most so many minutes and merge them into the cache.

    The one place that knows the tuner's interface: its command's own options, and the JSON that it returns.
    """
    try:
        command = importlib.import_module(_COMMAND)
    except ModuleNotFoundError as error:
        return {"status": REFUSED, "error": f"this tree has no tuner, so the estimate chooses: {error}"}
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.add_options(parser)
    first = shapes[0]
    words = ["--json", "--minutes", f"{minutes:g}", "--rows", str(first.M), "--rank", str(first.r)]
    words += ["--dropout", f"{first.p:g}", "--adapters", "base" if first.adapter_dtype == first.dtype else "fp32"]
    words += [word for cell in shapes for word in ("--shape", f"{cell.K}x{cell.N}")]
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        return {"status": REFUSED, "error": "tuning measures on a GPU, and there is none"}
    begin = time.monotonic()
    triton, reference = (dispatch.backend_named(name) for name in ("triton", "reference"))
    said: Any = command.run(options, reference, triton.unavailable())
    torch.cuda.synchronize()
    return {"seconds": round(time.monotonic() - begin, 1), "found": json.loads(said)}
