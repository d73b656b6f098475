"""The tuner over real launches, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import dataclasses
import io
import itertools

import pytest
import torch
from conftest import Case, make, run
from test_tune import options

from peftkern.backends.triton import select, tables
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.backends.triton.tune import command, search
from peftkern.backends.triton.tune.search import Cell, candidates
from peftkern.call import Problem
from peftkern.ops import dispatch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned", "cache"),
]

BF16, F32 = torch.bfloat16, torch.float32
ARCH, CPU = ARCHES["interpreter"], torch.device("cpu")


def cell(backward: bool, p: float = 0.3, weight_format: str = "dense", dtype: torch.dtype = BF16) -> Cell:
    return Cell(Pass(Problem("cuda", 17, 65, 33, 7, dtype, F32, weight_format, p > 0), backward), p)


def bench_of(cell: Cell, timer=None):
    from peftkern.backends.triton.tune.device import DeviceBench

    def ran(run) -> float:
        run()
        return 1e-3

    return DeviceBench(cell, ARCH, CPU, dispatch.backend_named("reference"), timer or ran)


@pytest.mark.parametrize(
    "tuned",
    [
        cell(False),
        cell(True),
        cell(False, 0.0, "int8"),
        cell(True, 0.0, "dense", F32),
        cell(False, 0.3, "fp8xfp8"),
        cell(True, 0.3, "fp8xfp8"),
    ],
    ids=command.title,
)
def test_every_candidate_is_right(tuned: Cell):
    bench, legal = bench_of(tuned), candidates(tuned.launch, ARCH)
    assert len({choice.schedule for choice in legal}) >= (1 if tuned.launch.problem.base_compute else 3)
    for choice in legal:
        assert bench.sample(choice) == 1e-3
        assert bench.check(choice) is None, choice


def sabotaged(monkeypatch, spoil) -> None:
    """Every direction gets one more step, ``spoil(produced, number of the run)``."""
    from peftkern.backends.triton import schedule

    genuine = schedule.produce

    class Spoiler:
        def __init__(self) -> None:
            self.runs = itertools.count()

        def run(self) -> None:
            spoil(self.produced, next(self.runs))

    def produce(*arguments, **options):
        spoiler = Spoiler()
        made = genuine(*arguments, **options)
        spoiler.produced = made
        return dataclasses.replace(made, rest=[*made.rest, spoiler])

    monkeypatch.setattr(schedule, "produce", produce)


SPOILERS = {
    "an element of Z": lambda made, run: made.Z[-1, -1].mul_(100),
    "a hole in Z": lambda made, run: made.Z[3].fill_(torch.nan),
    "T": lambda made, run: made.T.mul_(1.1),
    "added up": lambda made, run: made.Z.add_(0.5 * run),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_wrong_result_is_seen(spoil, backward: bool, monkeypatch):
    tuned = cell(backward)
    bench, choice = bench_of(tuned), candidates(tuned.launch, ARCH)[0]
    assert bench.check(choice) is None
    sabotaged(monkeypatch, spoil)
    assert "is wrong: error" in bench.check(choice)


@pytest.mark.parametrize("backward", [False, True])
def test_an_error_below_that_of_rounded_rows_is_seen(backward: bool, monkeypatch):
    """With base_compute "fp8" the truth has rounded rows: against others 2.65 % would be allowed, twice."""
    tuned = cell(backward, weight_format="fp8xfp8")
    bench, choice = bench_of(tuned), candidates(tuned.launch, ARCH)[0]
    sabotaged(monkeypatch, lambda made, run: made.Z.mul_(1.01 if run else 1))
    assert "Z is wrong: error" in bench.check(choice)


def test_what_is_not_written_is_seen(monkeypatch):
    """A candidate that does nothing cannot pass by the results of the one before it, in whose memory its own are."""
    from peftkern.backends.triton import schedule

    tuned = cell(False)
    bench, choice = bench_of(tuned), candidates(tuned.launch, ARCH)[0]
    made, genuine = [], schedule.produce
    monkeypatch.setattr(schedule, "produce", lambda *a, **k: made.append(genuine(*a, **k)) or made[-1])
    assert bench.check(choice) is None
    for spoiled in ("Z", "T"):
        kept = {"Z": made[0].Z.clone(), "T": made[0].T.clone()}
        half = dataclasses.replace(made[0], first=[], rest=[Rewrite(made[0], kept, spoiled)])
        monkeypatch.setattr(schedule, "produce", lambda *a, half=half, **k: half)
        assert bench.check(choice).startswith(f"{spoiled} is wrong: error inf")
        made[0].Z.copy_(kept["Z"])
        made[0].T.copy_(kept["T"])


class Rewrite:
    """Writes the right results, except one of them."""

    def __init__(self, made, kept: dict[str, torch.Tensor], spoiled: str) -> None:
        self.made, self.kept, self.spoiled = made, kept, spoiled

    def run(self) -> None:
        for name in self.kept.keys() - {self.spoiled}:
            getattr(self.made, name).copy_(self.kept[name])


def test_a_device_that_is_lost_ends_the_search(monkeypatch):
    """An illegal access makes every later call fail; a candidate that merely does not fit does not."""
    tuned = cell(False)
    choice = candidates(tuned.launch, ARCH)[0]

    def fail(*_):
        raise RuntimeError("out of resources")

    bench = bench_of(tuned, fail)
    bench.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(RuntimeError, match="out of resources") as error:
        bench.sample(choice)
    assert not isinstance(error.value, search.DeviceLost)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(search.DeviceLost, match=choice.schedule):
        bench.sample(choice)


def test_a_choice_that_cannot_run_raises():
    tuned = cell(False)
    tile = candidates(tuned.launch, ARCH)[0].tile
    with pytest.raises(RuntimeError, match="cannot run this call"):
        bench_of(tuned).sample(Choice("split", dataclasses.replace(tile, BLOCK_M=8)))


def test_the_whole_tuner_and_the_call_after_it(monkeypatch):
    """The worst estimate is made to seem fastest; it is written, chosen, and the call is what it was."""
    order: list[Choice] = []
    case = Case(17, 65, 33, 7, BF16, F32, p=0.3)
    t = make(case)
    before = run(case, t, "triton")

    class Bench:
        def __init__(self, tuned: Cell) -> None:
            self.genuine, self.fast = bench_of(tuned), candidates(tuned.launch, ARCH)[-1]
            self.check = self.genuine.check

        def sample(self, choice: Choice) -> float:
            order.append(choice)
            return self.genuine.sample(choice) * (1 if choice == self.fast else 2)

    monkeypatch.setattr(search, "_FINAL_ROUNDS", 2)
    parsed = options("--shape", "65x33", "--rows", "17", "--rank", "7", "--dropout", "0.3")
    command.measure(parsed, ARCH, Bench, stream=io.StringIO())
    table = tables.parse(tables.cache_path(ARCH).read_text(), "interpreter", "")
    assert len(table.entries) == 2 and len(order) > 8
    for backward in (False, True):
        here = Pass(Problem("cpu", 20, 65, 33, 7, BF16, F32, "dense", True), backward)
        fast = candidates(cell(backward).launch, ARCH)[-1]
        assert select.choose(here, ARCH) == fast != select.estimated(here, ARCH)
    after = run(case, t, "triton")
    for name in ("y", "x", "lora_A", "lora_B"):
        torch.testing.assert_close(after[name], before[name], rtol=0.02, atol=0.02)
