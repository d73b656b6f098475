"""Dense LoRA training on this CPU in one table: at most ten minutes on two cores.

    python -m benchmarks.cpu [--only layers,decode] [--minutes 10] [--name cpu] [--out out] [--quick]

layers   one linear, forward, backward and both, under naive PyTorch and peftkern, over the bare frozen linear
decode   few rows without gradients, over PyTorch's linear on the merged weight; also peftkern without an adapter
ranks    forward, backward and both of one layer at ranks 1 to 512, under naive PyTorch, PEFT and peftkern
steps    a training step of SmolLM2-135M on bases in bf16, fp32 and nf4, over the frozen step (``benchmarks.model``)

Adapters are fp32. Every result is checked against fp64, a training step against one precision up, before it is timed.
Each part has a share of the minutes, and what one leaves goes to those after it; a cell that would not end in its
part's time is not begun, and named at the end. decode and ranks run in what the machine multiplies in hardware first.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern
from benchmarks import harness, layer, linear, model, packages, products, record, smollm2
from benchmarks.linear import SCALING, Cell, Operands
from peftkern.testing import problems
from peftkern.testing.numerics import relative_error

SHARES = {"layers": 0.35, "decode": 0.1, "ranks": 0.15, "steps": 0.4}
COLUMNS = (
    "part", "base", "layer", "M", "K", "N", "r", "p", "phase", "name", "median", "q1", "q3", "ratio", "ratio_q1",
    "ratio_q3", "ratio_best", "arithmetic", "other", "ratio_other", "low", "high", "rounds", "tokens_per_second",
    "saved_mib",
)  # fmt: skip
DECODE_ROWS = (1, 4, 16)
ALONE = "peftkern, no adapter"
STEPS = (("bf16", 0.05), ("fp32", 0.05), ("nf4", 0.05), ("bf16", 0.0), ("fp32", 0.0))
STEP_OVERHEAD = 6  # rounds' worth of time that checks, warm-up and the count of saved bytes take
FORWARDS = 10  # forwards' worth of time that a round of three training steps takes
FEWEST_ROUNDS, MOST_ROUNDS = 3, 12  # of a training step
SLOW_LENGTH = 16  # tokens of a step in bf16 where the machine has no instructions for it
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shapes: tuple[tuple[problems.Layer, int], ...]  # layers and their rows
    columns: tuple[int, ...]  # of square layers in decode
    ranks: tuple[int, ...]  # the most telling first
    rounds: int
    length: int  # tokens of a training step


FULL = Sizes(
    (
        *((problems.layer(f"smollm2-135m.{name}"), 1024) for name in ("qo", "kv", "up", "down")),
        (problems.layer("llama3-8b.qo"), 64),
        (problems.layer("llama3-8b.kv"), 256),
    ),
    (576, 1024, 2048, 4096),
    tuple(sorted(problems.RANKS, key=lambda r: problems.RANKS.index(r) % 3)),
    15,
    512,
)
QUICK = Sizes(((problems.layer("small.65"), 24),), (64,), (1, 16), 2, 16)


class Part(NamedTuple):
    """One table.

    ``cells``: a title, and a call that measures it in about the seconds that it is given and returns rows, none where
    they are too few; ``keys``: the columns of a row that say what was measured; ``shown``: heading -> phase, variant,
    what is shown of its row.
    """

    cells: Sequence[tuple[str, Callable[[float], list[Row]]]]
    keys: tuple[str, ...]
    shown: dict[str, tuple[str, str, Callable[[Row], str]]]

    def text(self, rows: Sequence[Row]) -> str:
        """The table: a line for each cell."""
        found: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
        for row in rows:
            found.setdefault(tuple(row[key] for key in self.keys), {})[row["phase"], row["name"]] = row
        lines = [
            dict(zip(self.keys, map(str, key), strict=True))
            | {heading: show(cell[phase, name]) for heading, (phase, name, show) in self.shown.items()}
            for key, cell in found.items()
        ]
        return record.table(lines, tuple(lines[0])[1:])


@dataclass
class Clock:
    """Where the time of each part ends; what was not begun for want of it."""

    minutes: float
    parts: Sequence[str]
    start: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    def end(self, part: str) -> float:
        """In seconds of ``time.monotonic``."""
        before = self.parts[: self.parts.index(part) + 1]
        share = sum(SHARES[name] for name in before) / sum(SHARES[name] for name in self.parts)
        return self.start + 60 * self.minutes * share

    def run(self, name: str, part: Part) -> list[Row]:
        """Measure the cells that end in time if they take as long as the one before; each is given the seconds left."""
        rows: list[Row] = []
        last = 0.0
        for title, measure in part.cells:
            begun = time.monotonic()
            left = self.end(name) - begun
            found = measure(left) if last < left else []
            if not found:
                self.left_out.append(f"{name}: {title}")
                continue
            rows += [{"part": name, **row} for row in found]
            last = time.monotonic() - begun
            torch.compiler.reset()
            gc.collect()
        return rows


def _bases() -> tuple[str, ...]:
    """What the machine multiplies in hardware comes first."""
    return ("bf16", "fp32") if smollm2.native_dtype("cpu") == torch.bfloat16 else ("fp32", "bf16")


def _slow(base: str) -> bool:
    """Whether PyTorch's products are: of 16 bits without the instructions for them."""
    return base == "bf16" and _bases()[0] == "fp32"


