"""``python -m benchmarks.gpu --minutes N --out DIR``: correctness, tuning, products and models on one GPU.

A second run with the same folder goes on where the first one stopped, as long as the package's sources, the device and
the versions are the same. The last lines are a summary. What there is to bring back is in a few archives, in the folder
or in that of ``--archive``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu import archive, asked, cells, measure, parts, report, supervise, worker
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import FIRST, PARALLEL
from benchmarks.gpu.store import Store, source_digest
from benchmarks.gpu.supervise import Limits
from benchmarks.gpu.task import OK, Result

_REPORT_SECONDS = 25.0  # between two reports of a part that runs
_RESERVE = 12.0  # seconds that the last report, the summary and the archives may take
_GRACE = 15.0  # seconds after its share in which a part may end what it has begun


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="the whole run, reports included")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record; used again, it goes on")
    parser.add_argument("--commit", help="recorded where there is no git")
    asked.add_options(parser)
    parser.add_argument("--archive", type=Path, help="folder for the archives; default: that of the record")
    parser.add_argument("--triton-cache", type=Path, nargs="+", default=[], metavar="FILE",
        help="archives of an earlier run's, whose kernels need not be compiled again")  # fmt: skip
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)),
        help="of correctness and compile; default: %(default)s")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="run again what did not end well")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, and measure nothing")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stand_in and options.parts != ("compile",):
        parser.error("in front of the stand-in for a GPU there is nothing but --parts compile")
    options.out = options.out.resolve()
    options.archive = (options.archive or options.out).resolve()
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What every file says of where its results come from."""
    found = record.machine() | {
        "method": measure.METHOD,
        "rehearsal": bool(options.dry_run or options.stand_in),
        "sources": source_digest(),
    }
    if options.commit:
        found["commit"] = options.commit
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found


def identity(about: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on with another's results."""
    versions = {name: about["versions"].get(name) for name in ("torch", "triton")}
    return {name: about.get(name) for name in ("commit", "sources", "device", "rehearsal")} | versions


class Run:
    """One run of the command over the parts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.without = options, asked.without(options, options.minutes)
        self.plan = asked.plan(options, self.without)
        self.started = time.monotonic()
        self.about = machine(options)
        self.bench = Bench(self.plan, options.out, asked.of(options))
        self.open: Store | None = None
        self._reported = time.monotonic()
        self._reporting = threading.Lock()

    @property
    def end(self) -> float:
        """When nothing is waited for any more."""
        return self.started + 60 * self.options.minutes - (0.0 if self.plan.dry else _RESERVE)

    def chosen(self) -> bool:
        """Whether the expression of ``--only`` is found in any key at all."""
        named = [part for part in self.options.parts if part not in asked.WHOLE] or asked.TIMED
        return not self.options.only or any(parts.tasks(part, self.bench) for part in named)

    def part(self, part: str, begin: float) -> None:
        """Run a part; no task begins after ``begin``, and what has not ended soon after it is cut, and not recorded."""
        store = self.open = Store(self.options.out, part, identity(self.about), self.about)
        if self.options.retry:
            store.forget_failures()
        if part not in FIRST:
            worker.prepare(part, self.options.out)
            cells.forget_stale(store, self.plan)
        tasks = parts.tasks(part, self.bench)
        limits = Limits(min(begin, self.end), min(begin + _GRACE, self.end))
        self.bench.end = limits.end
        done = sum(task.key in store.results for task in tasks)
        started = time.monotonic()
        left = max(0.0, limits.end - started)
        print(f"\n{part}: {len(tasks)} tasks, {done} done before, at most {left:.0f} seconds", flush=True)
        try:
            if self.options.in_process:
                supervise.inline(tasks, store, limits, self._progress)
            else:
                workers = self.options.workers if part in PARALLEL else 1
                supervise.isolated(tasks, store, limits, self._progress, self._command(part, limits), workers)
        finally:
            report.write(self.options.out)
            self.pack(archive.results)
        count = sum(task.key in store.results for task in tasks)
        took = time.monotonic() - started
        print(f"{part}: {count} of {len(tasks)} tasks are done in {took:.0f} s; {self._elapsed()}", flush=True)

    def _command(self, part: str, limits: Limits) -> list[str]:
        found = [sys.executable, "-m", "benchmarks.gpu.worker", "--part", part, "--out", str(self.options.out)]
        return [*found, f"--seconds={limits.end - time.monotonic():.0f}", *asked.words(self.options, self.without)]

    def _progress(self, key: str, result: Result) -> None:
        text = "" if result["status"] == OK else f": {' '.join(str(result.get('error', '')).split())[:100]}"
        times = result.get("times", {})
        shown = ", ".join(
            f"{phase} {value['peftkern']['ratio']:.3f}" for phase, value in times.items() if "peftkern" in value
        )
        print(f"  {key}  {result['status']}{text}{'  ' + shown if shown else ''}", flush=True)
        with self._reporting:  # workers' threads come here
            if time.monotonic() - self._reported > _REPORT_SECONDS and self.open is not None:
                self.open.flush()
                report.write(self.options.out)
                self._reported = time.monotonic()

    def pack(self, archived: Callable[[Path, Path], object]) -> None:
        """Write an archive; an error in it is said, and costs no measurement."""
        try:
            archived(self.options.out, self.options.archive)
        except OSError as error:
            print(f"no archive: {error}", flush=True)

    def _elapsed(self) -> str:
        return f"{(time.monotonic() - self.started) / 60:.1f} of {self.options.minutes:g} minutes"

    def parts(self) -> None:
        """All parts, each until its share of the minutes; what one leaves over goes to those after it."""
        share, total = 0.0, sum(self.plan.shares[part] for part in self.options.parts)
        for part in self.options.parts:
            share += self.plan.shares[part]
            begin = self.started + (self.end - self.started) * share / total
            self.part(part, begin)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet. Returns: 0; 2 without a GPU; 130 where it was interrupted."""
    options = parse(arguments)
    if options.report:
        report.write(options.out)
        print(report.summary(options.out))
        return 0
    if not torch.cuda.is_available() and not options.dry_run and not options.stand_in:
        print("benchmarks.gpu needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    run = Run(options)
    if not run.chosen():
        print(f"benchmarks.gpu: no task's key has a match of --only {options.only!r}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(options.out / archive.FOLDER)
    if options.triton_cache:
        print(f"{archive.unpack(options.triton_cache, options.out)} kernels are compiled already")
    record.pyplot()  # says so in one line where there will be no PNG
    before = signal.signal(signal.SIGTERM, _interrupt)
    status = 0
    record.print_machine(run.about)
    try:
        run.parts()
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", flush=True)
        status = 130
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if run.open is not None:
            run.open.flush()
        report.write(options.out)
        run.pack(archive.results)
        run.pack(archive.cache)
        print(f"\n{'=' * 30} summary {'=' * 30}\n{report.summary(options.out)}", flush=True)
        signal.signal(signal.SIGTERM, before)
    return status


if __name__ == "__main__":
    sys.exit(main())
