"""A call's launches, reads, writes and products, counted from its launch records on meta tensors, without a GPU.

A pass over a tensor counts its bytes once, however often tiles come back to it through the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.schedule import Step, backward, produce
from peftkern.call import Pair, PairNeeds, Problem
from peftkern.weights import DenseWeight


@dataclass(frozen=True)
class Traffic:
    """Totals of a list of steps: launches by name, bytes, floating-point operations."""

    launches: tuple[str, ...]
    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


def count(steps: Sequence[Step]) -> Traffic:
    """The traffic of some steps."""

    def size(tensors: tuple[Tensor, ...]) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    return Traffic(
        tuple(step.name for step in steps), sum(size(step.reads) for step in steps),
        sum(size(step.writes) for step in steps), sum(step.flops for step in steps),
    )  # fmt: skip


def traffic(problem: Problem, arch: str | Arch = "sm_90", needs: PairNeeds | None = None) -> tuple[Traffic, Traffic]:
    """Forward and backward of one call, by the schedules that ``select`` chooses for it.

    Args:
        problem: the call; its ``device_type`` does not matter.
        arch: the chip, or its name.
        needs: which gradients; x, lora_A and lora_B by default, and the biases that there are.
    """
    chip = ARCHES[arch] if isinstance(arch, str) else arch
    p = problem

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = Pair(
        DenseWeight(empty(p.N, p.K)), empty(p.R, p.K, dtype=p.adapter_dtype), empty(p.N, p.R, dtype=p.adapter_dtype),
        empty(p.N) if p.bias else None, empty(p.N, dtype=p.adapter_dtype) if p.lora_bias else None, 1.0, None,
        0.05 if p.dropout else 0.0, empty(2, dtype=torch.int64) if p.dropout else None, p.precision,
    )  # fmt: skip
    needs = needs or PairNeeds(True, True, True, p.bias, p.lora_bias)
    x, dy = empty(p.M, p.K), empty(p.M, p.N)
    forward = produce(operands, x, False, chip)
    return count(forward.steps), count(backward(operands, dy, x, forward.T, needs, chip).all)