def _rounds(base: str, rounds: int) -> int:
    return min(rounds, model.SLOW_ROUNDS) if _slow(base) else rounds


def _cell(where: problems.Layer, M: int, r: int, p: float, base: str) -> Cell:
    return Cell(where.name, M, where.K, where.N, r, p, products.DTYPES[base], torch.float32, "cpu")


def layers(sizes: Sizes) -> Part:
    """Both bases, with dropout and without, at rank 16."""

    def measure(cell: Cell, base: str) -> list[Row]:
        rows = products.measure_cell(cell, ("frozen", "naive", "peftkern"), _rounds(base, sizes.rounds))
        return [{"base": base, **row} for row in rows]

    cells = []
    for base in _bases():
        for p in (0.05, 0.0):
            for where, M in sizes.shapes:
                cell = _cell(where, M, 16, p, base)
                cells.append((f"{base}, p={p:g}, {cell.title}", lambda _, c=cell, b=base: measure(c, b)))
    shown = {"frozen ms": ("forward", "frozen", _milliseconds), **_phases("naive", "peftkern")}
    return Part(cells, ("base", "p", "K", "N", "M"), shown)


def decode(sizes: Sizes) -> Part:
    """Square layers, without dropout; over F.linear on the weight with the update merged into it."""

    def measure(cell: Cell, base: str) -> list[Row]:
        cases = _decode_cases(cell, linear.operands(cell))
        timings = harness.measure(cases, _rounds(base, 2 * sizes.rounds), label=cell.title)
        return [{"base": base, **products.row(cell, "forward", timing), "phase": "decode"} for timing in timings]

    cells = []
    for base in _bases():
        for size in sizes.columns:
            for M in DECODE_ROWS:
                cell = _cell(problems.Layer("square", size, size), M, 16, 0.0, base)
                cells.append((f"{base}, {cell.title}", lambda _, c=cell, b=base: measure(c, b)))
    shown = {name: ("decode", name, _ratio) for name in ("naive", "peftkern", ALONE)}
    return Part(cells, ("base", "K", "N", "M"), {"merged ms": ("decode", "merged", _milliseconds), **shown})


