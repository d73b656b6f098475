"""Frozen weights that bitsandbytes holds, taken over as they are. bitsandbytes itself is not imported.

Its own decoder for CPUs with AVX-512 (0.50.2) reads the wrong scales where K is no multiple of the blocksize, without a
warning; what is returned here is decoded by peftkern, whose result does not depend on the machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.weights import FrozenWeight, Int8Weight


def from_bitsandbytes(module: Any) -> FrozenWeight:
    """The frozen weight of a bitsandbytes ``Linear4bit`` (nf4, fp4) or ``Linear8bitLt`` (int8), sharing its memory.

    Args: module: the layer, after it was moved to a device, which is when bitsandbytes quantises.
    Returns: a FrozenWeight of format "nf4", "fp4" or "int8". The offset of a double quantisation is copied.
    Raises: TypeError for any other module; ValueError for a weight that is not quantised yet, that bitsandbytes has
        repacked for its own CPU kernels, or that is no valid weight of its format.
    Numerics: nf4 and fp4 are bit-identical to bitsandbytes where it follows its own format; int8 is data · (SCB / 127).
    """
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "bnb_quantized") or "quant_state" in getattr(module, "__dict__", ()):
        state = quant_state(module)
        if state is None:
            raise ValueError("the weight is not quantised yet: move the module to a device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked this weight for its own CPU kernels: call module.state_dict() first"
            )
        found = {"weight": weight.data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
        return FrozenWeight.from_state_dict(found)
    if isinstance(weight, Tensor) and hasattr(getattr(module, "state", None), "SCB"):
        data, scale = int8_operands(module)
        if data.dtype != torch.int8 or scale is None:
            raise ValueError("the weight is not quantised yet: move the module to a device first")
        return Int8Weight(data, scale.float() / 127)
    raise TypeError(
        f"a bitsandbytes Linear4bit or Linear8bitLt has a frozen weight to take, not {type(module).__name__}"
    )


def quant_state(module: Any) -> Any:
    """What a module of 4 bits knows of its weight: its own where FSDP has put a plain tensor in the weight's place."""
    own = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if own is None else own


def int8_operands(module: Any) -> tuple[Tensor, Any]:
    """The elements of a module of 8 bits and the largest size of each row, which a first forward moves to ``state``."""
    weight, state = module.weight, module.state
    if getattr(weight, "CB", None) is not None:
        return weight.CB, weight.SCB
    return weight.data if state.CB is None else state.CB, state.SCB


def read_bitsandbytes(module: Any) -> FrozenWeight:
    """What ``from_bitsandbytes`` has taken before, without its checks: a compiler can trace this."""
    if not hasattr(module, "compute_dtype"):
        data, scale = int8_operands(module)
        return FrozenWeight.from_operands("int8", data, scale.float() / 127, 0)
    state, data = quant_state(module), module.weight.view(-1).view(torch.uint8)
    nested = (state.state2.absmax, state.state2.code, state.offset.view(1)) if state.nested else ()
    return FrozenWeight.from_operands(
        state.quant_type, data, state.absmax, state.blocksize, (state.code, *nested), state.shape
    )
