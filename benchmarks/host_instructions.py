"""Instructions of one layer's forward and backward, counted by valgrind's callgrind: a figure that no load disturbs.

A process of its own a variant, which counts nothing until everything is loaded, compiled and called; then it is asked
for the count of N calls and of 2 N calls, and their difference is that of N. Valgrind knows no AVX-512.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

CALLS = 20
VARIANTS = (("CPU", "linear"), ("CPU", "peft"), ("CPU", "peftkern"), ("sm_90", "peft"), ("sm_90", "peftkern"))
_ROOT = Path(__file__).resolve().parent.parent
_REQUESTS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void dump(void) { CALLGRIND_DUMP_STATS; }
"""


def count_in_this_process(place: str, name: str, cell: tuple[int, int, str, int, float], requests: Path) -> None:
    """Under callgrind: a part of its output for N calls, and one for 2 N."""
    import torch

    from benchmarks import host

    torch.set_num_threads(1)
    rows, columns, dtype, r, p = cell
    compared = host.variants(rows, columns, host.DTYPES[dtype], r, p)[place]
    variant = next(one for one in compared if one.name == name)
    callgrind = ctypes.CDLL(str(requests))
    with variant.around("forward+backward"):
        for _ in range(3):
            variant.both()
        callgrind.begin()
        variant.both()  # what callgrind translates and Python specialises once more
        callgrind.dump()
        for calls in (CALLS, 2 * CALLS):
            for _ in range(calls):
                variant.both()
            callgrind.dump()


def count(place: str, name: str, cell: tuple[int, int, str, int, float], folder: Path) -> float:
    """Instructions of one forward and backward.

    Raises: subprocess.CalledProcessError where valgrind or the process fails.
    """
    library = folder / "requests.so"
    if not library.exists():
        source = folder / "requests.c"
        source.write_text(_REQUESTS)
        subprocess.run([os.environ.get("CC") or "cc", "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    program = (
        "from pathlib import Path; from benchmarks import host_instructions as counter; "
        f"counter.count_in_this_process({place!r}, {name!r}, {cell!r}, Path({str(library)!r}))"
    )
    out = folder / f"{place}_{name}"
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    subprocess.run([*valgrind, sys.executable, "-W", "ignore", "-c", program], cwd=_ROOT, env=environment, check=True,
                   capture_output=True)  # fmt: skip
    few, many = (_total(Path(f"{out}.{part}")) for part in (2, 3))
    return (many - few) / CALLS


def _total(path: Path) -> int:
    """The instructions in one part of callgrind's output."""
    found = re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"callgrind has left no count in {path.name}")
    return int(found.group(1))


def measure_cell(rows: int, columns: int, dtype: str, r: int, p: float) -> list[dict[str, Any]]:
    """One row a variant; of those that are compared in front of a GPU, PEFT's works on one element."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed")
    from benchmarks import host

    cell, found = (rows, columns, dtype, r, p), []
    with tempfile.TemporaryDirectory() as scratch:
        for place, name in VARIANTS:
            if place == "CPU" and rows * columns * columns > host.MOST:
                continue
            instructions = round(count(place, name, cell, Path(scratch)))
            about = {"place": place, "rows": rows, "columns": columns, "dtype": dtype, "r": r, "p": p, "name": name}
            found.append(about | {"instructions": instructions})
    return found


def text(rows: Sequence[dict[str, Any]]) -> str:
    """A line a variant, with the ratio to PEFT's in the same place."""
    peft = {row["place"]: row["instructions"] for row in rows if row["name"] == "peft"}
    lines = [
        {"in front of": row["place"], "name": row["name"], "instructions": f"{row['instructions']:,}",
         "/ peft": f"{row['instructions'] / peft[row['place']]:.2f}x"}
        for row in rows
    ]  # fmt: skip
    return record.table(lines, ("instructions", "/ peft"))
