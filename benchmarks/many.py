"""Many adapters in one batch of one linear layer, against the ways to do without: as a ratio to the frozen layer alone.

    python -m benchmarks.many [--layer 4096x4096] [--dtype bf16] [--adapters 1,2,8] [--rounds 9] [--out folder]

Cells: E adapters of equal (16) or mixed ranks (8 to 128); who is asked for: uniform, Zipf, or one adapter by all;
decoding (a row an adapter, at least 8) and prefill (512 rows). Without --adapters, a few of them, most telling first.
When the time is over no other cell is begun, and those that are left are named. Every case is checked against fp64
before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkern
from benchmarks import harness, record
from peftkern.call import Rows, Span, Update
from peftkern.multi_lora import run_rows
from peftkern.segments import Routing, plan_rows
from peftkern.testing.numerics import relative_error
from peftkern.weights import DenseWeight

RANKS = {"equal": (16,), "mixed": (8, 16, 32, 64, 128)}
POPULARITY = ("uniform", "zipf", "one")
PREFILL_ROWS = 512
PREFILL_ROUNDS = 3  # at most; a round takes seconds where the vendor's product of 16 bits is slow
MERGED_BYTES = 2**30  # merged copies of the weight that need more are left out
SCALING = 2.0


@dataclass(frozen=True)
class Cell:
    """One problem: E adapters, their ranks and popularity, M rows."""

    E: int
    ranks: str
    popularity: str
    M: int

    @property
    def decoding(self) -> bool:
        """Whether it is of as many rows as decoding has."""
        return self.M < PREFILL_ROWS

    def __str__(self) -> str:
        return f"E={self.E} {self.ranks} {self.popularity} M={self.M}"

    def ids(self) -> Tensor:
        """The adapter of each row, int64 [M], unsorted."""
        generator = torch.Generator().manual_seed(self.E + self.M)
        if self.popularity == "one":
            return torch.zeros(self.M, dtype=torch.int64)
        if self.popularity == "zipf":
            weights = 1 / torch.arange(1, self.E + 1, dtype=torch.float64)
            return torch.multinomial(weights, self.M, replacement=True, generator=generator)
        return torch.arange(self.M)[torch.randperm(self.M, generator=generator)] % self.E


@dataclass
class Operands:
    """The tensors of a cell."""

    x: Tensor
    W: Tensor
    A: list[Tensor]
    B: list[Tensor]
    plan: Routing

    @classmethod
    def make(cls, cell: Cell, K: int, N: int, dtype: torch.dtype) -> Operands:
        """Gaussian ones; adapters are fp32, as PEFT keeps them."""
        g = torch.Generator().manual_seed(0)
        ranks = [RANKS[cell.ranks][e % len(RANKS[cell.ranks])] for e in range(cell.E)]
        return cls(
            torch.randn(cell.M, K, generator=g).to(dtype),
            torch.randn(N, K, generator=g).mul_(K**-0.5).to(dtype),
            [torch.randn(r, K, generator=g).mul_(K**-0.5) for r in ranks],
            [torch.randn(N, r, generator=g).mul_(r**-0.5) for r in ranks],
            plan_rows(cell.ids()),
        )

    def own(self) -> Tensor:
        """peftkern: the base and every adapter in one call."""
        updates = [
            Update(self.A[id], self.B[id], None, None, None, SCALING, 0.0, 0, Span(start, length, 0, 0))
            for id, start, length in self.plan.spans
        ]
        return run_rows(self.x, DenseWeight(self.W), None, updates, Rows(self.plan.rows, None))

    def base(self) -> Tensor:
        """The same call without adapters: the baseline."""
        return run_rows(self.x, DenseWeight(self.W), None, [], Rows(self.plan.rows, None))

    def vendor(self) -> Tensor:
        """PyTorch's frozen linear: what weights with an adapter merged into them cost."""
        return torch.nn.functional.linear(self.x, self.W)

    def loop(self) -> Tensor:
        """A loop over the batch's adapters in Python: cast, two products, scale, add."""
        y = self.vendor()
        for span in self.plan.spans:
            rows = self.plan.rows[span.start : span.start + span.length]
            update = self.x[rows].float() @ self.A[span.id].T @ self.B[span.id].T
            y[rows] += (SCALING * update).to(y.dtype)
        return y

    @functools.cached_property
    def merged_weights(self) -> dict[int, Tensor]:
        """W + c B A in W's dtype, for each adapter of the batch."""
        return {
            s.id: (self.W.float() + SCALING * self.B[s.id] @ self.A[s.id]).to(self.W.dtype) for s in self.plan.spans
        }

    def merged(self) -> Tensor:
        """A copy of the weight for each adapter, and a product with each: what serving without adapters takes."""
        y = self.x.new_empty(len(self.x), len(self.W))
        for span in self.plan.spans:
            rows = self.plan.rows[span.start : span.start + span.length]
            y[rows] = torch.nn.functional.linear(self.x[rows], self.merged_weights[span.id])
        return y

    @functools.cached_property
    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """A [E, K, R] and B [E, R, N] in x's dtype, padded to the largest rank, and the ends of each one's rows."""
        E, R, (N, K) = len(self.A), max(len(A) for A in self.A), self.W.shape
        A, B = self.x.new_zeros(E, R, K), self.x.new_zeros(E, N, R)
        counts = torch.zeros(E, dtype=torch.int32)
        for e in range(E):
            A[e, : len(self.A[e])], B[e, :, : len(self.A[e])] = self.A[e], self.B[e]
        for span in self.plan.spans:
            counts[span.id] = span.length
        return A.transpose(1, 2), B.transpose(1, 2), counts.cumsum(0, dtype=torch.int32)

    def grouped(self) -> Tensor:
        """torch._grouped_mm over the sorted rows, once to shrink and once to expand."""
        A, B, ends = self.stacked
        s = torch._grouped_mm(self.x[self.plan.rows], A, offs=ends)
        y = self.vendor()
        y[self.plan.rows] += SCALING * torch._grouped_mm(s, B, offs=ends)
        return y

    @functools.cached_property
    def peft_layer(self) -> tuple[Any, list[str]]:
        """PEFT's layer with every adapter, patched, and the adapter's name of each row."""
        from peft import LoraConfig, get_peft_model

        N, K = self.W.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(self.W, requires_grad=False)
        model: Any = nn.Sequential(linear)
        for e, A in enumerate(self.A):
            config = LoraConfig(r=len(A), lora_alpha=int(SCALING * len(A)), target_modules=["0"])
            if e == 0:
                model = get_peft_model(model, config, adapter_name="0").eval()
            else:
                model.add_adapter(str(e), config)
        layer = model.base_model.model[0]
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            layer.lora_A[str(e)].weight.data, layer.lora_B[str(e)].weight.data = A, B
        peftkern.patch(layer)
        names = [""] * len(self.x)
        for span in self.plan.spans:
            for row in self.plan.rows[span.start : span.start + span.length].tolist():
                names[row] = str(span.id)
        return layer, names

    def patched(self) -> Tensor:
        """PEFT's mixed batch, patched."""
        layer, names = self.peft_layer
        return layer(self.x.unsqueeze(1), adapter_names=names).squeeze(1)

    def peft(self) -> Tensor:
        """PEFT's mixed batch, its own."""
        with peftkern.disabled():
            return self.patched()

    def masked(self) -> Tensor:
        """Every adapter for every row, what is not wanted masked away."""
        y, x = self.vendor(), self.x.float()
        row_of = torch.full((len(x),), -1, dtype=torch.int64)
        for span in self.plan.spans:
            row_of[self.plan.rows[span.start : span.start + span.length]] = span.id
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            y += (SCALING * (row_of == e).unsqueeze(1) * (x @ A.T @ B.T)).to(y.dtype)
        return y

    def truth(self) -> Tensor:
        """fp64."""
        y = self.x.double() @ self.W.double().T
        for span in self.plan.spans:
            rows = self.plan.rows[span.start : span.start + span.length]
            y[rows] += SCALING * (self.x[rows].double() @ self.A[span.id].double().T @ self.B[span.id].double().T)
        return y


