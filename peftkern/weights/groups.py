"""Groups of neighbours along K that share a scale; the last of a row may be short."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped(tensor: Tensor, size: int) -> Tensor:
    """[N, K] as [N, ceil(K / size), size], zeros where a row ends."""
    N, K = tensor.shape
    return torch.nn.functional.pad(tensor, (0, -K % size)).view(N, -1, size)


def spread(of_groups: Tensor, size: int, K: int) -> Tensor:
    """[N, ceil(K / size)] as [N, K]: to each element its group's."""
    return of_groups.repeat_interleave(size, dim=1)[:, :K]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 values below 16, even in number along the last dimension, as half as many bytes: the even ones high."""
    return (codes[..., ::2] << 4) | codes[..., 1::2]
