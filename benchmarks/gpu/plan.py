"""What is measured, in which order: the whole plan for a GPU, and a tiny one that a CPU runs end to end."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.linear import Cell
from peftkern._env import SCHEDULES
from peftkern.testing import problems
from peftkern.testing.problems import Layer

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", F16: "fp16", F32: "fp32"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
Dtypes = tuple[torch.dtype, torch.dtype]  # of x and W; of the adapter

# The order in which rows are worth their time: training sizes, then decode, then what lies between.
_ROWS = (8192, 2048, 4096, 16384, 16, 1, 1024, 256, 64, 4)
_TELLING = (
    ("llama3-8b.qo", 8192), ("llama3-8b.kv", 8192), ("llama3-8b.up", 2048), ("llama3-8b.down", 4096),
    ("qwen2.5-7b.kv", 2048), ("llama3-70b.down", 8192),
)  # fmt: skip
# The last has more tiles than a GPU has units, so that programs of the shared schedule take several, and wait.
_SHAPES = ((1, 129, 257), (17, 65, 33), (130, 576, 192), (256, 512, 1024), (2100, 1000, 2056))
SAMPLE, SAMPLE_SEED = 200, 20260101


@dataclass(frozen=True)
class Plan:
    """One run.

    Args:
        device, backend: where it runs and which backend is judged.
        dry: a rehearsal: few cells, times that mean nothing.
        layers, rows: of the products; ``telling``: layer and M where schedules are compared.
        sample: how many other cells.
        compare_graphs: whether CUDA graphs are captured; without: variants that are left out.
        stand_in: without a GPU, the chip that the part "compile" compiles for, in front of the tests' stand-in.
        shapes: M, K, N of the correctness grid; ``medium``: of its sweep over tiles.
        repeats: runs with the same operands, whose results must not differ by a bit.
        hidden, blocks, tokens: of the small Llama.
        min_rounds, max_rounds, seconds: of one timing.
    """

    device: str = "cuda"
    backend: str = "triton"
    dry: bool = False
    layers: tuple[Layer, ...] = tuple(layer for layer in problems.LAYERS if layer.name.startswith(("llama", "qwen")))
    rows: tuple[int, ...] = _ROWS
    telling: tuple[tuple[str, int], ...] = _TELLING
    sample: int = SAMPLE
    compare_graphs: bool = True
    without: tuple[str, ...] = ()
    stand_in: str | None = None
    schedules: tuple[str, ...] = SCHEDULES
    dtypes: tuple[Dtypes, ...] = ((BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, F32))
    ranks: tuple[int, ...] = (16, 64, 8, 128, 24, 1, 256)
    dropout: tuple[float, ...] = (0.05, 0.0)
    shapes: tuple[tuple[int, int, int], ...] = _SHAPES
    medium: tuple[tuple[int, int, int], ...] = ((300, 1000, 1100), (512, 1024, 768))
    repeats: int = 8
    hidden: tuple[int, int] = (4096, 14336)
    blocks: int = 4
    vocabulary: int = 32000
    tokens: int = 4096
    min_rounds: int = 9
    max_rounds: int = 31
    seconds: float = 0.5
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is a competitor: it takes minutes."""
        return "compiled" not in self.without

    def layer(self, name: str) -> Layer:
        """One of the plan's layers, or of all."""
        return next((layer for layer in self.layers if layer.name == name), None) or problems.layer(name)

    def cell(self, layer: Layer, M: int, r: int = 16, p: float = 0.05, adapter: torch.dtype = F32) -> Cell:
        """A bf16 cell of this plan's device."""
        return Cell(layer.name, M, layer.K, layer.N, r, p, BF16, adapter, self.device)


# The share of the minutes after which a part stops beginning tasks; what one leaves over goes to those after it.
SHARES = {
    "environment": 0.05, "correctness": 0.24, "compile": 0.09, "tuning": 0.16, "products": 0.31, "models": 0.15,
    "tests": 0.35,
}  # fmt: skip


def dry(plan: Plan | None = None) -> Plan:
    """The rehearsal."""
    return replace(
        plan or Plan(), device="cpu", backend="reference", dry=True,
        layers=(Layer("tiny.square", 48, 48), Layer("tiny.up", 48, 80)), rows=(8, 2), telling=(("tiny.up", 8),),
        sample=2, compare_graphs=False, without=("compiled",), stand_in="sm_90", schedules=("split", "library"),
        dtypes=((BF16, F32), (F32, F32)), ranks=(4,), dropout=(0.05,), shapes=((5, 33, 17),), medium=((12, 40, 24),),
        repeats=2, hidden=(32, 48), blocks=1, vocabulary=64, tokens=16, min_rounds=3, max_rounds=3, seconds=0.0,
    )  # fmt: skip


def key_of(cell: Cell) -> str:
    """How a cell is named in the files."""
    dtypes = f"{NAMES[cell.dtype]}/{NAMES[cell.adapter_dtype]}"
    return f"{cell.layer} M={cell.M} r={cell.r} p={cell.p:g} {dtypes}"


def plane(plan: Plan, p: float, adapter: torch.dtype, r: int = 16) -> list[Cell]:
    """Every layer at every M, the most telling M first."""
    return [plan.cell(layer, M, r, p, adapter) for M in plan.rows for layer in plan.layers]


def sampled(plan: Plan) -> list[Cell]:
    """Cells beside the plane, drawn by a fixed seed: M 1 to 16384 (log-uniform), r 1 to 256, three dropouts."""
    draw = random.Random(SAMPLE_SEED)
    found: dict[str, Cell] = {}
    most = max(plan.rows)
    while len(found) < plan.sample:
        M = min(most, round(2 ** draw.uniform(0, most.bit_length() - 1)))
        r = draw.choice([rank for rank in problems.RANKS if rank <= 256])
        cell = plan.cell(draw.choice(plan.layers), M, r, draw.choice(problems.DROPOUT), draw.choice((F32, BF16)))
        if not (r == 16 and cell.p == 0.05 and M in plan.rows):
            found[key_of(cell)] = cell
    return list(found.values())


def about(cell: Cell) -> dict[str, Any]:
    """A cell as plain values."""
    dtypes = {"dtype": NAMES[cell.dtype], "adapter": NAMES[cell.adapter_dtype]}
    return {"layer": cell.layer, "M": cell.M, "K": cell.K, "N": cell.N, "r": cell.r, "p": cell.p} | dtypes


def cell_of(plan: Plan, found: Mapping[str, Any]) -> Cell:
    """The cell that ``about`` has told of."""
    dtype, adapter = _DTYPES[found["dtype"]], _DTYPES[found["adapter"]]
    return Cell(found["layer"], found["M"], found["K"], found["N"], found["r"], found["p"], dtype, adapter, plan.device)
