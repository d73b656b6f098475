"""Protocols between programs, right and wrong, under the interleaving harness: right ones pass every seed, wrong ones
are caught. TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from protocols.interleave import Deadlock, Log, interleaved

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.interpreter

SEEDS = range(20)
FEW = 4  # a handful: seeds, of 20, that must catch a mistake
TILES = 16  # of the ticket walk
ROWS, COLS, SPLITS, BLOCK = 3, 3, 3, 8


# ------------------------------------------------------------------------------------------------------- protocols


@triton.jit
def walk_kernel(counters, done, tiles, RESET: tl.constexpr):
    """Tiles by tickets; the last program to leave sets both counters back."""
    tile = tl.atomic_add(counters, 1, sem="relaxed")
    while tile < tiles:
        tl.store(done + tile, tl.load(done + tile) + 1)
        tile = tl.atomic_add(counters, 1, sem="relaxed")
    left = tl.atomic_add(counters + 1, 1, sem="acq_rel")
    if left == tl.num_programs(0) - 1:
        if RESET:
            tl.store(counters, 0)
            tl.store(counters + 1, 0)


@triton.jit
def flag_tile(x, t, flags, out, tile, rows, cols, BLOCK: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr,
              WAIT: tl.constexpr, BARRIER: tl.constexpr, LATE: tl.constexpr):  # fmt: skip
    """One tile: the producer of a row block stores T = 2 x and raises the flag, others wait for it; out = T + col."""
    row, col, lanes = tile // cols, tile % cols, tl.arange(0, BLOCK)
    producer = col == 0
    if LATE:  # the producer has the last ticket of all its row block
        producer = col == cols - 1
    if producer:
        tl.store(t + row * BLOCK + lanes, 2 * tl.load(x + row * BLOCK + lanes))
        if BARRIER:
            tl.debug_barrier()
        tl.atomic_xchg(flags + row, 1, sem=RELEASE)
    elif WAIT:
        while tl.atomic_add(flags + row, 0, sem=ACQUIRE) == 0:
            pass
    value = tl.load(t + row * BLOCK + lanes) + col
    tl.store(out + tile * BLOCK + lanes, value)


@triton.jit
def flag_kernel(x, t, flags, counters, out, rows, cols, BLOCK: tl.constexpr, RELEASE: tl.constexpr,
                ACQUIRE: tl.constexpr, WAIT: tl.constexpr, BARRIER: tl.constexpr, LATE: tl.constexpr,
                STATIC: tl.constexpr):  # fmt: skip
    """Producers and consumers; tiles by tickets, or by a static stride; the last program to leave resets everything."""
    programs = tl.num_programs(0)
    tile = tl.program_id(0)
    if not STATIC:
        tile = tl.atomic_add(counters, 1, sem="relaxed")
    while tile < rows * cols:
        flag_tile(x, t, flags, out, tile, rows, cols, BLOCK, RELEASE, ACQUIRE, WAIT, BARRIER, LATE)
        if STATIC:
            tile += programs
        else:
            tile = tl.atomic_add(counters, 1, sem="relaxed")
    left = tl.atomic_add(counters + 1, 1, sem="acq_rel")
    if left == programs - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        for row in range(rows):
            tl.store(flags + row, 0)


@triton.jit
def split_kernel(x, partial, arrived, out, SPLITS: tl.constexpr, BLOCK: tl.constexpr, SEM: tl.constexpr,
                 RESET: tl.constexpr, BARRIER: tl.constexpr):  # fmt: skip
    """Each program squares its part of a row; the last of a row to arrive adds them up and resets the row's counter."""
    row, part, lanes = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    at = (row * SPLITS + part) * BLOCK + lanes
    value = tl.load(x + at)
    tl.store(partial + at, value * value)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem=SEM) == SPLITS - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for other in range(SPLITS):
            total += tl.load(partial + (row * SPLITS + other) * BLOCK + lanes)
        tl.store(out + row * BLOCK + lanes, total)
        if RESET:
            tl.atomic_xchg(arrived + row, 0, sem="relaxed")


def walk(programs: int, reset: bool = True, **harness) -> bool:
    """Two launches, nothing reset between them; whether each did every tile once."""
    counters, done = torch.zeros(2, dtype=torch.int32), torch.zeros(TILES, dtype=torch.int32)
    right = True
    with interleaved(**harness):
        for launch in (1, 2):
            walk_kernel[(programs,)](counters, done, TILES, RESET=reset)
            right &= bool((done == launch).all())
    return right and not counters.any()


