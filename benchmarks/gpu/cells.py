"""Products: one linear in all variants, forward and forward+backward, as ratios to the bare frozen products."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from benchmarks.gpu import backend, banks, measure, roofline, studies
from benchmarks.gpu.bench import Bench, Wrong
from benchmarks.gpu.plan import BF16, F32, Plan, about, cell_of, key_of, plane, sampled
from benchmarks.gpu.store import Store
from benchmarks.gpu.task import OUT_OF_MEMORY, WRONG, Result, Task
from benchmarks.gpu.variants import RESULTS, Linear
from benchmarks.linear import Cell

PHASES = ("forward", "forward+backward")
_HOST_ROWS = 2048  # up to here the host's own time is measured too
_BYTES_FREE = 0.85  # of the memory that a cell may need, by a generous count


def tasks(bench: Bench) -> list[Task]:
    """Planes, side studies and the sample, in order of value."""
    plan = bench.plan
    first = plane(plan, 0.05, BF16)
    head, rest = first[: len(plan.layers)], first[len(plan.layers) :]
    limit = 180.0 if plan.compiled else 60.0

    def cells(found: list[Cell]) -> list[Task]:
        return [
            Task(f"cell {key_of(cell)}", functools.partial(measure_cell, bench, cell), limit, about(cell))
            for cell in found
        ]

    wide = plane(plan, 0.05, F32)
    ordered = [
        *studies.first(bench), *cells(head), *cells(wide[: len(plan.layers)]), *studies.schedules(bench),
        *banks.tasks(bench), *cells(rest), *studies.decode(bench), *cells(wide[len(plan.layers) :]),
        *cells(_rank_128(bench)), *cells(plane(plan, 0.0, BF16)), *cells(sampled(plan)), *cells(plane(plan, 0.0, F32)),
    ]  # fmt: skip
    return list({task.key: task for task in ordered}.values())


def _rank_128(bench: Bench) -> list[Cell]:
    rows = [M for M in bench.plan.rows if M in (2048, 8192)] or bench.plan.rows[:1]
    return [bench.plan.cell(layer, M, 128, 0.05, BF16) for M in rows for layer in bench.plan.layers]


def forget_stale(results: Store, plan: Plan) -> None:
    """Drop what ran by a choice that is no longer made, as after more tuning, so that it is measured again."""
    for key, result in list(results.results.items()):
        if "choice" in result and "about" in result:
            if backend.chosen(cell_of(plan, result["about"])) != result["choice"]:
                del results.results[key]


def bytes_needed(cell: Cell) -> float:
    """A generous count of what checks and variants hold at once: fp64 truths, the mask's words, fp32 copies."""
    tall, wide = cell.M * cell.K, cell.M * cell.N
    return 8.0 * (5 * tall + 4 * wide + 2 * cell.N * cell.K) + 12.0 * tall


def measure_cell(bench: Bench, cell: Cell) -> Result:
    """Check every variant, then time those that are right; peftkern wrong is a cell that is wrong."""
    if cell.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if bytes_needed(cell) > _BYTES_FREE * free:
            return {"status": OUT_OF_MEMORY, "error": f"it needs about {bytes_needed(cell) / 2**30:.0f} GiB"}
    started = time.monotonic()
    one = Linear(cell, bench.plan)
    result: Result = {"choice": backend.chosen(cell)}
    errors, failed = _check_eager(one)
    result["errors"] = errors
    if "peftkern" in failed:
        return result | {"status": WRONG, "error": failed["peftkern"], "excluded": failed}
    result["times"], result["host"], result["losses"], result["roofline"] = {}, {}, {}, {}
    for phase in PHASES:
        runs = _runs(one, phase, failed)
        samples = bench.time(runs)
        result["times"][phase] = measure.summary(samples, "frozen")
        result["roofline"][phase] = roofline.floor(cell, phase, bench.ceilings)
        result["losses"][phase] = _losses(samples)
        if cell.M <= _HOST_ROWS:
            eager = {name: run for name, run in runs.items() if not name.endswith("graph")}
            result["host"][phase] = {name: round(bench.timer.host(run, 0.004) * 1e6, 2) for name, run in eager.items()}
    if cell.device == "cuda":
        result["peak_mib"] = {name: peak_mib(one.both(name)) for name in one.names if not name.endswith("graph")}
    if failed:
        result["excluded"] = failed
    return result | {"seconds": round(time.monotonic() - started, 2)}


def _check_eager(one: Linear) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Errors of each eager variant, and why those that are out are out."""
    errors: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for name in one.names:
        if name.endswith("graph"):
            continue
        try:
            found, reason = one.check(name)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - one competitor less; ours makes the cell wrong
            found, reason = [], f"{type(error).__name__}: {str(error)[:400]}"
        errors[name] = {label: float(f"{value:.3e}") for label, value in zip(RESULTS, found, strict=False)}
        if reason is not None:
            failed[name] = reason
    return errors, failed


def _runs(one: Linear, phase: str, failed: dict[str, str]) -> dict[str, Any]:
    """The calls of a phase; a graph is captured and its own replayed result checked."""
    runs: dict[str, Any] = {}
    for name in one.names:
        if name in failed or name.removesuffix(" graph") in failed:
            continue
        try:
            runs[name] = one.run(name, phase)
            if name.endswith(" graph"):
                reason = one.check(name, runs[name])[1]
                if reason is not None:
                    raise Wrong(reason)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a call that cannot be captured is a variant less
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error)[:400]}"
    if phase == PHASES[-1]:
        one.forget_truth()
    return runs


def _losses(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Eager against all that is not a graph, and graph against graph."""
    ours = ("frozen", measure.again("frozen"), "peftkern")
    others = [name for name in samples if name.removesuffix(" graph") not in ours]
    plain = [name for name in others if not name.endswith(" graph")]
    found = measure.losses(samples, "peftkern", plain)
    return found + measure.losses(samples, "peftkern graph", others)


def peak_mib(run: Any) -> float:
    """What a call allocates at most, beyond what is there before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
