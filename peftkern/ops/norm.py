"""The row norms of W + c B A, without the [N, K] sum ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.dispatch import without_autocast
from peftkern.weights import FrozenWeight

# Elements of the widened block of rows: half a megabyte that stays in a core's cache, or a few launches on a GPU.
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**24


def row_norm(
    weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, scaling_tensor: Tensor | None
) -> Tensor:
    """||W_n + c B_n A|| for every row n.

    Block by block it is the sum itself that is squared, not the expansion ||W||^2 + 2c W.BA + c^2 ||BA||^2: that costs
    the same multiplications, and loses what cancels between W and c B A.

    Args: weight: [N, K]; lora_A: [R, K]; lora_B: [N, R].
    Returns: [N], fp32 (fp64 for fp64), from sums in that dtype.
    """
    N, K = weight.shape
    dense = weight.materialize(weight.compute_dtype or lora_A.dtype)
    wide = torch.promote_types(dense.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide) * scaling
    if scaling_tensor is not None:
        B *= scaling_tensor.to(wide)
    norm = dense.new_empty(N, dtype=wide)
    rows = max(1, _BLOCK.get(dense.device.type, _BLOCK_ELSEWHERE) // max(1, K))
    with without_autocast(dense.device.type):
        for n in range(0, N, rows):
            block = torch.addmm(dense[n : n + rows].to(wide), B[n : n + rows], A)
            torch.linalg.vector_norm(block, dim=1, out=norm[n : n + rows])
    return norm
