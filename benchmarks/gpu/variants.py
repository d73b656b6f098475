"""One linear in every variant that the products compare, each held to fp64 before it is timed.

naive     the factors rounded to the base dtype       compiled        naive under torch.compile, rows dynamic
peft      PEFT's formula in the adapter's dtype       "<name> graph"  the same call replayed as a CUDA graph
addmm_    the update accumulated in place             peftkern        with a given RNG state; its draw is timed apart

``compiled`` draws its own mask, so with dropout it is held to the size of the deviation that another mask makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern
from benchmarks import linear
from benchmarks.gpu import backend
from benchmarks.gpu.graphs import Captured
from benchmarks.gpu.plan import Plan
from benchmarks.linear import SCALING, Cell
from peftkern import dropout
from peftkern.backends.reference import formula
from peftkern.testing.numerics import relative_error

RESULTS = ("y", "dx", "dA", "dB")
GRAPHS = ("frozen", "peftkern", "compiled")
OTHERS = ("naive", "addmm_", "peft", "compiled")  # what a plan may leave out
_RECOMPILES = 512
_NOISE = 3.0  # times the deviation that one mask makes from none


def naive(x: Tensor, W: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    """The formula in the base dtype, out of place; the one that is compiled."""
    dropped = F.dropout(x, p) if p else x
    return F.linear(x, W) + F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * SCALING


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    config = torch._dynamo.config
    config.automatic_dynamic_shapes = False  # K and N stay constants: the best that the compiler can do for a layer
    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, _RECOMPILES)
    return torch.compile(naive)


class Linear:
    """A cell's variants: ``forward(name)`` and ``both(name)`` are calls to time, ``check(name)`` says what is wrong."""

    def __init__(self, cell: Cell, plan: Plan) -> None:
        self.cell, self.plan = cell, plan
        self.o = linear.operands(cell)
        self.inputs = (self.o.x, self.o.A, self.o.B)
        self.rng_state = torch.tensor([1234, 5678], device=cell.device) if cell.p else None
        self._truth: dict[bool, list[Tensor]] = {}
        self._peer: dict[bool, list[float]] = {}
        if plan.compiled:
            for tensor in (self.o.x, self.o.dy):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one compilation a layer, and not one for each M

    @property
    def names(self) -> list[str]:
        """The variants, the baseline first."""
        found = ["frozen", "peftkern", "naive", "addmm_"]
        if self.cell.adapter_dtype != self.cell.dtype:
            found.append("peft")
        found = [name for name in (*found, "compiled") if name not in self.plan.without]
        if self.plan.compare_graphs:
            found += [f"{name} graph" for name in GRAPHS if name in found]
        return found

    def forward(self, name: str) -> Callable[[], Tensor]:
        """y of an eager or compiled variant, with a fresh mask each call (peftkern: the given one)."""
        o, p = self.o, self.cell.p

        def drop(x: Tensor) -> Tensor:
            return F.dropout(x, p) if p else x

        return {
            "frozen": lambda: F.linear(o.x, o.W),
            "peftkern": self._own,
            "naive": lambda: naive(o.x, o.W, o.A, o.B, p),
            "addmm_": lambda: linear.addmm(o, drop),
            "peft": lambda: linear.naive(o, drop),
            "compiled": lambda: _compiled()(o.x, o.W, o.A, o.B, p),
        }[name]

    def _own(self) -> Tensor:
        o = self.o
        return peftkern.lora_linear(o.x, o.W, o.A, o.B, SCALING, dropout_p=self.cell.p, rng_state=self.rng_state)

    def both(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        """y and the gradients: dx alone for the frozen linear."""
        forward, dy = self.forward(name), self.o.dy
        inputs = (self.o.x,) if name == "frozen" else self.inputs

        def run() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, inputs, dy))

        return run

    def run(self, name: str, phase: str) -> Callable[[], Any]:
        """What is timed of a variant in a phase, captured where it is a graph."""
        eager = name.removesuffix(" graph")
        call = self.forward(eager) if phase == "forward" else self.both(eager)
        return Captured(call) if name != eager else call

    # ----------------------------------------------------------------------------------------------------- checks

    def truth(self, masked: bool = True) -> list[Tensor]:
        """y, dx, dA, dB in fp64, under the published mask or under none."""
        masked = masked and self.rng_state is not None
        if masked not in self._truth:
            x, W, A, B, dy = (tensor.detach().double() for tensor in self.o)
            wide = backend.operands_of(self.cell, self.o, self.rng_state if masked else None)
            wide = wide._replace(weight=type(wide.weight)(W), lora_A=A, lora_B=B)
            y, s = formula.forward(wide, x)
            found = formula.backward(wide, dy, x, s)
            self._truth[masked] = [y, found.x, found.lora_A, found.lora_B]
        return self._truth[masked]

    def errors(self, results: tuple[Tensor, ...], masked: bool = True) -> list[float]:
        """Relative errors of y, dx, dA, dB against the truth."""
        return [relative_error(value, wanted) for value, wanted in zip(results, self.truth(masked), strict=False)]

    def peer(self, masked: bool = True) -> list[float]:
        """The errors of plain PyTorch with the same roundings and the same mask."""
        masked = masked and self.rng_state is not None
        if masked not in self._peer:
            y = linear.addmm(self.o, self._published if masked else lambda x: x)
            self._peer[masked] = self.errors(linear.gradients(y, self.o, self.inputs), masked)
        return self._peer[masked]

    def _published(self, x: Tensor) -> Tensor:
        keep = dropout.keep_mask(self.cell.M, self.cell.K, self.cell.p, self.rng_state)
        return torch.where(keep, x * dropout.scale(self.cell.p), torch.zeros_like(x))

    def check(self, name: str, run: Callable[[], Any] | None = None) -> tuple[list[float], str | None]:
        """A variant's errors, and why it is wrong or None. ``run``: the very call, where it is a graph of ``both``."""
        eager = name.removesuffix(" graph")
        if eager == "frozen":
            return [], None  # cuBLAS itself
        if eager in ("naive", "addmm_", "peft") and run is None:
            y = {"naive": self._naive, "addmm_": linear.addmm, "peft": linear.naive}[eager](self.o, self._mask())
            results = linear.gradients(y, self.o, self.inputs)
        else:
            found = (run or self.both(eager))()
            results = (found,) if isinstance(found, Tensor) else found
        if eager == "compiled" and self.rng_state is not None:
            return self._check_noise(results)
        errors = self.errors(results)
        for label, error, peer in zip(RESULTS, errors, self.peer(), strict=False):
            if not error <= 2 * peer + 1e-6:
                return errors, f"{label} has error {error:.2e}, allowed 2 x {peer:.2e} + 1e-6"
        return errors, None

    def _mask(self) -> linear.Drop:
        return self._published if self.rng_state is not None else lambda x: x

    def _naive(self, o: linear.Operands, drop: linear.Drop) -> Tensor:
        update = F.linear(F.linear(drop(o.x), o.A.to(o.x.dtype)), o.B.to(o.x.dtype)) * SCALING
        return F.linear(o.x, o.W) + update

    def _check_noise(self, results: tuple[Tensor, ...]) -> tuple[list[float], str | None]:
        errors = self.errors(results, masked=False)
        for label, error, with_mask, without, peer in zip(
            RESULTS, errors, self.truth(), self.truth(False), self.peer(False), strict=False
        ):
            noise = relative_error(with_mask, without)
            if not error <= _NOISE * noise + 2 * peer + 1e-6:
                return errors, f"{label} is {error:.2e} from the result without dropout, a mask makes {noise:.2e}"
        return errors, None

    def forget_truth(self) -> None:
        """Free what only the checks need."""
        self._truth.clear()
