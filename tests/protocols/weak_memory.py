"""A weak memory for ``interleave``: store buffers, stale loads, and what release and acquire order.

Every program owns a buffer of plain stores that reach memory late and in any order, and a clock: how many stores of
each program it is sure to see. A release empties the buffer and leaves the clock at the location it writes, an acquire
takes the clock found there. A plain load may return any value whose overwriting the program is not sure to see.

Not modelled: sequential consistency of fences, which Triton has none of; one clock for reads (two plain loads of one
address may see the new value, then the old); loads delayed past later accesses of their own program; caches that a
release elsewhere happens to flush. An atomic always finds the newest value in memory, and it is done at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BUFFERED = 32  # stores that one program holds back at most
KEPT = 8  # overwritten values remembered for each address
STALE = 0.5  # share of loads that look for stale values


class RawMemory(NamedTuple):
    """Access to the real memory: one-dimensional uint64 addresses, one-dimensional values."""

    load: Callable[[np.ndarray, np.dtype], np.ndarray]
    store: Callable[[np.ndarray, np.ndarray], None]


class Atomic(NamedTuple):
    """An atomic that has just run: what each element found, whether it wrote (a failed compare-and-swap does not) and
    whether the value changed; and what its semantics order."""

    addresses: np.ndarray
    old: np.ndarray
    wrote: np.ndarray
    changed: np.ndarray
    acquire: bool
    release: bool


class _Store(NamedTuple):
    """A plain store that is not in memory yet; ``number`` counts its program's stores."""

    addresses: np.ndarray
    values: np.ndarray
    number: int

    def touches(self, addresses: np.ndarray, size: int) -> bool:
        """Whether it shares a byte with elements of ``size`` bytes there; errs towards yes if the sizes differ."""
        mine = self.values.itemsize
        first, last = int(addresses.min()), int(addresses.max())
        if int(self.addresses.min()) >= last + size or first >= int(self.addresses.max()) + mine:
            return False
        return mine != size or bool(np.isin(self.addresses, addresses).any())


class _Overwritten(NamedTuple):
    """A value that was in memory until store ``number`` of program ``writer``, the ``nth`` to this address."""

    writer: int
    number: int
    nth: int
    value: bytes


