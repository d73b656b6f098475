"""The kernels whose programs work together, their programs interleaved and memory weak: no GPU.

``shared`` (tickets, publish, await), slices of ``fused`` and ``shrink`` (who arrives last), ``grad`` with t, and a bank
of adapters (chunks that announce, tiles that wait for them all). A second call right after the first shows that the
counters are zero again.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from conftest import NAMES, Case, Found, make, run
from protocols.interleave import Deadlock, interleaved
from test_multi_lora import Batch
from test_multi_lora import make as bank_batch
from test_multi_lora import plain as bank_plain
from test_multi_lora import run as bank_gradients_of
from test_multi_lora import truth as bank_truth

import peftkern
from peftkern.backends.triton import launch, select, tiles
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.launch import operands as launch_operands
from peftkern.backends.triton.tiles import BANK, RECOMPUTE, SHARED, Choice, ThinConfig, TileConfig
from peftkern.multi_lora import multi_lora_linear
from peftkern.testing.numerics import assert_as_good_as

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned"),
]

TILE = TileConfig(16, 16, 64, 4, 1, GROUP_M=2, resident=1)
CASE = Case(48, 64, 48, 5, torch.float32)  # 3 x 3 tiles
SMALL = Case(32, 64, 32, 5, torch.float32)  # 2 x 2
SEEDS = range(3)


class OneSet:
    """The counters of all launches: zero after each, whoever took part, and none but those asked for is touched."""

    BEYOND = -(2**30)

    def __init__(self) -> None:
        self.counters = torch.empty(tiles.COUNTERS, dtype=torch.int32)
        self.forget()

    def forget(self) -> None:
        self.used = 0
        self.counters.fill_(self.BEYOND)

    def check(self) -> None:
        assert not self.counters[: self.used].any() and (self.counters[self.used :] == self.BEYOND).all()

    def give(self, like: torch.Tensor, blocks: int) -> torch.Tensor:
        self.check()
        self.forget()
        self.used = blocks + 2
        self.counters[: self.used] = 0
        return self.counters


@pytest.fixture(autouse=True)
def one_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneSet]:
    made = OneSet()
    for module in (launch.produce, launch.gradients):
        monkeypatch.setattr(module, "counters", made.give)
    yield made
    made.check()


def test_captured_launches_share_no_counters(monkeypatch):
    """Each has its own of the slab, for good, until it is used up; without a slab there are none."""
    monkeypatch.setattr(launch_operands, "_SLAB", 10)
    held = launch_operands._Counters()
    assert held.take(4) is None
    held.slab = torch.zeros(10, dtype=torch.int32)
    for number, count in enumerate((4, 5), 1):
        held.take(count).fill_(number)
    assert held.slab.tolist() == [1] * 4 + [2] * 5 + [0]
    assert held.take(2) is None and held.take(1) is not None


def programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A chip of ``count`` units, so that a persistent grid has that many programs."""
    arch = replace(ARCHES["interpreter"], units=count)
    monkeypatch.setattr("peftkern.backends.triton.backend.arch_of", lambda device: arch)


def once(needs: tuple[str, ...] = (), case: Case = CASE) -> Found:
    """y, and the gradients that are needed; forward alone where none is."""
    t = make(case)
    if needs:
        return run(case, t, "triton", needs)
    return {"y": peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, backend="triton")}


def interleaved_run(seed: int, resident: int | None, needs: tuple[str, ...] = (), case: Case = CASE) -> list[Found]:
    with interleaved(seed=seed, weak_memory=True, barriers=True, max_resident=resident):
        return [once(needs, case) for _ in range(2)]


def compare(found: list[Found], expected: Found, needs: tuple[str, ...] = ()) -> None:
    """Bit for bit: whatever the order of the programs, sums have one order."""
    for again, name in itertools.product(found, ("y", *needs)):
        assert torch.equal(again[name], expected[name]), name


@pytest.mark.parametrize(("count", "resident", "seeds"), [(1, None, 1), (3, 2, 3), (5, None, 3), (5, 2, 3)])
def test_shared(count: int, resident: int | None, seeds: int, monkeypatch):
    """1, 3 and 5 programs for 9 tiles; of one alone there is one order."""
    programs(monkeypatch, count)
    with select.forced(Choice(SHARED, TILE)):
        expected = once(())
        for seed in range(seeds):
            compare(interleaved_run(seed, resident), expected)


