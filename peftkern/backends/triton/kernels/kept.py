"""The ``kept`` body: what dropout leaves of a matrix, for products of which every operand is dropped."""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.matrix import load_block, store_block


@triton.jit(do_not_specialize=["M"])
def kept(
    X, x_strides, Z, z_strides, drop_operands, M, K, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """One tile of Z: X [M, K] where an element survives, else 0; unscaled. Grid: tiles, those of a row block first."""
    columns = tl.cdiv(K, BLOCK_COLS)
    m0, k0 = tl.program_id(0) // columns * BLOCK_M, tl.program_id(0) % columns * BLOCK_COLS
    value = load_block(X, x_strides, m0, k0, M, K, BLOCK_M, BLOCK_COLS)
    value = DROP(drop_operands, value, m0 + tl.arange(0, BLOCK_M), k0)
    store_block(Z, z_strides, value, m0, k0, M, K, BLOCK_M, BLOCK_COLS)
