"""Beside the planes: the RNG draw, the schedules side by side, overlap on and off, decode against merged weights."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern
from benchmarks import linear
from benchmarks.gpu import backend, graphs, measure, roofline
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import BF16, F32, about, key_of
from benchmarks.gpu.task import WRONG, Result, Task
from benchmarks.gpu.variants import Linear
from benchmarks.linear import SCALING, Cell
from peftkern import _env, dropout
from peftkern.call import PairNeeds
from peftkern.ops import dispatch
from peftkern.testing.numerics import relative_error

_ONLY_DX = PairNeeds(True, False, False, False, False)
_DECODE_ROWS = (1, 4, 16)


def first(bench: Bench) -> list[Task]:
    """What takes no time."""
    return [Task("rng draw", lambda: rng_draw(bench), 30.0)]


def rng_draw(bench: Bench) -> Result:
    """The two integers that a call with dropout draws: device time, and host time."""
    device = torch.device(bench.plan.device)

    def run() -> Tensor:
        return dropout.draw_rng_state(device)

    samples = bench.time({"draw": run})["draw"]
    low, middle, high = (round(value * 1e6, 3) for value in measure.interval(samples))
    return {"us": middle, "low": low, "high": high, "host_us": round(bench.timer.host(run, 0.004) * 1e6, 2)}


# ---------------------------------------------------------------------------------------- the schedules side by side


def schedules(bench: Bench) -> list[Task]:
    """Every legal choice at the telling shapes, direction by direction; then overlap on and off."""
    plan, found = bench.plan, []
    for name, M in plan.telling:
        cell = plan.cell(plan.layer(name), M, adapter=BF16)
        found.append(
            Task(f"schedules {key_of(cell)}", lambda cell=cell: compare_choices(bench, cell), 240.0, about(cell))
        )
        found.append(Task(f"overlap {key_of(cell)}", lambda cell=cell: overlap(bench, cell), 60.0, about(cell)))
    return found


class _Direction:
    """One direction of a cell as direct calls of the backend, with the truth and the error that plain PyTorch makes."""

    def __init__(self, bench: Bench, cell: Cell, backward: bool) -> None:
        self.backward, self.one = backward, Linear(cell, bench.plan)
        self.X = (self.one.o.dy if backward else self.one.o.x).detach()
        self.W = self.one.o.W
        self.operands = backend.operands_of(cell, self.one.o, self.one.rng_state)
        self.problem = self.operands.problem(cell.M, cell.dtype)
        self.runner = dispatch.backend_named(bench.plan.backend)

    def run(self) -> Tensor:
        """y or dx."""
        if self.backward:
            return self.runner.pair_backward(self.operands, self.X, None, None, None, _ONLY_DX).x
        return self.runner.pair(self.operands, self.X)[0]

    def frozen(self) -> Tensor:
        """The vendor's product."""
        return self.X @ self.W if self.backward else F.linear(self.X, self.W)

    def wrong(self) -> str | None:
        """Why ``run`` is wrong under the choice in force, or None."""
        which = int(self.backward)
        error, peer = relative_error(self.run(), self.one.truth()[which]), self.one.peer()[which]
        return None if error <= 2 * peer + 1e-6 else f"error {error:.2e}, allowed 2 x {peer:.2e} + 1e-6"


def compare_choices(bench: Bench, cell: Cell) -> Result:
    """Each schedule's tiles against the frozen product; what is wrong is said and not timed."""
    result: Result = {}
    for name, backward in backend.DIRECTIONS:
        one = _Direction(bench, cell, backward)
        choices: dict[str, Any] = {"": None}
        refused = {}
        if one.runner.name == "triton":
            arch = backend.arch_here(cell.device)
            choices = {}
            for schedule in bench.plan.schedules:
                legal = backend.legal(one.problem, backward, schedule, arch)
                choices |= {f"{schedule} {choice.tile}": choice for choice in legal}
                if not legal:
                    refused[schedule] = backend.refusal(one.problem, backward, schedule, arch)
        runs: dict[str, Any] = {"frozen": one.frozen}
        for label, choice in choices.items():
            try:
                with backend.forced(choice):
                    reason = one.wrong()
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - recorded beside the others
                reason = f"{type(error).__name__}: {str(error)[:300]}"
            if reason is None:
                runs[label] = _under(choice, one)
            else:
                refused[label] = reason
        one.one.forget_truth()
        times = measure.summary(bench.time(runs), "frozen")
        result[name] = {"times": times, "refused": refused, "roofline": roofline.floor(cell, "forward", bench.ceilings)}
    return result


