"""What runs in a process of its own: the GPU tests, and compute-sanitizer over small shapes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.task import HANG, OK, WRONG, Result, Task, without_folders
from peftkern.backends.triton.tiles import SHARED

_ROOT = Path(__file__).resolve().parent.parent.parent
_TEST_SECONDS, _SANITIZER_SECONDS = 3600.0, 150.0
_LAST_WORDS = 10.0  # seconds that a process has to say how far it came
_TOOLS = ("memcheck", "racecheck")
_SANITIZED = "benchmarks.gpu.sanitized"
_GPU_TEST = re.compile(r"\bmark\.gpu\b|\btarget: Target\b|^from conftest import .*\bTARGETS\b", re.MULTILINE)


def tests(bench: Bench) -> list[Task]:
    """All GPU tests of the repository at once, spread over processes; none where tests or pytest are not here."""
    folder = _ROOT / "tests"
    if bench.plan.dry or not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        return []
    return [Task("pytest -m gpu", lambda: _pytest(with_gpu_tests(folder), bench.end), _TEST_SECONDS)]


def with_gpu_tests(folder: Path) -> list[Path]:
    """The files with a test that is marked so, or that runs on each of conftest's targets."""
    return [path for path in sorted(folder.glob("test_*.py")) if _GPU_TEST.search(path.read_text(encoding="utf-8"))]


def _pytest(files: list[Path], end: float) -> Result:
    """Interrupted ``_LAST_WORDS`` before the end of the part, as by Ctrl-C, pytest says what has failed by then."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-q", "--maxfail=20", *map(str, files)]
    if importlib.util.find_spec("xdist") is not None:
        workers = max(1, min(14, (os.cpu_count() or 2) - 2))
        command += ["-n", str(workers), "--dist", "worksteal"]
    return run(command, min(_TEST_SECONDS, end - time.monotonic()) - _LAST_WORDS - 3)


def sanitizers(bench: Bench) -> list[Task]:
    """memcheck and racecheck, for each schedule, where the tool exists; no racecheck of programs that spin."""
    tool = shutil.which("compute-sanitizer")
    if bench.plan.dry or tool is None:
        return []
    return [
        Task(f"sanitizer {name} {schedule}", lambda a=(tool, name, schedule): _sanitize(*a), _SANITIZER_SECONDS + 20)
        for name in _TOOLS
        for schedule in bench.plan.schedules
        if (name, schedule) != ("racecheck", SHARED)
    ]


def _sanitize(tool: str, name: str, schedule: str) -> Result:
    """The tool over one schedule. Torch's allocator is off, so that a row too far is out of bounds."""
    command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", _SANITIZED, schedule]
    return run(command, _SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def run(command: list[str], seconds: float, variables: dict[str, str] | None = None) -> Result:
    """A process's exit status and the end of what it said, bounded in time."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": path} | (variables or {})
    process = subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=_LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        return {"status": HANG, "error": f"no end within {seconds:.0f} s", "output": tail(said)}
    result: Result = {"status": OK if process.returncode == 0 else WRONG, "rc": process.returncode}
    return result | {"output": tail(said)}


def tail(output: bytes | str | None, most: int = 3000) -> str:
    """The end of an output, without the folders that things lie in."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return without_folders(text)[-most:]
