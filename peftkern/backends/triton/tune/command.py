"""The command: its options, what is tuned in which order, and what it prints."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from peftkern import _env, dropout, weights
from peftkern.backends.base import Backend
from peftkern.backends.triton import select, tables, tiles
from peftkern.backends.triton.arch import Arch, arch_of
from peftkern.backends.triton.tables import Table
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.backends.triton.tune.progress import Progress
from peftkern.backends.triton.tune.search import Bench, Budget, Cell, Outcome, tune
from peftkern.call import Problem
from peftkern.testing.problems import LAYERS, Layer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Training first, then decoding, then what lies between.
ROWS_BY_VALUE = (8192, 4096, 2048, 1, 16, 16384, 1024, 256, 64, 4)
DESCRIPTION = """\
Measure every legal schedule and tile on this machine's GPU, forward and dx, and write the fastest right ones to your
cache (PEFTKERN_CACHE, by default ~/.cache/peftkern), where later calls find them. What is finished is written after
each shape, so that Ctrl-C and a short --minutes keep it. Lists are separated by commas; --shape may be repeated.
"""
Item = TypeVar("Item")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser the options of ``tune``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", type=_list_of(_shape), action="extend", metavar="KxN,...", default=None,
        help="in x out features of a layer; default: the layers of Llama-3 8B and 70B and Qwen2.5 7B")  # fmt: skip
    add("--rows", type=_list_of(_positive), default=list(ROWS_BY_VALUE), metavar="M,...",
        help=f"tokens of a call, in order of value; default: {','.join(map(str, ROWS_BY_VALUE))}. "
             "A number stands for all up to it and above the next smaller power of two")  # fmt: skip
    add("--rank", type=_list_of(_rank), default=[16], metavar="R,...", help="default: 16")
    add("--dropout", type=_list_of(_probability), default=[0.05], metavar="P,...",
        help="default: 0.05; 0 and not 0 are tuned apart, other differences do not matter")  # fmt: skip
    add("--dtype", type=_list_of(_one_of(DTYPES)), default=["bf16"], metavar="T,...",
        help="of x and the weight: bf16, fp16 or fp32; default: bf16")  # fmt: skip
    add("--adapters", type=_list_of(_one_of(("fp32", "base"))), default=["fp32"], metavar="T,...",
        help="dtype of the adapters: fp32 (PEFT's default) or base (that of x); default: fp32")  # fmt: skip
    add("--weight", type=_list_of(_one_of(weights.formats(computed=True))), default=["dense"], metavar="F,...",
        help=f"format of the frozen weight: {', '.join(weights.formats())}, or fp8xfp8, which is fp8 with base_compute "
             "'fp8'; default: dense")  # fmt: skip
    add("--minutes", type=float, default=30.0, metavar="M", help="stop after so many; default: 30")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="merge into this table, which is to be shipped, instead of the cache",
    )


def run(options: argparse.Namespace, reference: Backend, unavailable: str | None) -> str:
    """Tune as the options say.

    Args: reference: what results are checked against; unavailable: why nothing can be measured here, or None.
    Returns: the summary.
    Raises: ValueError for options that make no sense or a machine without a GPU; OSError for a table that cannot be
        written; KeyboardInterrupt, when what is finished is written.
    """
    if _env.settings().batch_invariant:
        raise ValueError("PEFTKERN_BATCH_INVARIANT=1 runs every number of rows as one: tune without it")
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes:g} is no time")
    if unavailable is None and not torch.cuda.is_available():
        unavailable = "there is no GPU"
    if unavailable is not None:
        raise ValueError(f"tune measures on a GPU: {unavailable}")
    from peftkern.backends.triton.tune.device import DeviceBench, EventTimer

    device = torch.device("cuda", torch.cuda.current_device())
    arch, timer = arch_of(device), EventTimer(device)
    return measure(options, arch, lambda cell: DeviceBench(cell, arch, device, reference, timer))


def measure(
    options: argparse.Namespace, arch: Arch, bench_of: Callable[[Cell], Bench],
    clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None,
) -> str:  # fmt: skip
    """Tune a chip by whatever measures its cells; ``run`` without the device."""
    stream = stream or sys.stderr
    path, to_ship = options.output or tables.cache_path(arch), options.output is not None
    tables.merge(path, table_of([], arch), to_ship)  # before any minute is spent: can it be written?
    todo = cells(options)
    seconds = options.minutes * 60
    progress = Progress(stream, len(todo), seconds, clock)
    progress.line(f"{len(todo)} cells on {arch.product or arch.name}, {options.minutes:g} minutes, into {path}")
    outcomes: list[Outcome] = []

    def report(done: int, outcome: Outcome) -> None:
        for choice, reason in outcome.rejected.items():
            progress.line(f"{title(outcome.cell)}: {choice.schedule} {choice.tile} is out: {reason}")
        progress.step(done, result(outcome))

    def save(finished: list[Outcome]) -> None:
        tables.merge(path, table_of(finished, arch), to_ship)
        outcomes.extend(finished)

    try:
        tune(todo, arch, bench_of, Budget.of(clock, seconds), save, report)
    except KeyboardInterrupt:
        progress.line(f"interrupted: {len(outcomes)} of {len(todo)} cells are kept in {path}")
        raise
    finally:
        progress.close()
        select.forget()
    if options.json:
        return json.dumps([record(outcome) for outcome in outcomes], indent=2)
    rest = f"; {len(todo) - len(outcomes)} cells were left for want of time" if len(outcomes) < len(todo) else ""
    return "\n".join([*map(result, outcomes), f"written to {path}{rest}"])


def layers() -> list[Layer]:
    """The layers of the large models, each shape once."""
    large = [layer for layer in LAYERS if layer.name.startswith(("llama3", "qwen2.5"))]
    return list({(layer.K, layer.N): layer for layer in large}.values())


def cells(options: argparse.Namespace) -> list[Cell]:
    """The cells to tune, the most valuable first; those with the same entry in a table are tuned once."""
    shapes = options.shape or [(layer.K, layer.N) for layer in layers()]
    found: dict[tuple[str, int], Cell] = {}
    features = itertools.product(
        options.rows,
        shapes,
        options.weight,
        options.dtype,
        options.adapters,
        options.rank,
        options.dropout,
        (False, True),
    )
    for M, (K, N), weight, dtype, adapters, R, p, backward in features:
        base = DTYPES[dtype]
        adapter = torch.float32 if adapters == "fp32" else base
        masked = dropout.threshold(p) > 0
        launch = Pass(Problem("cuda", M, K, N, R, base, adapter, weight, masked), backward)
        found.setdefault((tables.key_of(launch), tables.bucket_of(M)), Cell(launch, p if masked else 0.0))
    return list(found.values())


def table_of(outcomes: list[Outcome], arch: Arch) -> Table:
    """The winners, as a table."""
    entries: dict[str, dict[int, Choice]] = {}
    for outcome in outcomes:
        if outcome.winner is not None:
            launch = outcome.cell.launch
            buckets = entries.setdefault(tables.key_of(launch), {})
            buckets[tables.bucket_of(launch.problem.M)] = outcome.winner
    return Table(arch.name, arch.product, _triton_version(), entries)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def title(cell: Cell) -> str:
    """One cell in a few words."""
    problem = cell.launch.problem
    dtypes = f"{problem.dtype}/{problem.adapter_dtype}".replace("torch.", "")
    parts = [
        "backward" if cell.launch.backward else "forward",
        f"{problem.K}x{problem.N}",
        f"M={problem.M} r={problem.R}",
    ]
    return " ".join([*parts, dtypes, problem.weight_format, f"p={cell.dropout_p:g}"])


def result(outcome: Outcome) -> str:
    """One cell and what was found."""
    if outcome.winner is None:
        return f"{title(outcome.cell)}: nothing is written: {outcome.note}"
    winner, seconds = outcome.winner, outcome.seconds
    found = f"{title(outcome.cell)}: {winner.schedule} {winner.tile} {seconds[winner] * 1e6:.1f} us, "
    found += f"{len(seconds)} of {outcome.legal} timed"
    if outcome.estimated in seconds:
        found += f", the estimate's choice takes {seconds[outcome.estimated] / seconds[winner]:.2f}x"
    return found


def record(outcome: Outcome) -> dict[str, Any]:
    """One cell and what was found, for programs."""

    def name(choice: Choice) -> str:
        return f"{choice.schedule} {choice.tile}"

    return {
        "cell": title(outcome.cell), "legal": outcome.legal, "note": outcome.note,
        "winner": None if outcome.winner is None else name(outcome.winner),
        "seconds": {name(choice): seconds for choice, seconds in outcome.seconds.items()},
        "rejected": {name(choice): reason for choice, reason in outcome.rejected.items()},
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the options


def _list_of(item: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    def read(text: str) -> list[Item]:
        return [item(word.strip()) for word in text.split(",")]

    return read


def _shape(text: str) -> tuple[int, int]:
    K, cross, N = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not KxN, such as 4096x14336")
    return _positive(K), _positive(N)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _rank(text: str) -> int:
    if _positive(text) > tiles.MAX_R:
        raise argparse.ArgumentTypeError(f"a rank of {text} is larger than {tiles.MAX_R}")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability below 1")
    return value


def _one_of(known: Any) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return read