def test_shared_makes_one_result_with_recompute():
    t = make(CASE)
    with select.forced(Choice(SHARED, TILE)):
        shared = run(CASE, t, "triton")
    with select.forced(Choice(RECOMPUTE, TILE)):
        recompute = run(CASE, t, "triton")
    assert all(torch.equal(shared[n], recompute[n]) for n in NAMES if shared[n] is not None)


@pytest.mark.parametrize("resident", [None, 1])
def test_slices(resident: int | None):
    with select.forced(Choice(RECOMPUTE, replace(TILE, BLOCK_Q=32, SLICES=2, resident=0))):
        expected = once((), SMALL)
        for seed in SEEDS:
            compare(interleaved_run(seed, resident, (), SMALL), expected)


def test_slices_of_shrink_and_t_beside_dB(monkeypatch):
    """shrink in two slices; t in two column blocks and two runs of rows."""
    monkeypatch.setattr(tiles, "shrink_tile", lambda launch, arch: ThinConfig(16, 32, 4, 1, SLICES=2))
    monkeypatch.setattr(tiles, "grad_tile", lambda dtype, R, with_t, arch: ThinConfig(16, 16, 4, 1))
    monkeypatch.setattr(tiles, "grad_gives_t", lambda dtype, R, precision, arch: True)
    programs(monkeypatch, 8)
    needs = ("lora_A", "lora_B")
    with select.forced(Choice("split", replace(TILE, resident=0))):
        expected = once(needs, SMALL)
        for seed in SEEDS:
            compare(interleaved_run(seed, None, needs, SMALL), expected, needs)


def bank_run(batch: Batch) -> Found:
    """y of a batch whose rows have adapters of their own."""
    y = multi_lora_linear(
        batch.x, batch.W, batch.A, batch.B, batch.scaling, batch.ids, bias=batch.bias, backend="triton"
    )
    return {"y": y}


@pytest.fixture
def banked(monkeypatch) -> Callable[[int], Batch]:
    """``banked(slices)``: a batch of three chunks and four tiles on five programs, each perhaps in slices."""

    def batch_of(slices: int) -> Batch:
        tile = replace(TILE, BLOCK_Q=16, SLICES=slices, resident=1 if slices == 1 else 2)
        monkeypatch.setattr(select, "_override", Choice(BANK, tile))
        programs(monkeypatch, 5)
        return bank_batch([1, -1, 0] + [1] * 18, K=32, N=32, ranks=(5, 3))

    return batch_of


@pytest.mark.parametrize(
    ("slices", "resident"),
    [(1, 2), (2, None), *(pytest.param(*two, marks=pytest.mark.long) for two in [(1, None), (2, 2)])],
)
def test_bank(slices: int, resident: int | None, banked):
    batch = banked(slices)
    expected = bank_run(batch)
    assert_as_good_as(expected["y"], bank_plain(batch)["y"], bank_truth(batch)["y"], "y")
    for seed in SEEDS:
        with interleaved(seed=seed, weak_memory=True, barriers=True, max_resident=resident):
            compare([bank_run(batch) for _ in range(2)], expected)


def trained(batch: Batch) -> Found:
    """y, dx and the factors' gradients."""
    return bank_gradients_of(batch, "triton", ("x", "A", "B"))


def compare_all(found: list[Found], expected: Found) -> None:
    for again, name in itertools.product(found, expected):
        assert torch.equal(again[name], expected[name]), name


@pytest.fixture
def in_runs(monkeypatch) -> Batch:
    """A batch of which one adapter's rows are cut into two runs, whose parts are added up, on five programs."""
    monkeypatch.setattr(tiles, "bank_grad_tile", lambda dtype, R, arch: ThinConfig(16, 32, 4, 1))
    tile = replace(TILE, BLOCK_Q=32, resident=1)
    monkeypatch.setattr(select, "_override", Choice(BANK, tile))
    programs(monkeypatch, 5)
    batch = bank_batch([1, -1, 0] + [1] * 36, K=32, N=16, p=0.4, ranks=(5, 3), bias=False)
    return batch


def test_gradients_of_a_bank(in_runs):
    expected = trained(in_runs)
    for seed in SEEDS:
        with interleaved(seed=seed, weak_memory=True, barriers=True):
            compare_all([trained(in_runs) for _ in range(2)], expected)


