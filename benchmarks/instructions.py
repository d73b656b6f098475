"""Instructions of the C++ kernels, counted by valgrind's callgrind: a figure that no busy machine disturbs.

    python -m benchmarks.instructions [--set avx2] [--shape smollm2-135m.qo] [--rows 96] [--p 0.05] [--out out]

Compiles the test driver with one instruction set's kernels and runs forward and backward of one linear once, on one
thread, the product with the frozen weight inside; then forward of 1 and 16 rows (decode), and the dropout mask alone.
Valgrind knows AVX2 but not AVX-512. The figure to compare is instructions over vector multiplications, M K N / width
for y and as many for dx; for the mask, over M K / width.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from peftkern.testing import problems

SETS = {"baseline": ([], 4), "avx2": (["-mavx2", "-mfma", "-mf16c"], 8)}  # flags of setup.py, fp32 lanes
_ROOT = Path(__file__).resolve().parent.parent


def build(name: str, folder: Path) -> Path:
    """The driver of tests/cpp with the kernels of one instruction set.

    Raises: subprocess.CalledProcessError where it does not compile.
    """
    flags, _ = SETS[name]
    common = ["g++", "-std=c++17", "-O3", "-fno-math-errno", "-w", f"-DSET={name}"]
    objects = []
    for source, own in (
        ("tests/cpp/small_cases.cpp", []),
        ("csrc/cpu/parallel.cpp", []),
        (f"csrc/cpu/isa_{name}.cpp", flags),
    ):
        objects.append(folder / (Path(source).stem + ".o"))
        subprocess.run([*common, *own, "-c", source, "-o", objects[-1]], cwd=_ROOT, check=True)
    driver = folder / "driver"
    subprocess.run(["g++", *objects, "-o", driver, "-ldl", "-pthread"], check=True)
    return driver


def count(driver: Path, function: str, arguments: Sequence[object], folder: Path) -> int:
    """Instructions of the calls of ``function`` in one run of the driver.

    Raises: subprocess.CalledProcessError where valgrind fails.
    """
    command = ["valgrind", "--tool=callgrind", f"--toggle-collect={function}", f"--callgrind-out-file={folder / 'out'}"]
    done = subprocess.run([*command, driver, *map(str, arguments)], capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None  # valgrind always says so
    return int(found.group(1))


def measure(
    driver: Path, name: str, problem: tuple[int, int, int, int], p: float, folder: Path
) -> list[dict[str, Any]]:
    """One row for each dtype and kernel, of M, K, N, r = ``problem``, and one for the mask."""
    M, K, N, r = problem
    rows = []

    def add(kernel: str, function: str, rows_of_x: int, dtype: str, p: float, per: int) -> None:
        found = count(driver, f"peftkern::{name}::{function}", [rows_of_x, K, N, r, dtype, p], folder)
        vectors = rows_of_x * per / SETS[name][1]
        about = {"kernel": kernel, "dtype": dtype, "M": rows_of_x, "K": K, "N": N, "r": r, "p": p}
        rows.append(about | {"instructions": found, "per vector": round(found / vectors, 3)})

    for dtype in ("fp32", "bf16"):
        for phase, call in (("forward", "Forwards"), ("backward", "Backward")):
            add(phase, f"{phase}(peftkern::{call} const&)", M, dtype, p, K * N)
        for handful in (1, 16):
            add("decode", "forward(peftkern::Forwards const&)", handful, dtype, 0.0, K * N)
    if p:
        add("mask", "keep_bits(peftkern::Dropout const&, long, long, unsigned long*)", M, "fp32", p, K)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, write instructions.json and .csv."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="avx2", help="instruction set")
    parser.add_argument("--shape", default="smollm2-135m.qo", help="a layer of peftkern.testing.problems")
    parser.add_argument("--rows", type=int, default=96, help="M")
    parser.add_argument("--r", type=int, default=16, help="rank")
    parser.add_argument("--p", type=float, default=0.05, help="dropout")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the record")
    options = parser.parse_args(arguments)
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed")
    layer = problems.layer(options.shape)
    with tempfile.TemporaryDirectory() as scratch:
        driver = build(options.set, Path(scratch))
        problem = options.rows, layer.K, layer.N, options.r
        rows = measure(driver, options.set, problem, options.p, Path(scratch))
    print(f"{layer.name}, {options.set}")
    print(record.table([row | {"instructions": f"{row['instructions']:,}"} for row in rows], tuple(rows[0])[2:]))
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    about = {"method": "instructions, counted by callgrind", "compiler": compiler, "set": options.set}
    record.save(options.out, "instructions", {"machine": record.machine() | about, "rows": rows}, rows, None)


if __name__ == "__main__":
    main()
