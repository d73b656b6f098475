"""The results of one part: a JSON file that is whole and valid at any moment, and says what it belongs to."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu.task import OK, Result

_ROOT = Path(__file__).resolve().parent.parent.parent
_SECONDS_BETWEEN_WRITES = 1.0


def source_digest() -> str:
    """Of the package's sources: what a result belongs to, also where there is no git or a tree has local changes."""
    digest = hashlib.sha256()
    package = _ROOT / "peftkern"
    for path in sorted((*package.rglob("*.py"), *package.rglob("*.json"))):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """One part's results by key. Threads may put; the file is written at most once a second, and on ``flush``."""

    def __init__(self, folder: Path, part: str, identity: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        self.path = folder / f"{part}.json"
        self.part, self.identity, self.machine = part, dict(identity), dict(machine)
        self.results: dict[str, Result] = {}
        self._lock = threading.Lock()
        self._written = 0.0
        found = read(self.path)
        if found is not None and found.get("identity") == self.identity:
            self.results = found["results"]
        elif self.path.exists():
            kept = self.path.with_suffix(".previous.json")
            self.path.replace(kept)
            print(f"{self.path.name} belongs to another commit or device, or is damaged: kept as {kept.name}")

    def put(self, key: str, result: Result) -> None:
        """Add a result; on disk within a second, or by ``flush``."""
        with self._lock:
            self.results[key] = _plain(result)
            due = time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES
        if due:
            self.flush()

    def flush(self) -> None:
        """Write the file, atomically."""
        with self._lock:
            head = {"part": self.part, "identity": self.identity, "machine": self.machine}
            lines = [f"  {json.dumps(key)}: {json.dumps(result)}" for key, result in self.results.items()]
            start = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
            text = "{\n" + start + ' "results": {\n' + ",\n".join(lines) + "\n }\n}\n"
            record.write_atomically(self.path, text.encode())
            self._written = time.monotonic()

    def forget_failures(self) -> None:
        """Make what did not end well run again."""
        self.results = {key: result for key, result in self.results.items() if result.get("status") == OK}


def _plain(value: Any) -> Any:
    """``value`` with infinities and NaNs as words, which JSON has no numbers for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> dict[str, Any] | None:
    """A part's file; None where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found.get("results"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None
