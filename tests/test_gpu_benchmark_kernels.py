"""``benchmarks.gpu``: kernels compiled ahead of what is timed, and what comes back from a machine that is lent."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import stand_in
from gpu_runs import go, nothing_left_behind, put, results  # noqa: F401, a fixture
from triton.runtime.cache import get_cache_manager

import peftkern
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    archive,
    backend,
    compilation,
    parts,
    plan,
    report,
    tuning,
)
from benchmarks.gpu.asked import Asked
from benchmarks.gpu.bench import Bench, run_guarded
from benchmarks.gpu.task import OK, Task
from benchmarks.linear import SCALING, Cell
from peftkern.backends.triton import tiles
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import SPLIT, Choice, Pass
from peftkern.backends.triton.tune import search
from peftkern.backends.triton.tune.device import DeviceBench
from peftkern.call import Problem
from peftkern.ops import dispatch
from peftkern.testing.problems import Layer

# ------------------------------------------------------------------------------------------- the kernels ahead of time


def test_each_binary_is_one_task_and_each_choice_has_one(tmp_path):
    only = Asked(only="^tune llama3-8b.qo M=8192|^cell .* M=8192")
    tasks = parts.tasks("compile", Bench(plan.Plan(device="cpu", stand_in="sm_90"), tmp_path, only))
    keys = [task.key for task in tasks]
    assert len(set(keys)) == len(keys) and all(key.startswith("selected ") for key in keys[:24])
    for adapter in (plan.BF16, plan.F32):
        for name, backward in backend.DIRECTIONS:
            launch = _pass(plan.Plan().cell(Layer("l", 4096, 4096), 8192, adapter=adapter), backward)
            legal = [choice.tile for choice in tiles.choices(launch, ARCHES["sm_90"]) if choice.schedule == SPLIT]
            wanted = {replace(tile, resident=0) for tile in legal}
            dtypes = f"bf16/{plan.NAMES[adapter]}"
            found = [key for key in keys if key.startswith(f"{name} split ") and dtypes in key]
            assert len(found) == len(wanted) > 3 and len(legal) > len(wanted)


def test_nothing_is_left_to_compile_for_a_call_nor_for_the_tuner(tmp_path):
    """The binaries are those of calls that are timed, whatever is tuned, where streams fork and where they do not."""
    at, arch = Bench(plan.dry(), tmp_path), ARCHES["sm_90"]
    cell = at.plan.cell(Layer("narrow", 64, 64), 2**18, r=24)  # as much as a large one, by tiles that compile sooner
    *_, split = (one for one in search.candidates(_pass(cell, True), arch) if one.schedule == SPLIT)
    tasks = compilation.tasks(at, [Task(f"cell {plan.key_of(cell)}", lambda: {}, about=plan.about(cell))])
    tasks.append(Task("split", lambda: compilation._every(at.plan, cell, split, True)))
    with stand_in.gpu("sm_90"):
        before = _binaries()
    for task in tasks:
        result = run_guarded(task)
        assert result["status"] == OK and result["kernels"], result
    with stand_in.gpu("sm_90"):
        ahead = _binaries()
        assert len(ahead - before) >= 8
        _call(cell)
        _call(cell, split)
        reference, tuned = dispatch.backend_named("reference"), search.Cell(_pass(cell, True), cell.p)
        DeviceBench(tuned, arch, torch.device("cpu"), reference, lambda run: run() or 1.0).sample(split)
        assert _binaries() == ahead


def _pass(cell: Cell, backward: bool) -> Pass:
    problem = Problem("cuda", cell.M, cell.K, cell.N, cell.r, cell.dtype, cell.adapter_dtype, dropout=cell.p > 0)
    return Pass(problem, backward)


def _binaries() -> set[str]:
    return {kernel.hash for kernel in stand_in._compiled()}


def _call(cell: Cell, backward: Choice | None = None) -> None:
    """y and every gradient, as products call it, on memory that nobody fills."""

    def empty(*shape: int, dtype: torch.dtype = cell.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, dy, W = empty(cell.M, cell.K), empty(cell.M, cell.N), empty(cell.N, cell.K)
    A, B = empty(cell.r, cell.K, dtype=cell.adapter_dtype), empty(cell.N, cell.r, dtype=cell.adapter_dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    state = torch.tensor([1, 2])
    y = peftkern.lora_linear(x, W, A, B, SCALING, dropout_p=cell.p, rng_state=state)
    with backend.forced(backward):
        torch.autograd.grad(y, leaves, dy)


def test_the_worker_compiles_into_the_folder_and_the_next_run_takes_it_along(tmp_path, capsys):
    """The whole command with a worker: the real compiler, an archive, and elsewhere a run that compiles nothing."""
    only, first, second = "^cell tiny.up M=8 r=16 p=0 bf16/bf16$", tmp_path / "first", tmp_path / "second"
    words = ["--parts", "compile", "--only", only, "--dry-run", "--workers", "1", "--minutes", "3"]
    assert command.main([*words, "--out", str(first), "--archive", str(tmp_path / "back")]) == 0
    (found,) = results(first, "compile").values()
    kernels = sorted(found["kernels"])
    assert found["status"] == OK and {key.split()[0] for key in kernels} >= {"fused", "grad", "reduce"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"results.tar.gz", "triton-cache.tar.gz"}
    made = list((first / archive.FOLDER).rglob("*.cubin"))
    assert len(made) == len(kernels)
    volume = tmp_path / "back" / "triton-cache.tar.gz"
    assert command.main([*words, "--out", str(second), "--triton-cache", str(volume)]) == 0
    assert f"{len(kernels)} kernels are compiled already" in capsys.readouterr().out
    (again,) = results(second, "compile").values()
    assert sorted(again["kernels"]) == kernels and not list((second / archive.FOLDER).rglob("*.ptx"))


# ------------------------------------------------------------------------------------------------------ what comes back


def test_triton_finds_what_was_unpacked_elsewhere(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    _cached(there, "ab12", monkeypatch)
    assert [path.name for path in archive.cache(there, tmp_path)] == ["triton-cache.tar.gz"]
    with tarfile.open(tmp_path / "triton-cache.tar.gz") as packed:
        kinds = sorted(Path(name).suffix for name in packed.getnames())
    assert kinds == [".cubin", ".json", ".json"]
    assert archive.unpack([tmp_path / "triton-cache.tar.gz"], here) == 1
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here / archive.FOLDER))
    found = get_cache_manager("ab12").get_group("fused.json")
    assert found is not None and found.keys() == {"fused.json", "fused.cubin"}
    assert all(path.startswith(str(here)) and Path(path).exists() for path in found.values())


def _cached(folder: Path, key: str, monkeypatch, size: int = 100) -> Path:
    """A kernel as Triton leaves it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / archive.FOLDER))
    manager = get_cache_manager(key)
    files = {"fused.json": b"{}", "fused.cubin": os.urandom(size), "fused.ptx": b"text", "fused.ttir": b"text"}
    manager.put_group("fused.json", {name: manager.put(data, name) for name, data in files.items()})
    return Path(manager.cache_dir)


