"""Frozen weights that torchao holds, taken over as they are. torchao itself is not imported."""

from __future__ import annotations

from typing import Any

from peftkern.weights import FrozenWeight, Int8Weight


def from_torchao(weight: Any) -> Int8Weight:
    """The frozen weight in torchao's ``Int8Tensor``, sharing its memory.

    Formula: W[n, k] = qdata[n, k] · scale[n, k // group], which is what ``dequantize`` gives.
    Args: weight: of a linear layer after ``quantize_`` with ``Int8WeightOnlyConfig``: one scale an output channel, one
        for all (copied), or one a group along K.
    Returns: a FrozenWeight of format "int8".
    Raises: TypeError for anything else; ValueError for zero points other than 0, for a weight whose inputs are
        quantised or scaled too, and for one that is no valid int8 weight, such as with a group that is no power of two.
    """
    if type(weight).__name__ != "Int8Tensor" or not hasattr(weight, "qdata"):
        raise TypeError(f"torchao's Int8Tensor has a frozen weight to take, not {type(weight).__name__}")
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise ValueError("torchao quantises or scales the inputs of this weight, too")
    if weight.zero_point is not None and weight.zero_point.any():
        raise ValueError("this int8 weight has zero points")
    data, scale = weight.qdata, weight.scale.float()
    if data.ndim != 2 or scale.ndim != 2:
        raise ValueError(
            f"an int8 weight is [N, K] with scales [N, groups], got {list(data.shape)}, {list(scale.shape)}"
        )
    if scale.shape[1] > 1:
        group = weight.block_size[1]
        if list(weight.block_size) != [1, group]:
            raise ValueError(f"this int8 weight has scales for blocks of {list(weight.block_size)}")
        return Int8Weight(data, scale, group, dtype=weight.dtype)
    return Int8Weight(data, scale.view(-1).expand(data.shape[0]).contiguous(), dtype=weight.dtype)


def read_torchao(weight: Any) -> FrozenWeight:
    """What ``from_torchao`` has taken before, without its checks: a compiler can trace this."""
    data, scale = weight.qdata, weight.scale.float()
    if scale.shape[1] > 1:
        return FrozenWeight.from_operands("int8", data, scale, weight.block_size[1])
    return FrozenWeight.from_operands("int8", data, scale.view(-1).expand(data.shape[0]).contiguous(), 0)
