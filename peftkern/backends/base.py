"""What a backend is to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem


@dataclass(frozen=True)
class Plan:
    """How a backend would run a problem: its schedule and tile, for ``explain``."""

    schedule: str
    tile: str = ""


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

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """Why this backend cannot run ``problem``, or None."""

    @abstractmethod
    def plan(self, problem: Problem) -> Plan:
        """The schedule and tile it would take."""

    @abstractmethod
    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [M, N] in x's dtype and s = D(x) A^T [M, R], unscaled, in fp32 (fp64 for fp64). M and R are at least 1."""

    @abstractmethod
    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        """The needed gradients. ``x`` is None unless needs.lora_A, ``s`` unless needs.lora_B. dy may have any strides."""
