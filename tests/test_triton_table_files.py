"""Table files as several writers, readers and crashes meet them. No GPU, no interpreter."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from test_triton_tables import H200, forward, measured, not_the_estimates

from peftkern.backends.triton import tables, tiles
from peftkern.backends.triton.tables import Table
from peftkern.backends.triton.tiles import Choice, TileConfig

pytestmark = pytest.mark.usefixtures("cache")


def test_merging_keeps_what_is_there_and_renews_what_is_measured_again(cache):
    first, second = tiles.choices(forward(), H200)[:2]
    tables.merge(cache, measured(forward(8192), first))
    tables.merge(cache, measured(forward(1), first))
    tables.merge(cache, measured(forward(8192), second))
    found = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200").entries
    assert found == {tables.key_of(forward()): {1: first, 8192: second}}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "temporary files are left"


def test_a_bad_cache_is_replaced_and_a_bad_shipped_table_is_not(cache, caplog):
    table = measured(forward(), not_the_estimates(forward(), H200))
    for path in (cache, tables.shipped("sm_90")):
        path.parent.mkdir()
        path.write_text("{")
    tables.merge(cache, table)
    assert tables.parse(cache.read_text(), "sm_90").entries == table.entries and "replaced" in caplog.text
    with pytest.raises(ValueError, match="sm_90.json"):
        tables.merge(tables.shipped("sm_90"), table, to_ship=True)
    assert tables.shipped("sm_90").read_text() == "{"


def test_a_shipped_table_is_of_one_product(cache):
    choice = not_the_estimates(forward(), H200)
    tables.merge(tables.shipped("sm_90"), measured(forward(), choice), to_ship=True)
    other = dataclasses.replace(H200, product="NVIDIA H100 PCIe")
    with pytest.raises(ValueError, match="NVIDIA H200, not sm_90 NVIDIA H100 PCIe"):
        tables.merge(tables.shipped("sm_90"), measured(forward(), choice, other), to_ship=True)


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    first, second = tiles.choices(forward(), H200)[:2]
    tables.merge(cache, measured(forward(), first))
    before = cache.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tables.merge(cache, measured(forward(), second))
    assert cache.read_text() == before
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_readers_never_see_half_a_file(cache):
    """A reader in a loop beside a writer: the file is replaced, never truncated."""
    choices = tiles.choices(forward(), H200)
    tables.merge(cache, measured(forward(), choices[0]))
    done, read, errors = threading.Event(), [], []

    def reader() -> None:
        while not done.is_set():
            try:
                tables.parse(cache.read_text(), "sm_90", "NVIDIA H200")
                read.append(1)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    for number in range(60):
        tables.merge(cache, measured(forward(2 ** (number % 14), N=1024 + number), choices[0]))
    done.set()
    thread.join()
    assert read and not errors, errors[:1]


def intruded(monkeypatch: pytest.MonkeyPatch, path: pathlib.Path, others: list[Table]) -> list[int]:
    """Between a writer's reading of the file and its replacing it, another one adds the next of ``others``, whole.

    Returns: a list that grows with every text that the writer itself has written beside the file.
    """
    genuine, written, inside = os.fsync, [], []

    def fsync(descriptor: int) -> None:
        genuine(descriptor)
        if inside:
            return
        written.append(descriptor)
        if others:
            inside.append(True)
            tables.merge(path, others.pop(0))
            inside.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    return written


def entry(name: str) -> Table:
    return Table("sm_90", "NVIDIA H200", "", {name: {1: Choice("split", TileConfig(64, 64, 64, 4, 3))}})


def test_two_that_tune_different_problems_lose_nothing(cache, monkeypatch):
    """At every write of the one, the first included, the other is faster."""
    others: list[Table] = []
    intruded(monkeypatch, cache, others)
    for number in range(10):
        others.append(entry(f"other {number}"))
        tables.merge(cache, entry(f"own {number}"))
    found = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200").entries
    assert sorted(found) == [f"{whose} {number}" for whose in ("other", "own") for number in range(10)]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_writer_reads_again_once(cache, monkeypatch):
    """And only where the file has changed."""
    written = intruded(monkeypatch, cache, [])
    tables.merge(cache, entry("alone"))
    assert len(written) == 1
    written = intruded(monkeypatch, cache, [entry(f"other {number}") for number in range(3)])
    tables.merge(cache, entry("own"))
    assert len(written) == 2
    found = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200").entries
    assert {"alone", "other 0", "own"} <= set(found)


WRITER = """
import pathlib, sys, time
from peftkern.backends.triton import tables
from peftkern.backends.triton.tables import Table
from peftkern.backends.triton.tiles import Choice, TileConfig
path, start, name = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
choice = Choice("split", TileConfig(64, 64, 64, 4, 3))
start.with_name(f"ready {name}").touch()
while not start.exists():
    time.sleep(0.001)
for number in range(60):
    tables.merge(path, Table("sm_90", "NVIDIA H200", "", {f"{name} {number:02}": {1: choice}}))
"""


def test_of_two_processes_that_write_without_pause_none_corrupts_the_file(cache, tmp_path):
    """A third one reads all the time."""
    arguments = [sys.executable, "-c", WRITER, str(cache), str(tmp_path / "start")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([*arguments, name], env=environment) for name in ("one", "two")]
    while not all((tmp_path / f"ready {name}").exists() for name in ("one", "two")):
        assert all(writer.poll() is None for writer in writers)
        time.sleep(0.01)
    (tmp_path / "start").touch()
    seen = []
    while any(writer.poll() is None for writer in writers):
        if cache.exists():
            seen.append(len(tables.parse(cache.read_text(), "sm_90", "NVIDIA H200").entries))
    assert [writer.returncode for writer in writers] == [0, 0] and seen
    found = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200").entries
    assert set(found) <= {f"{name} {number:02}" for name in ("one", "two") for number in range(60)}
    assert {"one 59", "two 59"} & set(found), "the last one to write is there"
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_file_in_the_way_of_the_folder_is_an_error_of_the_writer(cache):
    cache.parent.write_text("")
    with pytest.raises(OSError, match="cache"):
        tables.merge(cache, measured(forward(), not_the_estimates(forward(), H200)))
    assert cache.parent.read_text() == ""
