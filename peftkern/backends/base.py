"""What a backend is to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.ops.bank_problem import BankBackward, BankGradients, BankOperands
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem
from peftkern.weights import FrozenWeight


@dataclass(frozen=True)
class Plan:
    """How a backend would run a problem: its schedule and tile, and the schedules it refuses, for ``explain``."""

    schedule: str
    tile: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


class Backend(ABC):
    """One implementation. Instances hold no state that a call can change."""

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run at all on this machine, or None."""

    @property
    def broken(self) -> bool:
        """Whether it is installed but fails to load, which deserves a warning."""
        return False

    def held_bytes(self) -> int:
        """Memory that the backend keeps between calls, beside what its callers own."""
        return 0

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """Why this backend cannot run ``problem``, or None."""

    @abstractmethod
    def plan(self, problem: Problem) -> Plan:
        """The schedule and tile it would take."""

    @abstractmethod
    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [M, N] in x's dtype and s = D(x) A^T [M, R], unscaled, in fp32 (fp64 for fp64). M >= 1."""

    @abstractmethod
    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        """The needed gradients. x is None unless needs.lora_A, s unless needs.lora_B. dy may have any strides."""

    @abstractmethod
    def accumulate(self, operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
        """y += c D(x) A^T B^T + c lora_bias in place, for one more adapter of the same weight; s as ``forward``'s.

        y is contiguous; ``operands.bias`` and the weight's values have no say.
        """

    @abstractmethod
    def accumulate_backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: Needs
    ) -> Gradients:
        """``backward`` on top of a contiguous dx, None unless needs.x: dx += c D(dy B A) in place, the others fresh."""

    def forward_shared(self, members: Sequence[LoRAOperands], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``forward`` of several layers on one x. In turn, where each has its thin product in its own pass over x."""
        return [self.forward(operands, x) for operands in members]

    def backward_onto(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor, needs: Needs
    ) -> Gradients:
        """``backward`` on top of a contiguous dx: dx += dy W + c D(dy B A) in place; needs.x."""
        dx.addmm_(dy, operands.weight.materialize(dy.dtype))
        return self.accumulate_backward(operands, dy, x, s, dx, needs)

    def product(self, weight: FrozenWeight, rows: Tensor, backward: bool) -> Tensor:
        """rows W^T, or, in ``backward``, rows W. M >= 1."""
        dtype = rows.dtype
        rows, weight = weight.factors(rows, backward)
        W = weight.materialize(rows.dtype)
        return (rows @ W if backward else torch.nn.functional.linear(rows, W)).to(dtype)

    def kept(self, x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
        """x [M, K] where an element survives, else 0 (for a NaN too), unscaled; fresh and contiguous. M >= 1."""
        M, K = x.shape
        keep = dropout.keep_mask(M, K, dropout_p, rng_state)
        return torch.where(keep, x, x.new_zeros(())).contiguous()

    def bank_forward(self, operands: BankOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [M, N] in x's dtype and s of all segments in fp32 (fp64 for fp64). M >= 1.

        Called where ``supports`` has accepted several adapters.
        """
        raise NotImplementedError(f"backend {self.name!r} has no products for several adapters")

    def bank_backward(self, operands: BankOperands, given: BankBackward) -> BankGradients:
        """dx where it is needed, and (dA, dB) of each segment whose pair is; exact zeros for one without rows.

        Segment after segment, by ``accumulate_backward``.
        """
        dy, x, s, need_x, need_pairs = given
        dx = dy @ operands.weight if need_x else None
        pairs: list[tuple[Tensor, Tensor] | None] = []
        at = 0
        for segment, need in zip(operands.segments, need_pairs, strict=True):
            if not segment.length or not segment.R:
                zeros = torch.zeros_like(segment.lora_A), torch.zeros_like(segment.lora_B)
                pairs.append(zeros if need else None)
                continue
            rows, inside = operands.rows_of(segment), operands.inside_of(segment)
            size = segment.length * segment.R
            own_x = own_s = own_dx = None
            if need:
                assert x is not None and s is not None
                own_x, own_s = only(x[rows], inside), s[at : at + size].view(segment.length, segment.R)
            if dx is not None:
                own_dx = dx[rows]
            needs = Needs(dx is not None, need, need, False, False)
            _, dA, dB, *_ = self.accumulate_backward(
                operands.alone(segment), only(dy[rows], inside), own_x, own_s, own_dx, needs
            )
            if dx is not None and own_dx is not None:
                dx[rows] = own_dx if inside is None else torch.where(inside, own_dx, dx[rows])
            pairs.append((dA, dB) if dA is not None and dB is not None else None)
            at += size
        return dx, pairs


def only(value: Tensor, inside: Tensor | None) -> Tensor:
    """Zeros in the rows that are another adapter's: neither their values nor their NaN get into a gradient."""
    return value if inside is None else torch.where(inside, value, value.new_zeros(()))


def rounding(problem: Problem) -> str:
    """What a plan has to add where the frozen product rounds its rows."""
    return " of rows rounded to e4m3" if problem.base_compute else ""


def scaled(value: Tensor, operands: LoRAOperands) -> Tensor:
    """c * value, in place and without reading a tensor's value on the host."""
    if operands.scaling_tensor is not None:
        value = value.mul_(operands.scaling_tensor.to(value.dtype))
    return value if operands.scaling == 1.0 else value.mul_(operands.scaling)


def bias_gradients(operands: LoRAOperands, dy: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """dbias = sum dy and dlora_bias = c sum dy over rows, from a wide accumulator, in the parameters' dtypes."""
    if not (needs.bias or needs.lora_bias):
        return None, None
    total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    dbias = total.to(operands.bias.dtype) if needs.bias and operands.bias is not None else None
    if not (needs.lora_bias and operands.lora_bias is not None):
        return dbias, None
    return dbias, scaled(total.clone(), operands).to(operands.lora_bias.dtype)
