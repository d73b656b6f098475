"""The parts, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu import cells, correctness, environment, models, tuning
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.task import Task

PARTS: dict[str, Callable[[Bench], list[Task]]] = {
    "environment": environment.tasks,
    "correctness": correctness.tasks,
    "tuning": tuning.tasks,
    "products": cells.tasks,
    "models": models.tasks,
}
# Nothing is timed in these, so many processes may share the device: most of their time is the compiler's.
UNTIMED = ("correctness",)
