"""The tuner with a clock and timings that the test makes up: order, budget, halving, checks, writing. No GPU."""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter

import pytest
import torch
from test_triton_tables import H200, forward

from peftkern.backends.triton import select, tables, tiles
from peftkern.backends.triton.estimate import estimate
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.backends.triton.tune import command
from peftkern.backends.triton.tune.search import FINALISTS, Budget, Cell, DeviceLost, candidates, search, tune
from peftkern.testing import problems

pytestmark = pytest.mark.usefixtures("cache")

CELL = Cell(forward(), 0.0)
LEGAL = candidates(CELL.launch, H200)


class Machine:
    """A clock, and benches whose candidates take ``seconds[choice]``, or fail, or are wrong."""

    def __init__(self, seconds: dict[Choice, float] | None = None, step: float = 0.0) -> None:
        self.seconds, self.step = seconds or {}, step
        self.now, self.fails, self.wrong = 0.0, {}, set()
        self.samples, self.checks, self.cells = [], [], []

    def clock(self) -> float:
        return self.now

    def bench(self, cell: Cell) -> Machine:
        self.cells.append(cell)
        return self

    def sample(self, choice: Choice) -> float:
        self.now += self.step
        self.samples.append(choice)
        if choice in self.fails:
            raise self.fails[choice]
        return self.seconds.get(choice, 1e-3)

    def check(self, choice: Choice) -> str | None:
        self.checks.append(choice)
        return "Z is wrong" if choice in self.wrong else None


def ladder(legal: list[Choice] = LEGAL, best: int = 5) -> dict[Choice, float]:
    """The ``best``-th is fastest, by 3 % each."""
    return {choice: 1e-3 * (1 + 0.03 * ((number - best) % len(legal))) for number, choice in enumerate(legal)}


def never() -> bool:
    return False


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.add_options(parser)
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------------------------------------- the search


def test_candidates_are_every_legal_choice_best_estimate_first():
    assert set(LEGAL) == set(tiles.choices(CELL.launch, H200)) and len(LEGAL) > 2 * FINALISTS
    costs = [estimate(CELL.launch, choice, H200) for choice in LEGAL]
    assert costs == sorted(costs)


def test_the_fastest_wins_and_the_slow_are_dropped_early():
    machine = Machine(ladder())
    outcome = search(CELL, LEGAL, machine, never)
    assert outcome.winner == LEGAL[5] and outcome.estimated == LEGAL[0] and not outcome.rejected
    assert machine.samples[: len(LEGAL)] == LEGAL, "each is warmed up first, in the estimate's order"
    first, second = (machine.samples[n * len(LEGAL) : (n + 1) * len(LEGAL)] for n in (1, 2))
    assert first == second == LEGAL, "rounds are interleaved"
    counts = Counter(machine.samples)
    assert counts[LEGAL[5]] > 4 * counts[LEGAL[4]] and counts[LEGAL[4]] == 4
    assert set(machine.checks) == {LEGAL[5], LEGAL[6], LEGAL[7]}, "finalists, all of them"
    assert outcome.seconds[LEGAL[5]] == pytest.approx(1e-3) and len(outcome.seconds) == len(LEGAL)


def test_the_first_run_which_compiles_does_not_count():
    machine = Machine(ladder())
    genuine, warm = machine.sample, set()

    def sample(choice: Choice) -> float:
        seconds = genuine(choice)
        if choice in warm:
            return seconds
        warm.add(choice)
        return 60.0 if choice == LEGAL[5] else 1e-9

    machine.sample = sample
    assert search(CELL, LEGAL, machine, lambda: len(machine.samples) >= len(LEGAL)).winner == LEGAL[5]


def test_a_median_is_not_moved_by_an_interruption():
    machine = Machine(ladder())
    genuine = machine.sample
    machine.sample = lambda choice: (
        genuine(choice) * (1000 if choice == LEGAL[5] and machine.samples.count(choice) % 4 == 3 else 1)
    )
    assert search(CELL, LEGAL, machine, never).winner == LEGAL[5]


def test_hopeless_candidates_are_dropped_after_the_first_heat():
    slow = {choice: 1e-3 if number < 2 else 1.0 for number, choice in enumerate(LEGAL)}
    machine = Machine(slow)
    search(CELL, LEGAL, machine, never)
    assert {count for choice, count in Counter(machine.samples).items() if slow[choice] == 1.0} == {4}


