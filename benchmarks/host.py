"""What one layer costs the host: nn.Linear, PEFT's LoRA layer, ours; on a CPU, and in front of a GPU that is not there.

    python -m benchmarks.host [--rows 1] [--columns 576] [--dtype bf16] [--rounds 15] [--instructions] [--out out]

On the CPU all three work on the same tensors, where the product of the rows is no larger than 2^30 multiplications. In
front of a GPU our layer launches its kernels with Triton's own launcher into the tests' stand-in for the driver's
library, where nothing runs; PEFT's and the linear's operators are called on tensors of one element, which is about
what launching them costs. These are times of the host, and say nothing of any GPU's.

Phases: "decode" is forward without gradients; "forward" keeps what backward reads. "cold": what lies in the caches is
driven out before every run. "launches": kernels of ours, and of the others the operators that compute something.
With --instructions, those of a forward and backward are counted instead, by callgrind (``host_instructions``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness, host_instructions, packages, quiet, record
from benchmarks.linear import Cell

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS, COLUMNS = (1, 2048), (64, 576, 1024, 4096)
PHASES = ("decode", "forward", "backward", "forward+backward")
ARCH = "sm_90"
MOST = 2**30  # multiplications of a product that the CPU is asked for
_ROOT = Path(__file__).resolve().parent.parent


def stand_in() -> Any:
    """The tests' stand-in for a GPU. Raises: ImportError where Triton is missing."""
    folder = str(_ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    import stand_in

    return stand_in


@dataclass
class Variant:
    """One layer with its input, and what is timed of it; keeps the graph that ``backward`` consumes."""

    name: str
    module: nn.Module
    x: Tensor
    dy: Tensor
    on_gpu: bool = False
    y: Tensor | None = None

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """What backward differentiates in."""
        return (self.x, *(one for one in self.module.parameters() if one.requires_grad))

    def forward(self) -> None:
        """Forward, of which the graph is kept."""
        self.y = self.module(self.x)

    def backward(self) -> None:
        """Backward of what ``forward`` built."""
        y, self.y = self.y, None
        torch.autograd.grad(y, self.inputs, self.dy)

    def both(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.module(self.x), self.inputs, self.dy)

    @contextlib.contextmanager
    def around(self, phase: str) -> Iterator[Any]:
        """Where a sample is taken: with the stand-in in place, and everything compiled, loaded and looked up."""
        with stand_in().gpu(ARCH) if self.on_gpu else contextlib.nullcontext() as gpu:
            self.both()
            with torch.no_grad() if phase == "decode" else contextlib.nullcontext():
                self.module(self.x)
                yield gpu

    def run_of(self, phase: str) -> Callable[[], object]:
        """What is timed."""
        if phase == "decode":
            return lambda: self.module(self.x)
        return {"forward": self.forward, "backward": self.backward, "forward+backward": self.both}[phase]

    def case(self, phase: str, evict: Callable[[], object] | None) -> harness.Case:
        """The case of one phase; ``evict`` runs before every run."""
        steps = [self.forward] if phase == "backward" else []
        steps += [evict] if evict is not None else []
        prepare = (lambda: [step() for step in steps]) if steps else None
        return harness.Case(self.name, self.run_of(phase), lambda: None, prepare, lambda: self.around(phase))

    def launches(self, phase: str) -> int:
        """Of one run."""
        with self.around(phase) as gpu:
            if phase == "backward":
                self.forward()
            if gpu is None:
                with _Operators() as counted:
                    self.run_of(phase)()
                return counted.count
            before = gpu.count
            self.run_of(phase)()
            return gpu.count - before


class _Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += not function.is_view and function is not torch.ops.aten.detach.default
        return function(*arguments, **(keywords or {}))


def variants(rows: int, columns: int, dtype: torch.dtype, r: int, p: float) -> dict[str, list[Variant]]:
    """What is compared, PEFT first: on the CPU (nothing where that takes too long), and in front of a GPU.

    Raises: WrongResult where our layer is wrong on the CPU.
    """
    from benchmarks.layer import Layers

    layers = Layers(Cell("host", rows, columns, columns, r, p, dtype, torch.float32, "cpu"))
    one = Layers(Cell("host", 1, 1, 1, 1, p, dtype, torch.float32, "cpu"))

    def variant(name: str, of: Layers, which: str, on_gpu: bool = False) -> Variant:
        return Variant(name, of.modules[which], of.o.x, of.o.dy, on_gpu)

    found = {}
    if rows * columns * columns <= MOST:
        harness.check([harness.Case("peftkern", lambda: None, lambda: layers.check("peftkern"))])
        names = (("peft", "peft"), ("linear", "frozen"), ("peftkern", "peftkern"))
        found["CPU"] = [variant(name, layers, which) for name, which in names]
    found[ARCH] = [
        variant("peft", one, "peft"), variant("linear", one, "frozen"),
        variant("peftkern", layers, "peftkern", on_gpu=True),
    ]  # fmt: skip
    return found


@functools.cache
def _much() -> Tensor:
    """Twice what the last cache holds."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        kib = int(size.removesuffix("K"))
    except (OSError, ValueError):
        kib = 32 * 1024
    return torch.ones(2 * kib * 1024 // 4)


def evict() -> None:
    """Drive what was used out of the caches, by reading: nothing is left to be written back."""
    _much().sum()


def measure_cell(rows: int, columns: int, dtype: str, r: int, p: float, rounds: int) -> list[dict[str, Any]]:
    """One row for each place, state of the caches, phase and variant."""
    found = []
    for place, compared in variants(rows, columns, DTYPES[dtype], r, p).items():
        for phase, cold in itertools.product(PHASES, (False, True)):
            cases = [one.case(phase, evict if cold else None) for one in compared]
            label = f"{place} {rows}x{columns} {dtype} {phase}{' cold' if cold else ''}"
            timings = harness.measure(cases, rounds, warmup=2, label=label, repeat=not cold)
            linear = timings[1].median
            for one, timing in zip(compared, timings, strict=True):
                figures = timing.to_dict()
                del figures["samples"]
                found.append(
                    {"place": place, "rows": rows, "columns": columns, "dtype": dtype, "r": r, "p": p, "phase": phase,
                     "caches": "cold" if cold else "warm", "name": one.name}
                    | figures
                    | {"over_linear": timing.median - linear, "load": (record.load_average() or [None])[0],
                       "launches": one.launches(phase) if place != "CPU" else None}
                )  # fmt: skip
    return found


def text(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each place, phase and state: microseconds, PEFT's ratio, and what is above the linear."""
    lines = []
    for (place, phase, caches), group in itertools.groupby(
        rows, lambda row: (row["place"], row["phase"], row["caches"])
    ):
        found = {row["name"]: row for row in group}
        own = found["peftkern"]
        line = {"in front of": place, "phase": phase, "caches": caches}
        line |= {f"{name} us": f"{found[name]['median'] * 1e6:.1f}" for name in ("linear", "peft", "peftkern")}
        line |= {
            "/ peft": f"{own['ratio']:.2f}x", "(quartiles)": f"{own['ratio_q1']:.2f}-{own['ratio_q3']:.2f}",
            "(fastest)": f"{own['ratio_best']:.2f}x",
            "over linear us": f"{own['over_linear'] * 1e6:.1f}",
        }  # fmt: skip
        counts = [found[name]["launches"] for name in ("linear", "peft", "peftkern")]
        lines.append(line | {"launches": "" if None in counts else " / ".join(map(str, counts))})
    return record.table(lines, tuple(lines[0])[3:])


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="benchmarks.host", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--rows", type=int, action="append", help="M, repeatable")
    found.add_argument("--columns", type=int, action="append", help="K and N, repeatable")
    found.add_argument("--dtype", choices=DTYPES, action="append", help="of x and the frozen weight, repeatable")
    found.add_argument("--r", type=int, default=16, help="rank")
    found.add_argument("--p", type=float, default=0.0, help="dropout")
    found.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    found.add_argument("--threads", type=int, default=1, help="torch's")
    found.add_argument("--instructions", action="store_true", help="count them instead (a minute a variant)")
    found.add_argument("--out", type=Path, default=Path("out"), help="folder of the record")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen cells, print each, write host.json and .csv."""
    packages.require("peft", "triton")
    options = parser().parse_args(arguments)
    if torch.cuda.is_available():
        raise SystemExit("there is a GPU here: its driver cannot be stood in for")
    quiet.others()
    torch.set_num_threads(options.threads)
    machine = record.machine()
    record.print_machine(machine)
    every = ((1,), (64,), ("fp32",)) if options.instructions else (ROWS, COLUMNS, ("fp32", "bf16"))
    asked = options.rows or every[0], options.columns or every[1], options.dtype or every[2]
    rows = []
    for M, columns, dtype in itertools.product(*asked):
        if options.instructions:
            found = host_instructions.measure_cell(M, columns, dtype, options.r, options.p)
            shown = host_instructions.text(found)
        else:
            found = measure_cell(M, columns, dtype, options.r, options.p, options.rounds)
            shown = text(found)
        rows += found
        print(f"{M} rows, {columns} columns, {dtype}, r={options.r}, p={options.p:g}, load {record.load_average()}")
        print(f"{shown}\n", flush=True)
    machine["load_average_at_end"] = record.load_average()
    name = "host_instructions" if options.instructions else "host"
    record.save(options.out, name, {"machine": machine, "rows": rows}, rows, None)


if __name__ == "__main__":
    main()
