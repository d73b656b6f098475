"""``int8``: symmetric, one fp32 scale per output channel or per group along K.

W[n, k] = data[n, k] * scale[n]  or  data[n, k] * scale[n, k // group_size],   scale = max |W| / 127 over what shares it
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight
from peftkern.weights.groups import grouped, spread
from peftkern.weights.saved import require, require_group


class Int8Weight(FrozenWeight):
    """``data`` int8 [N, K], ``scale`` fp32 [N], or [N, ceil(K / group_size)] where ``group_size`` is not 0."""

    format = "int8"
    parts = ("scale",)

    def check_layout(self, name: str) -> None:
        N, K = self.shape
        require(name, self.data, torch.int8, (N, K), self.data.device)
        if self.group_size:
            require_group(name, "group_size", self.group_size)
        shape = (N, -(-K // self.group_size)) if self.group_size else (N,)
        require(f"{name}.scale", self.scale, torch.float32, shape, self.data.device)

    def materialize(self, dtype: torch.dtype) -> Tensor:
        assert self.scale is not None  # validate() has seen to it
        scale = spread(self.scale, self.group_size, self.shape[1]) if self.group_size else self.scale.unsqueeze(1)
        return (self.data.float() * scale).to(dtype)

    @classmethod
    def pack(cls, tensor: Tensor, group_size: int = 0) -> Int8Weight:
        wide = tensor.float()
        if group_size:
            require_group("int8", "group_size", group_size)
        scale = (grouped(wide, group_size) if group_size else wide).abs().amax(dim=-1) / 127
        divisor = torch.where(scale > 0, scale, 1.0)
        divisor = spread(divisor, group_size, tensor.shape[1]) if group_size else divisor.unsqueeze(1)
        return cls((wide / divisor).round().clamp_(-127, 127).to(torch.int8), scale, group_size)