def flags(programs: int = 6, launches: int = 2, release="release", acquire="acquire", wait=True, barrier=True,
          late=False, static=False, **harness) -> bool:  # fmt: skip
    """Launches over new x, nothing but T and out poisoned between them; whether every tile of each is right."""
    counters, raised = torch.zeros(2, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int32)
    right = True
    with interleaved(**harness):
        for launch in range(launches):
            x = torch.arange(ROWS * BLOCK, dtype=torch.float32).reshape(ROWS, BLOCK) + 100 * launch
            t, out = torch.full_like(x, torch.nan), torch.full((ROWS, COLS, BLOCK), torch.nan)
            flag_kernel[(programs,)](x, t, raised, counters, out, ROWS, COLS, BLOCK, RELEASE=release, ACQUIRE=acquire,
                                     WAIT=wait, BARRIER=barrier, LATE=late, STATIC=static)  # fmt: skip
            right &= torch.equal(out, 2 * x[:, None] + torch.arange(COLS)[:, None])
    return right and not counters.any() and not raised.any()


def split(sem="acq_rel", reset=True, barrier=True, **harness) -> bool:
    """Two launches, only the partial sums and out poisoned between them; whether both are right."""
    x = torch.arange(ROWS * SPLITS * BLOCK, dtype=torch.float32).reshape(ROWS, SPLITS, BLOCK)
    arrived, right = torch.zeros(ROWS, dtype=torch.int32), True
    with interleaved(**harness):
        for _ in range(2):
            partial, out = torch.full_like(x, torch.nan), torch.full((ROWS, BLOCK), torch.nan)
            split_kernel[(ROWS, SPLITS)](x, partial, arrived, out, SPLITS, BLOCK, SEM=sem, RESET=reset, BARRIER=barrier)
            right &= torch.equal(out, (x * x).sum(1))
    return right and not arrived.any()


# ------------------------------------------------------------------------------------------- right ones, wrong ones

MEMORIES = [{}, {"weak_memory": True}, {"weak_memory": True, "barriers": True}]
WEAK = {"weak_memory": True}


