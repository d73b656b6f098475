"""``benchmarks.gpu``'s workers, and its figures: intervals, rooflines, the plan's cells, goals."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import cells, environment, goals, measure, plan, roofline, store, supervise
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.task import CRASH, HANG, OK, WRONG, Task, without_folders
from benchmarks.linear import Cell


def results(out, part: str) -> dict:
    return json.loads((out / f"{part}.json").read_text())["results"]


# ------------------------------------------------------------------------------------------------ workers

_SCRIPT = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    key = line.strip()
    if key == "hangs":
        time.sleep(60)
    if key == "crashes":
        print("an illegal address", file=sys.stderr, flush=True)
        os._exit(7)
    found = {"status": "error" if key == "breaks" else "ok", "process": os.getpid()}
    if key in ("breaks", "taints"):
        found["fatal"] = True
    print(json.dumps(found), flush=True)
"""


def _serve(out, keys, limits=(30.0, 30.0), script: str = _SCRIPT, workers: int = 1) -> dict:
    kept = store.Store(out, "products", {}, {})
    tasks = [Task(key, lambda: {}, 0.4 if key == "hangs" else 20.0, {"about": key}) for key in keys]
    begin, end = (time.monotonic() + seconds for seconds in limits)
    progress = lambda key, result: None  # noqa: E731
    supervise.isolated(tasks, kept, supervise.Limits(begin, end), progress, [sys.executable, "-c", script], workers)
    return results(out, "products")


def test_a_hang_and_a_crash_cost_one_task_each(tmp_path):
    found = _serve(tmp_path, ["a", "hangs", "b", "crashes", "c", "d"])
    assert {key: result["status"] for key, result in found.items()} == {
        "a": OK, "hangs": HANG, "b": OK, "crashes": CRASH, "c": OK, "d": OK,
    }  # fmt: skip
    assert "illegal address" in found["crashes"]["output"] and found["hangs"]["about"] == {"about": "hangs"}
    assert found["a"]["process"] != found["b"]["process"] != found["c"]["process"] == found["d"]["process"]


def test_a_process_that_is_of_no_more_use_is_replaced(tmp_path):
    found = _serve(tmp_path, ["a", "taints", "b", "breaks", "c"])
    assert [result["status"] for result in found.values()] == [OK, OK, OK, CRASH, OK]
    assert len({found[key]["process"] for key in "abc"}) == 3 and "fatal" not in found["taints"]


def test_the_end_of_the_run_is_no_hang(tmp_path):
    assert _serve(tmp_path, ["a", "hangs", "b"], limits=(30.0, 0.35)).keys() <= {"a"}


def test_a_worker_that_does_not_start_leaves_its_tasks(tmp_path, capsys):
    assert _serve(tmp_path, ["a", "b"], script="import sys; sys.exit('no driver')") == {}
    assert "no driver" in capsys.readouterr().err


def test_a_worker_that_starts_for_longer_than_there_is_time_is_not_waited_for(tmp_path, capsys):
    began = time.monotonic()
    assert _serve(tmp_path, ["a", "b"], limits=(30.0, 0.5), script="import time; time.sleep(60)") == {}
    assert time.monotonic() - began < 20 and capsys.readouterr().err == ""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a process started in the background does without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_workers_and_keeps_the_results(tmp_path):
    def interrupt(key, result):
        os.kill(os.getpid(), signal.SIGINT)

    kept = store.Store(tmp_path, "products", {}, {})
    tasks = [Task("a", lambda: {}), Task("hangs", lambda: {}), Task("b", lambda: {})]
    limits, begin = supervise.Limits(time.monotonic() + 60, time.monotonic() + 60), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        supervise.isolated(tasks, kept, limits, interrupt, [sys.executable, "-c", _SCRIPT], 1)
    assert time.monotonic() - begin < 20
    found = results(tmp_path, "products")
    assert found.keys() == {"a"}
    with pytest.raises(ProcessLookupError):
        os.kill(found["a"]["process"], 0)


def test_several_workers_share_the_tasks(tmp_path):
    found = _serve(tmp_path, [f"task {i}" for i in range(12)], workers=3)
    assert len(found) == 12 and {result["status"] for result in found.values()} == {OK}


