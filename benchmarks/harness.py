"""One harness for every benchmark: it refuses to time a wrong result and times all cases side by side.

Method: each case is checked, warmed up, and then run in interleaved rounds (A B C, A B C, ...), so that a drift of the
machine meets all cases alike. What is reported are medians and quartiles, of the times and of each round's ratio to the
baseline case. No time is asserted anywhere.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

METHOD = (
    "interleaved rounds in one process; median and quartiles over rounds; a ratio is the median over rounds of the "
    "case's time divided by the baseline's time in the same round; every case passed its check before it was timed"
)
_SAMPLE_SECONDS = 0.004  # a sample repeats a short case until it lasts about this long


class WrongResult(RuntimeError):
    """A case computes something else than it should; it is not timed."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    ``run`` is timed; ``check`` returns None where the result is right and otherwise the reason why it is not;
    ``prepare`` runs before every run, untimed; ``around`` is entered around every sample.
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], str | None]
    prepare: Callable[[], object] | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Timing:
    """Seconds per run and the ratio to the baseline, with quartiles.

    ``ratio_best`` divides the two fastest samples: on a busy machine it is what interruptions touch least.
    """

    name: str
    median: float
    q1: float
    q3: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    ratio_best: float
    samples: list[float]

    def ratios(self, baseline: Timing) -> list[float]:
        """Of every round."""
        return [own / base for own, base in zip(self.samples, baseline.samples, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def synchronise() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def progress(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """``items`` behind a progress bar with the estimated time left; without tqdm, the items alone."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True, file=sys.stderr)


def check(cases: Sequence[Case]) -> None:
    """Raises: WrongResult for the first case whose check fails, with the case and the reason in the text."""
    for case in cases:
        reason = case.check()
        if reason is not None:
            raise WrongResult(f"{case.name} is wrong and is not timed: {reason}")


def measure(
    cases: Sequence[Case], rounds: int, warmup: int = 1, label: str = "timing", repeat: bool = True
) -> list[Timing]:
    """Check all cases, then time them in interleaved rounds.

    Args:
        cases: what to time; the first is the baseline of the ratios.
        rounds: how often each is timed.
        warmup: untimed rounds before.
        label: shown beside the progress bar.
        repeat: whether a sample is the mean of several runs of a short case.
    Raises: WrongResult where a check fails; nothing is timed then.
    """
    check(cases)
    repeats = {case.name: 1 for case in cases}
    for _ in range(max(1, warmup)):
        for case in cases:
            seconds = _sample(case, 1)
            if repeat:
                repeats[case.name] = max(1, min(1000, round(_SAMPLE_SECONDS / max(seconds, 1e-7))))
    samples: dict[str, list[float]] = {case.name: [] for case in cases}
    schedule = [case for _ in range(rounds) for case in cases]
    for case in progress(schedule, len(schedule), label):
        samples[case.name].append(_sample(case, repeats[case.name]))
    baseline = samples[cases[0].name]
    return [_timing(case.name, samples[case.name], baseline) for case in cases]


def _sample(case: Case, repeats: int) -> float:
    """Seconds of one run, as the mean of ``repeats`` back-to-back runs."""
    with case.around():
        return _timed(case, repeats)


def _timed(case: Case, repeats: int) -> float:
    total = 0.0
    if case.prepare is None:
        synchronise()
        start = time.perf_counter()
        for _ in range(repeats):
            case.run()
        synchronise()
        return (time.perf_counter() - start) / repeats
    for _ in range(repeats):
        case.prepare()
        synchronise()
        start = time.perf_counter()
        case.run()
        synchronise()
        total += time.perf_counter() - start
    return total / repeats


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def median_interval(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Two of ``values`` between which the median of their distribution lies with at least that confidence.

    The sign test turned round: no assumption about the distribution. None where there are too few values for it.
    """
    ordered, count = sorted(values), len(values)
    below, inside = 0.5**count, 0  # chance that at most `inside` values lie below the median
    if below > (1 - confidence) / 2:
        return None
    while (more := below + math.comb(count, inside + 1) * 0.5**count) <= (1 - confidence) / 2:
        below, inside = more, inside + 1
    return ordered[inside], ordered[count - 1 - inside]


def _timing(name: str, samples: list[float], baseline: list[float]) -> Timing:
    q1, median, q3 = quartiles(samples)
    ratio_q1, ratio, ratio_q3 = quartiles([own / base for own, base in zip(samples, baseline, strict=True)])
    return Timing(name, median, q1, q3, ratio, ratio_q1, ratio_q3, min(samples) / min(baseline), samples)