def _decode_cases(cell: Cell, o: Operands) -> list[harness.Case]:
    checker = linear.Checker(cell, o)
    A, B = o.A.detach(), o.B.detach()
    merged = (o.W.float() + SCALING * B @ A).to(o.W.dtype)
    calls: dict[str, Callable[[], Tensor]] = {
        "merged": lambda: F.linear(o.x, merged),
        "naive": lambda: linear.naive(o, lambda x: x),
        "peftkern": lambda: peftkern.lora_linear(o.x, o.W, o.A, o.B, SCALING),
        ALONE: lambda: peftkern.lora_linear(o.x, o.W, A[:0], B[:, :0], SCALING),
    }

    def case(name: str, call: Callable[[], Tensor]) -> harness.Case:
        run = torch.no_grad()(call)
        return harness.Case(name, run, lambda: _off(run(), o) if name == ALONE else checker.judge_output(run()))

    return [case(name, call) for name, call in calls.items()]


@torch.no_grad()
def _off(y: Tensor, o: Operands) -> str | None:
    """Why y is not x W^T, or None: it may have twice the error of PyTorch's product."""
    truth = o.x.double() @ o.W.double().T
    error, allowed = relative_error(y, truth), 2 * relative_error(F.linear(o.x, o.W), truth) + 1e-6
    return None if error <= allowed else f"y has error {error:.2e}, allowed {allowed:.2e}"


def ranks(sizes: Sizes) -> Part:
    """The first of the layers, p=0.05, in what the machine multiplies."""
    (where, M), base = sizes.shapes[0], _bases()[0]

    def measure(cell: Cell) -> list[Row]:
        built = layer.Layers(cell)
        o, checker = built.o, linear.Checker(cell, built.o)
        calls = linear.step_functions(cell, o, ("frozen", "naive", "peftkern"))
        variants = {name: (call, (o.x,) if name == "frozen" else (o.x, o.A, o.B)) for name, call in calls.items()}
        variants["peft"] = (built.call("peft"), built.inputs("peft"))
        check = lambda name: built.check(name) if name == "peft" else checker.check(name)  # noqa: E731
        return [{"base": base, **row} for row in products.measure_variants(cell, variants, o.dy, check, sizes.rounds)]

    cells = [(f"r={r}", lambda _, r=r: measure(_cell(where, M, r, 0.05, base))) for r in sizes.ranks]
    return Part(cells, ("base", "p", "K", "N", "M", "r"), _phases("naive", "peft", "peftkern"))


def steps(sizes: Sizes) -> Part:
    """SmolLM2-135M; a base that the machine does not multiply in hardware comes last, with few tokens."""
    chosen = sorted(STEPS, key=lambda step: _slow(step[0]))
    cells = []
    for i, (base, p) in enumerate(chosen):
        length = min(sizes.length, SLOW_LENGTH) if _slow(base) else sizes.length
        measure = lambda left, b=base, p=p, n=length, i=i: _step(b, p, n, left, len(chosen) - i)  # noqa: E731
        cells.append((f"{base}, p={p:g}", measure))
    shown = {f"{name}, x frozen": ("step", name, _ratio) for name in ("peft", "peftkern")}
    shown |= {f"{name}, tokens/s": ("step", name, _tokens) for name in ("frozen", "peft", "peftkern")}
    return Part(cells, ("base", "p", "M"), shown)


def tokens(length: int) -> Tensor:
    """int64 [1, length] of Shakespeare's."""
    return smollm2.Plays(smollm2.load_tokenizer()).train_batches(1, 1, length)[0]


def _step(base: str, p: float, length: int, left: float, steps: int) -> list[Row]:
    """One training step with as many rounds as fit into its part of the seconds left for ``steps`` of them."""
    ids, bare = tokens(length), model.load(base, "cpu")
    with torch.no_grad():
        bare(input_ids=ids)
        begun = time.monotonic()
        bare(input_ids=ids)
        forward = time.monotonic() - begun
    if not (rounds := _rounds_of_a_step(forward, left, steps)):
        return []
    about = {"base": base, "layer": "SmolLM2-135M", "M": length, "r": 16, "p": p, "phase": "step", "rounds": rounds}
    rows = model.compare(bare, ids, p, rounds)["rows"]
    return [about | row | {"median": row["seconds"], "q1": row["seconds_q1"], "q3": row["seconds_q3"]} for row in rows]


