"""The search: candidates by their estimate, timed side by side, the slow ones dropped early, the winner checked.

How a candidate is timed and checked is given by a ``Bench``, the clock too, so that all of this runs without a GPU.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from peftkern.backends.triton import tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.estimate import estimate
from peftkern.backends.triton.tiles import Choice, Pass

FINALISTS = 3
_FIRST_ROUNDS = 3  # of the first heat; each heat has twice as many, for half the candidates
_FINAL_ROUNDS = 15
_HOPELESS = 1.5  # times the best median: dropped at once
_LEAST_SECONDS = 4.0  # what a cell may take, however many are left: a short budget does the first ones well


@dataclass(frozen=True)
class Cell:
    """One thing to tune: a direction of a problem, and the dropout that it is run with."""

    launch: Pass
    dropout_p: float

    @property
    def group(self) -> tuple[int, int, int]:
        """Cells are written out together whose shape and rows are the same."""
        problem = self.launch.problem
        return problem.K, problem.N, problem.M


@dataclass
class Outcome:
    """The result of a cell's search.

    ``estimated`` is the best estimate of the ``legal`` ones; ``winner`` is None where nothing may be written, and
    ``note`` says why; ``seconds`` are medians of what was timed, ``rejected`` what failed or was wrong.
    """

    cell: Cell
    legal: int = 0
    estimated: Choice | None = None
    winner: Choice | None = None
    seconds: dict[Choice, float] = field(default_factory=dict)
    rejected: dict[Choice, str] = field(default_factory=dict)
    note: str = ""


class DeviceLost(RuntimeError):
    """The device cannot be used any more, so that nothing more can be measured. ``choice``: what ran when it failed."""

    def __init__(self, text: str, choice: Choice | None = None) -> None:
        super().__init__(text)
        self.choice = choice


class Bench(Protocol):
    """A way to run the candidates of one cell."""

    def sample(self, choice: Choice) -> float:
        """Seconds of one run; the first one compiles. Raises whatever a candidate that cannot run raises."""
        ...

    def check(self, choice: Choice) -> str | None:
        """The fault of its result, or None."""
        ...


class _Timed:
    """The samples of the candidates that are still in the race."""

    def __init__(self, bench: Bench, outcome: Outcome) -> None:
        self.bench, self.outcome = bench, outcome
        self.samples: dict[Choice, list[float]] = {}

    def take(self, choice: Choice, keep: bool = True) -> bool:
        """One more sample; False where the candidate cannot run."""
        try:
            seconds = self.bench.sample(choice)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - a candidate that does not compile or fit is out, not the search
            self.outcome.rejected[choice] = _first_line(error)
            self.samples.pop(choice, None)
            return False
        self.samples.setdefault(choice, [])
        if keep:
            self.samples[choice].append(seconds)
        return True

    def rounds(self, alive: list[Choice], count: int, late: Callable[[], bool]) -> list[Choice]:
        """Interleaved rounds, so that a drift of the clocks meets all alike; the best first. At least one is run."""
        for done in range(count):
            if done and late():
                break
            alive = [choice for choice in alive if self.take(choice)]
        return self.ranked(alive)

    def ranked(self, alive: Iterable[Choice]) -> list[Choice]:
        """The candidates by their medians."""
        return sorted(alive, key=self.median)

    def median(self, choice: Choice) -> float:
        """The median of all its samples."""
        return statistics.median(self.samples[choice])


def _first_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def candidates(launch: Pass, arch: Arch) -> list[Choice]:
    """Every legal choice, the best estimate first."""
    return sorted(tiles.choices(launch, arch), key=lambda choice: estimate(launch, choice, arch))


def search(cell: Cell, legal: Sequence[Choice], bench: Bench, late: Callable[[], bool]) -> Outcome:
    """The fastest candidate whose result is right.

    Args:
        cell: what is tuned; legal: its candidates, the best estimate first; bench: how they run.
        late: whether the cell's time is over; then no more candidates are compiled, and no more rounds are run.
    """
    outcome = Outcome(cell, len(legal), legal[0] if legal else None)
    timed = _Timed(bench, outcome)
    alive: list[Choice] = []
    for choice in legal:
        if len(alive) >= 2 and late():
            break
        if timed.take(choice, keep=False):  # it compiles, and warms up
            alive.append(choice)
    everyone = alive = timed.rounds(alive, _FIRST_ROUNDS, late)
    heats = _FIRST_ROUNDS
    while len(alive) > FINALISTS:
        best = timed.median(alive[0])
        fair = [choice for choice in alive if timed.median(choice) <= _HOPELESS * best]
        alive, heats = fair[: max(FINALISTS, math.ceil(len(alive) / 2))], heats * 2
        if len(alive) > FINALISTS:
            alive = timed.rounds(alive, heats, late)
    alive = timed.rounds(alive, _FINAL_ROUNDS, late)
    outcome.seconds = {choice: timed.median(choice) for choice in everyone if choice in timed.samples}
    _elect(outcome, alive, timed.ranked(choice for choice in outcome.seconds if choice not in alive), bench)
    if outcome.winner is None:
        outcome.note = "every candidate failed or is wrong" if legal else "nothing is legal"
    return outcome


def _elect(outcome: Outcome, finalists: list[Choice], others: list[Choice], bench: Bench) -> None:
    """Check every finalist, and of the others, best first, as many as it takes to find one that is right."""
    for choice in itertools.chain(finalists, others):
        if outcome.winner is not None and choice not in finalists:
            return
        try:
            reason = bench.check(choice)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - what cannot be checked may not win
            reason = f"it cannot be checked: {_first_line(error)}"
        if reason is not None:
            outcome.rejected[choice] = reason
        elif outcome.winner is None:
            outcome.winner = choice


@dataclass(frozen=True)
class Budget:
    """A clock, and when it is over. ``seconds`` may be infinite."""

    clock: Callable[[], float]
    end: float

    @classmethod
    def of(cls, clock: Callable[[], float], seconds: float) -> Budget:
        """The budget that begins now."""
        return cls(clock, clock() + seconds)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.end - self.clock()

    def share(self, cells: int) -> Callable[[], bool]:
        """A function that says whether the next of so many cells has used its share."""
        end = min(self.end, self.clock() + max(_LEAST_SECONDS, self.left / cells))
        return lambda: self.clock() >= end


def tune(
    cells: Sequence[Cell], arch: Arch, bench_of: Callable[[Cell], Bench], budget: Budget,
    save: Callable[[list[Outcome]], None], report: Callable[[int, Outcome], None],
) -> list[Outcome]:  # fmt: skip
    """Search cell after cell until the budget is used.

    Args:
        cells: in the order of their value; bench_of: operands and timing of one.
        save: called with the outcomes of each shape and number of rows, and with what is finished when Ctrl-C or a lost
            device ends the search early, which is then raised.
        report: called after each cell, with how many are done.
    """
    outcomes: list[Outcome] = []
    for _, group in itertools.groupby(cells, key=lambda cell: cell.group):
        finished: list[Outcome] = []
        try:
            for cell in group:
                if budget.left <= 0:
                    break
                late = budget.share(len(cells) - len(outcomes) - len(finished))
                finished.append(_one(cell, arch, bench_of, late))
                report(len(outcomes) + len(finished), finished[-1])
        finally:
            outcomes += finished
            if finished:
                save(finished)
        if budget.left <= 0:
            break
    return outcomes


def _one(cell: Cell, arch: Arch, bench_of: Callable[[Cell], Bench], late: Callable[[], bool]) -> Outcome:
    legal = candidates(cell.launch, arch)
    try:
        bench = bench_of(cell)
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 - most likely operands that do not fit into the memory
        return Outcome(cell, len(legal), note=_first_line(error))
    return search(cell, legal, bench, late)
