"""One linear, forward, backward and both, in every variant, as ratios to the bare frozen linear.

    python -m benchmarks.products [--shape llama3-8b.qo] [--rows 2048] [--dtype bf16] [--p 0.05] [--quick]

Without --shape a CPU runs SmolLM2's layers, two of Llama-3-8B and an odd one, a GPU all of them; without --rows a CPU
takes the most rows that stay within --max-flops. Each variant is checked against fp64 before it is timed. Beside the
ratios to the frozen linear stands the one to the fastest other variant, round by round, with the interval in which its
median lies with 99 % confidence (the sign test's: eight rounds at least). What is slower than that other by more than
3 % with that confidence is listed at the end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, linear, record
from benchmarks.linear import Cell
from peftkern.testing import problems

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PHASES = ("forward", "backward", "forward+backward")
CPU_SHAPES = (
    *(layer.name for layer in problems.LAYERS if layer.name.startswith("smollm2")),
    "llama3-8b.qo",
    "llama3-8b.kv",
    "odd",
)
GPU_ROWS = (16, 256, 2048, 8192)
CPU_MAX_ROWS = 1024
CONFIDENCE = 0.99
ALLOWED = 1.03  # of the fastest other variant's time


class _Variant:
    """One variant of one cell; keeps the graph that a timed ``backward`` consumes."""

    def __init__(self, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> None:
        self.forward, self.inputs, self.dy = forward, inputs, dy
        self.y: Tensor | None = None

    def prepare(self) -> None:
        """Forward, untimed."""
        self.y = self.forward()

    def backward(self) -> None:
        """Backward of what ``prepare`` built."""
        assert self.y is not None
        torch.autograd.grad(self.y, self.inputs, self.dy)
        self.y = None

    def both(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.forward(), self.inputs, self.dy)

    def case(self, name: str, phase: str, check: Callable[[], str | None]) -> harness.Case:
        """This variant's case in one phase."""
        run = {"forward": self.forward, "backward": self.backward, "forward+backward": self.both}[phase]
        return harness.Case(name, run, check, self.prepare if phase == "backward" else None)


def measure_variants(
    cell: Cell,
    variants: Mapping[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]],
    dy: Tensor,
    check: Callable[[str], str | None],
    rounds: int,
) -> list[dict[str, Any]]:
    """Time each phase of the variants; one row per phase and variant.

    Args: variants: name -> (forward, what backward differentiates in); check: name -> why it is wrong, or None.
    Raises: WrongResult where a variant is wrong.
    """
    reasons = {name: check(name) for name in variants}
    rows = []
    for phase in PHASES:
        cases = [
            _Variant(forward, inputs, dy).case(name, phase, lambda name=name: reasons[name])
            for name, (forward, inputs) in variants.items()
        ]
        timings = harness.measure(cases, rounds, label=f"{cell.title}, {phase}")
        rows += [row(cell, phase, timing) | _against_others(timing, timings) for timing in timings]
    return rows


def _against_others(own: harness.Timing, timings: Sequence[harness.Timing]) -> dict[str, Any]:
    """A variant beside the fastest that is neither itself nor the first one, the frozen linear; empty without one."""
    others = [timing for timing in timings[1:] if timing is not own]
    if not others:
        return {"other": None, "ratio_other": None, "low": None, "high": None}
    other = min(others, key=lambda timing: timing.median)
    ratios = own.ratios(other)
    low, high = harness.median_interval(ratios, CONFIDENCE) or (None, None)
    return {"other": other.name, "ratio_other": statistics.median(ratios), "low": low, "high": high}


