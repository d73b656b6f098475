"""The one key by which backends, schedules and tiles are chosen, and the operands of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.weights import FrozenWeight, split_format


@dataclass(frozen=True, slots=True)
class Problem:
    """What a backend may look at to say whether, and how, it can run a call. Hashable.

    ``dtype`` is the compute dtype (x, y, dense weight); ``adapter_dtype`` that of lora_A and lora_B;
    ``precision`` is "base" (factors rounded to ``dtype``) or "fp32" (factors kept in fp32). Where there are
    ``several_adapters`` in the batch, R is the largest rank; ``ids_on_device``: the host does not know whose rows
    are whose. ``scaled_steps``: e4m3 on both sides, and a scale for every step of what is contracted.
    """

    device_type: str
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    weight_format: str = "dense"
    dropout: bool = False
    bias: bool = False
    lora_bias: bool = False
    precision: str = "base"
    several_adapters: bool = False
    ids_on_device: bool = False
    scaled_steps: bool = False

    @property
    def base_compute(self) -> str | None:
        """What the rows of the frozen product are rounded to: a fact of the weight's format."""
        return split_format(self.weight_format)[1]


class LoRAOperands(NamedTuple):
    """The operands that forward and backward share. ``scaling`` multiplies ``scaling_tensor`` where there is one.

    Shapes: lora_A [R, K], lora_B [N, R], bias and lora_bias [N], scaling_tensor 0-d, rng_state int64 [2].
    ``rng_state`` is None iff there is no dropout (``dropout_p == 0``).
    """

    weight: FrozenWeight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    lora_bias: Tensor | None
    scaling: float
    scaling_tensor: Tensor | None
    dropout_p: float
    rng_state: Tensor | None
    precision: str

    def problem(self, M: int, dtype: torch.dtype) -> Problem:
        """The key of a call with M rows in compute dtype ``dtype``."""
        return Problem(*self.key(M, dtype))

    def key(self, M: int, dtype: torch.dtype) -> tuple:
        """The fields of ``problem``: every call looks its backend up by them, and making an object costs 2 us."""
        weight, A, _, bias, lora_bias, _, _, _, rng_state, precision = self
        N, K = weight.shape
        return (
            A.device.type, M, K, N, A.shape[0], dtype, A.dtype, weight.format,
            rng_state is not None, bias is not None, lora_bias is not None, precision, False, False,
            weight.base_compute is not None and weight.group_size > 0,
        )  # fmt: skip


class Needs(NamedTuple):
    """Which gradients a backward call must return; what is False is not computed."""

    x: bool
    lora_A: bool
    lora_B: bool
    bias: bool
    lora_bias: bool


class Gradients(NamedTuple):
    """dx [M, K], dA [R, K], dB [N, R], dbias [N], dlora_bias [N]; None where not needed.

    dx has x's dtype, the others their parameter's (from an fp32 accumulator).
    """

    x: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    lora_bias: Tensor | None
