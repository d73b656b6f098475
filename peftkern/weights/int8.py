"""``int8``: symmetric, one fp32 scale per output channel.

W[n, k] = data[n, k] * scale[n],   scale[n] = max_k |W[n, k]| / 127
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight


class Int8Weight(FrozenWeight):
    """``data`` int8 [N, K], ``scale`` fp32 [N]."""

    format = "int8"

    def validate(self) -> None:
        if self.data.ndim != 2 or self.data.dtype != torch.int8:
            raise ValueError(f"int8 data is int8 [N, K], got {self.data.dtype} {tuple(self.data.shape)}")
        if self.scale is not None and self.scale.device != self.data.device:
            raise ValueError(f"int8 data is on {self.data.device}, its scale on {self.scale.device}")
        if self.scale is None or self.scale.dtype != torch.float32 or self.scale.shape != self.data.shape[:1]:
            found = None if self.scale is None else (self.scale.dtype, tuple(self.scale.shape))
            raise ValueError(f"int8 scale is float32 [{self.data.shape[0]}], got {found}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    def materialize(self, dtype: torch.dtype) -> Tensor:
        assert self.scale is not None  # validate() has seen to it
        wide = torch.promote_types(dtype, torch.float32)
        return (self.data.to(wide) * self.scale.to(wide).unsqueeze(1)).to(dtype)

    @classmethod
    def pack(cls, tensor: Tensor) -> Int8Weight:
        wide = tensor.float()
        scale = wide.abs().amax(dim=1) / 127
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
        return cls((wide / divisor).round().clamp_(-127, 127).to(torch.int8), scale)