def test_a_part_that_nobody_waits_for_is_seen(in_runs, monkeypatch, tmp_path, one_set):
    """The first of the runs adds up parts that are not there yet."""
    expected = trained(in_runs)
    first = "def arrived_last(counters, block, count):\n    return tl.atomic_add(counters + 2 + block, 1) == 0\n"
    mutate("bank_grad", "arrived_last", first, monkeypatch, tmp_path)
    with pytest.raises(AssertionError), interleaved(seed=0, weak_memory=True, barriers=True):
        compare_all([trained(in_runs)], expected)
    one_set.forget()


BANK_MUTATIONS = {
    "nobody waits": ("await_all", "def await_all(counters, block, producers, readers):\n    pass\n"),
    "a chunk does not announce": ("announce", "def announce(counters, block):\n    pass\n"),
    "a chunk announces before its stores": (
        "announce", "def announce(counters, block):\n    tl.atomic_add(counters + 2 + block, 1, sem='relaxed')\n",
    ),
    "one chunk is enough": (
        "await_all",
        "def await_all(counters, block, producers, readers):\n"
        "    seen = tl.atomic_add(counters + 2 + block, 0, sem='acquire')\n"
        "    while seen < 1:\n"
        "        seen = tl.atomic_add(counters + 2 + block, 0, sem='acquire')\n"
        "    tl.debug_barrier()\n"
        "    if tl.atomic_add(counters + 2 + block, 1, sem='relaxed') == producers + readers - 1:\n"
        "        tl.atomic_xchg(counters + 2 + block, 0, sem='relaxed')\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", BANK_MUTATIONS)
def test_a_broken_protocol_of_a_bank_is_seen(name, slices, banked, monkeypatch, tmp_path, one_set):
    batch = banked(slices)
    expected = bank_run(batch)
    mutate("fused", *BANK_MUTATIONS[name], monkeypatch, tmp_path)
    caught = False
    for seed in range(6):
        try:
            with interleaved(seed=seed, weak_memory=True, barriers=True):
                compare([bank_run(batch) for _ in range(2)], expected)
        except (AssertionError, Deadlock):
            caught = True
            break
    one_set.forget()
    assert caught


MUTATIONS = {
    "a consumer does not wait": ("fused", "await_block", "def await_block(counters, block, readers):\n    pass\n"),
    "a producer does not publish": ("fused", "publish", "def publish(counters, block):\n    pass\n"),
    "a flag is published before the stores": (
        "fused", "publish",
        "def publish(counters, block):\n    tl.atomic_xchg(counters + 2 + block, 1, sem='relaxed')\n",
    ),
    "consumers come first": (
        "fused", "producers_first",
        "def producers_first(item, tiles_m, tiles_p, GROUP_M: tl.constexpr):\n"
        "    return item % tiles_m, tiles_p - 1 - item // tiles_m\n",
    ),
    "the tickets are not cleared": ("fused", "retire", "def retire(counters):\n    pass\n"),
    "a slice does not release": (
        "fused", "arrived_last",
        "def arrived_last(counters, block, count):\n"
        "    last = tl.atomic_add(counters + 2 + block, 1, sem='relaxed') == count - 1\n"
        "    if last:\n        tl.atomic_xchg(counters + 2 + block, 0, sem='relaxed')\n    return last\n",
    ),
}  # fmt: skip


def mutate(body: str, function: str, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Another function in a body's place of one."""
    import importlib.util

    import triton

    path = tmp_path / "mutant.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n\n@triton.jit\n{source}")
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels = importlib.import_module(f"peftkern.backends.triton.kernels.{body}")
    assert isinstance(getattr(kernels, function), type(triton.jit(lambda: None)))
    monkeypatch.setattr(kernels, function, getattr(module, function))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_seen(name: str, monkeypatch, tmp_path, one_set):
    """What the tests above would say if a step were missing."""
    mutate(*MUTATIONS[name], monkeypatch, tmp_path)
    programs(monkeypatch, 4)
    sliced = "slice" in name
    case, chosen = CASE, Choice(SHARED, TILE)
    if sliced:
        case, chosen = SMALL, Choice(RECOMPUTE, replace(TILE, BLOCK_Q=32, SLICES=2, resident=0))
    # One program after another, the mutant's slices are right; the shared schedule's result is recompute's.
    with select.forced(chosen if sliced else Choice(RECOMPUTE, replace(TILE, resident=0))):
        expected = once((), case)
    caught = False
    with select.forced(chosen):
        for seed in range(6):
            try:
                compare(interleaved_run(seed, 2 if "first" in name else None, (), case), expected)
            except (AssertionError, Deadlock):
                caught = True
                break
    one_set.forget()
    assert caught
