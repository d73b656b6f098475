"""What short runs of ``benchmarks.gpu`` in a test share: how they are started, read and left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report, store
from peftkern.backends.triton import select, tiles


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The caches are the test's own, and nothing that a run has replaced stays so."""
    monkeypatch.setenv("PEFTKERN_CACHE", os.environ.get("PEFTKERN_CACHE", ""))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "supports", tiles.supports)
    monkeypatch.setattr(report, "plot", lambda products: None)
    monkeypatch.setattr(command.record, "pyplot", lambda: None)
    yield
    monkeypatch.undo()
    select.forget()


def go(out: Path, *more: str, minutes: str = "5") -> int:
    """A rehearsal in this process. Returns: the exit status."""
    return command.main(["--minutes", minutes, "--out", str(out), "--dry-run", "--in-process", *more])


def results(out: Path, part: str) -> dict:
    """What a run has written of a part."""
    return json.loads((out / f"{part}.json").read_text())["results"]


def put(out: Path, part: str, results: dict) -> None:
    """Write results of a part, as a run before would have."""
    kept = store.Store(out, part, {}, {})
    for key, result in results.items():
        kept.put(key, result)
    kept.flush()