class WeakMemory:
    """The memory of one launch. The real memory always holds the newest drained value, so that nothing is lost here.

    Args: raw: the real memory; rng: makes every choice; programs: of the grid; barriers: a release covers only the
        stores before its program's last barrier, as on a GPU, where one thread releases what many threads stored.
    """

    def __init__(self, raw: RawMemory, rng: random.Random, programs: int, barriers: bool) -> None:
        self.raw, self.rng, self.barriers = raw, rng, barriers
        self.stale = 0  # elements that a load returned although they were overwritten
        self.drain_rate = rng.choice((0.02, 0.2, 0.6))
        self._buffers: list[list[_Store]] = [[] for _ in range(programs)]
        self._clocks = np.zeros((programs, programs), dtype=np.int64)
        self._issued = [0] * programs
        self._fenced = [0] * programs  # how many of them were issued before the program's last barrier
        self._overwritten: dict[int, list[_Overwritten]] = {}
        self._released: dict[int, np.ndarray] = {}  # the clock that an acquire finds at an address
        self._met: list[dict[int, int]] = [{} for _ in range(programs)]  # overwritings an atomic of a program has met

    # ------------------------------------------------------------------------------------------------ plain accesses

    def store(self, program: int, addresses: np.ndarray, values: np.ndarray) -> None:
        """Put a store of ``program`` into its buffer, sometimes torn in two."""
        if not addresses.size:
            return
        self._issued[program] += 1
        number, buffer = self._issued[program], self._buffers[program]
        cut = self.rng.randrange(addresses.size) if self.rng.random() < 0.5 else 0
        for part in (slice(0, cut), slice(cut, None)):
            if addresses[part].size:
                buffer.append(_Store(addresses[part].copy(), values[part].copy(), number))
        while len(buffer) > BUFFERED:
            self._drain(program, self.rng.randrange(len(buffer)))

    def settle(self, program: int, addresses: np.ndarray, size: int) -> bool:
        """Drain ``program``'s own stores to these addresses, so that it sees them; returns whether there were any."""
        buffer, drained = self._buffers[program], False
        while addresses.size:
            at = next((i for i, store in enumerate(buffer) if store.touches(addresses, size)), None)
            if at is None:
                break
            self._drain(program, at)
            drained = True
        return drained

    def age(self, program: int, addresses: np.ndarray, values: np.ndarray) -> None:
        """Replace some of the ``values`` that a plain load of ``program`` found by stale ones."""
        if not self._overwritten or self.rng.random() >= STALE:
            return
        oldest, known = self.rng.random() < 0.5, self._overwritten
        for i, address in enumerate(addresses.tolist()):
            if address not in known:
                continue
            choices = self._choices(program, address, values.itemsize)
            if choices and (oldest or self.rng.random() < 0.5):
                value = choices[-1] if oldest else self.rng.choice(choices)
                values[i] = np.frombuffer(value, dtype=values.dtype)[0]
                self.stale += 1

    def _choices(self, program: int, address: int, size: int) -> list[bytes]:
        """The stale values that ``program`` may still find at ``address``, the newest first."""
        choices, met = [], self._met[program].get(address, 0)
        for past in reversed(self._overwritten[address]):
            if past.writer == program or past.nth <= met or self._clocks[program, past.writer] >= past.number:
                break
            if len(past.value) == size:
                choices.append(past.value)
        return choices

    # ------------------------------------------------------------------------------------------------------- atomics

    def before_atomic(self, program: int, addresses: np.ndarray, size: int, release: bool) -> None:
        """Drain what must be in memory before an atomic of ``program`` at ``addresses``."""
        self.settle(program, addresses, size)
        buffer, covered = self._buffers[program], self._covered(program)
        while release and buffer and buffer[0].number <= covered:
            choices = [i for i, store in enumerate(buffer) if store.number <= covered]
            self._drain(program, self.rng.choice(choices))

    def after_atomic(self, program: int, atomic: Atomic) -> None:
        """Account for an atomic; a read-modify-write keeps the clock that an earlier release left at the address."""
        addresses = atomic.addresses.tolist()
        mine = self._clocks[program].copy()
        mine[program] = self._covered(program)
        for address, written in zip(addresses, atomic.wrote.tolist(), strict=True):
            clock = self._released.get(address)
            if atomic.acquire and clock is not None:
                np.maximum(self._clocks[program], clock, out=self._clocks[program])
            if atomic.release and written:
                self._released[address] = mine if clock is None else np.maximum(mine, clock)
        changed = atomic.changed
        if changed.any():
            self._issued[program] += 1
            self._remember(program, self._issued[program], atomic.addresses[changed], atomic.old[changed])
        for address in addresses:
            past = self._overwritten.get(address)
            if past:
                self._met[program][address] = past[-1].nth

    def forget_release(self, addresses: np.ndarray) -> None:
        """A store that is no read-modify-write: an acquire that reads it learns nothing of earlier releases."""
        for address in addresses.tolist():
            self._released.pop(address, None)

    def barrier(self, program: int) -> None:
        """``tl.debug_barrier()``: the program's next release covers all that it has stored so far."""
        self._fenced[program] = self._issued[program]

    def _covered(self, program: int) -> int:
        return self._fenced[program] if self.barriers else self._issued[program]

    # ------------------------------------------------------------------------------------------------------ draining

    def drain_some(self) -> bool:
        """Now and then let one store of some program reach memory; returns whether one did."""
        if self.rng.random() >= self.drain_rate:
            return False
        holders = [program for program, buffer in enumerate(self._buffers) if buffer]
        if holders:
            program = self.rng.choice(holders)
            self._drain(program, self.rng.randrange(len(self._buffers[program])))
        return bool(holders)

    def drain_all(self) -> bool:
        """Let every store reach memory, programs and stores in random order; returns whether there was one."""
        holders = [program for program, buffer in enumerate(self._buffers) for _ in buffer]
        self.rng.shuffle(holders)
        for program in holders:
            if self._buffers[program]:  # draining one takes older ones to the same addresses along
                self._drain(program, self.rng.randrange(len(self._buffers[program])))
        return bool(holders)

    def _drain(self, program: int, at: int) -> None:
        """Let a store reach memory, after older ones of its program to the same addresses."""
        buffer = self._buffers[program]
        store = buffer.pop(at)
        while True:
            older = next((i for i in range(at) if buffer[i].touches(store.addresses, store.values.itemsize)), None)
            if older is None:
                break
            before = len(buffer)
            self._drain(program, older)
            at -= before - len(buffer)
        old = self.raw.load(store.addresses, store.values.dtype)
        self.raw.store(store.addresses, store.values)
        self._remember(program, store.number, store.addresses, old)
        self.forget_release(store.addresses)

    def _remember(self, program: int, number: int, addresses: np.ndarray, old: np.ndarray) -> None:
        size, content = old.itemsize, np.ascontiguousarray(old).tobytes()
        for i, address in enumerate(addresses.tolist()):
            past = self._overwritten.setdefault(address, [])
            nth = past[-1].nth + 1 if past else 1
            past.append(_Overwritten(program, number, nth, content[i * size : (i + 1) * size]))
            del past[:-KEPT]
