"""``python -m benchmarks.gpu.worker``: runs the tasks of one part whose keys come in by stdin, and answers on stdout.

One line in, one line of JSON out. What tasks print goes to stderr. After a "fatal" result the process ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import asked, backend, parts, store
from benchmarks.gpu.bench import Bench, run_guarded
from benchmarks.gpu.parts import FIRST, PARTS
from peftkern.backends.triton import select


def prepare(part: str, folder: Path) -> None:
    """Take the tuned table of the folder as the user's own, and refuse what failed its correctness run."""
    os.environ["PEFTKERN_CACHE"] = str(folder)
    select.forget()
    if part == "correctness":  # poisoning fresh memory asks for it before the device is used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if part not in FIRST:
        found = [store.read(folder / f"{name}.json") for name in ("correctness", "tuning")]
        backend.exclude([rule for one in found if one for rule in backend.exclusions(one["results"])])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="that the part has from now on")
    asked.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stdin ends."""
    options = parse(arguments)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    prepare(options.part, options.out)
    plan = asked.plan(options, asked.without(options, math.inf))
    bench = Bench(plan, options.out, asked.of(options), time.monotonic() + options.seconds)
    tasks = {task.key: task for task in parts.tasks(options.part, bench)}
    gc.freeze()  # else each collection between tasks walks all that is imported
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        result = run_guarded(tasks[line.rstrip("\n")])
        answers.write(json.dumps(result) + "\n")
        answers.flush()
        if result.get("fatal"):
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
