"""The kernels of the timed tasks, compiled into Triton's cache by many processes before anything is timed.

Timed parts have one process, which would compile one kernel after another while the others' cores are idle, and a tuner
that waits for a compiler times what it has by then. The launches are those that the tasks build themselves, on tensors
without memory; a kernel is compiled, loaded and its launcher built, and not started.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import host
from benchmarks.gpu import backend
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import NAMES, Plan, cell_of, key_of
from benchmarks.gpu.task import Result, Task
from benchmarks.linear import Cell
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.tiles import SPLIT, Choice, Pass
from peftkern.backends.triton.tune import search
from peftkern.call import Pair, PairNeeds
from peftkern.weights import DenseWeight

_LIMIT = 60.0
_HEAD = 48
_EVERY = ("tune ", "schedules ")  # tasks that run all choices of a cell; others run what is selected for it
_FORWARD = "decode "  # tasks without gradients
_NEEDS = PairNeeds(True, True, True, False, False)


def tasks(bench: Bench, timed: Sequence[Task]) -> list[Task]:
    """What is selected for the first cells, every choice and direction where a task compares them, the other cells.

    A key says all that a binary depends on, so that each is compiled by one process.
    """
    plan = bench.plan
    if plan.backend != "triton" and plan.stand_in is None:
        return []
    arch, every, rest = _arch(plan), {}, {}
    for task in timed:
        if "p" not in (task.about or {}):
            continue  # no linear of one adapter
        cell = cell_of(plan, task.about)
        if task.key.startswith(_EVERY):
            for name, backward in backend.DIRECTIONS:
                for choice in search.candidates(Pass(_problem(cell), backward), arch):
                    key = f"{name} {_kind(cell, choice, backward, arch)}"
                    run = functools.partial(_every, plan, cell, choice, backward)
                    every.setdefault(key, Task(key, run, _LIMIT))
        else:
            forward = task.key.startswith(_FORWARD)
            key = f"{'forward' if forward else 'selected'} {key_of(cell)}"
            rest.setdefault(key, Task(key, functools.partial(_selected, plan, cell, not forward), _LIMIT))
    selected = list(rest.values())
    return [*selected[:_HEAD], *every.values(), *selected[_HEAD:]]


def _problem(cell: Cell) -> Any:
    return _operands(cell).problem(cell.M, cell.dtype)


def _kind(cell: Cell, choice: Choice, backward: bool, arch: Arch) -> str:
    """What the binaries of a choice depend on: Triton compiles anew for a 1 and for what is no multiple of 16."""
    tile = str(choice.tile).replace(f" resident={choice.tile.resident}", "")
    sizes = "x".join("1" if size == 1 else "n" if size % 16 else "16n" for size in (cell.M, cell.K, cell.N))
    found = f"{choice.schedule} {tile} {sizes} r={cell.r} {'p' if cell.p else 'p=0'}"
    found += f" {NAMES[cell.dtype]}/{NAMES[cell.adapter_dtype]}"
    if choice.one_pass:
        return found
    thin = tiles.shrink_tile(Pass(_problem(cell), backward), arch)
    return f"{found} after shrink {thin.BLOCK_M}x{thin.BLOCK_COLS} slices={thin.SLICES}"


def _operands(cell: Cell) -> Pair:
    """A cell's operands as ``backend.operands_of`` gives them, without memory."""

    def empty(*shape: int, dtype: torch.dtype = cell.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    A, B = empty(cell.r, cell.K, dtype=cell.adapter_dtype), empty(cell.N, cell.r, dtype=cell.adapter_dtype)
    state = empty(2, dtype=torch.int64) if cell.p else None
    return Pair(DenseWeight(empty(cell.N, cell.K)), A, B, None, None, 1.75, None, cell.p, state, "base")


def _rows(cell: Cell, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(cell.M, columns, dtype=dtype or cell.dtype, device="meta")


def _every(plan: Plan, cell: Cell, choice: Choice, backward: bool) -> Result:
    """One choice in one direction; of split's dx also as it runs beside the parameters' gradients."""
    from peftkern.backends.triton import schedule

    with _gpu(plan) as arch, select.forced(choice):
        X = _rows(cell, cell.N if backward else cell.K)
        forks = (False, True) if backward and choice.schedule == SPLIT else (False,)
        made = [schedule.produce(_operands(cell), X, backward, arch, forked) for forked in forks]
        return _compiled([step for one in made for step in one.steps])


def _selected(plan: Plan, cell: Cell, backward: bool) -> Result:
    """What a call of the cell launches, with its gradients where it has some.

    These are launched in one way beside a dx that makes t, and in another behind a ``shrink`` that has made it; tuning
    may yet choose either.
    """
    from peftkern.backends.triton import schedule

    with _gpu(plan) as arch:
        operands, x, dy = _operands(cell), _rows(cell, cell.K), _rows(cell, cell.N)
        forward = schedule.produce(operands, x, False, arch)
        steps = list(forward.steps)
        legal = search.candidates(Pass(_problem(cell), True), arch) if backward else []
        best = {choice.one_pass: choice for choice in reversed(legal)}
        for choice in (None, *best.values()) if backward else ():
            with backend.forced(choice):
                steps += schedule.backward(operands, dy, x, forward.T, _NEEDS, arch).all
        return _compiled(steps)


def _compiled(steps: Sequence[Any]) -> Result:
    """Compile and load the kernels of launches, build their launchers, and say what each takes of a unit."""
    from peftkern.backends.triton.launch import Launch

    found = {}
    for step in steps:
        if isinstance(step, Launch):
            kernel = step.kernel.warmup(grid=step.grid, **step.arguments, **step.options)
            kernel.run  # noqa: B018 - a property that loads the binary and compiles its launcher
            usage = {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared}
            found[f"{step.name} {kernel.hash[:8]}"] = usage
    return {"kernels": found}


def _arch(plan: Plan) -> Arch:
    return ARCHES[plan.stand_in] if plan.stand_in is not None else backend.arch_here(plan.device)


@contextlib.contextmanager
def _gpu(plan: Plan) -> Iterator[Arch]:
    """The device that is compiled for; in a rehearsal, the tests' stand-in for one."""
    with contextlib.nullcontext() if plan.stand_in is None else host.stand_in().gpu(plan.stand_in):
        yield _arch(plan)
