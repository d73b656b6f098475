"""One linear whose rows belong to several adapters, serving and training: as ratios to the frozen products."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import graphs, measure
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import F32, Plan
from benchmarks.gpu.task import WRONG, Result, Task
from benchmarks.linear import SCALING
from peftkern.multi_lora import multi_lora_linear
from peftkern.segments import plan_rows
from peftkern.testing.numerics import relative_error
from peftkern.testing.problems import Layer

_DECODE_ROWS = 16
_ADAPTERS = (8, 16, 64)
_P = (0.05, 0.0, 0.1)  # of each adapter in turn
PHASES = ("decode", "prefill", "training")
_NAMES = ("y", "dx", "dA", "dB")


def tasks(bench: Bench) -> list[Task]:
    """Decode of few rows, prefill and training of the plan's most telling number, for several numbers of adapters."""
    plan, found = bench.plan, []
    for E in _ADAPTERS:
        for phase in PHASES:
            layer, M = plan.layers[0], plan.rows[0]
            M = min(M, _DECODE_ROWS) if phase == "decode" else M
            about = {"phase": phase, "layer": layer.name, "K": layer.K, "N": layer.N, "M": M, "E": E, "r": 16}
            run = functools.partial(measure_bank, bench, layer, M, E, phase)
            found.append(Task(f"bank {phase} {layer.name} M={M} E={E}", run, 120.0, about))
    return found


class Banked:
    """The operands of one cell; adapters are fp32, and a third of them have no dropout where any has some."""

    def __init__(self, plan: Plan, layer: Layer, M: int, E: int, phase: str) -> None:
        g = torch.Generator(plan.device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=g, device=plan.device).mul_(scale).to(dtype)

        K, N, r, self.phase = layer.K, layer.N, 16, phase
        self.x, self.dy, self.W = normal(M, K), normal(M, N), normal(N, K, scale=K**-0.5)
        self.A = [normal(r, K, dtype=F32, scale=K**-0.5) for _ in range(E)]
        self.B = [normal(N, r, dtype=F32, scale=r**-0.5) for _ in range(E)]
        ids = torch.arange(M) % E if phase == "decode" else torch.arange(M) * E // M  # a row each, or sequences
        self.rows = plan_rows(ids, plan.device)
        self.p = [_P[e % 3] if phase == "training" else 0.0 for e in range(E)]
        self.states = [(e, 7) for e in range(E)]
        self.nobody = plan_rows(torch.full((M,), -1), plan.device)
        self._differentiable()

    def _differentiable(self) -> None:
        for tensor in (self.x, *self.A, *self.B):
            tensor.requires_grad_(self.phase == "training")

    def wide(self) -> Banked:
        """The same in fp64."""
        made = copy.copy(self)
        made.x, made.dy, made.W = (tensor.detach().double() for tensor in (self.x, self.dy, self.W))
        made.A, made.B = ([factor.detach().double() for factor in factors] for factors in (self.A, self.B))
        made._differentiable()
        return made

    def own(self, backend: str) -> Tensor:
        """y by a backend."""
        return multi_lora_linear(
            self.x, self.W, self.A, self.B, [SCALING] * len(self.A), self.rows, dropout_p=self.p,
            rng_states=self.states, backend=backend,
        )  # fmt: skip

    def base(self, backend: str) -> Tensor:
        """The same launch without adapters."""
        return multi_lora_linear(self.x, self.W, [], [], [], self.nobody, backend=backend)

    def frozen(self) -> Tensor:
        """The vendor's product."""
        return F.linear(self.x, self.W)

    def whole(self, forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """y, and in training the gradients; of the frozen layer dx alone."""
        leaves = [self.x] if forward == self.frozen else [self.x, *self.A, *self.B]

        def run() -> tuple[Tensor, ...]:
            y = forward()
            if self.phase != "training":
                return (y,)
            return (y.detach(), *torch.autograd.grad(y, leaves, self.dy))

        return run

    def errors(self, run: Callable[[], tuple[Tensor, ...]], truth: tuple[Tensor, ...]) -> dict[str, float]:
        """Of y, dx, and all dA and all dB pooled, against fp64."""
        E = len(self.A)
        found, pools = run(), (slice(0, 1), slice(1, 2), slice(2, 2 + E), slice(2 + E, None))
        joined = [[torch.cat([t.flatten().double() for t in of[at]]) for of in (found, truth)]
                  for at in pools if found[at]]  # fmt: skip
        return {name: relative_error(*pair) for name, pair in zip(_NAMES, joined, strict=False)}


def measure_bank(bench: Bench, layer: Layer, M: int, E: int, phase: str) -> Result:
    """Check the bank against fp64 beside PyTorch's loop over the adapters, then time it, the base and both."""
    one, plan = Banked(bench.plan, layer, M, E, phase), bench.plan
    calls: dict[str, Any] = {
        "frozen": one.frozen, "peftkern": functools.partial(one.own, plan.backend),
        "loop": functools.partial(one.own, "reference"),
    }  # fmt: skip
    runs = {name: one.whole(call) for name, call in calls.items()}
    truth = (wide := one.wide()).whole(functools.partial(wide.own, "reference"))()
    errors = {name: one.errors(runs[name], truth) for name in ("peftkern", "loop")}
    del truth, wide
    result: Result = {"errors": {name: {k: float(f"{v:.3e}") for k, v in of.items()} for name, of in errors.items()}}
    bad = [name for name, value in errors["peftkern"].items() if not value <= 2 * errors["loop"][name] + 1e-6]
    if bad:
        return result | {"status": WRONG, "error": f"{', '.join(bad)}: {result['errors']}"}
    if phase != "training":
        runs["without adapters"] = functools.partial(one.base, plan.backend)
        if plan.compare_graphs:
            runs |= {f"{name} graph": graphs.Captured(runs[name]) for name in ("frozen", "peftkern")}
    if plan.device == "cuda":
        result["kernels"] = graphs.kernels_of(runs["peftkern"])
    return result | {"times": measure.summary(bench.time(runs), "frozen")}
