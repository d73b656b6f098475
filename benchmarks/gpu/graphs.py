"""CUDA graphs of calls that are compared, and how many kernels a call launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One stream for every warm-up and capture, so that a workspace kept per stream is there before the capture."""
    return torch.cuda.Stream()


class Captured:
    """A call as a graph; ``result`` is what the last replay left."""

    def __init__(self, run: Callable[[], Any]) -> None:
        stream = _stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.result = run()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def kernels_of(run: Callable[[], object]) -> dict[str, int] | None:
    """Name of each kernel that a call launches, with how often; None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        run()
        torch.cuda.synchronize()
    found: dict[str, int] = {}
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:80]] = found.get(event.name[:80], 0) + 1
    return found or None
