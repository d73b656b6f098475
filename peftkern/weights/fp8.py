"""``fp8``: e4m3 (no infinities, largest 448) with fp32 scales: one, one a row, or one for every 128 x 128 block.

W[n, k] = data[n, k] * scale[...],   scale = max |W| / 448 over what shares it
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight
from peftkern.weights.saved import require, require_finite

_LARGEST = 448.0
BLOCK = 128


class FP8Weight(FrozenWeight):
    """``data`` float8_e4m3fn [N, K], ``scale`` fp32 [1], [N] or (group_size 128) [ceil(N / 128), ceil(K / 128)]."""

    format = "fp8"
    parts = ("scale",)

    def check_layout(self, name: str) -> None:
        N, K = self.shape
        require(name, self.data, torch.float8_e4m3fn, (N, K), self.data.device)
        if self.group_size not in (0, BLOCK):
            raise ValueError(f"{name}: group_size is 0 or {BLOCK}, not {self.group_size}")
        shape: tuple[int, ...] = (-(-N // BLOCK), -(-K // BLOCK)) if self.group_size else (N,)
        if not self.group_size and self.scale is not None and self.scale.shape == (1,):
            shape = (1,)
        require(f"{name}.scale", self.scale, torch.float32, shape, self.data.device)

    def check_values(self, name: str) -> None:
        require_finite(f"{name}.scale", self.scale)

    def materialize(self, dtype: torch.dtype) -> Tensor:
        assert self.scale is not None  # validate() has seen to it
        return (self.data.float() * _spread(self.scale, self.group_size, self.shape)).to(dtype)

    @classmethod
    def pack(cls, tensor: Tensor, scaling: str = "row") -> FP8Weight:
        wide, shape = tensor.float(), (tensor.shape[0], tensor.shape[1])
        size, group_size = wide.abs(), 0
        if scaling == "tensor":
            largest = size.amax().reshape(1)
        elif scaling == "row":
            largest = size.amax(dim=1)
        elif scaling == "block":
            padded = torch.nn.functional.pad(size, (0, -shape[1] % BLOCK, 0, -shape[0] % BLOCK))
            largest = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).amax(dim=(1, 3))
            group_size = BLOCK
        else:
            raise ValueError(f"scaling={scaling!r} is not one of 'tensor', 'row', 'block'")
        scale = largest / _LARGEST
        divisor = _spread(torch.where(scale > 0, scale, 1.0), group_size, shape)
        return cls((wide / divisor).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale, group_size)


def _spread(scale: Tensor, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The scales as what broadcasts over [N, K]."""
    if not group_size:
        return scale.unsqueeze(1)
    return scale.repeat_interleave(group_size, 0)[: shape[0]].repeat_interleave(group_size, 1)[:, : shape[1]]
