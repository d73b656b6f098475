"""``python -m benchmarks.gpu --minutes N --out DIR``: correctness, tuning, products and models on one GPU.

A second run with the same folder goes on where the first one stopped, as long as the package's sources, the device and
the versions are the same. The last lines are a summary.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu import cells, measure, report, supervise, worker
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import PARTS, UNTIMED
from benchmarks.gpu.plan import Plan, dry
from benchmarks.gpu.store import Store, source_digest
from benchmarks.gpu.supervise import Limits
from benchmarks.gpu.task import OK, Result

_REPORT_SECONDS = 25.0  # between two reports of a part that runs
_RESERVE = 12.0  # seconds that the last report and the summary may take


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="the whole run, reports included")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record; used again, it goes on")
    parser.add_argument("--commit", help="recorded where there is no git")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="of correctness"
    )
    parser.add_argument("--retry", action="store_true", help="run again what did not end well")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, and measure nothing")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = [part for part in options.parts.split(",") if part]
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    options.out = options.out.resolve()
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What every file says of where its results come from."""
    found = record.machine() | {
        "method": measure.METHOD,
        "rehearsal": bool(options.dry_run),
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

    def __init__(self, options: argparse.Namespace, plan: Plan) -> None:
        self.options, self.plan = options, plan
        self.started = time.monotonic()
        self.about = machine(options)
        self.bench = Bench(plan, options.out)
        self.open: Store | None = None
        self._reported = time.monotonic()
        self._reporting = threading.Lock()

    @property
    def end(self) -> float:
        """When nothing is waited for any more."""
        return self.started + 60 * self.options.minutes - (0.0 if self.plan.dry else _RESERVE)

    def part(self, part: str, begin: float) -> None:
        """Run a part; no task begins after ``begin``."""
        store = self.open = Store(self.options.out, part, identity(self.about), self.about)
        if self.options.retry:
            store.forget_failures()
        if part not in UNTIMED:
            worker.prepare(part, self.options.out)
            cells.forget_stale(store, self.plan)
        tasks = PARTS[part](self.bench)
        limits = Limits(min(begin, self.end), self.end)
        done = sum(task.key in store.results for task in tasks)
        left = max(0.0, limits.begin - time.monotonic()) / 60
        print(f"\n{part}: {len(tasks)} tasks, {done} done before, at most {left:.1f} minutes", flush=True)
        try:
            if self.options.in_process:
                supervise.inline(tasks, store, limits, self._progress)
            else:
                workers = self.options.workers if part in UNTIMED else 1
                supervise.isolated(tasks, store, limits, self._progress, self._command(part), workers)
        finally:
            report.write(self.options.out)
        count = sum(task.key in store.results for task in tasks)
        print(f"{part}: {count} of {len(tasks)} tasks are done; {self._elapsed()}", flush=True)

    def _command(self, part: str) -> list[str]:
        found = [sys.executable, "-m", "benchmarks.gpu.worker", "--part", part, "--out", str(self.options.out)]
        return found + (["--dry-run"] if self.plan.dry else [])

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
    if not torch.cuda.is_available() and not options.dry_run:
        print("benchmarks.gpu needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    record.pyplot()  # says so in one line where there will be no PNG
    before = signal.signal(signal.SIGTERM, _interrupt)
    status = 0
    run = Run(options, dry() if options.dry_run else Plan())
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
        print(f"\n{'=' * 30} summary {'=' * 30}\n{report.summary(options.out)}", flush=True)
        signal.signal(signal.SIGTERM, before)
    return status


if __name__ == "__main__":
    sys.exit(main())
