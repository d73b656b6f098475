"""One LoRA linear in every variant that is compared, and the check that each computes the same thing.

frozen    x W^T and dy W: the floor
naive     plain PyTorch, in the adapter's dtype, as PEFT does it
addmm_    plain PyTorch, factors rounded to the base dtype, the update accumulated in place
compiled  naive under torch.compile
peftkern  this project
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern
from peftkern import dropout
from peftkern.backends.reference import formula
from peftkern.call import Pair
from peftkern.testing.numerics import relative_error
from peftkern.weights import DenseWeight

SCALING = 2.0
VARIANTS = ("frozen", "naive", "addmm_", "compiled", "peftkern")
Drop = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One problem: M rows through a linear K -> N with rank r, dropout p, and an adapter dtype beside the base's."""

    layer: str
    M: int
    K: int
    N: int
    r: int
    p: float
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: str

    @property
    def title(self) -> str:
        """For tables and plots."""
        return f"{self.layer} {self.K}->{self.N}, M={self.M}"

    def arithmetic_ratio(self, phase: str) -> float:
        """Multiplications of a LoRA linear over those of the frozen one, in a phase of ``products``.

        Forward adds D(x) A^T and s B^T to x W^T; backward adds dy B, t A, t^T D(x) and dy^T s to dy W.
        """
        thin = self.r * (self.K + self.N) / (self.K * self.N)
        return 1 + thin * {"forward": 1.0, "backward": 2.0, "forward+backward": 1.5}[phase]


class Operands(NamedTuple):
    """x [M, K], W [N, K], A [r, K], B [N, r], dy [M, N]; x, A and B require grad."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor


def operands(cell: Cell, seed: int = 0) -> Operands:
    """Seeded random operands with entries of the size they have in a model."""
    generator = torch.Generator(cell.device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=cell.device).mul_(std).to(dtype)

    return Operands(
        normal(cell.M, cell.K, 1.0, cell.dtype).requires_grad_(),
        normal(cell.N, cell.K, cell.K**-0.5, cell.dtype),
        normal(cell.r, cell.K, cell.K**-0.5, cell.adapter_dtype).requires_grad_(),
        normal(cell.N, cell.r, 0.1, cell.adapter_dtype).requires_grad_(),
        normal(cell.M, cell.N, 1.0, cell.dtype),
    )


def frozen(o: Operands, drop: Drop) -> Tensor:
    """The base layer alone."""
    return F.linear(o.x, o.W)


def naive(o: Operands, drop: Drop) -> Tensor:
    """The formula as PEFT writes it."""
    update = F.linear(F.linear(drop(o.x.to(o.A.dtype)), o.A), o.B) * SCALING
    return (F.linear(o.x, o.W) + update).to(o.x.dtype)


def addmm(o: Operands, drop: Drop) -> Tensor:
    """The update accumulated in place, with the factors rounded to x's dtype."""
    s = F.linear(drop(o.x), o.A.to(o.x.dtype))
    return F.linear(o.x, o.W).addmm_(s, o.B.to(o.x.dtype).T, alpha=SCALING)


def step_functions(cell: Cell, o: Operands, names: tuple[str, ...] = VARIANTS) -> dict[str, Callable[[], Tensor]]:
    """name -> a call that computes y with a fresh dropout draw, ready to be timed."""

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, cell.p) if cell.p else x

    def own() -> Tensor:
        return peftkern.lora_linear(o.x, o.W, o.A, o.B, SCALING, dropout_p=cell.p)

    found: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: frozen(o, drop),
        "naive": lambda: naive(o, drop),
        "addmm_": lambda: addmm(o, drop),
        "peftkern": own,
    }
    if "compiled" in names:
        compiled = torch.compile(naive, dynamic=False)
        found["compiled"] = lambda: compiled(o, drop)
    return {name: found[name] for name in names}


def gradients(y: Tensor, o: Operands, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y and its gradients."""
    return y.detach(), *torch.autograd.grad(y, inputs, o.dy)


class Checker:
    """Holds every variant of one cell to 2 err(torch, same roundings) + 1e-6 against fp64, for y and each gradient.

    All of them are given peftkern's published mask. ``compiled`` draws its own mask inside the compiled graph, so it is
    held to the eager result under torch's mask of probability 0.
    """

    _NAMES = ("y", "dx", "dA", "dB")

    def __init__(self, cell: Cell, o: Operands) -> None:
        self.cell, self.o = cell, o
        state = torch.tensor([1234, 5678], device=cell.device) if cell.p else None
        self.rng_state = state
        keep = None if state is None else dropout.keep_mask(cell.M, cell.K, cell.p, state)
        self.drop: Drop = lambda x: x
        if keep is not None:
            self.drop = lambda x: torch.where(keep, x * dropout.scale(cell.p), torch.zeros_like(x))
        self.truth = self._truth(cell.p, state)
        self.peer = self._errors(addmm(o, self.drop), self.truth)

    def _truth(self, p: float, state: Tensor | None) -> list[Tensor]:
        x, W, A, B, dy = (tensor.detach().double() for tensor in self.o)
        wide = Pair(DenseWeight(W), A, B, None, None, SCALING, None, p, state, "base")
        y, s = formula.forward(wide, x)
        found = formula.backward(wide, dy, x, s)
        return [y, found.x, found.lora_A, found.lora_B]

    def _errors(self, y: Tensor, truth: list[Tensor]) -> list[float]:
        results = gradients(y, self.o, (self.o.x, self.o.A, self.o.B))
        return [relative_error(value, wanted) for value, wanted in zip(results, truth, strict=True)]

    def _judge(self, errors: list[float], peer: list[float]) -> str | None:
        for name, error, allowed in zip(self._NAMES, errors, peer, strict=True):
            if not error <= 2 * allowed + 1e-6:
                return f"{self.cell.title}: {name} has error {error:.2e}, allowed 2 x {allowed:.2e} + 1e-6"
        return None

    def check(self, name: str) -> str | None:
        """Why the variant ``name`` is wrong, or None."""
        o = self.o
        if name == "frozen":
            y, dx = gradients(frozen(o, self.drop), o, (o.x,))
            x, W, dy = o.x.detach().double(), o.W.double(), o.dy.double()
            errors = [relative_error(y, x @ W.T), relative_error(dx, dy @ W)]
            return self._judge([*errors, 0.0, 0.0], self.peer)
        if name == "compiled":
            truth = self.truth if self.rng_state is None else self._truth(0.0, None)
            peer = self.peer if self.rng_state is None else self._errors(addmm(o, lambda x: x), truth)
            return self._judge(self._errors(torch.compile(naive, dynamic=False)(o, lambda x: x), truth), peer)
        if name == "peftkern":
            y = peftkern.lora_linear(o.x, o.W, o.A, o.B, SCALING, dropout_p=self.cell.p, rng_state=self.rng_state)
        else:
            y = {"naive": naive, "addmm_": addmm}[name](o, self.drop)
        return self.judge(y)

    def judge(self, y: Tensor) -> str | None:
        """Why y, computed from the operands with autograd, or a gradient of it is wrong, or None."""
        return self._judge(self._errors(y, self.truth), self.peer)

    def judge_output(self, y: Tensor) -> str | None:
        """Why y, computed without gradients, is wrong, or None."""
        return self._judge([relative_error(y, self.truth[0]), 0.0, 0.0, 0.0], self.peer)
