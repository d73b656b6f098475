"""From accumulators to Z, in sub-tiles of columns so that few registers live at once.

Z = acc + c · D_out(T · G^T) + columns

Where G's strides are an empty tuple, G is a bank, and t says whose each row is: see ``lookup``.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.lookup import add_updates
from peftkern.backends.triton.kernels.matrix import load_block, store_block


@triton.jit
def add_low_rank(
    acc, t, T, G, g_strides, drop_operands, c, m0, p0, M, P, R, DROP: tl.constexpr, ADAPTER: tl.constexpr,
    T_READY: tl.constexpr, MASK_OUT: tl.constexpr, WGMMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + c D_out(T G^T). T is ``t``, or (``T_READY``) read from memory in chunks of R.

    By ``WGMMA`` the product has an accumulator of its own: into a part of the main loop's, ptxas makes every wgmma of
    the kernel wait. Even one product is in a loop, lest the compiler take acc for the accumulator after all.
    """
    low = acc
    if MASK_OUT or WGMMA:
        low = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if T_READY or WGMMA:
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):  # its buffers are the main loop's to use
            chunk = t
            if T_READY:
                chunk = load_block(T, (R, 1), m0, r0, M, R, BLOCK_M, BLOCK_R)
            g = load_block(G, g_strides, r0, p0, R, P, BLOCK_R, BLOCK_P)
            low = ADAPTER(chunk * c, g, low, DTYPE, PRECISION)
    else:
        g = load_block(G, g_strides, 0, p0, R, P, BLOCK_R, BLOCK_P)
        low = ADAPTER(t * c, g, low, DTYPE, PRECISION)
    if MASK_OUT:
        low = DROP(drop_operands, low, m0 + tl.arange(0, BLOCK_M), p0)
    if MASK_OUT or WGMMA:
        low = acc + low
    return low


@triton.jit
def _halves(value, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of the columns; a thread keeps what it has."""
    return tl.split(tl.permute(tl.reshape(value, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def finish(
    acc, t, T, Z, z_strides, G, g_strides, drop_operands, column_operands, c, m0, p0, M, P, R,
    DROP: tl.constexpr, ADAPTER: tl.constexpr, EPILOGUE: tl.constexpr,
    T_READY: tl.constexpr, BACKWARD: tl.constexpr, MASK_OUT: tl.constexpr, WGMMA: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """Z's tile from its accumulator, SUBTILES (a power of two) column blocks one after the other."""
    if SUBTILES > 1:
        left, right = _halves(acc, BLOCK_M, BLOCK_P)
        finish(left, t, T, Z, z_strides, G, g_strides, drop_operands, column_operands, c, m0, p0, M, P, R,
               DROP, ADAPTER, EPILOGUE, T_READY, BACKWARD, MASK_OUT, WGMMA, DTYPE, PRECISION,
               BLOCK_M, BLOCK_P // 2, BLOCK_R, SUBTILES // 2)  # fmt: skip
        finish(right, t, T, Z, z_strides, G, g_strides, drop_operands, column_operands, c, m0, p0 + BLOCK_P // 2, M, P,
               R, DROP, ADAPTER, EPILOGUE, T_READY, BACKWARD, MASK_OUT, WGMMA, DTYPE, PRECISION,
               BLOCK_M, BLOCK_P // 2, BLOCK_R, SUBTILES // 2)  # fmt: skip
    else:
        if len(g_strides) == 0:
            acc = add_updates(acc, t, T, G, drop_operands, p0, P, DROP, ADAPTER, BACKWARD, MASK_OUT, DTYPE, PRECISION,
                              BLOCK_P, BLOCK_R)  # fmt: skip
        else:
            acc = add_low_rank(acc, t, T, G, g_strides, drop_operands, c, m0, p0, M, P, R,
                               DROP, ADAPTER, T_READY, MASK_OUT, WGMMA, DTYPE, PRECISION,
                               BLOCK_M, BLOCK_P, BLOCK_R)  # fmt: skip
        acc = EPILOGUE(column_operands, acc, p0, P, c, BLOCK_P)
        store_block(Z, z_strides, acc, m0, p0, M, P, BLOCK_M, BLOCK_P)
