"""A short run of ``benchmarks.gpu``: what is asked for, each part's end, what is left out, frozen timed twice."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu_runs import go, nothing_left_behind, put, results  # noqa: F401, a fixture

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    asked,
    cells,
    compilation,
    environment,
    external,
    goals,
    measure,
    parts,
    plan,
    report,
    store,
    supervise,
    tuning,
    worker,
)
from benchmarks.gpu.asked import Asked
from benchmarks.gpu.bench import Bench, Wrong
from benchmarks.gpu.measure import FakeTimer
from benchmarks.gpu.task import CRASH, HANG, OK, Task
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import SPLIT, Pass
from peftkern.backends.triton.tune import search
from peftkern.testing.problems import Layer

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------ what is asked for


def test_only_takes_the_tasks_whose_key_has_a_match(tmp_path):
    assert (
        go(
            tmp_path,
            "--parts",
            "environment,correctness,products",
            "--only",
            "^grid split .* r=4|cell tiny.up M=8 r=16",
        )
        == 0
    )
    assert results(tmp_path, "environment").keys() == {"card", "ceilings", "one call", "packages"}
    grid, products = results(tmp_path, "correctness"), results(tmp_path, "products")
    assert grid and all(key.startswith("grid split ") for key in grid)
    assert products and all(key.startswith("cell tiny.up M=8 r=16 ") for key in products)


def test_only_without_a_match_measures_nothing_and_says_so(tmp_path, capsys):
    assert go(tmp_path / "out", "--parts", "environment,products", "--only", "cell huge") == 2
    assert "'cell huge'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "says"), [(("--only", "("), "no regular expression"), (("--parts", "models,all"), "unknown parts: all"),
                         (("--without", "frozen"), "unknown variants: frozen"),
                         (("--stand-in", "sm_90"), "nothing but --parts compile")],
)  # fmt: skip
def test_what_cannot_be_asked_for(option, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        go(tmp_path, *option)
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("minutes", "more", "left_out"),
    [("14.9", (), ("compiled",)), ("15", (), ()), ("5", ("--without", ""), ()),
     ("60", ("--without", "peft,compiled"), ("peft", "compiled"))],
)  # fmt: skip
def test_a_short_run_has_no_time_for_the_compiler(minutes, more, left_out, tmp_path):
    words = ["--minutes", minutes, "--out", str(tmp_path), "--parts", "models,tests", "--only=-m gpu|layer"]
    run = command.Run(command.parse([*words, *more]))
    assert run.plan.without == left_out
    words = run._command("products", supervise.Limits(0.0, time.monotonic() + 60))
    told = worker.parse(words[words.index("benchmarks.gpu.worker") + 1 :])
    assert asked.plan(told, asked.without(told, 1e9)) == run.plan and asked.of(told) == run.bench.asked
    assert run.bench.asked == Asked(("models", "tests"), "-m gpu|layer") and 50 < told.seconds <= 60


def test_variants_that_are_left_out_are_neither_checked_nor_timed(tmp_path):
    at = Bench(replace(plan.dry(), without=("naive", "compiled")), tmp_path)
    result = cells.measure_cell(at, at.plan.cell(at.plan.layers[0], 8))
    assert result["times"]["forward"].keys() == {"frozen", "frozen again", "peftkern", "addmm_", "peft"}
    assert result["errors"].keys() == {"frozen", "peftkern", "addmm_", "peft"}


def test_the_card_comes_first(tmp_path):
    assert [task.key for task in environment.tasks(Bench(plan.dry(), tmp_path))] == [
        "card", "ceilings", "one call", "packages",
    ]  # fmt: skip


def test_the_first_call_is_judged_and_explained(tmp_path, monkeypatch):
    at = Bench(plan.dry(), tmp_path)
    result = environment.one_call(at)
    assert result["errors"]["reference"][3] < 5e-3 and "backend" in result["explained"]
    genuine = environment.peftkern.lora_linear
    monkeypatch.setattr(environment.peftkern, "lora_linear", lambda *a, **k: genuine(*a, **k) * 1.05)
    with pytest.raises(Wrong, match="reference: y has error"):
        environment.one_call(at)


# --------------------------------------------------------------------------------------------------------- deadlines


def test_a_part_ends_soon_after_its_share(tmp_path, monkeypatch):
    """Its limits are its own, and not the run's."""
    found = {}

    def inline(tasks, kept, limits, progress):
        found[kept.part] = limits

    monkeypatch.setattr(supervise, "inline", inline)
    began = time.monotonic()
    assert go(tmp_path, "--parts", "environment,correctness,products", minutes="10") == 0
    shares = plan.SHARES["environment"], plan.SHARES["correctness"], plan.SHARES["products"]
    ends = [600 * sum(shares[: i + 1]) / sum(shares) for i in range(3)]
    assert [limits.begin - began for limits in found.values()] == pytest.approx(ends, abs=5)
    assert [limits.end - limits.begin for limits in found.values()] == pytest.approx([15, 15, 0], abs=1e-3)