def test_the_real_worker(tmp_path):
    at = Bench(plan.dry(), tmp_path)
    kept = store.Store(tmp_path, "environment", {}, {})
    argv = [sys.executable, "-m", "benchmarks.gpu.worker", "--part", "environment", "--out", str(tmp_path), "--dry-run"]
    limits = supervise.Limits(time.monotonic() + 60, time.monotonic() + 60)
    supervise.isolated(environment.tasks(at), kept, limits, lambda key, result: None, argv, 1)
    assert {result["status"] for result in results(tmp_path, "environment").values()} == {OK}


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("n", [8, 9, 15, 25, 41])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    low, _, high = measure.interval([float(i) for i in range(n)])
    outside = sum(math.comb(n, k) for k in range(int(low) + 1)) / 2**n
    assert low + high == n - 1 and 2 * outside <= 0.01
    if low:  # no narrower one would do
        assert 2 * sum(math.comb(n, k) for k in range(int(low) + 2)) / 2**n > 0.01


def test_a_loss_is_two_percent_and_two_microseconds_for_sure():
    steady = {"peftkern": [100e-6] * 9, "a little": [98.5e-6] * 9, "much": [90e-6] * 9}
    assert [loss["than"] for loss in measure.losses(steady, "peftkern", ["a little", "much"])] == ["much"]
    tiny = {"peftkern": [10e-6] * 9, "other": [9e-6] * 9}
    assert measure.losses(tiny, "peftkern", ["other"]) == []
    unsure = {"peftkern": [100e-6] * 9, "other": [90e-6] * 8 + [101e-6]}
    assert measure.losses(unsure, "peftkern", ["other"]) == []


def test_the_roofline_is_that_of_the_arithmetic():
    ceilings = roofline.Ceilings({"bfloat16": 790e12}, 4.3e12)
    cell = Cell("llama3-8b.qo", 8192, 4096, 4096, 16, 0.05, torch.bfloat16, torch.bfloat16, "cuda")
    forward, both = (roofline.floor(cell, phase, ceilings) for phase in cells.PHASES)
    assert forward["frozen_us"] == pytest.approx(348, abs=1)
    assert forward["ratio"] == pytest.approx(1.0078, abs=1e-4)
    assert both["ratio"] == pytest.approx(1.0078 + 0.045, abs=2e-3)
    assert both["overlapped"] == pytest.approx(1.0117, abs=1e-3)
    assert both["bytes"] == pytest.approx(448 * 2**20, rel=0.01)


def test_the_plan_has_every_cell_once():
    whole = plan.Plan()
    first = plan.plane(whole, 0.05, torch.bfloat16)
    assert len(first) == 12 * 10 and [cell.M for cell in first[:12]] == [8192] * 12
    sample = plan.sampled(whole)
    assert len(sample) == plan.SAMPLE and sample == plan.sampled(whole)
    assert not {plan.key_of(cell) for cell in sample} & {plan.key_of(cell) for cell in first}
    assert max(cell.M for cell in sample) <= 16384 and max(cell.r for cell in sample) <= 256


def test_goals_say_met_missed_and_not_measured():
    def cell(M, own, than=()):
        times = {"frozen": {"us": 1.0, "ratio": 1.0}, "peftkern": {"us": 1.0, "ratio": own}}
        about = {"layer": "l", "M": M, "K": 4096, "N": 4096, "r": 16, "p": 0.05, "dtype": "bf16", "adapter": "bf16"}
        lost = [{"own": "peftkern", "than": name, "ratio": 1.1, "us": 9.0} for name in than]
        return {
            "status": OK, "about": about, "times": {"forward": times}, "losses": {"forward": lost}, "choice": {},
            "roofline": {"forward": {"ratio": 1.0}},
        }  # fmt: skip

    found = {"cell a": cell(8192, 1.01), "cell b": cell(2048, 1.09, ["naive"]), "cell c": {"status": WRONG}}
    rows = {goal.name: goal.row() for goal in goals.all_goals(found, {})}
    mean = rows["forward, bf16 adapters, geo-mean M >= 2048"]
    assert mean["found"] == "1.049" and mean[""] == "MISSED" and mean["over"] == "2 of 48"
    assert rows["forward at 4096x4096, M=8192, bf16 adapters"][""] == "met"
    assert rows["within 2 % of its roofline, bf16 adapters"]["note"] == "1 of 2 above"
    assert rows["no cell slower than the best other: plane"]["found"] == "1"
    assert rows["forward, fp32 adapters, geo-mean M >= 2048"][""] == "not measured"
    assert goals.losing(found)[0]["than"] == "naive" and goals.worst(found)[0]["above"] == "1.090"


def test_records_name_no_folders():
    said = 'File "/usr/lib/python3/site-packages/torch/nn/functional.py", line 3; a / b; 1/2; /tmp/x'
    assert without_folders(said) == 'File "nn/functional.py", line 3; a / b; 1/2; /tmp/x'
