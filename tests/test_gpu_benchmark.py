"""``benchmarks.gpu`` end to end without a GPU: a tiny plan, invented times, and what can go wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import backend, bench, cells, correctness, plan, report, store, supervise
from benchmarks.gpu.measure import FakeTimer
from benchmarks.gpu.task import CRASH, ERROR, HANG, OK, OUT_OF_MEMORY, WRONG
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.arch import ARCHES
from peftkern.call import Problem
from peftkern.ops import dispatch

FAST = "environment,correctness,tuning,products"


@pytest.fixture(autouse=True)
def one_thread_and_nothing_left_behind(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("PEFTKERN_CACHE", os.environ.get("PEFTKERN_CACHE", ""))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # the command sets it for all that follows
    monkeypatch.setattr(tiles, "supports", tiles.supports)
    monkeypatch.setattr(report, "plot", lambda products: None)
    monkeypatch.setattr(bench, "free", lambda: None)  # a collection takes longer than these cells
    monkeypatch.setattr(command.record, "pyplot", lambda: None)
    yield
    monkeypatch.undo()
    select.forget()
    torch.set_num_threads(threads)


def go(out, *more: str, parts: str = FAST, minutes: str = "5") -> int:
    return command.main(["--minutes", minutes, "--out", str(out), "--parts", parts, "--dry-run", "--in-process", *more])


def results(out, part: str) -> dict:
    return json.loads((out / f"{part}.json").read_text())["results"]


def tiny_bench(out, **changes) -> bench.Bench:
    return bench.Bench(replace(plan.dry(), **changes), out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert command.main(["--minutes", "1", "--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_whole_command_then_again(tmp_path, capsys, monkeypatch):
    parts = FAST + (",models" if _has("peft", "transformers") else "")
    assert go(tmp_path, parts=parts) == 0
    printed = capsys.readouterr().out
    last = printed[printed.index(" summary ") :]
    assert len(last) < 12_000
    for words in ("A REHEARSAL", "forward, bf16 adapters, geo-mean M >= 2048", "goals missed", "decode over merged"):
        assert words in last
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{part}.json" for part in parts.split(",")} | {"report.md", "results.tar.gz"}
    for part in parts.split(","):
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert {"device", "commit", "date", "method", "versions"} <= found["machine"].keys()
        assert {result["status"] for result in found["results"].values()} <= {OK, "refused"}, part
    products, text = results(tmp_path, "products"), (tmp_path / "report.md").read_text()
    timed = [result for key, result in products.items() if key.startswith("cell ")]
    assert len(timed) >= 2 * 2 * 4 + 2
    for result in timed:
        assert result["times"]["forward+backward"].keys() >= {"frozen", "frozen again", "peftkern", "naive", "addmm_"}
        assert result["roofline"]["forward"]["bytes"] > 0
    assert text.count("| f+b |") == len(timed)

    monkeypatch.setattr(supervise, "run_guarded", lambda task: pytest.fail(f"{task.key} ran again"))
    assert go(tmp_path, parts=parts) == 0
    assert results(tmp_path, "products") == products


def _has(*modules: str) -> bool:
    import importlib.util

    return all(importlib.util.find_spec(name) for name in modules)


def test_another_commit_starts_anew_and_keeps_the_old_record(tmp_path):
    assert go(tmp_path, "--commit", "first", parts="environment") == 0
    assert go(tmp_path, "--commit", "second", parts="environment") == 0
    assert json.loads((tmp_path / "environment.json").read_text())["machine"]["commit"] == "second"
    assert json.loads((tmp_path / "environment.previous.json").read_text())["machine"]["commit"] == "first"


def test_a_damaged_file_is_put_aside(tmp_path, capsys):
    (tmp_path / "environment.json").write_text('{"results": {"ceil')
    assert go(tmp_path, parts="environment") == 0
    assert results(tmp_path, "environment")["ceilings"]["status"] == OK
    assert "damaged" in capsys.readouterr().out


def test_an_infinity_is_a_word(tmp_path):
    kept = store.Store(tmp_path, "products", {}, {})
    kept.put("a", {"status": WRONG, "failures": [{"error": float("inf")}], "errors": {"y": float("nan")}})
    kept.flush()
    text = (tmp_path / "products.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["results"]["a"]["failures"] == [{"error": "inf"}]


def test_no_time_measures_nothing_and_leaves_valid_files(tmp_path, capsys):
    assert go(tmp_path, minutes="0") == 0
    assert all(results(tmp_path, part) == {} for part in FAST.split(","))
    assert "not measured" in capsys.readouterr().out


def test_the_time_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "measure_cell", lambda bench, cell: time.sleep(0.2) or {"status": "refused"})
    assert go(tmp_path, parts="products", minutes=str(1.0 / 60)) == 0
    count = sum(key.startswith("cell ") for key in results(tmp_path, "products"))
    assert 1 <= count <= 6


def test_cut_short_keeps_what_there_is_and_goes_on_later(tmp_path, monkeypatch, capsys):
    genuine, seen = cells.measure_cell, []

    def interrupted(at, cell):
        seen.append(cell)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return genuine(at, cell)

    monkeypatch.setattr(cells, "measure_cell", interrupted)
    assert go(tmp_path, parts="products") == 130
    kept = results(tmp_path, "products")
    assert sum(key.startswith("cell ") for key in kept) == 2
    assert "interrupted" in (said := capsys.readouterr().out) and "summary" in said
    assert "## Products" in (tmp_path / "report.md").read_text()
    assert go(tmp_path, parts="products") == 0
    whole = results(tmp_path, "products")
    assert len(whole) > len(kept) and {key: whole[key] for key in kept} == kept


def test_a_termination_is_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cells, "measure_cell", lambda bench, cell: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5)
    )
    assert go(tmp_path, parts="products") == 130
    assert "rng draw" in results(tmp_path, "products")


def test_what_goes_wrong_in_a_cell_stays_in_it(tmp_path, monkeypatch, capsys):
    genuine, seen = cells.measure_cell, []

    def unlucky(at, cell):
        seen.append(cell)
        if len(seen) == 1:
            raise RuntimeError("broken in /home/somebody/code/kernel.py")
        if len(seen) == 2:
            raise torch.cuda.OutOfMemoryError("too large")
        return genuine(at, cell)

    monkeypatch.setattr(cells, "measure_cell", unlucky)
    assert go(tmp_path, parts="products") == 0
    found = [result for key, result in results(tmp_path, "products").items() if key.startswith("cell ")]
    assert [result["status"] for result in found[:3]] == [ERROR, OUT_OF_MEMORY, OK]
    assert found[0]["error"] == "RuntimeError: broken in code/kernel.py" and found[0]["about"]["M"] == 8
    assert "Did not end well (2)" in capsys.readouterr().out
    seen += [None] * 2
    assert go(tmp_path, "--retry", parts="products") == 0
    assert {result["status"] for result in results(tmp_path, "products").values()} == {OK}


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    from benchmarks.gpu import variants

    genuine = variants.peftkern.lora_linear
    monkeypatch.setattr(variants.peftkern, "lora_linear", lambda *a, **k: genuine(*a, **k) * 1.05)
    at = tiny_bench(tmp_path)
    result = cells.measure_cell(at, at.plan.cell(at.plan.layers[0], 8))
    assert result["status"] == WRONG and "y has error" in result["error"] and "times" not in result


def test_a_wrong_competitor_is_left_out(tmp_path, monkeypatch):
    from benchmarks.gpu import variants

    monkeypatch.setattr(variants.linear, "addmm", lambda o, drop: _off(o, drop))
    at = tiny_bench(tmp_path)
    one = variants.Linear(at.plan.cell(at.plan.layers[0], 8), at.plan)
    monkeypatch.setattr(one, "peer", lambda masked=True: [1e-2] * 4)
    errors, failed = cells._check_eager(one)
    assert failed.keys() == {"addmm_"} and errors["addmm_"]["y"] > 0.02


def _off(o, drop):
    return 1.5 * (torch.nn.functional.linear(o.x, o.W) + 0 * o.A.sum() + 0 * o.B.sum())


class _Backend:
    """The reference with something wrong in one result."""

    name = "reference"

    def __init__(self, scale: float = 1.0, noise: float = 0.0) -> None:
        self.exact, self.scale, self.noise = dispatch.backend_named("reference"), scale, noise

    def pair(self, pair, x):
        y, s = self.exact.pair(pair, x)
        return y * self.scale + self.noise * torch.rand_like(y), s

    def pair_backward(self, *arguments):
        return self.exact.pair_backward(*arguments)


def test_correctness_finds_a_wrong_result_and_excludes_its_schedule(tmp_path, monkeypatch):
    genuine = dispatch.backend_named
    at = tiny_bench(tmp_path, backend="broken")
    monkeypatch.setattr(dispatch, "backend_named", lambda name: _Backend(1.05) if name == "broken" else genuine(name))
    tasks = [task for task in correctness.tasks(at) if task.key.startswith("grid split bf16")]
    found = {task.key: bench.run_guarded(task) for task in tasks}
    (result,) = found.values()
    assert result["status"] == WRONG and {failure["name"] for failure in result["failures"]} == {"y"}
    rules = backend.exclusions(found)
    assert rules == [{"schedule": "split", "dtype": "bfloat16", "rank": None, "tile": None}]
    launch, arch = tiles.Pass(_problem(torch.bfloat16), False), ARCHES["sm_90"]
    before = {choice.schedule for choice in tiles.choices(launch, arch)}
    backend.exclude(rules)
    after = {choice.schedule for choice in tiles.choices(launch, arch)}
    assert before - after == {"split"}
    assert "failed its correctness run" in tiles.refusals(launch, arch)["split"]
    fp16 = tiles.Pass(_problem(torch.float16), False)
    assert "split" in {choice.schedule for choice in tiles.choices(fp16, arch)}


def _problem(dtype: torch.dtype) -> Problem:
    return Problem("cuda", 4096, 4096, 4096, 16, dtype, dtype, dropout=True)


def test_what_tensor_cores_cut_off_is_allowed_for_on_a_gpu_alone():
    one = correctness.trial((64, 128, 192), (torch.bfloat16, torch.float32), 16, 0.0, "cpu")
    assert correctness.cut_off(one, "y") == 0.0
    here = {"is_cuda": True, "dtype": torch.bfloat16}
    on_a_gpu = one._replace(x=SimpleNamespace(shape=(64, 4096), **here), dy=SimpleNamespace(shape=(64, 192)))
    found = {name: correctness.cut_off(on_a_gpu, name) for name in correctness.NAMES_OF_RESULTS}
    steps = {"y": 256, "s": 256, "dx": 12, "dA": 4, "dB": 4, "dbias": 0, "dlora_bias": 0}
    assert found == pytest.approx({name: 2e-8 * count for name, count in steps.items()})


def test_correctness_finds_results_that_move(tmp_path, monkeypatch):
    genuine = dispatch.backend_named
    at = tiny_bench(tmp_path, backend="moving")
    moving = _Backend(noise=1e-4)
    monkeypatch.setattr(dispatch, "backend_named", lambda name: moving if name == "moving" else genuine(name))
    task = next(task for task in correctness.tasks(at) if task.key.startswith("grid split fp32"))
    names = {failure["name"] for failure in bench.run_guarded(task)["failures"]}
    assert "repeat y" in names and "repeat dx" not in names


@pytest.mark.parametrize(
    ("status", "failures", "excluded"),
    [(HANG, [], [None]), (CRASH, [], [None]), (ERROR, [], [16]), (OUT_OF_MEMORY, [], []), ("refused", [], []),
     (WRONG, [{"name": "dA"}], []), (WRONG, [{"name": "dA"}, {"name": "dx"}], [None])],
)  # fmt: skip
def test_what_excludes_a_schedule(status, failures, excluded):
    about = {"schedule": "one_pass/shared", "dtype": "bfloat16", "padded": 16, "tile": None}
    found = backend.exclusions({"a": {"status": status, "about": about, "failures": failures}})
    assert [rule["rank"] for rule in found] == excluded


def test_more_tuning_measures_the_changed_cells_again(tmp_path):
    at = tiny_bench(tmp_path)
    kept = store.Store(tmp_path, "products", {}, {})
    for M, choice in ((8, None), (2, {"backend": "another"})):
        cell = at.plan.cell(at.plan.layers[0], M)
        kept.put(plan.key_of(cell), {"status": OK, "about": plan.about(cell), "choice": choice or backend.chosen(cell)})
    kept.put("rng draw", {"status": OK})
    cells.forget_stale(kept, at.plan)
    assert [key.split()[0] for key in kept.results] == ["tiny.square", "rng"]


def test_speeds_reach_the_record(tmp_path):
    at = tiny_bench(tmp_path)
    at.timer = FakeTimer({"frozen": 1.0, "peftkern": 1.5, "naive": 1.2, "addmm_": 2.0})
    result = cells.measure_cell(at, at.plan.cell(at.plan.layers[1], 8, adapter=torch.bfloat16))
    assert result["times"]["forward"]["peftkern"]["ratio"] == pytest.approx(1.5, rel=0.02)
    assert [loss["than"] for loss in result["losses"]["forward"]] == ["naive"]


def test_an_error_in_the_report_costs_no_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.goals, "all_goals", lambda products, models: 1 / 0)
    assert go(tmp_path, parts="environment") == 0
    assert results(tmp_path, "environment")["ceilings"]["status"] == OK
    assert "no report: ZeroDivisionError" in (said := capsys.readouterr().out) and "no summary" in said


def test_the_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    at = tiny_bench(tmp_path)
    kept = store.Store(tmp_path, "products", {}, {})
    cell = at.plan.cell(at.plan.layers[0], 8)
    kept.put(f"cell {plan.key_of(cell)}", {"status": OK, "about": plan.about(cell)} | cells.measure_cell(at, cell))
    kept.flush()
    report.write(tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


class _Replay:
    """Stands in for a CUDA graph: the call itself."""

    def __init__(self, run) -> None:
        self.run = run

    def __call__(self):
        return self.run()


def test_graphs_are_variants_and_a_failed_capture_is_one_less(tmp_path, monkeypatch):
    from benchmarks.gpu import graphs, studies, variants

    monkeypatch.setattr(variants, "Captured", _Replay)
    monkeypatch.setattr(graphs, "Captured", _Replay)
    at = tiny_bench(tmp_path, compare_graphs=True)
    cell = at.plan.cell(at.plan.layers[0], 8)
    result = cells.measure_cell(at, cell)
    for phase in cells.PHASES:
        assert {"frozen graph", "peftkern graph"} <= result["times"][phase].keys()
    decoded = studies.decode_cell(at, replace(cell, p=0.0))
    assert {"merged graph", "peftkern graph"} <= decoded["graphs"].keys()

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(variants, "Captured", refuse)
    result = cells.measure_cell(at, cell)
    assert "capturing" in result["excluded"]["peftkern graph"] and "peftkern" in result["times"]["forward"]


def test_the_model_step_as_a_graph(tmp_path, monkeypatch):
    if not _has("peft", "transformers"):
        pytest.skip("peft or transformers is not installed")
    from benchmarks.gpu import graphs, models

    monkeypatch.setattr(graphs, "Captured", _Replay)
    result = models.model_step(tiny_bench(tmp_path, compare_graphs=True), 0.05)
    assert result["graphs"]["times"].keys() == {"frozen", "frozen again", "peft", "peftkern"}
    assert result["graphs"]["failed"] == {}
    assert result["saved_mib"]["peftkern"] <= result["saved_mib"]["peft"]