def _rounds_of_a_step(forward: float, left: float, steps: int) -> int:
    """Of a model whose forward takes that long; 0 where the fewest would take longer than what is left."""
    fitting = lambda seconds: int(seconds / (FORWARDS * forward)) - STEP_OVERHEAD  # noqa: E731
    return 0 if fitting(left) < FEWEST_ROUNDS else max(FEWEST_ROUNDS, min(MOST_ROUNDS, fitting(left / steps)))


def _milliseconds(row: Row) -> str:
    return f"{row['median'] * 1e3:.3f}"


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f}x"


def _arithmetic(row: Row) -> str:
    return f"{row['arithmetic']:.3f}x"


def _tokens(row: Row) -> str:
    return f"{row['tokens_per_second']:.0f}"


def _phases(*names: str) -> dict[str, tuple[str, str, Callable[[Row], str]]]:
    """Forward and backward of the variants, beside what arithmetic alone would cost."""
    shown = {}
    for phase, short in (("forward", "fw"), ("backward", "bw")):
        shown |= {f"{short} {name}": (phase, name, _ratio) for name in names}
        shown[f"{short} arithmetic"] = (phase, "peftkern", _arithmetic)
    return shown


def figure(rows: Sequence[Row], title: str) -> Any | None:
    """Bars: layers with dropout, decode of one row and ranks, each in what the machine multiplies; every step."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = f"{row['K']}->{row['N']}, M={row['M']}"
        heading = {
            "layers": f"{shape}\n{row['phase']}" if row["p"] and row["phase"] != "forward+backward" else "",
            "decode": f"decode {shape}" if row["M"] == DECODE_ROWS[0] else "",
            "ranks": f"{shape}\nr={row['r']}" if row["phase"] == "forward+backward" else "",
            "steps": f"step, {row['base']}\np={row['p']:g}, {row['M']} tokens",
        }[row["part"]]
        shown = row["part"] == "steps" or (row["base"] == _bases()[0] and row["name"] not in ("frozen", "merged"))
        if heading and shown:
            groups.setdefault(heading, []).append(row)
            if row["part"] == "layers" and row["name"] == "peftkern":
                bare = dict.fromkeys(("ratio", "ratio_q1", "ratio_q3"), row["arithmetic"])
                groups[heading].append({"name": "arithmetic", **bare})
    return record.ratio_figure(groups, title, "time / time of the frozen base") if groups else None


def _only(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in SHARES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(SHARES)}")
    return [name for name in SHARES if name in text.split(",")]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=_only, default=list(SHARES), help=f"of {','.join(SHARES)} (comma between them)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--quick", action="store_true", help="a few tiny cells, two rounds")
    parser.add_argument("--name", default="cpu", help="of the files; in benchmarks/results DATE-PROCESSOR-CORES-cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the record")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen parts, print a table of each, write the record."""
    options = _parse(arguments)
    packages.require("peft", *(("bitsandbytes", *packages.REAL_MODEL) if "steps" in options.only else ()))
    machine = record.machine()
    record.print_machine(machine)
    clock = Clock(options.minutes, options.only)
    rows: list[Row] = []
    for name in options.only:
        part = {"layers": layers, "decode": decode, "ranks": ranks, "steps": steps}[name](
            QUICK if options.quick else FULL
        )
        found = clock.run(name, part)
        if found:
            print(f"{name}\n{part.text(found)}\n", flush=True)
        rows += [{column: row.get(column) for column in COLUMNS} for row in found]
    if clock.left_out:
        print("no time was left for\n  " + "\n  ".join(clock.left_out))
    if not rows:
        raise SystemExit("nothing was measured: give more --minutes")
    machine |= {"load_average_at_end": record.load_average(), "seconds": time.monotonic() - clock.start}
    title = f"LoRA on {machine['cpu']}, {machine['cores']} cores, {machine['device']}, adapters in fp32"
    content = {"machine": machine, "left_out": clock.left_out, "rows": rows}
    record.save(options.out, options.name, content, rows, figure(rows, title))


if __name__ == "__main__":
    main()
