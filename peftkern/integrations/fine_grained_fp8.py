"""Frozen weights that transformers' ``FP8Linear`` holds, taken over as they are. transformers is not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.weights import FP8Weight, FrozenWeight
from peftkern.weights.fp8 import BLOCK


def from_fp8_linear(module: Any) -> FrozenWeight:
    """The frozen weight of an ``FP8Linear``, as DeepSeek's and Qwen's FP8 checkpoints are loaded, sharing its memory.

    Formula: W[n, k] = weight[n, k] · weight_scale_inv[n // 128, k // 128], or one scale for all.
    Args: module: the layer; scales that are not fp32 are copied.
    Returns: a FrozenWeight of format "fp8".
    Raises: TypeError for a module without scales; ValueError for blocks of another size, for a weight whose inputs are
        scaled by a number of the checkpoint's, and for what is no valid fp8 weight.
    """
    scale = module._parameters.get("weight_scale_inv")
    if scale is None:
        raise TypeError(f"transformers' FP8Linear has a frozen weight to take, not {type(module).__name__}")
    if module._parameters.get("activation_scale") is not None:
        raise ValueError("its inputs are quantised by the checkpoint's own activation_scale")
    size = module.block_size
    if size is not None and tuple(size) != (BLOCK, BLOCK):
        raise ValueError(f"weight_scale_inv is for blocks of {list(size)}, and here they are [{BLOCK}, {BLOCK}]")
    return FP8Weight.from_checkpoint(("weight", "weight_scale_inv"), operands(module))


def operands(module: Any) -> tuple[Tensor, Tensor]:
    """The elements and the scales, which nobody trains."""
    return module._parameters["weight"].detach(), module._parameters["weight_scale_inv"].detach()


def read_fp8_linear(module: Any) -> FrozenWeight:
    """What ``from_fp8_linear`` has taken before, without its checks: a compiler can trace this."""
    data, scale = operands(module)
    single = module.block_size is None
    scale = scale.to(torch.float32)
    return FrozenWeight.from_operands("fp8", data, scale.view(1) if single else scale, 0 if single else BLOCK)
