"""A progress bar of plain text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 24


class Progress:
    """A bar with the time left, redrawn in place on a terminal; elsewhere a line a step."""

    def __init__(self, stream: TextIO, total: int, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``limit``: seconds after which everything ends, however much is done."""
        self.stream, self.total, self.limit, self.clock = stream, total, limit, clock
        self.start, self.width, self.bar = clock(), 0, stream.isatty()

    def step(self, done: int, text: str) -> None:
        """Show that ``done`` are done, the last of which is ``text``."""
        spent = self.clock() - self.start
        left = min(spent / max(1, done) * (self.total - done), max(0.0, self.limit - spent))
        line = f"{done}/{self.total} {_clock_face(left)} left  {text}"
        if not self.bar:
            print(line, file=self.stream, flush=True)
            return
        filled = _WIDTH * done // max(1, self.total)
        line = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {line}"[: shutil.get_terminal_size().columns - 1]
        self.stream.write(f"\r{line:<{self.width}}")
        self.stream.flush()
        self.width = len(line)

    def line(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.close()
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Wipe the bar."""
        if self.bar and self.width:
            self.stream.write(f"\r{'':<{self.width}}\r")
            self.stream.flush()
            self.width = 0


def _clock_face(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
