"""Frozen weights that bitsandbytes holds, taken over as they are. bitsandbytes itself is not imported.

Its own decoder for CPUs with AVX-512 (0.50.2) reads the wrong scales where K is no multiple of the blocksize, without a
warning; what is returned here is decoded by peftkern, whose result does not depend on the machine.
"""

from __future__ import annotations

from typing import Any

import torch

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
    if hasattr(weight, "quant_state") and hasattr(weight, "bnb_quantized"):
        state = weight.quant_state
        if state is None:
            raise ValueError("the weight is not quantised yet: move the module to a device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked this weight for its own CPU kernels: call module.state_dict() first"
            )
        found = {"weight": weight.data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
        return FrozenWeight.from_state_dict(found)
    if hasattr(weight, "CB") and hasattr(weight, "SCB"):
        data, scale = (weight.CB, weight.SCB) if weight.CB is not None else (module.state.CB, module.state.SCB)
        if data is None or data.dtype != torch.int8:
            raise ValueError("the weight is not quantised yet: move the module to a device first")
        return Int8Weight(data, scale.float() / 127)
    raise TypeError(
        f"a bitsandbytes Linear4bit or Linear8bitLt has a frozen weight to take, not {type(module).__name__}"
    )


def read_bitsandbytes(module: Any) -> FrozenWeight:
    """What ``from_bitsandbytes`` has taken before, without its checks: a compiler can trace this."""
    weight = module.weight
    if not hasattr(weight, "quant_state"):
        held = module.state if weight.CB is None else weight
        return FrozenWeight.from_operands("int8", held.CB, held.SCB.float() / 127, 0)
    state, data = weight.quant_state, weight.view(-1).view(torch.uint8)
    nested = (state.state2.absmax, state.state2.code, state.offset.view(1)) if state.nested else ()
    return FrozenWeight.from_operands(
        state.quant_type, data, state.absmax, state.blocksize, (state.code, *nested), state.shape
    )
