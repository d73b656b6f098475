"""What runs in a process of its own: the GPU tests, file by file, and compute-sanitizer over small shapes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.task import HANG, OK, WRONG, Result, Task, without_folders

_ROOT = Path(__file__).resolve().parent.parent.parent
_TEST_SECONDS, _SANITIZER_SECONDS = 240.0, 150.0
_TOOLS = ("memcheck", "racecheck")
_NO_TESTS = 5  # pytest's exit status where it collected nothing
_SANITIZED = "benchmarks.gpu.sanitized"


def tests(bench: Bench) -> list[Task]:
    """One task a test file that has GPU tests; none where tests or pytest are not here."""
    folder = _ROOT / "tests"
    if bench.plan.dry or not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        return []
    files = [path for path in sorted(folder.glob("test_*.py")) if _may_use_gpu(path)]
    return [Task(f"pytest {path.name}", lambda path=path: _pytest(path), _TEST_SECONDS + 20) for path in files]


def _may_use_gpu(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return any(word in text for word in ("target", "gpu", "cuda"))


def _pytest(path: Path) -> Result:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-q", "--maxfail=20", str(path)]
    result = run(command, _TEST_SECONDS)
    if result.pop("rc", 0) == _NO_TESTS:
        return {"status": OK, "note": "no GPU tests in this file"}
    return result


def sanitizers(bench: Bench) -> list[Task]:
    """memcheck and racecheck, for each schedule, where the tool exists."""
    tool = shutil.which("compute-sanitizer")
    if bench.plan.dry or tool is None:
        return []
    return [
        Task(f"sanitizer {name} {schedule}", lambda a=(tool, name, schedule): _sanitize(*a), _SANITIZER_SECONDS + 20)
        for name in _TOOLS
        for schedule in bench.plan.schedules
    ]


def _sanitize(tool: str, name: str, schedule: str) -> Result:
    """The tool over one schedule. Torch's allocator is off, so that a row too far is out of bounds."""
    command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", _SANITIZED, schedule]
    return run(command, _SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def run(command: list[str], seconds: float, variables: dict[str, str] | None = None) -> Result:
    """A process's exit status and the end of what it said, bounded in time."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": path} | (variables or {})
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return {"status": HANG, "error": f"no end within {seconds:.0f} s", "output": tail(error.stdout)}
    result: Result = {"status": OK if done.returncode == 0 else WRONG, "rc": done.returncode}
    return result | {"output": tail(done.stdout)}


def tail(output: bytes | str | None, most: int = 3000) -> str:
    """The end of an output, without the folders that things lie in."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return without_folders(text)[-most:]