def test_a_wrong_candidate_never_wins_and_is_reported():
    machine = Machine(ladder())
    machine.wrong = {LEGAL[5], LEGAL[6]}
    outcome = search(CELL, LEGAL, machine, never)
    assert outcome.winner == LEGAL[7] and outcome.rejected == dict.fromkeys(machine.wrong, "Z is wrong")


def test_when_every_finalist_is_wrong_the_others_are_asked_and_then_nobody_wins():
    machine = Machine(ladder())
    machine.wrong = {LEGAL[5], LEGAL[6], LEGAL[7], LEGAL[8]}
    assert search(CELL, LEGAL, machine, never).winner == LEGAL[9]
    machine.wrong = set(LEGAL)
    outcome = search(CELL, LEGAL, machine, never)
    assert outcome.winner is None and outcome.note and outcome.rejected.keys() == set(LEGAL)


def test_candidates_that_cannot_run_or_be_checked_are_out():
    machine = Machine(ladder())
    machine.fails = {LEGAL[5]: RuntimeError("out of resources\nmore"), LEGAL[0]: torch.OutOfMemoryError("no memory")}

    def check(choice: Choice) -> None:
        if choice == LEGAL[6]:
            raise MemoryError("the truth does not fit")

    machine.check = check
    outcome = search(CELL, LEGAL, machine, never)
    assert outcome.winner == LEGAL[7] and outcome.rejected.keys() == {LEGAL[5], LEGAL[0], LEGAL[6]}
    assert outcome.rejected[LEGAL[5]] == "RuntimeError: out of resources"
    machine.fails = dict.fromkeys(LEGAL, RuntimeError("nothing compiles"))
    assert search(CELL, LEGAL, machine, never).winner is None
    assert search(CELL, [], Machine(), never).winner is None


def test_a_candidate_that_fails_in_the_middle_is_out():
    machine = Machine(ladder())
    genuine = machine.sample

    def sample(choice: Choice) -> float:
        if machine.samples.count(LEGAL[5]) == 6 and choice == LEGAL[5]:
            raise RuntimeError("now")
        return genuine(choice)

    machine.sample = sample
    outcome = search(CELL, LEGAL, machine, never)
    assert outcome.winner == LEGAL[6] and LEGAL[5] in outcome.rejected and LEGAL[5] not in outcome.seconds


def test_a_late_cell_compares_the_best_estimates_only():
    machine = Machine(ladder(best=1), step=1.0)
    outcome = search(CELL, LEGAL, machine, lambda: machine.now > 4)
    assert outcome.winner == LEGAL[1] and set(machine.samples) == set(LEGAL[:5]) and len(machine.samples) < 20
    machine = Machine(ladder(best=1))
    outcome = search(CELL, LEGAL, machine, lambda: True)
    assert outcome.winner == LEGAL[1] and set(machine.samples) == set(LEGAL[:2]), "one alone is no comparison"


# ------------------------------------------------------------------------------------------------------ many cells


def few_cells(*arguments: str) -> list[Cell]:
    return command.cells(options("--shape", "4096x4096", "--shape", "4096x1024,512x512", *arguments))


def test_cells_come_in_the_order_of_their_value_and_each_key_once():
    cells = few_cells("--rows", "8192,1,5000", "--rank", "16,9,64", "--dropout", "0.05,0.1,1e-7,0")
    assert cells[0] == Cell(Pass(forward(dropout=True).problem, False), 0.05)
    assert len(cells) == 2 * 3 * 2 * 2 * 2
    assert [cell.launch.problem.M for cell in cells] == [8192] * 24 + [1] * 24
    assert [cell.launch.backward for cell in cells[:2]] == [False, True]
    assert {(cell.launch.problem.dropout, cell.dropout_p) for cell in cells} == {(True, 0.05), (False, 0.0)}
    keys = {(tables.key_of(cell.launch), tables.bucket_of(cell.launch.problem.M)) for cell in cells}
    assert len(keys) == len(cells)


def test_what_is_tuned_by_default():
    cells = command.cells(options())
    named = {(layer.K, layer.N) for layer in problems.LAYERS if not layer.name.startswith(("smollm2", "odd"))}
    assert {(layer.K, layer.N) for layer in command.layers()} == named and len(named) == 12
    assert set(command.ROWS_BY_VALUE) == set(problems.ROWS)
    assert len(cells) == 12 * len(problems.ROWS) * 2 and cells[0].launch.problem.M == 8192
    assert {(c.launch.problem.R, c.dropout_p, c.launch.problem.adapter_dtype) for c in cells} == {
        (16, 0.05, torch.float32)
    }


