"""What every frozen weight format is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

_FORMATS: dict[str, type[FrozenWeight]] = {}


class FrozenWeight(ABC):
    """A weight ``[N, K]`` that is never trained, in one storage format.

    The format is one subclass; the kernels see its operands only (``data``, ``scale``, ``format``, ``group_size``) and
    decode them in their tile loader. ``materialize`` is the format's definition: a loader is right iff it agrees.

    Args:
        data: the payload, on any device; its dtype and layout belong to the format.
        scale: the format's scales, or None.
        group_size: how many elements along K share a scale; 0 where the format has no groups.
    """

    format: ClassVar[str]

    def __init_subclass__(cls) -> None:
        _FORMATS[cls.format] = cls

    def __init__(self, data: Tensor, scale: Tensor | None = None, group_size: int = 0) -> None:
        self.data, self.scale, self.group_size = data, scale, group_size
        self.validate()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @abstractmethod
    def validate(self) -> None:
        """Raise ValueError or TypeError, naming the field, unless the operands are a weight of this format."""

    @abstractmethod
    def materialize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a dense ``[N, K]`` tensor of ``dtype``."""

    @classmethod
    @abstractmethod
    def pack(cls, tensor: Tensor) -> FrozenWeight:
        """Convert a dense ``[N, K]`` tensor into this format."""

    @property
    def device(self) -> torch.device:
        """Where the payload lives."""
        return self.data.device

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype x must have, or None where the format computes in x's own dtype."""
        return None

    @staticmethod
    def quantize(tensor: Tensor, format: str) -> FrozenWeight:
        """Convert a dense weight ``[N, K]`` into ``format``.

        Returns: a FrozenWeight on the same device.
        Raises: ValueError for an unknown format or a tensor that is not 2-D.
        """
        if tensor.ndim != 2:
            raise ValueError(f"a frozen weight is 2-D [N, K], got shape {tuple(tensor.shape)}")
        return _format_class(format).pack(tensor.detach())

    @staticmethod
    def from_operands(format: str, data: Tensor, scale: Tensor | None, group_size: int) -> FrozenWeight:
        """Rebuild a weight from what the operators carry; it was validated when it was first made."""
        weight = object.__new__(_format_class(format))
        weight.data, weight.scale, weight.group_size = data, scale, group_size
        return weight

    def to(self, device: torch.device | str) -> FrozenWeight:
        """A copy on another device, or self where it is there already."""
        if self.data.device == torch.device(device):
            return self
        scale = None if self.scale is None else self.scale.to(device)
        return type(self)(self.data.to(device), scale, self.group_size)

    def __repr__(self) -> str:
        N, K = self.shape
        return f"FrozenWeight(format={self.format!r}, N={N}, K={K}, device={str(self.device)!r})"


def _format_class(format: str) -> type[FrozenWeight]:
    if format not in _FORMATS:
        raise ValueError(f"unknown weight format {format!r}; known: {', '.join(sorted(_FORMATS))}")
    return _FORMATS[format]


def formats() -> tuple[str, ...]:
    """The names of the registered formats."""
    return tuple(sorted(_FORMATS))
