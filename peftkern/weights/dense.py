"""``dense``: the weight as it is, in any floating dtype and any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight


class DenseWeight(FrozenWeight):
    """A plain tensor ``[N, K]``; x must have its dtype."""

    format = "dense"

    def check_layout(self, name: str) -> None:
        if self.data.ndim != 2 or self.shape != self.data.shape:
            raise ValueError(f"{name} is 2-D [N, K], got shape {tuple(self.data.shape)}")

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.data.dtype

    def materialize(self, dtype: torch.dtype) -> Tensor:
        return self.data if self.data.dtype == dtype else self.data.to(dtype)

    @classmethod
    def pack(cls, tensor: Tensor) -> DenseWeight:
        return cls(tensor)
