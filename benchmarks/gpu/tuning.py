"""The tuner as this command uses it: a thin adapter around ``peftkern.backends.triton.tune``.

The table is the user's cache of ``PEFTKERN_CACHE``, which a worker sets to the folder of the results: it comes back
with them, and the parts after this one select by it.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import BF16, F32, about, key_of
from benchmarks.gpu.task import CRASH, REFUSED, Result, Task, without_folders
from benchmarks.linear import Cell
from peftkern.backends.triton import tiles
from peftkern.backends.triton.tiles import Choice
from peftkern.backends.triton.tune import command, search
from peftkern.ops import dispatch

_MINUTES = 0.3  # that a layer at one M may take, both directions
_LIMIT = 60.0
_ROWS = (8192, 2048, 4096, 16, 16384, 1024, 1, 256, 64, 4)


def tasks(bench: Bench) -> list[Task]:
    """One task a layer, M and adapter dtype, in order of value."""
    plan = bench.plan
    rows = [M for M in _ROWS if M in plan.rows]
    cells = [plan.cell(layer, M, adapter=adapter) for M in rows for adapter in (BF16, F32) for layer in plan.layers]
    return [
        Task(f"tune {key_of(cell)}", functools.partial(tune_shapes, [cell], _MINUTES), _LIMIT, about(cell))
        for cell in cells
    ]


def tune_shapes(shapes: list[Cell], minutes: float) -> Result:
    """Measure some shapes, which differ in K and N alone, for at most so many minutes and merge them into the cache.

    The one place that knows the tuner's interface: its command's own options, and the JSON that it returns.
    """
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
    try:
        said: Any = command.run(options, reference, triton.unavailable())
    except search.DeviceLost as error:
        failed = None if error.choice is None else _failed(error.choice, first)
        return {"status": CRASH, "error": without_folders(str(error)), "failed": failed}
    torch.cuda.synchronize()
    found = json.loads(said)
    whole = len(found) == 2 * len(shapes) and all(map(_whole, found))  # both directions
    return {"seconds": round(time.monotonic() - begin, 1), "whole": whole, "found": found}


def _whole(found: Mapping[str, Any]) -> bool:
    """Whether every legal choice was timed, or is out for a reason, and not for want of time to compile it."""
    return found["winner"] is not None and len(found["seconds"].keys() | found["rejected"].keys()) >= found["legal"]


def _failed(choice: Choice, cell: Cell) -> dict[str, Any]:
    """What broke the device, as ``backend.exclusions`` reads it: no later process runs it."""
    dtype = str(cell.dtype).removeprefix("torch.")
    return {"schedule": choice.schedule, "dtype": dtype, "padded": tiles.padded(cell.r), "tile": str(choice.tile)}


def incomplete(results: Mapping[str, Result]) -> list[str]:
    """The cells whose winners were found among some of the choices alone: those are no measured order."""
    return [key for key, result in results.items() if not result.get("whole", False)]


def spoken(results: Mapping[str, Result]) -> str:
    """One line: in how many cells every choice was timed."""
    partly = incomplete(results)
    line = f"tuned with every choice timed: {len(results) - len(partly)} of {len(results)} cells"
    return line + (f"; the table is NOT a measured one: {'; '.join(partly[:3])} ..." if partly else "")
