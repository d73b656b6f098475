"""The benchmarks' own machinery: nothing here looks at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from benchmarks import harness, memory, record
from benchmarks.harness import Case, WrongResult


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny problems, which threads of a busy machine only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def right() -> None:
    return None


def test_a_wrong_result_is_not_timed():
    runs = []
    cases = [Case("base", lambda: runs.append("base"), right), Case("other", lambda: runs.append("other"), lambda: "y")]
    with pytest.raises(WrongResult, match="other is wrong and is not timed: y"):
        harness.measure(cases, rounds=2)
    assert runs == []


def test_rounds_are_interleaved_and_prepared(monkeypatch):
    monkeypatch.setattr(harness, "_SAMPLE_SECONDS", 0.0)
    order = []
    cases = [
        Case("a", lambda: order.append("a"), right),
        Case("b", lambda: order.append("b"), right, prepare=lambda: order.append("prepare")),
    ]
    timings = harness.measure(cases, rounds=2, warmup=1)
    assert order == ["a", "prepare", "b"] * 3
    assert [timing.name for timing in timings] == ["a", "b"]
    assert timings[0].ratio == timings[0].ratio_q1 == timings[0].ratio_q3 == 1.0
    for timing in timings:
        assert len(timing.samples) == 2
        assert timing.q1 <= timing.median <= timing.q3
        assert timing.ratio_q1 <= timing.ratio <= timing.ratio_q3


def test_a_sample_is_taken_somewhere_and_may_be_one_run():
    order = []

    @contextlib.contextmanager
    def around():
        order.append("in")
        yield
        order.append("out")

    cases = [Case("a", lambda: order.append("run"), right, lambda: order.append("prepare"), around)]
    harness.measure(cases, rounds=2, repeat=False)
    assert order == ["in", "prepare", "run", "out"] * 3  # one of them to warm up


def test_the_interval_of_a_median_is_the_sign_tests():
    values = [float(value) for value in range(15, 0, -1)]
    assert harness.median_interval(values, 0.99) == (3.0, 13.0)  # 1 - 2 (1 + 15 + 105) / 2**15 = 0.9926
    assert harness.median_interval(values, 0.95) == (4.0, 12.0)
    assert (
        harness.median_interval(values[:8], 0.99) == (8.0, 15.0) and harness.median_interval(values[:7], 0.99) is None
    )
    covered = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        low, high = harness.median_interval(torch.rand(15, generator=generator).tolist(), 0.99)
        covered += low <= 0.5 <= high
    assert covered / 2000 > 0.985


def test_the_record_says_where_and_when():
    machine = record.machine()
    for field in ("date", "commit", "dirty", "cpu", "cores", "threads", "load_average_at_start", "method", "versions"):
        assert field in machine, field
    assert machine["versions"]["torch"]
    json.dumps(machine)


def test_saved_bytes_of_a_known_graph():
    model = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    assert memory.saved_for_backward(lambda: model(x), model).total == x.nbytes  # the weight is a parameter
    y = torch.randn(32, requires_grad=True)

    def views_of_one_storage():
        wide = y * 1.0
        return wide[:16].sigmoid() * wide[16:]  # saves sigmoid's result once and one half of wide, in full

    saved = memory.saved_for_backward(views_of_one_storage)
    assert saved.total == 16 * 4 + 32 * 4
    assert saved.by_dtype == {"float32": saved.total}


def test_what_forward_drops_is_not_saved():
    x = torch.randn(64, requires_grad=True)

    def forward():
        x.exp()  # saves its result, and is dropped at once
        return x.sum()

    assert memory.saved_for_backward(forward).total == 0


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.json"
    record.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_tables_align():
    rows = [{"name": "a", "ms": "1.0"}, {"name": "longer", "ms": "10.0"}]
    assert record.table(rows, right=("ms",)).splitlines() == [
        "name      ms",
        "------  ----",
        "a        1.0",
        "longer  10.0",
    ]


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_check_every_variant(dtype, p):
    from benchmarks import linear

    cell = linear.Cell("small", 24, 65, 33, 4, p, dtype, torch.float32, "cpu")
    checker = linear.Checker(cell, linear.operands(cell))
    for name in linear.VARIANTS:
        if name != "compiled":
            assert checker.check(name) is None
    with_error = linear.Checker(cell, linear.operands(cell))
    with_error.truth[2] = with_error.truth[2] * 1.05
    assert "dA" in with_error.check("peftkern")


def test_products_rows():
    from benchmarks import linear, products

    cell = linear.Cell("small", 24, 65, 33, 4, 0.05, torch.float32, torch.float32, "cpu")
    rows = products.measure_cell(cell, ("frozen", "naive", "addmm_", "peftkern"), rounds=2)
    assert len(rows) == 3 * 4
    assert {"layer", "M", "K", "N", "r", "p", "phase", "name", "median", "ratio", "arithmetic"} <= rows[0].keys()
    assert "forward+backward" in products.text(rows) and products.slower(rows) == []  # two rounds say nothing


def test_products_say_what_is_slower_for_sure():
    from benchmarks import harness, products

    def timing(name: str, samples: list[float]) -> harness.Timing:
        return harness.Timing(name, statistics.median(samples), 0, 0, 0, 0, 0, 0, samples)

    def own(against: float) -> dict:
        seconds = [1.0 + i / 1000 for i in range(10)]
        timings = [timing("frozen", seconds), timing("naive", [2 * s for s in seconds]), timing("addmm_", seconds)]
        timings.append(timing("peftkern", [against * s for s in seconds]))
        verdict = products._against_others(timings[-1], timings)
        return {"layer": "l", "M": 1, "phase": "forward", "name": "peftkern"} | verdict

    assert products.slower([own(1.02), own(0.5)]) == []
    assert products.slower([own(1.05)]) == ["l M=1 forward: 1.05x of addmm_"]


def test_layer_checks_and_measures():
    pytest.importorskip("peft")
    from benchmarks import layer, linear

    cell = linear.Cell("small", 24, 65, 33, 4, 0.05, torch.bfloat16, torch.float32, "cpu")
    assert layer.Layers(cell).check("peftkern") is None
    rows = layer.measure_cell(cell, ("frozen", "peft", "peftkern"), rounds=1)
    assert [row["name"] for row in rows[:3]] == ["frozen", "peft", "peftkern"]


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a real GPU cannot be stood in for")


@no_gpu
def test_the_host_benchmark(tmp_path, monkeypatch, capsys):
    """Every phase, warm and cold, of every layer in both places; launches by the schedule that this size gets."""
    pytest.importorskip("peft")
    pytest.importorskip("triton")
    from benchmarks import host

    evicted = []
    monkeypatch.setattr(host, "evict", lambda: evicted.append(1))
    sizes = ["--rows", "1", "--columns", "64", "--dtype", "fp32", "--rounds", "2"]
    host.main([*sizes, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert len(rows) == 2 * len(host.PHASES) * 2 * 3 and (tmp_path / "host.csv").exists()
    assert len(evicted) == 2 * len(host.PHASES) * 3 * (2 + 2)  # two to warm up
    launches = {(row["name"], row["phase"]): row["launches"] for row in rows if row["place"] == "sm_90"}
    assert [launches["peftkern", phase] for phase in host.PHASES] == [1, 1, 3, 4]
    assert [launches["linear", phase] for phase in host.PHASES] == [1, 1, 1, 2]
    assert [launches["peft", phase] for phase in host.PHASES] == [5, 5, 7, 12]
    assert "1 rows, 64 columns, fp32" in capsys.readouterr().out


def test_the_host_benchmark_does_not_time_what_is_wrong(monkeypatch):
    pytest.importorskip("peft")
    from benchmarks import host, layer

    monkeypatch.setattr(layer.Layers, "check", lambda self, name: "off by one")
    with pytest.raises(WrongResult, match="peftkern is wrong and is not timed: off by one"):
        host.variants(1, 64, torch.float32, 4, 0.0)


@no_gpu
def test_the_host_benchmark_counts_instructions(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("triton")
    from benchmarks import host, host_instructions

    monkeypatch.setattr(host_instructions.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(host_instructions, "count", lambda place, name, *_: 50.0 if name == "peftkern" else 100.0)
    host.main(["--instructions", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "host_instructions.json").read_text())["rows"]
    assert [(row["place"], row["name"]) for row in rows] == list(host_instructions.VARIANTS)
    assert capsys.readouterr().out.count("0.50x") == 2


@pytest.mark.long
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_of_the_host_are_counted(tmp_path):
    pytest.importorskip("peft")
    from benchmarks import host_instructions

    one, again = (host_instructions.count("CPU", "peftkern", (1, 8, "fp32", 2, 0.0), tmp_path) for _ in range(2))
    assert one > 50_000 and abs(again / one - 1) < 0.02


def tiny_llama(dtype: torch.dtype) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_model_benchmark_end_to_end(dtype):
    pytest.importorskip("peft")
    from benchmarks import model

    ids = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0))
    result = model.compare(tiny_llama(dtype), ids, 0.05, rounds=2)
    frozen, peft, own = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["frozen", "peft", "peftkern"]
    assert frozen["ratio"] == 1.0
    assert frozen["saved_mib"] < own["saved_mib"] < peft["saved_mib"]
    assert result["check"]["ok"]
    assert sum(result["backends"].values()) == 14
    json.dumps(result)
    assert "x frozen" in model.text(result, (1.1, 400.0))


def test_a_wrong_gradient_stops_the_model_benchmark(monkeypatch):
    pytest.importorskip("peft")
    from benchmarks import model
    from peftkern.integrations.peft import memo

    exact = memo.run_pair
    wrong = lambda x, pair, *kept: exact(x, pair._replace(scaling=pair.scaling * 1.05), *kept)  # noqa: E731
    monkeypatch.setattr(memo, "run_pair", wrong)
    ids = torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(WrongResult, match="peftkern is wrong"):
        model.compare(tiny_llama(torch.float32), ids, 0.0, rounds=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "bert"])
def test_the_pair_benchmark_on_every_family(family, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from benchmarks import families, model, pairs

    monkeypatch.setattr(pairs.load, "__defaults__", (families.Size(32, 48, 2, 4, 64, 32),))
    options = ["--models", family, "--base", "fp32", "--length", "16", "--rounds", "8", "--out", str(tmp_path)]
    model.main(options)
    written = json.loads((tmp_path / "models.json").read_text())
    row = written["results"][family]["row"]
    assert written["results"][family]["check"]["ok"] and row["p"] == (0.0 if family == "mixtral" else 0.05)
    assert row["low"] <= row["ratio"] <= row["high"] and row["within"] == (row["high"] <= 1.03)
    assert sum(written["results"][family]["layers"].values()) == row["layers"]
    assert f"{row['fast']} of {row['layers']}" in capsys.readouterr().out and (tmp_path / "models.csv").exists()


def test_the_pair_benchmark_names_what_it_does_not_take(capsys):
    from benchmarks import model

    with pytest.raises(SystemExit):
        model.main(["--models", "llama,lama"])
    assert "lama: not of smollm2, llama" in capsys.readouterr().err
    pytest.importorskip("peft")
    with pytest.raises(SystemExit, match="--models takes a base of bf16, fp16, fp32"):
        model.main(["--models", "llama", "--base", "nf4"])


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_demo_takes_a_dtype_that_the_machine_multiplies(native, dtype, monkeypatch):
    from benchmarks import smollm2

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert smollm2.native_dtype("cpu") == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert smollm2.native_dtype("cpu") == torch.float32


@pytest.mark.parametrize(("dtype", "noise", "wrong"), [(torch.bfloat16, 1e-3, 4e-3), (torch.float32, 5e-7, 3e-6)])
def test_the_demo_stops_at_a_disagreement(dtype, noise, wrong, monkeypatch, tmp_path):
    """Losses of the two runs may differ by the roundings of the base's dtype and by no more."""
    pytest.importorskip("peft")
    from benchmarks import demo, finetune

    job = finetune.Job("cpu", tmp_path, 1, dtype)
    monkeypatch.setattr(finetune, "build", lambda job, p: None)
    monkeypatch.setattr(finetune, "patched", lambda model: (None, None))
    for difference in (noise, wrong):
        losses = iter([3.0, 3.0 * (1 + difference)])
        monkeypatch.setattr(finetune, "train", lambda *_, values=losses: finetune.Run([next(values)], [1.0]))
        if difference == noise:
            assert demo.agreement(job, [])["seconds"] == 2.0
        else:
            with pytest.raises(demo.Disagreement, match="bf16" if dtype == torch.bfloat16 else "fp32"):
                demo.agreement(job, [])


def test_what_the_demo_imports_says_nothing_but_errors():
    pytest.importorskip("peft")
    program = (
        "from benchmarks import quiet; quiet.others(); import benchmarks.finetune; import importlib.util, logging\n"
        "for name in ('torchao', 'bitsandbytes'): importlib.util.find_spec(name) and __import__(name)\n"
        "for name in quiet._WARN: logging.getLogger(name).error('an error')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.count("an error") == len(done.stderr.splitlines()) == 3


def test_missing_packages_are_named_in_one_line():
    from benchmarks import packages

    with pytest.raises(SystemExit, match="missing packages: no_such_package; install them with: pip install"):
        packages.require("torch", "no_such_package")
