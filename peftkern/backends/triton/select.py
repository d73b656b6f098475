"""Which schedule and tile a problem gets: override, the user's cache, the shipped table, the analytic estimate.

It never raises on an unknown GPU and never measures anything: that is ``python -m peftkern tune``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from peftkern import _env
from peftkern.backends.triton import tables, tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.estimate import estimate
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.call import Problem

# Under the batch-invariant mode every M is run as this one would be, so that a row's result has no neighbours.
_INVARIANT_M = 256

_forgotten = 0  # how often ``forget`` was called
_override: Choice | None = None  # the whole process's: autograd runs backward in threads of its own


@contextlib.contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Within the block, in every thread, what ``choice`` supports runs by it and the rest raises. For measuring."""
    global _override
    before, _override = _override, choice
    try:
        yield
    finally:
        _override = before


def pass_of(problem: Problem, backward: bool) -> Pass:
    """The key of one direction, as schedules and tiles are chosen by it."""
    if _env.settings().batch_invariant:
        return Pass(dataclasses.replace(problem, M=_INVARIANT_M), backward, invariant=True)
    return Pass(problem, backward)


def choose(launch: Pass, arch: Arch) -> Choice:
    """The schedule and tile of one direction. Raises: RuntimeError if what is forced cannot run it."""
    choice = _override
    if choice is None:
        return _choose(launch, arch, tiles.BANK if launch.problem.several_adapters else _env.settings().schedule)
    reason = tiles.supports(launch, choice, arch)
    if reason is not None:
        raise RuntimeError(f"{choice.schedule} with tile {choice.tile} cannot run this call: {reason}")
    return choice


def accumulating(launch: Pass, arch: Arch) -> Choice:
    """The tile by which a low-rank product is added to a Z that is there already: the same for every row anyway."""
    return _choose(dataclasses.replace(launch, invariant=False), arch, tiles.LIBRARY)


@functools.lru_cache(maxsize=4096)
def _choose(launch: Pass, arch: Arch, schedule: str) -> Choice:
    if schedule == "auto":
        for table in tables.tables(arch):
            choice = table.lookup(launch)
            if choice is None:
                continue
            reason = tiles.supports(launch, choice, arch)
            if reason is None:
                return choice
            tables.complain(table, reason)
    return estimated(launch, arch, schedule)


def estimated(launch: Pass, arch: Arch, schedule: str = "auto") -> Choice:
    """What the analytic estimate says, whatever the tables do. Raises: RuntimeError if nothing is legal."""
    legal = [choice for choice in tiles.choices(launch, arch) if schedule in ("auto", choice.schedule)]
    if not legal:
        reasons = tiles.refusals(launch, arch)
        reason = reasons.get(schedule, "; ".join(f"{name}: {text}" for name, text in reasons.items()))
        raise RuntimeError(f"PEFTKERN_SCHEDULE={schedule} cannot run this call: {reason}")
    return min(legal, key=lambda choice: estimate(launch, choice, arch))


def state() -> tuple[Choice | None, int]:
    """What choices depend on beside the call and the environment: equal while a call would be given the same."""
    return _override, _forgotten


def forget() -> None:
    """Make the next call look at the environment and the tables again."""
    global _forgotten
    _forgotten += 1
    _choose.cache_clear()
    tables.forget()
