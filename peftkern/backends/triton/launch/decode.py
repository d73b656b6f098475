"""The launch that decodes a quantised weight once, for a product with the dense one."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from peftkern.backends.triton.kernels.decode import decode as decode_body
from peftkern.backends.triton.launch.operands import Launch, numerics, quantised
from peftkern.weights import DenseWeight, FrozenWeight

_BLOCK_N, _BLOCK_K = 32, 128


def decode(weight: FrozenWeight, dtype: torch.dtype) -> tuple[Launch, DenseWeight]:
    """The launch that writes the weight to scratch memory, and the weight that is read from there.

    The scratch is torch's allocator's: on one stream the next call gets the same memory, and no call of another stream,
    thread or graph can.
    """
    N, K = weight.shape
    out: Tensor = torch.empty(N, K, dtype=dtype, device=weight.device)
    arguments: dict[str, Any] = {
        **quantised(weight, backward=True), "OUT": out, "N": N, "K": K, "DTYPE": numerics("base", dtype)["DTYPE"],
        "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K,
    }  # fmt: skip
    grid = (triton.cdiv(N, _BLOCK_N) * triton.cdiv(K, _BLOCK_K),)
    launch = Launch(decode_body, grid, arguments, 4, 1, reads=weight.tensors, writes=(out,), flops=N * K)
    return launch, DenseWeight(out)
