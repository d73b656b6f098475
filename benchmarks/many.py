"""Many adapters in one batch of one linear layer, against the ways to do without: as a ratio to the frozen layer alone.

    python -m benchmarks.many [--layer 4096x4096] [--dtype bf16] [--adapters 1,8,32] [--rounds 9] [--out folder]

Cells: E adapters of equal (16) or mixed ranks (8 to 128); who is asked for: uniform, Zipf, or one adapter by all;
decoding (a row an adapter, at least 8) and prefill (512 rows). Every case is checked against fp64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, record
from peftkern.bank_autograd import BankSettings
from peftkern.multi_lora import apply
from peftkern.segments import Plan, plan_rows
from peftkern.testing.numerics import relative_error

RANKS = {"equal": (16,), "mixed": (8, 16, 32, 64, 128)}
POPULARITY = ("uniform", "zipf", "one")
PREFILL_ROWS = 512
SCALING = 2.0


@dataclass(frozen=True)
class Cell:
    """One problem: E adapters, their ranks and popularity, M rows."""

    E: int
    ranks: str
    popularity: str
    M: int

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
    plan: Plan

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
        spans = self.plan.spans
        settings = BankSettings(
            [SCALING] * len(spans), [0.0] * len(spans), [0] * (2 * len(spans)), self.plan.rows,
            [span.start for span in spans], [span.length for span in spans], "base", "",
        )  # fmt: skip
        return apply(self.x, self.W, None, settings, [f for s in spans for f in (self.A[s.id], self.B[s.id])])

    def base(self) -> Tensor:
        """The same call without adapters: the baseline."""
        return apply(self.x, self.W, None, BankSettings([], [], [], self.plan.rows, [], [], "base", ""), [])

    def vendor(self) -> Tensor:
        """PyTorch's frozen linear: what weights with an adapter merged into them cost."""
        return torch.nn.functional.linear(self.x, self.W)

    def loop(self) -> Tensor:
        """A loop over the batch's adapters in Python, as PEFT's mixed batch has it: cast, two products, scale, add."""
        y = self.vendor()
        for span in self.plan.spans:
            rows = self.plan.rows[span.start : span.start + span.length]
            update = self.x[rows].float() @ self.A[span.id].T @ self.B[span.id].T
            y[rows] += (SCALING * update).to(y.dtype)
        return y

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


def measure(cell: Cell, K: int, N: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to compute the cell."""
    operands = Operands.make(cell, K, N, dtype)
    truth, peer = operands.truth(), operands.loop()
    allowed = 2 * relative_error(peer, truth) + 1e-6

    def right(run: Callable[[], Tensor]) -> str | None:
        error = relative_error(run(), truth)
        return None if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"

    frozen = [harness.Case(n, run, lambda: None) for n, run in (("base", operands.base), ("vendor", operands.vendor))]
    ways = {"peftkern": operands.own, "loop": operands.loop, "masked": operands.masked}
    cases = frozen + [harness.Case(name, run, lambda run=run: right(run)) for name, run in ways.items()]
    with torch.no_grad():
        timings = harness.measure(cases, rounds, label=str(cell))
    return [{"cell": str(cell), "name": t.name} | t.to_dict() for t in timings]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every cell and print the ratios."""
    parser = argparse.ArgumentParser(prog="benchmarks.many", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layer", default="4096x4096", help="KxN")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--adapters", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    K, N = map(int, options.layer.split("x"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    machine = record.machine()
    record.print_machine(machine)
    rows = []
    for cell in cells([int(E) for E in options.adapters.split(",")]):
        rows += measure(cell, K, N, dtype, options.rounds)
        shown = {row["name"]: f"{row['ratio']:.2f}" for row in rows if row["cell"] == str(cell)}
        print(f"{cell!s:32s}", "  ".join(f"{name} {ratio}" for name, ratio in shown.items()), flush=True)
    if options.out:
        plain = [{key: value for key, value in row.items() if key != "samples"} for row in rows]
        record.save(options.out, "many", {"machine": machine, "rows": rows}, plain, None)


if __name__ == "__main__":
    main()