def test_the_budget_is_shared_and_ends():
    cells, machine, done, begun = few_cells(), Machine(step=0.5), [], []

    def bench(cell: Cell) -> Machine:
        begun.append(machine.now)
        return machine.bench(cell)

    outcomes = tune(cells, H200, bench, Budget.of(machine.clock, 100.0), lambda _: None, lambda n, _: done.append(n))
    assert done == list(range(1, len(outcomes) + 1)) and 4 < len(outcomes) < len(cells)
    assert max(begun) < 100 <= machine.now and [outcome.cell for outcome in outcomes] == cells[: len(outcomes)]
    spent = Counter(machine.cells)
    assert max(spent.values()) == 1
    plenty = Machine()
    outcomes = tune(cells, H200, plenty.bench, Budget.of(plenty.clock, 1e9), lambda _: None, lambda *_: None)
    assert len(outcomes) == len(cells) and all(len(outcome.seconds) == outcome.legal for outcome in outcomes)


def test_operands_that_do_not_fit_cost_one_cell():
    machine = Machine()

    def bench(cell: Cell) -> Machine:
        if cell.launch.problem.M == 8192:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return machine

    cells = few_cells("--rows", "8192,1")
    outcomes = tune(cells, H200, bench, Budget.of(machine.clock, 1e9), lambda _: None, lambda *_: None)
    assert [outcome.winner is None for outcome in outcomes] == [True] * 6 + [False] * 6
    assert "out of memory" in outcomes[0].note


# ------------------------------------------------------------------------------------------------ what is written


def measured_with(machine: Machine, *arguments: str, stream: io.StringIO | None = None) -> str:
    parsed = options("--shape", "4096x4096,4096x1024", "--rows", "8192,1", "--dropout", "0", *arguments)
    return command.measure(parsed, H200, machine.bench, machine.clock, stream or io.StringIO())


def test_what_wins_is_written_and_chosen_afterwards(cache):
    machine = Machine(ladder())
    machine.wrong = {LEGAL[5]}
    assert select.choose(CELL.launch, H200) == LEGAL[0]
    stream = io.StringIO()
    text = measured_with(machine, stream=stream)
    assert select.choose(CELL.launch, H200) == LEGAL[6] != LEGAL[0]
    assert select.choose(forward(4097), H200) == LEGAL[6], "for all rows of the bucket"
    table = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200")
    assert len(table.entries) == 4 and all(set(buckets) == {1, 8192} for buckets in table.entries.values())
    assert str(cache) in text and text.count("\n") == 8 and "the estimate's choice takes 2.11x" in text
    assert f"{LEGAL[5].schedule} {LEGAL[5].tile} is out: Z is wrong" in stream.getvalue()


def test_nothing_is_written_where_nothing_is_right(cache):
    machine = Machine()
    machine.check = lambda choice: "wrong"
    assert measured_with(machine).count("nothing is written") == 8
    assert tables.parse(cache.read_text(), "sm_90").entries == {}


def test_json(cache):
    found = json.loads(measured_with(Machine(ladder()), "--json"))
    assert len(found) == 8 and found[0]["winner"] == f"{LEGAL[5].schedule} {LEGAL[5].tile}"
    assert found[0]["legal"] == len(found[0]["seconds"]) == len(LEGAL)


def test_output_is_a_table_to_be_shipped(cache, tmp_path):
    path = tmp_path / "ship" / "sm_90.json"
    measured_with(Machine(ladder()), "--output", str(path))
    assert not cache.exists() and len(tables.parse(path.read_text(), "sm_90").entries) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeviceLost("an illegal access")], ids=repr)
def test_an_early_end_keeps_what_is_finished(error: BaseException, cache):
    """In the fourth cell: two were written with their shape, the third is finished."""
    machine = Machine(ladder())
    genuine = machine.sample

    def sample(choice: Choice) -> float:
        if len(machine.cells) == 4:
            raise error
        return genuine(choice)

    machine.sample = sample
    with pytest.raises(type(error)):
        measured_with(machine)
    table = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200")
    assert sum(len(buckets) for buckets in table.entries.values()) == 3
    assert select.choose(CELL.launch, H200) == LEGAL[5]


def test_each_shape_is_written_before_the_next_begins(cache):
    machine, seen = Machine(), []

    def bench(cell: Cell) -> Machine:
        seen.append(sum(map(len, tables.parse(cache.read_text(), "sm_90").entries.values())))
        return machine

    machine.bench = bench
    measured_with(machine)
    assert seen == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(cache):
    cache.parent.write_text("in the way")
    machine = Machine()
    with pytest.raises(OSError, match="cache"):
        measured_with(machine)
    assert not machine.cells
