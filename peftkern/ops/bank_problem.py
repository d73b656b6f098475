"""The operands of a call whose rows belong to several adapters, by segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.ops.problem import LoRAOperands, Problem
from peftkern.weights import DenseWeight


class Segment(NamedTuple):
    """One adapter's part: lora_A [R, K], lora_B [N, R], and the rows ``rows[start : start + length]`` of x.

    seed and offset are the adapter's own RNG state; the mask's row number counts from the segment's first row.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    seed: int
    offset: int
    start: int
    length: int

    @property
    def R(self) -> int:
        """The rank."""
        return self.lora_A.shape[0]


BankGradients = tuple[Tensor | None, list[tuple[Tensor, Tensor] | None]]  # dx, and dA and dB of each segment


class BankBackward(NamedTuple):
    """What backward goes by: dy [M, N] of any strides, x [M, K] and s where a pair is needed, and what is needed."""

    dy: Tensor
    x: Tensor | None
    s: Tensor | None
    need_x: bool
    need_pairs: Sequence[bool]


class BankOperands(NamedTuple):
    """The operands that forward and backward share: weight [N, K], bias [N] or None, rows int64 on x's device.

    Where ``inside``, bool like rows, is there, the adapters' ids are on a device: a segment's length is the most rows
    that it can have, and those that are its own, which come first, are inside.
    """

    weight: Tensor
    bias: Tensor | None
    segments: Sequence[Segment]
    rows: Tensor
    precision: str
    inside: Tensor | None = None

    @property
    def thin_size(self) -> int:
        """Elements of s: [length, R] of each segment, one behind the other."""
        return sum(segment.length * segment.R for segment in self.segments)

    def rows_of(self, segment: Segment) -> Tensor:
        """The rows of x that belong to a segment, in its order."""
        return self.rows[segment.start : segment.start + segment.length]

    def inside_of(self, segment: Segment) -> Tensor | None:
        """bool [length, 1]: which of ``rows_of`` are the segment's; None where all of them are."""
        if self.inside is None:
            return None
        return self.inside[segment.start : segment.start + segment.length].unsqueeze(1)

    def alone(self, segment: Segment) -> LoRAOperands:
        """A segment as a call of its own."""
        p, rng_state = segment.dropout_p, None
        if p:
            words = segment.seed, segment.offset  # filled in there: a copy from the host could not be captured
            rng_state = torch.stack(
                [torch.full((), word, dtype=torch.int64, device=segment.lora_A.device) for word in words]
            )
        return LoRAOperands(
            DenseWeight(self.weight), segment.lora_A, segment.lora_B, self.bias, None, segment.scaling, None, p,
            rng_state, self.precision,
        )  # fmt: skip

    def problem(self, M: int, dtype: torch.dtype) -> Problem:
        """The key of a call with M rows in compute dtype ``dtype``."""
        N, K = self.weight.shape
        return Problem(
            self.weight.device.type,
            M,
            K,
            N,
            max((segment.R for segment in self.segments), default=0),
            dtype,
            self.segments[0].lora_A.dtype if self.segments else dtype,
            dropout=any(segment.dropout_p > 0 for segment in self.segments),
            bias=self.bias is not None,
            precision=self.precision,
            several_adapters=True,
            ids_on_device=self.inside is not None,
        )
