"""``int4``: asymmetric, a scale and a zero point per group along K.

W[n, k] = (q[n, k] - zero_point[n, g]) * scale[n, g],   g = k // group_size,   q in 0 ... 15

Zero is always representable. Two elements share a byte, the even one in the high half; a row begins with a new byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.weights import packed_int32
from peftkern.weights.base import FrozenWeight
from peftkern.weights.groups import grouped, pack_nibbles, spread
from peftkern.weights.saved import require, require_group


class Int4Weight(FrozenWeight):
    """``data`` uint8 [N, ceil(K / 2)], ``scale`` fp32 [N, G], ``tables`` (zero_point uint8 [N, G])."""

    format = "int4"
    packed = True
    parts = ("scale", "zero_point")
    spellings = packed_int32.SPELLINGS  # GPTQ's and AWQ's

    def check_layout(self, name: str) -> None:
        N, K = self.shape
        device = self.data.device
        require(name, self.data, torch.uint8, (N, -(-K // 2)), device)
        require_group(name, "group_size", self.group_size)
        shape = (N, -(-K // self.group_size))
        require(f"{name}.scale", self.scale, torch.float32, shape, device)
        if len(self.tables) != 1:
            raise ValueError(f"{name} has one table, zero_point, not {len(self.tables)}")
        require(f"{name}.zero_point", self.tables[0], torch.uint8, shape, device)

    def check_values(self, name: str) -> None:
        super().check_values(name)
        if (self.tables[0] > 15).any():
            raise ValueError(f"{name}.zero_point is beyond 15")

    def materialize(self, dtype: torch.dtype) -> Tensor:
        assert self.scale is not None  # validate() has seen to it
        N, K = self.shape
        codes = torch.stack((self.data >> 4, self.data & 15), dim=-1).view(N, -1)[:, :K].float()
        codes -= spread(self.tables[0].float(), self.group_size, K)
        return codes.mul_(spread(self.scale, self.group_size, K)).to(dtype)

    @classmethod
    def pack(cls, tensor: Tensor, group_size: int = 128) -> Int4Weight:
        require_group("int4", "group_size", group_size)
        N, K = tensor.shape
        groups = grouped(tensor.float(), group_size)
        low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
        scale = (high - low) / 15
        divisor = torch.where(scale > 0, scale, 1.0)
        zero_point = (-low / divisor).round().clamp_(0, 15)
        codes = (groups / divisor.unsqueeze(-1)).round() + zero_point.unsqueeze(-1)
        codes = codes.clamp_(0, 15).to(torch.uint8).view(N, -1)[:, :K]
        data = pack_nibbles(torch.nn.functional.pad(codes, (0, K % 2)))
        return cls(data, scale, group_size, (zero_point.to(torch.uint8),), (N, K))

    @classmethod
    def from_checkpoint(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> FrozenWeight:
        """The weight of a GPTQ or AWQ checkpoint, whose codes and zero points are put into this order.

        Raises: ValueError naming the key that holds what it should not, or the layout that is not read.
        """
        return cls.from_int32(keys, tensors)

    @classmethod
    def from_int32(cls, keys: Sequence[str], tensors: Sequence[Tensor], stored_less_one: bool = True) -> Int4Weight:
        """``from_checkpoint``; ``stored_less_one``: whether zero points of GPTQ's are, as in files of "gptq"."""
        found = packed_int32.read(keys, tensors, stored_less_one)
        K = found.codes.shape[1]
        data = pack_nibbles(torch.nn.functional.pad(found.codes, (0, K % 2)))
        dtype = tensors[2].dtype
        return cls(data, found.scale, found.group_size, (found.zero_point,), (len(data), K), dtype)