def test_a_large_cache_comes_in_volumes_the_newest_first_and_not_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archive, "MOST_BYTES", 2**20 + 150_000)
    kernels = [_cached(tmp_path, f"ab{i:02}", monkeypatch, 100_000) for i in range(15)]
    for i, kernel in enumerate(kernels):
        os.utime(kernel, (i, i))
    volumes = archive.cache(tmp_path, tmp_path)
    assert [path.name for path in volumes][::5] == ["triton-cache.tar.gz", "triton-cache-6.tar.gz"]
    assert len(volumes) <= 6 and max(path.stat().st_size for path in volumes) < archive.MOST_BYTES
    held = []
    for volume in volumes:
        with tarfile.open(volume) as packed:
            held += dict.fromkeys(name.split("/")[0] for name in packed.getnames())
    assert held == [kernel.name for kernel in reversed(kernels)][: len(held)] and 6 <= len(held) < 15
    assert f"{15 - len(held)} kernels" in capsys.readouterr().out


@pytest.mark.parametrize("timed", [20, 19])
def test_a_table_whose_choices_were_not_all_timed_is_not_called_measured(timed, tmp_path, monkeypatch):
    """As where the part that compiles was cut, and the tuner's time went to the compiler."""
    seconds = {f"split {i}": 1e-3 for i in range(timed)}
    said = [{"winner": "split 0", "legal": 21, "seconds": seconds, "rejected": {"split x": "it is wrong"}}] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tuning.command, "run", lambda *_: json.dumps(said))
    cell = plan.Plan().cell(Layer("l", 4096, 4096), 8192)
    put(tmp_path, "tuning", {"tune a": {"status": OK, "about": plan.about(cell)} | tuning.tune_shapes([cell], 0.1)})
    (tmp_path / "sm_90-nvidia-h200.json").write_text('{"arch": "sm_90"}')
    archive.results(tmp_path, tmp_path / "back")
    with tarfile.open(tmp_path / "back" / "results.tar.gz") as packed:
        names = set(packed.getnames())
    head = report.summary(tmp_path)
    if timed == 20:
        assert names == {"gpu/tuning.json", "gpu/sm_90-nvidia-h200.json"} and "1 of 1 cells" in head
    else:
        assert names == {"gpu/tuning.json", "gpu/partly-tuned-sm_90-nvidia-h200.json"}
        assert "0 of 1 cells" in head and "NOT a measured" in head


def test_an_archive_that_cannot_be_written_costs_no_measurement(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert go(tmp_path / "out", "--parts", "environment", "--archive", str(tmp_path / "file")) == 0
    assert results(tmp_path / "out", "environment")["card"]["status"] == OK
    assert "no archive: " in capsys.readouterr().out
