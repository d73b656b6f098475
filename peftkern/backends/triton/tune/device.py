"""A cell on a device: its operands, the timing of a candidate, and the check of what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.base import Backend
from peftkern.backends.triton import schedule, select
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.schedule import Produced
from peftkern.backends.triton.tiles import Choice
from peftkern.backends.triton.tune.search import Cell, DeviceLost
from peftkern.call import Pair, PairNeeds
from peftkern.testing.numerics import relative_error
from peftkern.weights import DenseWeight, FrozenWeight, split_format

Timer = Callable[[Callable[[], None]], float]
_ONLY_X = PairNeeds(True, False, False, False, False)
_SCALING = 1.75


class EventTimer:
    """Seconds between two events on the current stream, after the L2 cache was filled with what nobody needs.

    By reading: what is written would be written back while the candidate runs. The buffer is at least twice the cache;
    where memory allows it is so large that the launches are queued behind its sum, and what is timed is the device's
    time, not Python's.
    """

    def __init__(self, device: torch.device) -> None:
        properties: Any = torch.cuda.get_device_properties(device)
        size = max(2 * properties.L2_cache_size, min(2**30, properties.total_memory // 32))
        self.buffer = torch.zeros(size // 4, device=device)
        self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Callable[[], None]) -> float:
        start, end = self.events
        self.buffer.sum()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


class DeviceBench:
    """The candidates of one cell. Nothing of one run is kept for the next: each has outputs of its own, overwritten."""

    def __init__(self, cell: Cell, arch: Arch, device: torch.device, reference: Backend, timer: Timer) -> None:
        self.backward, self.arch, self.reference, self.timer = cell.launch.backward, arch, reference, timer
        self.device = device
        self.operands, self.X = _operands(cell, device)
        self.expected: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def sample(self, choice: Choice) -> float:
        """Seconds of one run."""
        try:
            steps = self._produced(choice).steps
            return self.timer(lambda: _run(steps))
        except Exception:
            self._require_device(choice)
            raise

    def check(self, choice: Choice) -> str | None:
        """The error rule against fp64, on outputs that were NaN before, run twice: nothing is missing or added up."""
        try:
            produced = self._produced(choice)
            produced.Z.fill_(torch.nan)
            produced.T.fill_(torch.nan)
            _run(produced.steps)
            _run(produced.steps)
            if self.expected is None:
                self.expected = self._by(torch.float64), self._by(self.X.dtype)
            truths, peers = self.expected
            for name, ours, truth, peer in zip("ZT", (produced.Z, produced.T), truths, peers, strict=True):
                error, allowed = relative_error(ours, truth), 2 * relative_error(peer, truth) + 1e-6
                if not error <= allowed:
                    return f"{name} is wrong: error {error:.2e}, allowed {allowed:.2e}"
            return None
        except Exception:
            self._require_device(choice)
            raise

    def _produced(self, choice: Choice) -> Produced:
        with select.forced(choice):
            return schedule.produce(self.operands, self.X, self.backward, self.arch)

    def _by(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Z and T by the reference backend in ``dtype``."""
        operands, X, product = self.operands, self.X.to(dtype), None
        if dtype != self.X.dtype:
            rows, met = operands.weight.factors(self.X, self.backward)  # the adapter's rows are not rounded
            W = met.materialize(dtype)
            product = rows.to(dtype) @ (W if self.backward else W.t())
            operands = operands._replace(
                weight=DenseWeight(torch.zeros_like(W)), lora_A=operands.lora_A.to(dtype),
                lora_B=operands.lora_B.to(dtype),
            )  # fmt: skip
        if self.backward:
            Z, T = self.reference.pair_backward(operands, X, None, None, None, _ONLY_X).x, X @ operands.lora_B.to(dtype)
        else:
            Z, T = self.reference.pair(operands, X)
        if Z is None:
            raise RuntimeError("the reference gave no dx")
        return Z if product is None else Z + product, T

    def _require_device(self, choice: Choice) -> None:
        """Raises: DeviceLost if what has just failed left the device unusable, as an illegal access does."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:
            tile = f"{choice.schedule} {choice.tile}"
            text = f"the device failed while {tile} ran, which should be reported: {error}"
            raise DeviceLost(text, choice) from error


def _run(steps: list[schedule.Step]) -> None:
    for step in steps:
        step.run()


def _operands(cell: Cell, device: torch.device) -> tuple[Pair, Tensor]:
    """Gaussian operands of magnitude 1 in, about 1 out: real multiplications, at the power that they draw."""
    problem = cell.launch.problem
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype).mul_(scale)

    W = normal(problem.N, problem.K, problem.dtype, problem.K**-0.5)
    stored, base_compute = split_format(problem.weight_format)
    operands = Pair(
        weight=FrozenWeight.quantize(W, stored, base_compute=base_compute),
        lora_A=normal(problem.R, problem.K, problem.adapter_dtype, problem.K**-0.5),
        lora_B=normal(problem.N, problem.R, problem.adapter_dtype, problem.R**-0.5),
        bias=None, lora_bias=None, scaling=_SCALING, scaling_tensor=None, dropout_p=cell.dropout_p,
        rng_state=torch.tensor([1, 2], device=device) if problem.dropout else None, precision=problem.precision,
    )  # fmt: skip
    made = operands.problem(problem.M, problem.dtype)
    if made != dataclasses.replace(problem, device_type=device.type):
        raise RuntimeError(f"the operands make {made}, not {problem}")
    return operands, normal(problem.M, cell.launch.Q, problem.dtype)