@pytest.mark.parametrize("memory", MEMORIES, ids=["plain", "weak", "barriers"])
@pytest.mark.parametrize("protocol", [walk, flags, split])
def test_a_right_protocol_passes_every_seed(protocol: Callable, memory: dict):
    for seed in SEEDS:
        programs = {} if protocol is split else {"programs": (1, 3, 5)[seed % 3]}
        resident = (None, 1, 2, 4)[seed % 4]
        order = ("shuffled", "program")[seed // 4 % 2]
        assert protocol(seed=seed, max_resident=resident, order=order, **programs, **memory), f"seed {seed}"


@pytest.mark.parametrize("programs", [1, 3, 5])
def test_tickets_for_any_number_of_programs(programs: int):
    assert all(walk(programs, seed=seed, weak_memory=seed % 2 == 1) for seed in range(6))


WRONG = {
    "no_reset_of_tickets": (walk, dict(programs=3, reset=False), {}),
    "no_reset_of_arrivals": (split, dict(reset=False), {}),
    "no_wait": (flags, dict(wait=False), {}),
    "relaxed_release": (flags, dict(release="relaxed"), WEAK),
    "relaxed_acquire": (flags, dict(acquire="relaxed"), WEAK),
    "relaxed_arrival": (split, dict(sem="relaxed"), WEAK),
    "arrival_without_release": (split, dict(sem="acquire"), WEAK),
    "arrival_without_acquire": (split, dict(sem="release"), WEAK),
    "no_barrier_before_release": (flags, dict(barrier=False), {"weak_memory": True, "barriers": True}),
    "no_barrier_before_arrival": (split, dict(barrier=False), {"weak_memory": True, "barriers": True}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_protocol_gives_a_wrong_result(name: str):
    protocol, mistake, memory = WRONG[name]
    caught = (seed for seed in SEEDS if not protocol(seed=seed, **mistake, **memory))
    assert len(list(itertools.islice(caught, FEW))) == FEW


def deadlocks(seeds: int = len(SEEDS), **options) -> list[str]:
    """What the seeds that end in a deadlock say; the other seeds must give the right result."""
    messages = []
    for seed in range(seeds):
        try:
            assert flags(launches=1, seed=seed, patience=40, **options), f"seed {seed}"
        except Deadlock as deadlock:
            messages.append(str(deadlock))
    return messages


def test_a_static_stride_that_waits_on_programs_not_yet_started():
    programs = ROWS * COLS
    assert not deadlocks(5, programs=programs, static=True)  # all in flight: right, as on a GPU that is large enough
    assert not deadlocks(5, programs=programs, static=True, max_resident=2, order="program")  # or lucky
    messages = deadlocks(programs=programs, static=True, max_resident=2)
    assert len(messages) >= FEW
    assert all("test_interleave.py:" in message and "in flag_tile" in message for message in messages)
    assert "have not started" in messages[0] and messages[0].count("program (") == 2


def test_tickets_of_consumers_before_their_producers():
    assert not deadlocks(5, programs=ROWS * COLS, late=True)
    assert len(deadlocks(10, programs=ROWS * COLS, late=True, max_resident=2)) == 10
    (message, *_) = deadlocks(1, programs=2, late=True)
    assert "program (0, 0, 0)" in message and "program (1, 0, 0)" in message


def test_what_a_mistake_needs_to_be_caught():
    """Plain memory forgives the wrong order, programs one after another a missing wait: what each check needs."""
    assert all(flags(seed=seed, release="relaxed", acquire="relaxed") for seed in range(5))
    assert all(split(seed=seed, sem="relaxed", barrier=False) for seed in range(5))
    assert flags(programs=1, wait=False) and flags(programs=3, wait=False, max_resident=1)


@triton.jit
def message_kernel(data, flag, out, SEND: tl.constexpr, RELEASE: tl.constexpr, AWAIT: tl.constexpr,
                   ACQUIRE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Program 0 sends a block, the others wait for it; each by one of the ways that Triton has."""
    lanes = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(data + lanes, lanes)
        if SEND == "atomic_store":
            tl.atomic_store(flag, 1, sem=RELEASE)
        elif SEND == "cas":
            tl.atomic_cas(flag, 0, 1, sem=RELEASE)
        elif SEND == "cta":
            tl.atomic_xchg(flag, 1, sem=RELEASE, scope="cta")
        else:
            tl.store(flag, 1)
    else:
        if AWAIT == "poll":
            tl.atomic_poll(flag, 1, sem=ACQUIRE)
        elif AWAIT == "atomic_load":
            while tl.atomic_load(flag, sem=ACQUIRE) == 0:
                pass
        elif AWAIT == "cas":
            while tl.atomic_cas(flag, 1, 1, sem=ACQUIRE) == 0:
                pass
        else:
            while tl.load(flag, volatile=True) == 0:
                pass
        tl.store(out + (tl.program_id(0) - 1) * BLOCK + lanes, tl.load(data + lanes))


def message(seed: int, send: str, release: str, wait: str, acquire: str) -> bool:
    """Whether two receivers get the block."""
    data, flag = torch.full((BLOCK,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = torch.full((2, BLOCK), -1, dtype=torch.int32)
    with interleaved(seed, weak_memory=True):
        message_kernel[(3,)](data, flag, out, SEND=send, RELEASE=release, AWAIT=wait, ACQUIRE=acquire, BLOCK=BLOCK)
    return bool((out == torch.arange(BLOCK)).all())


@pytest.mark.parametrize("wait", ["poll", "atomic_load", "cas"])
@pytest.mark.parametrize("send", ["atomic_store", "cas"])
def test_every_kind_of_atomic_orders(send: str, wait: str):
    if not hasattr(tl, "atomic_poll") and (send, wait) != ("cas", "cas"):
        pytest.skip("this Triton has no atomic_load, atomic_store and atomic_poll")
    assert all(message(seed, send, "release", wait, "acquire") for seed in SEEDS)
    assert not all(message(seed, send, "relaxed", wait, "acquire") for seed in SEEDS)
    assert not all(message(seed, send, "release", wait, "relaxed") for seed in SEEDS)


@pytest.mark.parametrize(("send", "wait"), [("store", "cas"), ("cas", "load"), ("store", "load"), ("cta", "cas")])
def test_plain_flags_and_narrow_scopes_order_nothing(send: str, wait: str):
    assert sum(not message(seed, send, "release", wait, "acquire") for seed in SEEDS) >= FEW


# ------------------------------------------------------------------------------------------------- the harness itself


@triton.jit
def race_kernel(counter, lost, ids):
    """An atomic sum, a sum that loses updates, and the grid index around switches."""
    before = tl.program_id(0) * 2 + tl.program_id(1)
    tl.atomic_add(counter, 1.0)
    tl.store(lost, tl.load(lost) + 1.0)
    tl.store(ids + before, tl.program_id(0) * 2 + tl.program_id(1))


def race(seed: int, **harness) -> tuple[Log, float, float]:
    """Its log, the atomic sum and the other one."""
    counter, lost, ids = torch.zeros(1), torch.zeros(1), torch.full((6,), -1, dtype=torch.int32)
    with interleaved(seed, **harness) as log:
        race_kernel[(3, 2)](counter, lost, ids)
    assert ids.tolist() == list(range(6))
    return log, counter.item(), lost.item()


@pytest.mark.parametrize("weak", [False, True])
def test_atomics_are_atomic_and_plain_updates_are_not(weak: bool):
    found = [race(seed, weak_memory=weak)[1:] for seed in SEEDS]
    assert all(atomic == 6 for atomic, _ in found)
    assert len({lost for _, lost in found}) > 2


@pytest.mark.parametrize("weak", [False, True])
def test_a_seed_decides_everything(weak: bool):
    for seed in range(5):
        (first, *values), (again, *same) = race(seed, weak_memory=weak), race(seed, weak_memory=weak)
        assert first == again and values == same
    schedules = {tuple(race(seed, weak_memory=weak)[0].launches[0].schedule) for seed in SEEDS}
    assert len(schedules) > 15
    (launch,) = first.launches
    assert launch.kernel == "race_kernel" and launch.grid == (3, 2, 1) and launch.switches > 0


def test_one_program_at_a_time_in_order_is_what_triton_does():
    log, _, lost = race(0, max_resident=1, order="program")
    schedule = log.launches[0].schedule
    assert schedule == sorted(schedule) and lost == 6


@triton.jit
def broken_kernel(out, flag):
    """Program 1 fails while the others wait."""
    if tl.program_id(0) == 1:
        tl.static_assert(tl.load(out) == 1.0, "out is not 1")
    while tl.atomic_add(flag, 0) == 0:
        pass


@triton.jit
def seesaw_kernel(flag):
    """Never ends, although memory changes."""
    while tl.atomic_xor(flag, 1) >= 0:
        pass


def test_errors_of_a_kernel_and_livelocks_come_back():
    from triton.runtime.errors import InterpreterError

    out, flag = torch.full((1,), torch.nan), torch.zeros(1, dtype=torch.int32)
    with interleaved(1):
        with pytest.raises(InterpreterError, match="out is not 1"):
            broken_kernel[(4,)](out, flag)
    with interleaved(1, max_steps=500), pytest.raises(Deadlock, match="no end after 500 accesses"):
        seesaw_kernel[(2,)](flag)
    assert walk(3)  # and nothing is left behind


def test_bad_options_and_nesting():
    for options, message in (
        ({"order": "random"}, "'random'"),
        ({"max_resident": 0}, "max_resident is 0"),
        ({"barriers": True}, "needs weak_memory"),
    ):
        with pytest.raises(ValueError, match=message), interleaved(**options):
            pass
    with interleaved(), pytest.raises(RuntimeError, match="already active"), interleaved():
        pass


def test_other_internals_are_named(monkeypatch: pytest.MonkeyPatch):
    from triton.runtime import interpreter

    with monkeypatch.context() as patch:
        patch.delattr(interpreter.InterpreterBuilder, "create_atomic_cas")
        with pytest.raises(RuntimeError, match="from 3.6 to 3.9; .*create_atomic_cas"), interleaved():
            pass
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", lambda self, value, ptrs, mask: None)
        with pytest.raises(RuntimeError, match=r"create_masked_store\(value, ptrs, mask\)"), interleaved():
            pass


def test_the_package_and_the_harness_import_without_triton():
    code = "import sys, peftkern.testing, protocols.interleave; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True)
