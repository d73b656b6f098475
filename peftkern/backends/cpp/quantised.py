"""What the kernels are told of a quantised weight (csrc/include/quantised.h decodes it)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkern.weights import E2M1Weight, FourBitWeight, FP8Weight, FrozenWeight, Int4Weight, Int8Weight
from peftkern.weights.fp8 import BLOCK

FORMATS = {"nf4": 1, "fp4": 1, "int4": 2, "int8": 3, "fp8": 4, "mxfp4": 5, "nvfp4": 6}  # call.h, WeightFormat
_ALL = 62  # log2 of more elements than there are


def read(problem: Any, weight: FrozenWeight) -> tuple[Any, list[Tensor]]:
    """A problem of the kernels that reads ``weight``, and what must live until its call is over."""
    shift = weight.group_size.bit_length() - 1 if weight.group_size else _ALL
    row_shift = stride = 0
    match weight:
        case FourBitWeight():
            pass
        case Int4Weight() | Int8Weight() | E2M1Weight():
            stride = -(-weight.shape[1] // weight.group_size) if weight.group_size else 1
        case FP8Weight():
            row_shift = BLOCK.bit_length() - 1 if weight.group_size else 0
            assert weight.scale is not None
            stride = weight.scale.shape[-1] if weight.group_size else int(len(weight.scale) == weight.shape[0])
    held = [tensor.contiguous() for tensor in weight.tensors]
    data, scale, *tables = (tensor.data_ptr() for tensor in held)
    return problem.read_quantised(FORMATS[weight.format], data, scale, stride, shift, row_shift, tables), held
