"""Times of calls that are compared: interleaved samples, medians, and 99 % intervals from order statistics."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

METHOD = (
    "CUDA events around one call behind a flush of the L2 cache by reading and a wait that hides the host; interleaved "
    "rounds A B A B, the baseline twice in each; medians; 99 % intervals of the median of per-round ratios by order "
    "statistics (sign test)"
)
CONFIDENCE = 0.99
_LEAST_LOSS = 1.02
_FLUSH_BYTES = 2**28
_MOST_HIDDEN = 3e-3  # seconds of host time that a wait on the device hides
_CLOCK = 2.0e9  # at least what the device counts a second, so that a wait is never too short


class Timer(Protocol):
    """Something that times one call."""

    def sample(self, name: str, run: Callable[[], object], host: float) -> float:
        """Seconds on the device; ``host``: how long the call keeps the host."""
        ...

    def host(self, run: Callable[[], object], seconds: float) -> float:
        """Seconds a call, back to back, host included."""
        ...


class CudaTimer:
    """Events on the current stream. The cache is flushed by reading: what is written would be written back later."""

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")

    def sample(self, name: str, run: Callable[[], object], host: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        torch.cuda._sleep(int(min(host * 1.5 + 2e-5, _MOST_HIDDEN) * _CLOCK))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def host(self, run: Callable[[], object], seconds: float) -> float:
        torch.cuda.synchronize()
        count, begin = 0, time.perf_counter()
        while True:
            for _ in range(8):
                run()
            count += 8
            if time.perf_counter() - begin >= seconds:
                torch.cuda.synchronize()
                return (time.perf_counter() - begin) / count


class FakeTimer:
    """Runs each call once and invents its time, the same in every rehearsal; ``speeds`` sets it by name."""

    def __init__(self, speeds: Mapping[str, float] | None = None) -> None:
        self.speeds = dict(speeds or {})
        self._calls = 0

    def sample(self, name: str, run: Callable[[], object], host: float) -> float:
        run()
        self._calls += 1
        like = name.removesuffix(again(""))
        base = self.speeds.get(name) or self.speeds.get(like) or 1.0 + (sum(like.encode()) % 17) / 50
        return base * 1e-3 * (1 + 1e-3 * (self._calls * 37 % 11))

    def host(self, run: Callable[[], object], seconds: float) -> float:
        run()
        return 1e-3


def timer_for(device: str) -> Timer:
    """Events on a GPU; without one nothing real is timed."""
    return CudaTimer() if device == "cuda" else FakeTimer()


class Rounds:
    """How often a timing is repeated."""

    def __init__(self, least: int, most: int, seconds: float) -> None:
        self.least, self.most, self.seconds = least, most, seconds

    def count(self, seconds_a_round: float) -> int:
        """As many rounds as fit into the seconds, within the bounds."""
        wanted = int(self.seconds / max(seconds_a_round, 1e-9))
        return max(self.least, min(self.most, wanted))


def interleaved(timer: Timer, runs: Mapping[str, Callable[[], object]], rounds: Rounds) -> dict[str, list[float]]:
    """Samples of each call, taken in turn; three untimed rounds before, in which the host's time is found."""
    host = {}
    for name, run in runs.items():
        run()
        synchronise()
        begin = time.perf_counter()
        run()
        host[name] = min(time.perf_counter() - begin, 1.0)
        synchronise()
    begin = time.perf_counter()
    for name, run in runs.items():
        timer.sample(name, run, host[name])
    count = rounds.count(time.perf_counter() - begin)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            samples[name].append(timer.sample(name, run, host[name]))
    return samples


def synchronise() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Median and the order statistics that hold it with ``confidence``: low, median, high.

    With fewer than eight values no pair of order statistics reaches 99 %, and the extremes are returned.
    """
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if 2 * tail > 1 - confidence:
            break
        rank += 1
    rank = max(0, rank - 1)
    return ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]


def ratio(own: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Low, median and high of the per-round ratios."""
    return interval([a / b for a, b in zip(own, base, strict=True)])


def summary(samples: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Each call's median in microseconds and its ratio to the baseline with the interval."""
    found = {}
    for name, values in samples.items():
        low, middle, high = ratio(values, samples[baseline])
        found[name] = {
            "us": round(statistics.median(values) * 1e6, 3), "ratio": round(middle, 5), "low": round(low, 5),
            "high": round(high, 5), "rounds": len(values),
        }  # fmt: skip
    return found


def again(name: str) -> str:
    """What the second of two equal variants is called, between which is nothing but the measurement's error."""
    return f"{name} again"


def noise(summarised: Mapping[str, Mapping[str, Any]], baseline: str = "frozen") -> float | None:
    """How far a baseline is from itself by its interval, as a ratio: no smaller loss counts. None: not timed twice."""
    found = summarised.get(again(baseline))
    return None if found is None else max(found["high"], 1 / found["low"])


def losses(samples: Mapping[str, Sequence[float]], own: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """Where ``own`` is slower than another by more than 2 % and 2 microseconds at 99 % confidence.

    And by more than the baseline is slower than itself, where it was timed twice.
    """
    found = []
    twice = {name: samples[name] for name in ("frozen", again("frozen")) if name in samples}
    least = max(_LEAST_LOSS, noise(summary(twice, "frozen")) or 0.0) if twice else _LEAST_LOSS
    for name in others:
        if name not in samples or own not in samples:
            continue
        low, middle, _ = ratio(samples[own], samples[name])
        gap = interval([(a - b) * 1e6 for a, b in zip(samples[own], samples[name], strict=True)])
        if low > least and gap[0] > 2.0:
            found.append({"own": own, "than": name, "ratio": round(middle, 4), "us": round(gap[1], 2)})
    return found
