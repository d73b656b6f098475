"""What a worker process holds while it runs the tasks of a part."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import measure, store
from benchmarks.gpu.asked import Asked
from benchmarks.gpu.measure import Rounds, Timer
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.roofline import Ceilings
from benchmarks.gpu.task import ERROR, OK, OUT_OF_MEMORY, WRONG, Result, Task, without_folders


@dataclass
class Bench:
    """The plan, the folder of the results, what was asked for, and a timer that is made when it is first needed."""

    plan: Plan
    folder: Path
    asked: Asked = field(default_factory=Asked)
    end: float = math.inf  # of the part, on the monotonic clock
    _timer: Timer | None = None
    _ceilings: Ceilings | None = field(default=None)

    @property
    def timer(self) -> Timer:
        """Events on a GPU."""
        if self._timer is None:
            self._timer = measure.timer_for(self.plan.device)
        return self._timer

    @timer.setter
    def timer(self, timer: Timer) -> None:
        self._timer = timer

    @property
    def rounds(self) -> Rounds:
        """How often the plan repeats a timing."""
        return Rounds(self.plan.min_rounds, self.plan.max_rounds, self.plan.seconds)

    @property
    def ceilings(self) -> Ceilings:
        """As the environment part measured them; without it, those of the data sheet's order of magnitude."""
        if self._ceilings is None:
            found = store.read(self.folder / "environment.json")
            self._ceilings = ceilings_in(found["results"] if found else {}) or Ceilings({"bfloat16": 790e12}, 3e12)
        return self._ceilings

    def time(self, runs: dict[str, Any], baseline: str = "frozen") -> dict[str, list[float]]:
        """Interleaved samples of calls; the baseline's, where there is one, are taken twice in each round."""
        twice = {measure.again(baseline): runs[baseline]} if baseline in runs else {}
        return measure.interleaved(self.timer, runs | twice, self.rounds)


def ceilings_in(results: dict[str, Result]) -> Ceilings | None:
    """The ceilings that the environment part left, or None."""
    found = results.get("ceilings", {})
    if found.get("status") != OK:
        return None
    return Ceilings(found["flops"], found["bandwidth"])


class Wrong(RuntimeError):
    """A result that is not right; its task ends as "wrong"."""


def run_guarded(task: Task) -> Result:
    """A task's result, whatever happens in it; KeyboardInterrupt passes.

    "fatal" is set where only a new process can go on: the device no longer answers, or a capture that failed has left
    torch's generator believing that it is still captured.
    """
    try:
        result: Result = {"status": OK} | task.run()
    except torch.cuda.OutOfMemoryError as error:
        result = {"status": OUT_OF_MEMORY, "error": _short(error)}
    except Wrong as error:
        result = {"status": WRONG, "error": _short(error)}
    except Exception as error:  # noqa: BLE001 - recorded in the cell; the run goes on
        result = {"status": ERROR, "error": f"{type(error).__name__}: {_short(error)}"}
    free()
    if torch.cuda.is_available() and not _healthy():
        result["fatal"] = True
    return result if task.about is None else {"about": dict(task.about)} | result


def _healthy() -> bool:
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 - whatever it is, this process is of no more use
        return False
    return True


def free() -> None:
    """Give memory back between tasks."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except Exception:  # noqa: BLE001 - a broken context says so at the next call
            return


def _short(error: BaseException) -> str:
    text = without_folders(str(error).strip())
    return text if len(text) <= 1200 else f"{text[:600]} ... {text[-600:]}"
