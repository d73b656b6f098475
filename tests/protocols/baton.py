"""The scheduler of ``interleave``: programs as threads that pass a baton, one running at a time, the next chosen by a
seeded generator before every access to memory."""

from __future__ import annotations

import contextvars
import dataclasses
import os
import random
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from protocols.weak_memory import WeakMemory

PARKED = 8  # fruitless accesses after which a program rests until memory changes
REDRAW = 64  # steps after which other programs are slow


class Deadlock(RuntimeError):
    """No program in flight gets on; the message names each and its source line."""


class _Abandoned(BaseException):
    """Ends a program whose launch has failed; no handler of ordinary exceptions may catch it."""


class Options(NamedTuple):
    """See ``interleaved``."""

    max_resident: int | None
    shuffled: bool
    patience: int
    max_steps: int


@dataclasses.dataclass
class LaunchRecord:
    """One launch: ``schedule`` has the program of every access to memory, by its place in the grid, last axis fastest;
    ``stale`` counts the overwritten elements that plain loads returned."""

    kernel: str
    grid: tuple[int, ...]
    schedule: list[int] = dataclasses.field(default_factory=list)
    stale: int = 0

    @property
    def switches(self) -> int:
        """How often another program went on."""
        return sum(a != b for a, b in zip(self.schedule, self.schedule[1:], strict=False))


class Program:
    """A program of the grid; it has a thread from its first step on."""

    def __init__(self, number: int, index: tuple) -> None:
        self.number, self.index = number, index
        self.baton = threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.seen: set[int] = set()
        self.seen_at = 0  # the change of memory since which ``seen`` and ``repeats`` count
        self.repeats = 0


class Launch:
    """All programs of a grid, run to their end.

    Args: options; rng: makes every choice; record: to fill; indices: of the programs; program: runs one; enter: sets
        the interpreter's grid index; memory: None for the real one.
    """

    def __init__(
        self,
        options: Options,
        rng: random.Random,
        record: LaunchRecord,
        indices: list[tuple],
        program: Callable[[], None],
        enter: Callable[[tuple], None],
        memory: WeakMemory | None,
    ) -> None:
        self.options, self.rng, self.record, self.memory = options, rng, record, memory
        self._program, self._enter = program, enter
        self._waiting = [Program(number, index) for number, index in enumerate(indices)]
        if options.shuffled:
            rng.shuffle(self._waiting)
        self._resident: list[Program] = []
        self._changes = 0
        self._stay = rng.choice((0.0, 0.5, 0.9))
        self._slow: set[int] = set()
        self._failure: BaseException | None = None
        self._ended = threading.Semaphore(0)
        self._context = contextvars.copy_context()  # numpy's errstate, for one
        self.current = self._waiting[0]

    def run(self) -> None:
        """Run all programs. Raises: Deadlock, or what a program raised."""
        self._admit()
        self._hand(self._choose())
        try:
            self._ended.acquire()
        except BaseException as interrupt:
            self._failure = interrupt
            self._ended.acquire()
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------------------ called by the program that runs

    def step(self) -> int:
        """Let others run before an access to memory; returns the number of the program that called."""
        me = self.current
        if self.memory is not None and self.memory.drain_some():
            self.changed()
        chosen = self._choose()
        if self._failure is None and chosen is not me:
            self._hand(chosen)
            me.baton.acquire()
        if self._failure is not None:
            raise _Abandoned
        self._enter(me.index)
        self.record.schedule.append(me.number)
        if len(self.record.schedule) >= self.options.max_steps:
            self._fail(f"no end after {self.options.max_steps} accesses to memory")
            raise _Abandoned
        return me.number

    def changed(self) -> None:
        """Memory has changed: who spins may find something new."""
        self._changes += 1

    def saw(self, access: tuple) -> None:
        """The running program has read; the same access with the same result, in unchanged memory, is spinning."""
        me, key = self.current, hash(access)
        if me.seen_at != self._changes:
            me.seen_at, me.repeats = self._changes, 0
            me.seen.clear()
        me.repeats = me.repeats + 1 if key in me.seen else 0
        me.seen.add(key)

    # ------------------------------------------------------------------------------------------------- who goes next

    def _spun(self, program: Program) -> int:
        return program.repeats if program.seen_at == self._changes else 0

    def _choose(self) -> Program:
        """The next program; the present one, with ``_failure`` set, if nobody gets on."""
        ready = [program for program in self._resident if self._spun(program) < PARKED]
        if not ready:
            tired = min(self._resident, key=self._spun)
            if self._spun(tired) < self.options.patience:
                return tired
            if self.memory is None or not self.memory.drain_all():
                self._fail("no program in flight gets on")
                return self.current
            self.changed()
            ready = self._resident
        if len(self.record.schedule) % REDRAW == 0:
            self._slow = {program.number for program in self._resident if self.rng.random() < 0.3}
        if self.current in ready and self.rng.random() < self._stay:
            return self.current
        fast = [program for program in ready if program.number not in self._slow]
        return self.rng.choice(fast if fast and self.rng.random() < 0.95 else ready)

    def _admit(self) -> None:
        most = self.options.max_resident or len(self._waiting) + len(self._resident)
        while self._waiting and len(self._resident) < most:
            self._resident.append(self._waiting.pop(0))

    def _fail(self, reason: str) -> None:
        lines = [f"  program {program.index}: {_where(program)}" for program in self._resident]
        waiting = f"; {len(self._waiting)} programs have not started" if self._waiting else ""
        self._failure = Deadlock(f"{self.record.kernel}: {reason}{waiting}\n" + "\n".join(lines))

    # ------------------------------------------------------------------------------------------------------- threads

    def _hand(self, program: Program) -> None:
        self.current = program
        if program.thread is None:
            program.thread = threading.Thread(target=self._context.copy().run, args=(self._body, program), daemon=True)
            program.thread.start()
        else:
            program.baton.release()

    def _body(self, program: Program) -> None:
        try:
            self._enter(program.index)
            self._program()
        except _Abandoned:
            pass
        except BaseException as error:
            self._failure = self._failure or error
        self._resident.remove(program)
        self._admit()
        chosen = self._choose() if self._resident and self._failure is None else None
        if self._failure is not None:  # one after another, those that have started end too
            chosen = next((other for other in self._resident if other.thread is not None), None)
        if chosen is None:
            self._ended.release()
        else:
            self._hand(chosen)


def _where(program: Program) -> str:
    """The line of the kernel at which a program stands."""
    import triton

    frame = sys._current_frames().get(program.thread.ident or 0) if program.thread is not None else None
    ours = (os.path.dirname(__file__), os.path.dirname(triton.__file__), os.path.dirname(threading.__file__))
    while frame is not None:
        directory = os.path.dirname(frame.f_code.co_filename)
        if not directory.startswith(ours[:2]) and directory != ours[2]:
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "not started"