def cells(counts: Sequence[int]) -> list[Cell]:
    """Every combination; one popular adapter of one is uniform already."""
    return [
        Cell(E, ranks, popularity, M)
        for E in counts
        for ranks in RANKS
        for popularity in POPULARITY
        if E > 1 or (ranks, popularity) == ("equal", "uniform")
        for M in (max(E, 8), PREFILL_ROWS)
    ]


def telling_cells() -> list[Cell]:
    """What fits into a few minutes: the goals' cells, then what differs from them."""
    decoding = [(8, "equal", "uniform"), (32, "equal", "uniform"), (8, "mixed", "zipf"), (32, "mixed", "zipf")]
    prefill = [(8, "equal", "uniform"), (32, "mixed", "zipf"), (8, "equal", "one")]
    more = [(1, "equal", "uniform"), (64, "equal", "uniform")]
    return [
        Cell(*one, M or max(one[0], 8))
        for ones, M in ((decoding, 0), (prefill, PREFILL_ROWS), (more, 0))
        for one in ones
    ]


def measure(cell: Cell, K: int, N: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to compute the cell."""
    operands = Operands.make(cell, K, N, dtype)
    truth, peer = operands.truth(), operands.loop()
    allowed = 2 * relative_error(peer, truth) + 1e-6

    def right(run: Callable[[], Tensor]) -> str | None:
        error = relative_error(run(), truth)
        return None if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"

    frozen = [harness.Case(n, run, lambda: None) for n, run in (("base", operands.base), ("vendor", operands.vendor))]
    ways = {
        "peftkern": operands.own,
        "patched": operands.patched,
        "peft": operands.peft,
        "loop": operands.loop,
        "masked": operands.masked,
        "grouped_mm": operands.grouped,
    }
    if len(operands.plan.spans) * operands.W.nbytes <= MERGED_BYTES:
        ways["merged"] = operands.merged
    cases = frozen + [harness.Case(name, run, lambda run=run: right(run)) for name, run in ways.items()]
    with torch.no_grad():
        timings = harness.measure(cases, rounds if cell.decoding else min(rounds, PREFILL_ROUNDS), label=str(cell))
    return [{"cell": str(cell), "name": t.name} | t.to_dict() for t in timings]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every cell and print the ratios."""
    parser = argparse.ArgumentParser(prog="benchmarks.many", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layer", default="4096x4096", help="KxN")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--adapters", help="1,2,4,8,16,32,64: every cell of these many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=4, help="after which no cell is begun")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    K, N = map(int, options.layer.split("x"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    machine = record.machine()
    record.print_machine(machine)
    counts = [int(E) for E in options.adapters.split(",")] if options.adapters else None
    rows, left = [], list(cells(counts) if counts else telling_cells())
    end = time.monotonic() + 60 * options.minutes
    while left and time.monotonic() < end:
        cell = left.pop(0)
        rows += measure(cell, K, N, dtype, options.rounds)
        shown = {row["name"]: f"{row['ratio']:.2f}" for row in rows if row["cell"] == str(cell)}
        print(f"{cell!s:32s}", "  ".join(f"{name} {ratio}" for name, ratio in shown.items()), flush=True)
    if left:
        print(f"\nno time for {', '.join(map(str, left))}")
    if options.out:
        save(options.out, machine | {"layer": options.layer, "dtype": options.dtype}, rows)


def save(folder: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The record, the table, and a plot."""
    plain = [{key: value for key, value in row.items() if key != "samples"} for row in rows]
    groups = {cell: [row for row in rows if row["cell"] == cell] for cell in dict.fromkeys(row["cell"] for row in rows)}
    title = f"Many adapters in one batch, {machine['layer']}, {machine['dtype']}, {machine['cpu']}"
    figure = record.ratio_figure(groups, title, "time as a ratio to the same batch without adapters")
    record.save(folder, "many", {"machine": machine, "rows": rows}, plain, figure)


if __name__ == "__main__":
    main()
