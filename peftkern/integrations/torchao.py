"""Frozen weights that torchao holds, taken over as they are. torchao itself is not imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkern.weights import FP8Weight, FrozenWeight, Int8Weight
from peftkern.weights.fp8 import BLOCK

KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
OF_INPUTS = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")


def from_torchao(weight: Any) -> FrozenWeight:
    """The frozen weight in torchao's ``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` or ``Float8Tensor``, sharing its
    memory.

    Formula: W[n, k] = qdata[n, k] · scale[n, k // group], which is what ``dequantize`` gives.
    Args: weight: of a linear layer after ``quantize_`` with ``Int8WeightOnlyConfig`` or ``IntxWeightOnlyConfig``: one
        scale an output channel, one for all (copied), or one a group along K; or with ``Float8WeightOnlyConfig``: e4m3,
        one scale an output channel, one for all, or one a block of 128 x 128.
    Returns: a FrozenWeight of format "int8" or "fp8".
    Raises: TypeError for anything else; ValueError for zero points other than 0, for a weight whose inputs are
        quantised or scaled too, and for one that is no valid weight, such as with a group that is no power of two.
    """
    if type(weight).__name__ not in KINDS or not hasattr(weight, "qdata"):
        raise TypeError(f"torchao's {', '.join(KINDS)} have a frozen weight to take, not {type(weight).__name__}")
    if any(getattr(weight, name, None) is not None for name in OF_INPUTS):
        raise ValueError("torchao quantises or scales the inputs of this weight, too")
    data, scale, zeros = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
    if zeros is not None and zeros.any():
        raise ValueError("this int8 weight has zero points")
    if data.ndim != 2 or scale.ndim != 2:
        raise ValueError(f"a weight is [N, K] with scales [N, groups], got {list(data.shape)}, {list(scale.shape)}")
    format, data, scale, group_size = _operands(weight)
    size = list(weight.block_size)
    if group_size and size != ([BLOCK, BLOCK] if format == "fp8" else [1, group_size]):
        raise ValueError(f"this {format} weight has scales for blocks of {size}")
    return (FP8Weight if format == "fp8" else Int8Weight)(data, scale, group_size, dtype=weight.dtype)


def read_torchao(weight: Any) -> FrozenWeight:
    """What ``from_torchao`` has taken before, without its checks: a compiler can trace this."""
    return FrozenWeight.from_operands(*_operands(weight))


def _operands(weight: Any) -> tuple[str, Tensor, Tensor, int]:
    """(format, data, scale, group_size)."""
    data, scale = weight.qdata, weight.scale.float()
    format, one = "fp8" if data.is_floating_point() else "int8", scale.numel() == 1
    if not one and tuple(scale.shape) != (data.shape[0], 1):
        return format, data, scale, BLOCK if format == "fp8" else weight.block_size[1]
    flat = scale.view(-1)
    return format, data, flat.expand(data.shape[0]).contiguous() if one and format == "int8" else flat, 0
