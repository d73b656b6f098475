"""Tables of tuned choices: their text, selection by them, and those that are shipped. No GPU, no interpreter."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, Case, make

from peftkern.backends.triton import select, tables, tiles
from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.tables import Table
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.call import Problem

pytestmark = pytest.mark.usefixtures("cache")

BF16, F32 = torch.bfloat16, torch.float32
H200 = dataclasses.replace(ARCHES["sm_90"], product="NVIDIA H200")
SM_90 = ARCHES["sm_90"]
genuine_shipped = tables.shipped  # the tests here have a folder of their own


def forward(M: int = 8192, K: int = 4096, N: int = 4096, R: int = 16, **options) -> Pass:
    return Pass(Problem("cuda", M, K, N, R, BF16, F32, **options), backward=False)


def not_the_estimates(launch: Pass, arch: Arch) -> Choice:
    """A legal choice that only a table can have given."""
    return next(c for c in reversed(tiles.choices(launch, arch)) if c != select.estimated(launch, arch))


def measured(launch: Pass, choice: Choice, arch: Arch = H200) -> Table:
    entries = {tables.key_of(launch): {tables.bucket_of(launch.problem.M): choice}}
    return Table(arch.name, arch.product, "3.6.0", entries)


# ------------------------------------------------------------------------------------------------------------- the text


def test_a_table_survives_its_text():
    entries = {}
    for launch in (forward(), forward(K=14336), Pass(forward(dropout=True, weight_format="int8").problem, True)):
        choices = tiles.choices(launch, SM_90)
        entries[tables.key_of(launch)] = {2**i: choices[(i // 3) % len(choices)] for i in (0, 1, 2, 3, 5, 13)}
    table = Table("sm_90", "NVIDIA H200", "3.6.0", entries)
    assert len(entries) == 3
    assert tables.parse(tables.to_json(table), "sm_90", "NVIDIA H200") == table


def test_rows_count_by_their_power_of_two():
    assert [tables.bucket_of(M) for M in (1, 2, 3, 4, 5, 8192, 8193)] == [1, 2, 4, 4, 8, 8192, 16384]
    choice = not_the_estimates(forward(8192), H200)
    table = measured(forward(5000), choice)
    assert [table.lookup(forward(M)) for M in (4096, 4097, 8192, 8193)] == [None, choice, choice, None]
    assert table.lookup(forward(8192, R=9)) == choice and table.lookup(forward(8192, R=17)) is None


@pytest.mark.parametrize(
    "other",
    [
        forward(K=2048), forward(N=2048), forward(R=32), forward(dropout=True), forward(precision="fp32"),
        forward(weight_format="int8"), Pass(forward().problem, True),
        Pass(dataclasses.replace(forward().problem, dtype=torch.float16), False),
        Pass(dataclasses.replace(forward().problem, adapter_dtype=BF16), False),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_holds_what_a_choice_depends_on(other: Pass):
    assert tables.key_of(other) != tables.key_of(forward())


def good() -> dict:
    return json.loads(tables.to_json(measured(forward(), not_the_estimates(forward(), H200))))


def broken(change: Callable[[dict], object]) -> str:
    content = good()
    change(content)
    return json.dumps(content)


BAD_FILES = {
    "empty": "",
    "not JSON": tables.to_json(Table("sm_90", "NVIDIA H200", "", {}))[:-4],
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another version": broken(lambda c: c.update(version=tables.VERSION + 1)),
    "no version": broken(lambda c: c.pop("version")),
    "another architecture": broken(lambda c: c.update(arch="sm_80")),
    "another product": broken(lambda c: c.update(device="NVIDIA H100 80GB HBM3")),
    "no entries": broken(lambda c: c.pop("entries")),
    "entries of another type": broken(lambda c: c.update(entries=[1])),
    "an entry of another type": broken(lambda c: c["entries"].update({"forward": 3})),
    "an entry of no such form": broken(lambda c: c["entries"].update({"forward": "8192"})),
    "an entry of an estimate": broken(lambda c: c["entries"].update({"forward": "8192~00"})),
    "an entry of an unknown choice": broken(lambda c: c["entries"].update({"forward": "8192=77"})),
    "rows that are no power of two": broken(lambda c: c["entries"].update({"forward": "8191=00"})),
    "rows in the wrong order": broken(lambda c: c["entries"].update({"forward": "16-8=00"})),
    "rows without end": broken(lambda c: c["entries"].update({"forward": f"1-{2**90}=00"})),
    "choices of another type": broken(lambda c: c.update(choices="x")),
    "a choice of another type": broken(lambda c: c["choices"].update({"00": 3})),
    "an unknown schedule": broken(lambda c: c["choices"]["00"].update(schedule="two_pass")),
    "a schedule of another type": broken(lambda c: c["choices"]["00"].update(schedule=["split"])),
    "a field of another type": broken(lambda c: c["choices"]["00"].update(BLOCK_M="128")),
    "a fraction": broken(lambda c: c["choices"]["00"].update(BLOCK_M=128.0)),
    "a truth where a number belongs": broken(lambda c: c["choices"]["00"].update(GROUP_M=True)),
    "a number where a truth belongs": broken(lambda c: c["choices"]["00"].update(tma=1)),
    "zero": broken(lambda c: c["choices"]["00"].update(SUBTILES=0)),
    "a negative number": broken(lambda c: c["choices"]["00"].update(resident=-1)),
    "warps that are no power of two": broken(lambda c: c["choices"]["00"].update(num_warps=3)),
    "too many warps": broken(lambda c: c["choices"]["00"].update(num_warps=64)),
    "an unknown field": broken(lambda c: c["choices"]["00"].update(BLOCK_Z=1)),
    "a missing field": broken(lambda c: c["choices"]["00"].pop("num_stages")),
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_ignored_with_one_warning(text: str | bytes, cache, caplog):
    cache.parent.mkdir()
    cache.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, RecursionError)):
        tables.parse(cache.read_text(encoding="utf-8"), "sm_90", "NVIDIA H200")
    for M in (1, 8192, 8000):
        assert select.choose(forward(M), H200) == select.estimated(forward(M), H200)
    assert len(caplog.records) == 1 and str(cache) in caplog.text, caplog.text


def test_the_good_file_that_the_bad_ones_were_made_of_is_used(cache, caplog):
    cache.parent.mkdir()
    cache.write_text(json.dumps(good()))
    assert select.choose(forward(), H200) == not_the_estimates(forward(), H200) and not caplog.records


@pytest.mark.parametrize("where", ["a folder is there", "the folder is a file"])
def test_a_file_that_cannot_be_read_is_ignored_with_one_warning(where: str, cache, caplog):
    if where == "a folder is there":
        cache.mkdir(parents=True)
    else:
        cache.parent.write_text("")
    assert select.choose(forward(), H200) == select.estimated(forward(), H200)
    select.choose(forward(1), H200)
    assert len(caplog.records) == 1, caplog.text


def test_no_home_is_no_error(monkeypatch, caplog):
    monkeypatch.delenv("PEFTKERN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert select.choose(forward(), H200) == select.estimated(forward(), H200)
    assert len(caplog.records) == 1


def test_illegal_tiles_are_ignored_with_one_warning_a_file(cache, caplog):
    """Both entries are refused, and the third is used."""
    legal = not_the_estimates(forward(16), H200)
    shape = {"num_warps": 8, "num_stages": 3}
    huge = Choice("split", tiles.TileConfig(BLOCK_M=512, BLOCK_P=512, BLOCK_Q=64, **shape))
    tiny = Choice("split", tiles.TileConfig(BLOCK_M=8, BLOCK_P=128, BLOCK_Q=64, **shape))
    tables.merge(cache, measured(forward(8192), huge))
    tables.merge(cache, measured(forward(1), tiny))
    tables.merge(cache, measured(forward(16), legal))
    for launch in (forward(8192), forward(1), forward(7000)):
        assert select.choose(launch, H200) == select.estimated(launch, H200)
    assert select.choose(forward(16), H200) == legal
    assert len(caplog.records) == 1 and str(cache) in caplog.text, caplog.text


# ------------------------------------------------------------------------------------------------------------ selection


def test_order_forced_then_cache_then_shipped_then_estimate(cache, tmp_path, dispatch_env):
    launch = forward()
    best = select.estimated(launch, H200)
    others = [choice for choice in tiles.choices(launch, H200) if choice != best]
    tables.merge(tables.shipped("sm_90"), measured(launch, others[0]), to_ship=True)
    assert select.choose(launch, H200) == others[0]
    tables.merge(cache, measured(launch, others[1]))
    assert select.choose(launch, H200) == others[0], "the files are read again"
    select.forget()
    assert select.choose(launch, H200) == others[1]
    with select.forced(others[2]):
        assert select.choose(launch, H200) == others[2]
    dispatch_env(PEFTKERN_SCHEDULE=best.schedule)
    assert select.choose(launch, H200).schedule == best.schedule


def test_the_cache_is_of_one_product_and_a_shipped_table_of_the_architecture(caplog):
    h100 = dataclasses.replace(SM_90, product="NVIDIA H100 80GB HBM3")
    launch, choice = forward(), not_the_estimates(forward(), H200)
    assert tables.cache_path(h100) != tables.cache_path(H200)
    tables.merge(tables.cache_path(H200), measured(launch, choice))
    assert select.choose(launch, H200) == choice
    assert select.choose(launch, h100) == select.estimated(launch, h100)
    tables.merge(tables.shipped("sm_90"), measured(launch, choice), to_ship=True)
    select.forget()
    assert select.choose(launch, h100) == choice
    assert not caplog.records


def test_selection_launches_nothing_and_reads_each_table_once(cache, monkeypatch):
    for path, to_ship in ((cache, False), (tables.shipped("sm_90"), True)):
        tables.merge(path, measured(forward(), not_the_estimates(forward(), H200)), to_ship)
    reads, read_text = [], pathlib.Path.read_text
    monkeypatch.setattr(pathlib.Path, "read_text", lambda p, *a, **k: reads.append(p) or read_text(p, *a, **k))

    def refuse(*_, **__):
        raise AssertionError("selection ran something")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    modules = set(sys.modules)
    for M, backward in ((1, False), (8192, True), (8192, False), (3, True)):
        select.choose(Pass(forward(M).problem, backward), H200)
    assert sorted(reads) == sorted([cache, tables.shipped("sm_90")])
    assert not any("peftkern" in name or name.startswith("triton") for name in set(sys.modules) - modules)


def test_a_call_imports_no_tuner():
    code = "import sys, peftkern.backends.triton.backend; print([m for m in sys.modules if 'triton.tune' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def at_once(work: Callable[[], object], count: int = 8) -> list:
    """What several threads get that begin together."""
    barrier, results = threading.Barrier(count), []

    def run() -> None:
        barrier.wait()
        results.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count, "a thread failed"
    return results


def test_threads_that_choose_first_agree_and_read_once(cache, monkeypatch, caplog):
    tables.merge(cache, measured(forward(), not_the_estimates(forward(), H200)))
    tables.shipped("sm_90").parent.mkdir()
    tables.shipped("sm_90").write_text("bad")
    reads, read_text = [], pathlib.Path.read_text

    def slow(path, *arguments, **options):
        reads.append(path)
        time.sleep(0.02)
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "read_text", slow)
    assert set(at_once(lambda: select.choose(forward(), H200))) == {not_the_estimates(forward(), H200)}
    assert len(reads) == 2 and len(caplog.records) == 1, (reads, caplog.text)


def test_threads_that_call_first_make_identical_launches(monkeypatch):
    """Row 31. What a launch gets is recorded instead of run."""
    pytest.importorskip("triton")
    from peftkern.backends.triton import backend as module
    from peftkern.call import Pair
    from peftkern.weights import DenseWeight

    case = Case(33, 129, 257, 16, BF16, F32, p=0.3)
    t = make(case)
    operands = Pair(DenseWeight(t.weight), t.lora_A, t.lora_B, None, None, 1.0, None, case.p, t.rng_state, "base")
    seen: dict[int, list] = {}

    def record(steps) -> list[None]:
        for step in steps:
            arguments = getattr(step, "arguments", {})
            plain = {name: value for name, value in arguments.items() if isinstance(value, int | float | str)}
            shapes = [tuple(tensor.shape) for tensor in (*step.reads, *step.writes)]
            seen.setdefault(threading.get_ident(), []).append((step.name, plain, shapes))
        return [None] * len(steps)

    monkeypatch.setattr(module, "_run", record)
    select.forget()
    at_once(lambda: module.TritonBackend().pair(operands, t.x), 4)
    launches = list(seen.values())
    assert len(launches) == 4 and launches[0] and all(found == launches[0] for found in launches)


# ------------------------------------------------------------------------------------------------------------- shipped


def test_a_chip_without_a_shipped_table_is_estimated_and_nothing_is_said(monkeypatch, caplog):
    """The genuine folder, which need not exist."""
    monkeypatch.setattr(tables, "shipped", genuine_shipped)
    for arch in ARCHES:
        file = pathlib.Path(str(tables.shipped(arch)))
        assert file.relative_to(ROOT).match("peftkern/backends/triton/tuned/*.json")
        if not file.exists():
            assert select.choose(forward(), ARCHES[arch]) == select.estimated(forward(), ARCHES[arch])
    assert not caplog.records


def test_a_shipped_table_has_a_largest_size(monkeypatch):
    path, table = tables.shipped("sm_90"), measured(forward(), not_the_estimates(forward(), H200))
    size = len(tables.to_json(table))
    monkeypatch.setattr(tables, "SHIPPED_LIMIT", size - 1)
    with pytest.raises(ValueError, match=f"{size} bytes; a shipped table has {size - 1} at most"):
        tables.merge(path, table, to_ship=True)
    assert not path.exists()
    monkeypatch.setattr(tables, "SHIPPED_LIMIT", size)
    tables.merge(path, table, to_ship=True)
    assert path.exists()


def check_form(path: pathlib.Path) -> None:
    def ordered(pairs: list) -> dict:
        assert [key for key, _ in pairs] == sorted(key for key, _ in pairs), path
        return dict(pairs)

    text = path.read_bytes()
    assert len(text) <= 64 * 1024, path
    json.loads(text, object_pairs_hook=ordered)
    assert tables.to_json(tables.parse(text.decode(), path.stem)).encode() == text, "it is not as the command writes it"


def test_shipped_tables_are_as_the_command_writes_them():
    """One that is written here, and every one that is there."""
    path = tables.shipped("sm_90")
    for M in (8192, 1, 64, 128):
        for launch in (forward(M, N=1024), forward(M), Pass(forward(M, dropout=True).problem, True)):
            tables.merge(path, measured(launch, not_the_estimates(launch, H200)), to_ship=True)
    for table in (path, *(ROOT / "peftkern/backends/triton/tuned").glob("*.json")):
        check_form(table)
