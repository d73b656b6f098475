"""Runs the tasks of a part: in this process, or in workers that may hang or crash without taking the run with them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import external
from benchmarks.gpu.bench import run_guarded
from benchmarks.gpu.store import Store
from benchmarks.gpu.task import CRASH, HANG, OK, Result, Task

_ROOT = Path(__file__).resolve().parent.parent.parent
_START_SECONDS = 90.0  # that a worker may take to import and to find its tasks, once


@dataclass(frozen=True)
class Limits:
    """When a part stops, on the monotonic clock: no task begins after ``begin``, none is waited for after ``end``."""

    begin: float
    end: float


Progress = Callable[[str, Result], None]


def inline(tasks: Sequence[Task], store: Store, limits: Limits, progress: Progress) -> None:
    """Run what is not done yet, one after the other, in this process."""
    try:
        for task in tasks:
            if task.key in store.results:
                continue
            if time.monotonic() >= limits.begin:
                break
            result = run_guarded(task)
            store.put(task.key, result)
            progress(task.key, result)
    finally:
        store.flush()


class NoStart(RuntimeError):
    """A worker that does not come up; its last words."""


class _Worker:
    """One worker process, started when it is first needed."""

    def __init__(self, command: list[str]) -> None:
        self.command, self.process = command, None
        self.errors = tempfile.TemporaryFile()
        self.answers: queue.Queue[bytes | None] = queue.Queue()

    def ask(self, key: str, seconds: float, end: float) -> Result | None:
        """The result of a task; None where there is none within the seconds, or by ``end``.

        Raises: EOFError where the worker ended; NoStart where it did not come up.
        """
        if self.process is None:
            self._start(end)
        process, answers = self.process, self.answers  # ``end`` may come from another thread
        if process is None or process.stdin is None:
            raise EOFError("it was ended")
        try:
            process.stdin.write(f"{key}\n".encode())
            process.stdin.flush()
        except (OSError, ValueError) as error:
            raise EOFError(str(error)) from error
        try:
            answer = answers.get(timeout=max(0.0, min(seconds, end - time.monotonic())))
        except queue.Empty:
            return None
        if answer is None:
            raise EOFError(f"exit status {process.wait()}")
        return json.loads(answer)

    def _start(self, end: float) -> None:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        self.errors.seek(0)
        self.errors.truncate()
        self.answers = queue.Queue()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True).start()
        try:
            ready = self.answers.get(timeout=max(0.0, min(_START_SECONDS, end - time.monotonic())))
        except queue.Empty:
            ready = None
        if ready is None:
            said = self.said()
            self.end()
            raise NoStart(said)

    @staticmethod
    def _read(process: subprocess.Popen[bytes], answers: queue.Queue[bytes | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self.errors.seek(0)
        return external.tail(self.errors.read(), 1500)

    def end(self) -> None:
        """Kill it; the next ``ask`` starts another."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its own group, with whatever it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()  # type: ignore[union-attr]


def isolated(
    tasks: Sequence[Task], store: Store, limits: Limits, progress: Progress, command: Sequence[str], workers: int
) -> None:
    """Run what is not done yet in worker processes.

    Args: command: starts one that answers as ``benchmarks.gpu.worker`` does; workers: how many at a time.
    """
    waiting = queue.SimpleQueue[Task]()
    todo = [task for task in tasks if task.key not in store.results]
    for task in todo:
        waiting.put(task)
    pool = [_Worker(list(command)) for _ in range(min(workers, len(todo)))]
    stop = threading.Event()
    threads = [
        threading.Thread(target=_serve, args=(worker, waiting, store, limits, progress, stop), daemon=True)
        for worker in pool
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()
        for worker in pool:
            worker.end()
        for thread in threads:
            thread.join(5)
        store.flush()


def _serve(
    worker: _Worker, waiting: queue.SimpleQueue[Task], store: Store, limits: Limits, progress: Progress,
    stop: threading.Event,
) -> None:  # fmt: skip
    """Feed one worker until nothing is left or the time is over."""
    for task in _drain(waiting):
        if stop.is_set() or time.monotonic() >= limits.begin:
            return
        try:
            result = worker.ask(task.key, task.limit, limits.end)
        except NoStart as error:
            if time.monotonic() < limits.end:
                print(f"a worker does not start, so its tasks are left: {error}", file=sys.stderr, flush=True)
            return
        except (EOFError, ValueError) as error:
            result = {"status": CRASH, "error": f"the process ended: {error}", "output": worker.said()}
        if stop.is_set():
            return
        if result is None:
            worker.end()
            if time.monotonic() >= limits.end:
                return  # the part is over, which says nothing of the task
            result = {"status": HANG, "error": f"no answer within {task.limit:.0f} s", "output": worker.said()}
        if result["status"] == CRASH or result.pop("fatal", False):
            result["status"] = result["status"] if result["status"] == OK else CRASH
            worker.end()
        if task.about is not None:
            result.setdefault("about", dict(task.about))
        store.put(task.key, result)
        if result["status"] == CRASH:
            store.flush()  # the next process leaves out what has ended this one
        progress(task.key, result)


def _drain(waiting: queue.SimpleQueue[Task]) -> Iterator[Task]:
    while True:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return
