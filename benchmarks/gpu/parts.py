"""The parts, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu import asked, cells, compilation, correctness, environment, external, models, tuning
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.task import Task

# Nothing is timed in these, so many processes may share the device: most of their time is the compiler's.
PARALLEL = ("correctness", "compile")
# What these do does not depend on the tuned table, nor on what correctness has found.
FIRST = ("environment", "correctness", "tests")


def _compile(bench: Bench) -> list[Task]:
    return compilation.tasks(bench, [task for part in bench.asked.timed for task in tasks(part, bench)])


PARTS: dict[str, Callable[[Bench], list[Task]]] = {
    "environment": environment.tasks,
    "correctness": correctness.tasks,
    "compile": _compile,
    "tuning": tuning.tasks,
    "products": cells.tasks,
    "models": models.tasks,
    "tests": external.tests,
}
assert tuple(PARTS) == asked.NAMES


def tasks(part: str, bench: Bench) -> list[Task]:
    """The tasks of a part that are asked for, in order of value."""
    return [task for task in PARTS[part](bench) if bench.asked.takes(part, task.key)]
