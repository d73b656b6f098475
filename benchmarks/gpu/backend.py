"""What a part needs of the backends: to force a schedule and tile, to say what was chosen, to leave out failures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.task import ERROR, OK, OUT_OF_MEMORY, REFUSED, Result
from benchmarks.linear import SCALING, Cell, Operands
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.arch import Arch, arch_of
from peftkern.backends.triton.estimate import estimate
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.call import Pair, Problem
from peftkern.ops import dispatch
from peftkern.weights import DenseWeight

DIRECTIONS = (("forward", False), ("backward", True))


def arch_here(device: str) -> Arch:
    """The chip that the plan runs on."""
    return arch_of(torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device))


def legal(problem: Problem, backward: bool, schedule: str, arch: Arch) -> list[Choice]:
    """The legal choices of a schedule, the most promising by the estimate first."""
    launch = Pass(problem, backward)
    found = [choice for choice in tiles.choices(launch, arch) if choice.schedule == schedule]
    return sorted(found, key=lambda choice: estimate(launch, choice, arch))


def refusal(problem: Problem, backward: bool, schedule: str, arch: Arch) -> str:
    """Why a schedule has no legal choice."""
    return tiles.refusals(Pass(problem, backward), arch).get(schedule, "no legal tile")


@contextlib.contextmanager
def forced(choice: Choice | None) -> Iterator[None]:
    """Direct calls of the backend run by ``choice`` within the block. (Autograd's threads do not see the override.)"""
    with contextlib.nullcontext() if choice is None else select.forced(choice):
        yield


def operands_of(cell: Cell, o: Operands, rng_state: Tensor | None) -> Pair:
    """A cell's operands, as backends take them."""
    A, B = o.A.detach(), o.B.detach()
    return Pair(DenseWeight(o.W), A, B, None, None, SCALING, None, cell.p, rng_state, "base")


def chosen(cell: Cell) -> dict[str, str]:
    """Which backend, schedule and tile a cell gets in each direction, or why that cannot be said."""
    problem = Problem(
        cell.device, cell.M, cell.K, cell.N, cell.r, cell.dtype, cell.adapter_dtype, dropout=cell.p > 0
    )  # fmt: skip
    try:
        backend = dispatch.select(problem, "auto")
        if backend.name != "triton":
            return {"backend": backend.name}
        arch = arch_here(cell.device)
        found = {"backend": backend.name}
        for name, backward in DIRECTIONS:
            choice = select.choose(select.pass_of(problem, backward), arch)
            found[name] = f"{choice.schedule} {choice.tile}"
        return found
    except Exception as error:  # noqa: BLE001 - a record, not a decision
        return {"backend": f"unknown: {error}"}


# ------------------------------------------------------------------------------------------------------- exclusions


def exclusions(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """What correctness found wrong and what broke the tuner's device, as {schedule, dtype, rank, tile}; None is all.

    A wrong, hung or crashed run of a schedule's y, s or dx excludes the schedule for that dtype; one that only raised,
    for that rank; a tile of the sweep, the tile. Wrong parameter gradients exclude no schedule: they are not its work,
    and every timed call that has them is checked by itself.
    """
    found = []
    for result in results.values():
        status, about = result.get("status"), result.get("failed") or result.get("about") or {}
        if "schedule" not in about or status in (OK, REFUSED, OUT_OF_MEMORY):
            continue
        wrong = {failure["name"] for failure in result.get("failures", ())}
        if wrong and not wrong & {"y", "s", "dx", "repeat y", "repeat dx"}:
            continue
        rank = about.get("padded") if status == ERROR else None
        found.append({"schedule": about["schedule"], "dtype": about["dtype"], "rank": rank, "tile": about.get("tile")})
    return found


def exclude(excluded: Iterable[Mapping[str, Any]]) -> None:
    """Make this process's selection refuse what is excluded, in every way that a choice comes about."""
    rules, genuine = list(excluded), tiles.supports
    if not rules:
        return

    def supports(launch: Pass, choice: Choice, arch: Arch) -> str | None:
        problem = launch.problem
        for rule in rules:
            if (
                rule["schedule"] == choice.schedule
                and rule["dtype"] == str(problem.dtype).removeprefix("torch.")
                and rule["rank"] in (None, tiles.padded(problem.R))
                and rule["tile"] in (None, str(choice.tile))
            ):
                return "it failed its correctness run on this device"
        return genuine(launch, choice, arch)

    tiles.supports = supports  # type: ignore[assignment]
    select.forget()
