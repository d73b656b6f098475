"""Instructions of the C++ kernels, counted by valgrind's callgrind: a figure that no busy machine disturbs.

    python -m benchmarks.instructions [--set avx2] [--shape smollm2-135m.qo] [--rows 96] [--p 0.05]

Compiles the test driver with one instruction set's kernels and runs forward and backward of one linear once, on one
thread, with the product with the frozen weight inside. Valgrind knows AVX2 but not AVX-512. The figure to compare is
instructions over vector multiplications: M K N / width for y, as many for dx.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

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


def count(driver: Path, name: str, phase: str, arguments: Sequence[str], folder: Path) -> int:
    """Instructions of one call of ``phase`` ("Forward" or "Backward").

    Raises: subprocess.CalledProcessError where valgrind fails.
    """
    function = f"peftkern::{name}::{phase.lower()}(peftkern::{phase} const&)"
    command = ["valgrind", "--tool=callgrind", f"--toggle-collect={function}", f"--callgrind-out-file={folder / 'out'}"]
    done = subprocess.run([*command, driver, *arguments], capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None  # valgrind always says so
    return int(found.group(1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="avx2", help="instruction set")
    parser.add_argument("--shape", default="smollm2-135m.qo", help="a layer of peftkern.testing.problems")
    parser.add_argument("--rows", type=int, default=96, help="M")
    parser.add_argument("--r", type=int, default=16, help="rank")
    parser.add_argument("--p", type=float, default=0.05, help="dropout")
    options = parser.parse_args(arguments)
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed")
    layer = problems.layer(options.shape)
    floor = options.rows * layer.K * layer.N / SETS[options.set][1]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        driver = build(options.set, Path(scratch))
        for dtype in ("fp32", "bf16"):
            for phase in ("Forward", "Backward"):
                problem = [options.rows, layer.K, layer.N, options.r, dtype, options.p]
                found = count(driver, options.set, phase, [str(part) for part in problem], Path(scratch))
                rows.append(
                    {
                        "dtype": dtype,
                        "phase": phase.lower(),
                        "instructions": f"{found:,}",
                        "x floor": f"{found / floor:.3f}",
                    }
                )
    print(f"{layer.name} {layer.K}->{layer.N}, M={options.rows}, r={options.r}, p={options.p:g}, {options.set}")
    print(record.table(rows, ("instructions", "x floor")))


if __name__ == "__main__":
    main()
