"""The launch of ``quantise``, and what ``fused`` is told of codes on both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern.backends.triton.kernels.quantise import quantise as quantise_body
from peftkern.backends.triton.launch.operands import Launch, describable, matrix, near
from peftkern.backends.triton.tiles import TileConfig
from peftkern.weights import FP8ComputedWeight, FrozenWeight

_BLOCK = (4, 1024)


class Codes(NamedTuple):
    """Rows as they are multiplied: e4m3 [M, Q], the rows' powers of two fp32 [M], and the weight that they meet."""

    data: Tensor
    scale: Tensor
    weight: FrozenWeight


def quantise(weight: FrozenWeight, X: Tensor, backward: bool) -> tuple[Launch, Codes]:
    """The launch that rounds the rows of x or dy, and what it leaves."""
    assert isinstance(weight, FP8ComputedWeight)
    (M, Q), (fold, met) = X.shape, weight.split(backward)
    pitch = triton.cdiv(Q, 16) * 16  # so that every row can be read 16 bytes at a time
    codes, scale = X.new_empty(M, pitch, dtype=torch.uint8)[:, :Q], X.new_empty(M, dtype=torch.float32)
    BLOCK_M, BLOCK_Q = _BLOCK
    arguments = {
        **matrix("X", X, _BLOCK, tma=False), "FOLD": None if fold is None else fold.contiguous(),
        "CODES": codes, "pitch": pitch, "SCALES": scale, "M": M, "Q": Q,
        "BLOCK_M": BLOCK_M, "BLOCK_Q": min(BLOCK_Q, max(16, triton.next_power_of_2(Q))),
    }  # fmt: skip
    reads = (X,) if fold is None else (X, fold)
    launch = Launch(quantise_body, (triton.cdiv(M, BLOCK_M),), arguments, 4, 1, reads, (codes, scale), flops=0)
    return launch, Codes(codes.view(torch.float8_e4m3fn), scale, met)


def loader(codes: Codes, backward: bool, tile: TileConfig) -> dict[str, Any]:
    """LOAD_W (None: codes), W, and what ``contract_codes`` is told of its scales."""
    W: Any = near(codes.weight.data)
    scale, group = codes.weight.scale, codes.weight.group_size
    assert scale is not None
    along_n, along_k = W.stride()
    strides: tuple[Any, ...] = (along_n, along_k) if backward else (along_k, along_n)
    if tile.tma and not backward and describable(W):
        W, strides = TensorDescriptor.from_tensor(W, [tile.BLOCK_P, tile.BLOCK_Q]), ()
    shift = max(0, group.bit_length() - 1)
    along: tuple[int | None, int]
    if group:
        next_n, next_k = scale.stride()
        along = (next_n, next_k) if backward else (next_k, next_n)
    else:  # the same for every q
        along = (None, scale.stride(0) if len(scale) > 1 else 0)
    return {"LOAD_W": None, "W": W, "w_operands": (strides, codes.scale, scale, *along, shift)}
