"""The ``decode`` body: a quantised weight as a dense [N, K] matrix, once for all the tiles that read it."""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.matrix import store_block


@triton.jit
def decode(
    W, w_operands, OUT, N, K, LOAD_W: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile of OUT; neighbouring programs take neighbouring columns."""
    columns = tl.cdiv(K, BLOCK_K)
    n0, k0 = tl.program_id(0) // columns * BLOCK_N, tl.program_id(0) % columns * BLOCK_K
    value = LOAD_W(W, w_operands, n0, k0, N, K, BLOCK_N, BLOCK_K, True, DTYPE)
    store_block(OUT, (K, 1), value, n0, k0, N, K, BLOCK_N, BLOCK_K)