def test_what_broke_the_device_is_left_out_by_the_next_process(tmp_path):
    """A crash is on disk when the next process begins, which reads there what to leave out."""
    script = f"""
import json, os, pathlib, sys
path = pathlib.Path({str(tmp_path / "tuning.json")!r})
print("ready", flush=True)
seen = json.loads(path.read_text())["results"].keys() if path.exists() else ()
for line in sys.stdin:
    print(json.dumps({{"status": "crash" if line.strip() == "b" else "ok", "seen": list(seen)}}), flush=True)
"""
    kept = store.Store(tmp_path, "tuning", {}, {})
    limits = supervise.Limits(time.monotonic() + 30, time.monotonic() + 30)
    tasks = [Task(key, lambda: {}) for key in "abc"]
    supervise.isolated(tasks, kept, limits, lambda *_: None, [sys.executable, "-c", script], 1)
    assert results(tmp_path, "tuning")["c"]["seen"] == ["a", "b"]


def test_a_device_lost_by_the_tuner_excludes_the_tile(tmp_path, monkeypatch):
    arch = ARCHES["sm_90"]
    cell = plan.Plan().cell(Layer("l", 4096, 4096), 8192)
    launch = Pass(compilation._problem(cell), False)
    faulty = next(choice for choice in search.candidates(launch, arch) if choice.schedule == SPLIT)

    def lost(*_):
        raise search.DeviceLost("an illegal access", faulty)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.command, "run", lost)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    result = tuning.tune_shapes([cell], 0.1)
    assert result["status"] == CRASH
    put(
        tmp_path,
        "tuning",
        {"tune a": {"about": plan.about(cell)} | result, "tune b": {"status": OK, "about": plan.about(cell)}},
    )
    worker.prepare("products", tmp_path)
    left = search.candidates(launch, arch)
    assert faulty not in left and any(choice.schedule == SPLIT for choice in left)


# ------------------------------------------------------------------------------------------------------ frozen, twice


@pytest.mark.parametrize(("again", "lost"), [(1.0, ["naive"]), (1.3, []), (0.75, []), (1.2, ["naive"])])
def test_a_loss_below_the_measurements_own_error_does_not_count(again, lost, tmp_path):
    at = Bench(plan.dry(), tmp_path)
    at.timer = FakeTimer({"frozen": 1.0, "frozen again": again, "peftkern": 1.5, "naive": 1.2, "addmm_": 2.0})
    result = cells.measure_cell(at, at.plan.cell(at.plan.layers[1], 8, adapter=torch.bfloat16))
    assert [loss["than"] for loss in result["losses"]["forward"]] == lost
    found = {"cell a": {"status": OK, "about": plan.about(at.plan.cell(at.plan.layers[1], 8))} | result}
    (row,) = report._cells(found)[:1]
    low, high = (float(word) for word in row["A/A"].split("-"))
    assert low <= again * 1.01 and high >= again * 0.99 and "frozen again" not in row
    note = next(goal.note for goal in goals.all_goals(found, {}) if goal.name.endswith("plane"))
    assert f"over itself up to {measure.noise(result['times']['forward']):.3f}" in note


def test_the_cache_is_flushed_by_reading(monkeypatch):
    """What is written would be written back while the call runs."""
    diary: list[str] = []

    class Buffer:
        def sum(self) -> None:
            diary.append("read")

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            diary.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1.0

    monkeypatch.setattr(torch, "zeros", lambda *_, **__: Buffer())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda count: diary.append("wait"))
    timer = measure.CudaTimer()
    assert timer.sample("a", lambda: diary.append("run"), 1e-5) == 1e-3
    assert diary == ["read", "wait", "event", "run", "event"]


# ----------------------------------------------------------------------------------------------- the repository's tests


def test_the_gpu_tests_are_one_task_of_the_files_that_have_some(tmp_path, monkeypatch):
    found = {path.name for path in external.with_gpu_tests(ROOT / "tests")}
    assert found >= {"test_gpu.py", "test_gpu_bank.py", "test_products.py", "test_lora_fa.py", "test_bad_inputs.py"}
    assert not found & {"test_triton_compile.py", "test_cpp.py", "test_tune.py", "test_gpu_benchmark.py"}
    asked_for: list[list[str]] = []
    monkeypatch.setattr(external, "run", lambda words, seconds: asked_for.append([*words, seconds]) or {"status": OK})
    at = Bench(plan.Plan(), tmp_path, end=time.monotonic() + 60)
    (task,) = parts.tasks("tests", at)
    assert task.run() == {"status": OK}
    *words, seconds = asked_for[0]
    assert words[words.index("--dist") + 1] == "worksteal" and {Path(word).name for word in words} >= found
    assert 40 < seconds < 50
    assert "tests" not in Asked().parts


def test_programs_that_wait_for_each_other_are_not_watched_for_races(tmp_path, monkeypatch):
    monkeypatch.setattr(external.shutil, "which", lambda tool: f"/bin/{tool}")
    keys = {task.key for task in external.sanitizers(Bench(plan.Plan(), tmp_path))}
    assert {"sanitizer memcheck one_pass/shared", "sanitizer racecheck split"} < keys and len(keys) == 7


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a process started in the background does without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_what_runs_out_of_time_says_how_far_it_came(monkeypatch):
    script = """
import time
try:
    print("two failed", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("a summary of them", flush=True)
"""
    result = external.run([sys.executable, "-c", script], 3.0)
    assert result["status"] == HANG and result["output"] == "two failed\na summary of them\n"
    monkeypatch.setattr(external, "_LAST_WORDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert external.run([sys.executable, "-c", deaf], 3.0)["status"] == HANG and time.monotonic() - began < 30
