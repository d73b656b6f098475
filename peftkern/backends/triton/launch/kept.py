"""The launch of ``kept``."""

from __future__ import annotations

import triton
from torch import Tensor

from peftkern import dropout
from peftkern.backends.triton.kernels import dropout as drop
from peftkern.backends.triton.kernels.kept import kept as kept_body
from peftkern.backends.triton.launch.operands import Launch, matrix, near

_BLOCK = (16, 128)  # rows whose stores are 256 bytes and more; a call of Philox for every eighth column


def kept(x: Tensor, Z: Tensor, dropout_p: float, rng_state: Tensor) -> Launch:
    """Z = x where an element survives, else 0."""
    (M, K), (BLOCK_M, BLOCK_COLS) = x.shape, _BLOCK
    arguments = {
        **matrix("X", near(x), _BLOCK, tma=False), **matrix("Z", Z, _BLOCK, tma=False),
        "drop_operands": (rng_state, dropout.threshold(dropout_p)), "M": M, "K": K,
        "DROP": drop.philox, "BLOCK_M": BLOCK_M, "BLOCK_COLS": BLOCK_COLS,
    }  # fmt: skip
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(K, BLOCK_COLS),)
    return Launch(kept_body, grid, arguments, 4, 1, reads=(x,), writes=(Z,), flops=0)