def slower(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The cells and phases in which peftkern is slower than the fastest other by more than is allowed, for sure."""
    return [
        f"{row['layer']} M={row['M']} {row['phase']}: {row['ratio_other']:.2f}x of {row['other']}"
        for row in rows
        if row["name"] == "peftkern" and row["low"] is not None and row["low"] > ALLOWED
    ]


def measure_cell(cell: Cell, names: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Check all variants of a cell, then time forward, backward and both.

    Raises: WrongResult where a variant is wrong.
    """
    o = linear.operands(cell)
    functions = linear.step_functions(cell, o, names)
    variants = {name: (call, (o.x,) if name == "frozen" else (o.x, o.A, o.B)) for name, call in functions.items()}
    return measure_variants(cell, variants, o.dy, linear.Checker(cell, o).check, rounds)


def row(cell: Cell, phase: str, timing: harness.Timing) -> dict[str, Any]:
    """What is written of one variant in one phase."""
    figures = timing.to_dict()
    samples = figures.pop("samples")
    about = {"layer": cell.layer, "M": cell.M, "K": cell.K, "N": cell.N, "r": cell.r, "p": cell.p}
    dtypes = {"dtype": str(cell.dtype)[6:], "adapter_dtype": str(cell.adapter_dtype)[6:]}
    return (
        about
        | dtypes
        | {"phase": phase}
        | figures
        | {"arithmetic": cell.arithmetic_ratio(phase), "rounds": len(samples)}
    )


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The ratios of one cell: a line per phase, a column per variant (median, and quartiles for peftkern)."""
    lines = []
    for phase in PHASES:
        found = {row["name"]: row for row in rows if row["phase"] == phase}
        line = {"phase": phase, "frozen ms": f"{found['frozen']['median'] * 1e3:.3f}"}
        line |= {name: f"{row['ratio']:.2f}x" for name, row in found.items() if name != "frozen"}
        own = found["peftkern"]
        line |= {
            "(quartiles)": f"{own['ratio_q1']:.2f}-{own['ratio_q3']:.2f}",
            "(fastest)": f"{own['ratio_best']:.2f}x",
            "of best other": f"{own['ratio_other']:.2f}x of {own['other']}",
            f"({CONFIDENCE:.0%})": "" if own["low"] is None else f"{own['low']:.2f}-{own['high']:.2f}",
        }
        lines.append(line | {"by arithmetic": f"{own['arithmetic']:.3f}x"})
    return record.table(lines, tuple(lines[0])[1:])


def cells(options: argparse.Namespace, device: str) -> list[Cell]:
    """The cells that the options choose on this device."""
    on_cpu = device == "cpu"
    everything = CPU_SHAPES if on_cpu else tuple(layer.name for layer in problems.LAYERS)
    shapes = options.shape or (CPU_SHAPES[1:3] if options.quick else everything)
    adapter_dtype = torch.float32 if options.adapter == "fp32" else DTYPES[options.dtype]
    found = []
    for layer in map(problems.layer, shapes):
        limit = options.max_flops / (2 * layer.K * layer.N) if options.max_flops else float("inf")
        largest = max((M for M in problems.ROWS if M <= min(limit, CPU_MAX_ROWS)), default=1)
        for M in options.rows or ([largest] if on_cpu else GPU_ROWS):
            if limit >= M:
                found.append(
                    Cell(
                        layer.name,
                        M,
                        layer.K,
                        layer.N,
                        options.r,
                        options.p,
                        DTYPES[options.dtype],
                        adapter_dtype,
                        device,
                    )
                )
    return found


def parser(name: str, doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that products and layer share."""
    found = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=(doc or "").splitlines()[0])
    found.add_argument("--shape", action="append", help="a layer of peftkern.testing.problems, repeatable")
    found.add_argument("--rows", type=int, action="append", help="M, repeatable")
    found.add_argument("--r", type=int, default=16, help="rank")
    found.add_argument("--p", type=float, default=0.05, help="dropout")
    found.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and of the frozen weight")
    found.add_argument("--adapter", choices=("fp32", "base"), default="fp32", help="dtype of A and B")
    found.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    found.add_argument("--quick", action="store_true", help="two small layers, five rounds, nothing compiled")
    limit = 2.0 * problems.CPU_LIMIT if not torch.cuda.is_available() else 0.0
    found.add_argument("--max-flops", type=float, default=limit, help="of one frozen product; 0: no limit")
    found.add_argument("--out", type=Path, default=Path("out"), help="folder of the record")
    return found


def run(
    name: str, options: argparse.Namespace, measure: Callable[..., Any], names: tuple[str, ...], title: str
) -> None:
    """Measure all cells, print each, write ``name``.json, .csv and .png."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = record.machine()
    record.print_machine(machine)
    if options.quick:
        options.rounds = min(options.rounds, 5)
        names = tuple(variant for variant in names if "compiled" not in variant)
    rows = []
    for cell in cells(options, device):
        found = measure(cell, names, options.rounds)
        rows += found
        print(f"{cell.title}, r={cell.r}, p={cell.p:g}, {options.dtype} base, {options.adapter} adapter")
        print(f"{text(found)}\n", flush=True)
        torch.compiler.reset()
    if not rows:
        raise SystemExit("no cell within --max-flops: choose fewer --rows or a smaller --shape")
    behind = slower(rows)
    print(
        f"slower than the fastest other by more than {ALLOWED - 1:.0%} at {CONFIDENCE:.0%} confidence: "
        f"{len(behind)} of {len(rows) // len(names)}" + "".join(f"\n  {line}" for line in behind)
    )
    machine["load_average_at_end"] = record.load_average()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["phase"] == "forward+backward":
            groups.setdefault(f"{row['layer']}\n{row['K']}->{row['N']}, M={row['M']}", []).append(row)
    figure = record.ratio_figure(groups, title.format(**vars(options)), "time / time of the frozen linear")
    record.save(options.out, name, {"machine": machine, "rows": rows}, rows, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen cells."""
    options = parser("products", __doc__, rounds=25).parse_args(arguments)
    title = "One LoRA linear, forward+backward: r={r}, p={p:g}, {dtype} base, {adapter} adapter"
    run("products", options, measure_cell, linear.VARIANTS, title)


if __name__ == "__main__":
    main()
