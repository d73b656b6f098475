"""Frozen weight formats, host side, one file each."""

from peftkern.weights.base import FrozenWeight, formats, split_format
from peftkern.weights.dense import DenseWeight
from peftkern.weights.e2m1 import E2M1Weight, MXFP4Weight, NVFP4Weight
from peftkern.weights.four_bit import FourBitWeight, FP4Weight, NF4Weight
from peftkern.weights.fp8 import FP8ComputedWeight, FP8Weight
from peftkern.weights.int4 import Int4Weight
from peftkern.weights.int8 import Int8Weight

__all__ = [
    "DenseWeight",
    "E2M1Weight",
    "FP4Weight",
    "FP8ComputedWeight",
    "FP8Weight",
    "FourBitWeight",
    "FrozenWeight",
    "Int4Weight",
    "Int8Weight",
    "MXFP4Weight",
    "NF4Weight",
    "NVFP4Weight",
    "formats",
    "split_format",
]