def _under(choice: Any, one: _Direction) -> Any:
    def run() -> Tensor:
        with backend.forced(choice):
            return one.run()

    return run


def overlap(bench: Bench, cell: Cell) -> Result:
    """Forward+backward with dA/dB beside dx and after it, where the backend has a switch for it."""
    if "overlap" not in _env.Settings.__dataclass_fields__:
        return {"note": "this backend has no switch for overlap"}
    one, runs = Linear(cell, bench.plan), {"frozen": None}
    runs["frozen"] = one.both("frozen")
    for value in ("1", "0"):
        runs[f"overlap={value}"] = _with_environment("PEFTKERN_OVERLAP", value, one.both("peftkern"))
    return {"times": measure.summary(bench.time(runs), "frozen")}


def _with_environment(name: str, value: str, run: Any) -> Any:
    def call() -> Any:
        before = os.environ.get(name)
        os.environ[name] = value
        _env.settings.cache_clear()
        try:
            return run()
        finally:
            os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)
            _env.settings.cache_clear()

    return call


# ------------------------------------------------------------------------------------------------------------ decode


def decode(bench: Bench) -> list[Task]:
    """M up to 16 without gradients, against weights with the update merged in."""
    plan, found = bench.plan, []
    rows = [M for M in _DECODE_ROWS if M in plan.rows] or list(plan.rows[-1:])
    for M in rows:
        for layer in plan.layers:
            cell = plan.cell(layer, M, p=0.0, adapter=F32)
            found.append(Task(f"decode {key_of(cell)}", lambda cell=cell: decode_cell(bench, cell), 90.0, about(cell)))
    return found


def decode_cell(bench: Bench, cell: Cell) -> Result:
    """Latency of one row block by events, by graph replay and by the host; kernels a call."""
    one = Linear(cell, bench.plan)
    errors, reason = one.check("peftkern")
    if reason is not None:
        return {"status": WRONG, "error": reason}
    one.forget_truth()
    o = one.o
    x, A, B = o.x.detach(), o.A.detach(), o.B.detach()
    merged = (o.W.double() + SCALING * B.double() @ A.double()).to(cell.dtype)
    calls = {
        "merged": lambda: F.linear(x, merged), "frozen": lambda: F.linear(x, o.W),
        "peftkern": lambda: peftkern.lora_linear(x, o.W, A, B, SCALING),
        "peft": lambda: linear.naive(o._replace(x=x, A=A, B=B), lambda value: value),
    }  # fmt: skip
    runs: dict[str, Any] = dict(calls)
    failed = {}
    with torch.inference_mode():
        if bench.plan.compare_graphs:
            for name in ("merged", "peftkern", "peft"):
                try:
                    runs[f"{name} graph"] = graphs.Captured(calls[name])
                except Exception as error:  # noqa: BLE001 - said in the record
                    failed[f"{name} graph"] = f"{type(error).__name__}: {str(error)[:300]}"
        samples = bench.time(runs, "merged")
        result: Result = {
            "choice": backend.chosen(cell), "times": measure.summary(samples, "merged"),
            "host": {name: round(bench.timer.host(run, 0.004) * 1e6, 2) for name, run in calls.items()},
            "errors": errors,
        }  # fmt: skip
        if "merged graph" in samples:
            result["graphs"] = measure.summary(
                {name: values for name, values in samples.items() if name.endswith("graph")}, "merged graph"
            )
        if cell.device == "cuda":
            result["kernels"] = graphs.kernels_of(calls["peftkern"])
    return result | ({"excluded": failed} if failed else {})
