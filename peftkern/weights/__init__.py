"""Frozen weight formats, host side, one file each."""

from peftkern.weights.base import FrozenWeight, formats
from peftkern.weights.dense import DenseWeight
from peftkern.weights.int8 import Int8Weight

__all__ = ["DenseWeight", "FrozenWeight", "Int8Weight", "formats"]
