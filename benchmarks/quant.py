"""A LoRA linear on a frozen weight in every format: time, bytes held, bytes moved and error.

    python -m benchmarks.quant [--full] [--shape llama3-8b.qo] [--rows 1] [--dtype bf16]

frozen            x W^T (and dy W) on the dense weight without an adapter: the floor, and the ratios' baseline
peftkern          the LoRA linear on the dense weight, and on each format; on fp8 also with base_compute="fp8"
materialise       the weight decoded by PyTorch for the call, then a dense product and PyTorch's low-rank pair
bitsandbytes      its matmul_4bit, and PyTorch's low-rank pair
torchao           F.linear with its int8 weight, and PyTorch's low-rank pair

Up to 16 rows what is timed is the forward without gradients (decode), from there on forward and backward. Each result,
every gradient included, is held to the rule against fp64 with its own dequantised weight, and with base_compute with
rounded rows, before it is timed; the error shown is that of y against fp64 with the weight that was quantised. Without
--full a few M, in a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern
from benchmarks import harness, linear, products, record, smollm2
from benchmarks.linear import SCALING, Cell, Operands
from peftkern.testing import problems
from peftkern.testing.numerics import relative_error
from peftkern.weights import DenseWeight, FrozenWeight

FORMATS = ("nf4", "fp4", "mxfp4", "nvfp4", "int8", "int4", "fp8")
DECODE_ROWS = 16
ROWS = (1, 16, 256)
FULL_ROWS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192)
SHAPES = ("llama3-8b.qo",)
FULL_SHAPES = ("llama3-8b.qo", "llama3-8b.up", "llama3-8b.down", "smollm2-135m.up")


@dataclass(frozen=True)
class Contender:
    """One way to compute y from x and the factors.

    ``weight``: what it multiplies with, dequantised and rounded to x's dtype; ``held``: the bytes of what is kept;
    ``dense_copies``: how often a call writes, and then reads, a dense copy of the weight.
    """

    name: str
    weight: Tensor
    held: int
    forward: Callable[[Operands], Tensor]
    dense_copies: int = 0
    rounding: FrozenWeight | None = None  # the weight where its products round their rows

    def moved(self, cell: Cell) -> int:
        """Bytes of every operand and result, once for each product that reads or writes it, temporaries of x's size not
        counted."""
        size, factor = cell.dtype.itemsize, cell.adapter_dtype.itemsize
        x, y, thin = cell.M * cell.K * size, cell.M * cell.N * size, cell.r * (cell.K + cell.N) * factor
        once = self.held + self.dense_copies * 2 * cell.N * cell.K * size + x + y + thin
        return once if cell.M <= DECODE_ROWS else 2 * once + x + y + thin  # dx, and dA and dB from x and dy


def plus_pair(base: Tensor, o: Operands) -> Tensor:
    """The base's product and PyTorch's low-rank pair, accumulated in place."""
    dtype = o.x.dtype
    return base.addmm_(F.linear(o.x, o.A.to(dtype)), o.B.to(dtype).T, alpha=SCALING)


def own(weight: FrozenWeight, dense: Tensor, name: str, o: Operands) -> Contender:
    """peftkern on a weight; ``dense``: the same, dequantised."""

    def forward(o: Operands) -> Tensor:
        return peftkern.lora_linear(o.x, weight, o.A, o.B, SCALING)

    plan = peftkern.explain(o.x, weight, o.A, o.B, SCALING)
    in_place = plan.backend != "reference" and "decoded once" not in plan.tile and plan.schedule != "split"
    copies = 0 if weight.format == "dense" or in_place else 1
    return Contender(name, dense, weight.nbytes, forward, copies, weight if weight.base_compute else None)


def materialised(weight: FrozenWeight, dense: Tensor) -> Contender:
    """Decoded by PyTorch at every call, for y and again for dx, so that nothing dense is kept."""
    forward = lambda o: plus_pair(_Materialised.apply(o.x, weight), o)  # noqa: E731
    return Contender(f"materialise {weight.format}", dense, weight.nbytes, forward, 1)


class _Materialised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.materialize(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy @ ctx.weight.materialize(dy.dtype), None


def bitsandbytes_nf4(o: Operands) -> Contender | str:
    """matmul_4bit over the weight that bitsandbytes packs, or why not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "not installed"
    if o.W.shape[1] % 64:
        return "its AVX-512 decoder is wrong where K is no multiple of the blocksize"
    import bitsandbytes as bnb

    data, state = bnb.functional.quantize_4bit(o.W, quant_type="nf4", compress_statistics=True)
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    weight = FrozenWeight.from_state_dict({"weight": data, **parts})

    def forward(o: Operands) -> Tensor:
        return plus_pair(bnb.matmul_4bit(o.x, data, state), o)

    return Contender("bitsandbytes nf4", weight.materialize(o.x.dtype), weight.nbytes, forward, 1)


