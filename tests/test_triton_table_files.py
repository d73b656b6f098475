"""Table files as several writers, readers and crashes meet them. No GPU, no interpreter."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from test_triton_tables import H200, forward, measured, not_the_estimates

from peftkern.backends.triton import lock, tables, tiles

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


WRITER = """
import pathlib, sys, time
from peftkern.backends.triton import lock, tables
from peftkern.backends.triton.tables import Table
from peftkern.backends.triton.tiles import Choice, TileConfig
path, start, first, by_file = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"
if by_file:
    lock.fcntl = None
choice = Choice("split", TileConfig(64, 64, 64, 4, 3))
start.with_name(f"ready{first}").touch()
while not start.exists():
    time.sleep(0.001)
for number in range(first, first + 60):
    tables.merge(path, Table("sm_90", "NVIDIA H200", "", {f"entry{number:03}": {1: choice}}))
"""


@pytest.mark.parametrize("by_file", [False, True], ids=["flock", "O_EXCL"])
def test_two_processes_that_tune_at_once_lose_nothing(by_file: bool, cache, tmp_path):
    arguments = [sys.executable, "-c", WRITER, str(cache), str(tmp_path / "start")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([*arguments, first, str(int(by_file))], env=environment) for first in ("0", "60")]
    while not all((tmp_path / f"ready{first}").exists() for first in (0, 60)):
        assert all(writer.poll() is None for writer in writers)
        time.sleep(0.01)
    (tmp_path / "start").touch()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = tables.parse(cache.read_text(), "sm_90", "NVIDIA H200").entries
    assert sorted(found) == [f"entry{number:03}" for number in range(120)]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


HOLDER = """
import os, pathlib, sys
from peftkern.backends.triton import lock
if sys.argv[2] == "1":
    lock.fcntl = None
with lock.locked(pathlib.Path(sys.argv[1])):
    os._exit(3)
"""


@pytest.mark.parametrize("by_file", [False, True], ids=["flock", "O_EXCL"])
def test_a_holder_that_died_blocks_nobody(by_file: bool, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    command = [sys.executable, "-c", HOLDER, str(file), str(int(by_file))]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 3
    assert list(tmp_path.iterdir()), "it left nothing behind, so that this proves nothing"
    monkeypatch.setattr(lock, "_STALE", 0.2)
    if by_file:
        monkeypatch.setattr(lock, "fcntl", None)
    with lock.locked(file, timeout=5):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by_file", [False, True], ids=["flock", "O_EXCL"])
def test_a_holder_that_lives_is_waited_for_and_not_for_ever(by_file: bool, tmp_path, monkeypatch):
    if by_file:
        monkeypatch.setattr(lock, "fcntl", None)
    with lock.locked(tmp_path / "table.json"):
        with pytest.raises(TimeoutError, match="table.json"), lock.locked(tmp_path / "table.json", timeout=0.1):
            pass
        with lock.locked(tmp_path / "another.json", timeout=0.1):
            pass


@pytest.mark.skipif(lock.fcntl is None, reason="no flock here")
def test_a_lock_whose_file_the_last_holder_removed_is_taken_again(tmp_path, monkeypatch):
    """The file goes between our open and our flock; the next one to come would make another, and hold it too."""
    genuine, removed = lock.fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / ".table.json.lock").unlink())
        genuine(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.locked(tmp_path / "table.json"):
        with pytest.raises(TimeoutError), lock.locked(tmp_path / "table.json", timeout=0.1):
            pass


def test_of_two_who_find_an_abandoned_lock_one_gets_it(tmp_path):
    """Between the look at the abandoned lock and its removal another waiter has taken it: it is put back."""
    held = tmp_path / ".table.json.held"
    held.touch()
    abandoned = lock._identity(held)
    held.unlink()
    held.write_text("the other's")
    os.utime(held, ns=(1, 1))
    lock._remove(held, abandoned)
    assert held.read_text() == "the other's" and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_of_the_folder_is_an_error_of_the_writer(cache):
    cache.parent.write_text("")
    with pytest.raises(OSError, match="cache"):
        tables.merge(cache, measured(forward(), not_the_estimates(forward(), H200)))
    assert cache.parent.read_text() == ""