def torchao_int8(o: Operands) -> Contender | str:
    """F.linear with the int8 weight that torchao makes, or why not."""
    if importlib.util.find_spec("torchao") is None:
        return "not installed"
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    N, K = o.W.shape
    layer = torch.nn.Linear(K, N, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(o.W.clone(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig())
    weight: Any = layer.weight
    held = sum(part.nbytes for part in (weight.qdata, weight.scale, weight.zero_point) if part is not None)
    return Contender("torchao int8", weight.dequantize(), held, lambda o: plus_pair(F.linear(o.x, weight), o), 1)


def contenders(o: Operands, formats: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """Everything that is compared on these operands, and why the rest is not."""
    found = [own(DenseWeight(o.W), o.W, "peftkern", o)]
    for name in formats:
        weight = FrozenWeight.quantize(o.W, name)
        dense = weight.materialize(o.x.dtype)
        found += [own(weight, dense, f"peftkern {name}", o), materialised(weight, dense)]
        if name == "fp8":
            found.append(own(weight.with_base_compute("fp8"), dense, "peftkern fp8, base_compute", o))
    absent = {}
    for name, make in (("bitsandbytes nf4", bitsandbytes_nf4), ("torchao int8", torchao_int8)):
        made = make(o)
        if isinstance(made, str):
            absent[name] = made
        else:
            found.append(made)
    return found, absent


def measure_cell(cell: Cell, formats: Sequence[str], rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Check and time one cell.

    Returns: a row for each contender, the frozen linear first, and why others are left out.
    Raises: WrongResult where one computes something else than with its dequantised weight, or has a wrong gradient.
    """
    o = linear.operands(cell)
    truth = (o.x.double() @ o.W.double().T + SCALING * (o.x.double() @ o.A.double().T) @ o.B.double().T).detach()
    found, absent = contenders(o, formats)
    checkers = {(id(o.W), False): linear.Checker(cell, o)}
    floor = Contender("frozen", o.W, o.W.nbytes, lambda o: F.linear(o.x, o.W))
    cases = [_case(cell, o, floor, lambda: checkers[id(o.W), False].check("frozen"), (o.x,))]
    errors: dict[str, float | None] = {"frozen": None}
    for contender in found:
        key = id(contender.weight), contender.rounding is not None
        if key not in checkers:
            checkers[key] = linear.Checker(cell, o._replace(W=contender.weight))
            if contender.rounding is not None:
                _round(checkers[key], contender.rounding)
        checker = checkers[key]
        y = _without_gradients(contender, o)
        reason = checker.judge(contender.forward(o)) or checker.judge_output(y)
        errors[contender.name] = relative_error(y, truth)
        cases.append(_case(cell, o, contender, lambda reason=reason: reason, (o.x, o.A, o.B)))
    timings = harness.measure(cases, rounds, label=cell.title)
    rows = [
        _row(cell, contender, errors[contender.name], timing)
        for contender, timing in zip([floor, *found], timings, strict=True)
    ]
    return rows, absent


@torch.no_grad()
def _round(checker: linear.Checker, weight: FrozenWeight) -> None:
    """Make the truths of y and dx those of rounded rows; what is allowed stays the error of the dense product."""
    o = checker.o
    for i, rows in enumerate((o.x, o.dy)):
        factor, met = weight.factors(rows, i == 1)
        W, rounded = o.W.double(), met.materialize(o.x.dtype).double()
        W, rounded = (W, rounded) if i == 1 else (W.T, rounded.T)
        checker.truth[i] = checker.truth[i] + factor.double() @ rounded - rows.double() @ W


@torch.no_grad()
def _without_gradients(contender: Contender, o: Operands) -> Tensor:
    return contender.forward(o)


def _case(
    cell: Cell, o: Operands, contender: Contender, check: Callable[[], str | None], inputs: tuple[Tensor, ...]
) -> harness.Case:
    if cell.M <= DECODE_ROWS:
        return harness.Case(contender.name, lambda: _without_gradients(contender, o), check)
    return harness.Case(contender.name, lambda: torch.autograd.grad(contender.forward(o), inputs, o.dy), check)


def _row(cell: Cell, contender: Contender, error: float | None, timing: harness.Timing) -> dict[str, Any]:
    figures = timing.to_dict()
    samples, moved = figures.pop("samples"), contender.moved(cell)
    about = {"layer": cell.layer, "M": cell.M, "K": cell.K, "N": cell.N, "r": cell.r, "dtype": str(cell.dtype)[6:]}
    return about | {
        "phase": "decode" if cell.M <= DECODE_ROWS else "forward+backward",
        **figures,
        "held_bytes": contender.held,
        "bits_per_weight": 8 * contender.held / (cell.N * cell.K),
        "moved_bytes": moved,
        "gb_per_s": moved / timing.median / 1e9,
        "error": error,
        "rounds": len(samples),
    }


def text(rows: Sequence[dict[str, Any]], absent: dict[str, str]) -> str:
    """One cell: a line for each contender."""
    lines = [
        {
            "": row["name"],
            "ms": f"{row['median'] * 1e3:.3f}",
            "/ frozen": f"{row['ratio']:.2f}x",
            "(quartiles)": f"{row['ratio_q1']:.2f}-{row['ratio_q3']:.2f}",
            "bit/weight": f"{row['bits_per_weight']:.3f}",
            "MiB moved": f"{row['moved_bytes'] / 2**20:.1f}",
            "GB/s": f"{row['gb_per_s']:.1f}",
            "error of y": "" if row["error"] is None else f"{row['error']:.1e}",
        }
        for row in rows
    ]
    left_out = [f"{name}: {reason}" for name, reason in absent.items()]
    return "\n".join([record.table(lines, tuple(lines[0])[1:]), *left_out])


def cells(options: argparse.Namespace, device: str) -> list[Cell]:
    """The cells that the options choose."""
    dtype = products.DTYPES[options.dtype]
    shapes = options.shape or (("smollm2-135m.up",) if options.quick else FULL_SHAPES if options.full else SHAPES)
    adapter = torch.float32 if options.adapter == "fp32" else dtype
    rows = options.rows or (FULL_ROWS if options.full else ROWS)
    return [
        Cell(layer.name, M, layer.K, layer.N, options.r, 0.0, dtype, adapter, device)
        for layer in map(problems.layer, shapes)
        for M in rows
        if options.full or not options.max_flops or 2 * M * layer.K * layer.N <= options.max_flops
    ]


def parser() -> argparse.ArgumentParser:
    """The options."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = products.parser("quant", __doc__, rounds=5)
    found.add_argument("--full", action="store_true", help=f"M up to {FULL_ROWS[-1]}, and four shapes")
    found.add_argument("--format", action="append", choices=FORMATS, help="repeatable; all of them without it")
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[smollm2.native_dtype(device)]
    found.set_defaults(dtype=dtype, max_flops=2.0**33 if device == "cpu" else 0.0)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells, print each, write quant.json, .csv and .png."""
    options = parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = record.machine()
    record.print_machine(machine)
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for cell in cells(options, device):
        found, absent = measure_cell(
            cell, options.format or FORMATS, min(options.rounds, 5 if options.quick else 10**9)
        )
        rows += found
        print(f"{cell.title}, r={cell.r}, {options.dtype}, {options.adapter} adapter: {found[0]['phase']}")
        print(f"{text(found, absent)}\n", flush=True)
    if not rows:
        raise SystemExit("no cell within --max-flops: choose fewer --rows, a smaller --shape, or --full")
    machine["load_average_at_end"] = record.load_average()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['layer']}\nM={row['M']}, {row['phase']}", []).append(row)
    title = f"One LoRA linear on a frozen weight in each format: r={options.r}, {options.dtype}"
    figure = record.ratio_figure(groups, title, "time / time of the frozen dense linear")
    record.save(options.out, "quant", {"machine": machine, "absent": absent, "rows": rows}, rows, figure)


if __name__ == "__main__":
    main()
