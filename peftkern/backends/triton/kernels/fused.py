"""The ``fused`` body: the frozen product and the low-rank pair in a single pass over X.

    T[M, R] = D_in(X)[M, Q] · F^T                                  F: first low-rank factor, [R, Q]
    Z[M, P] = X[M, Q] · op(W) + c · D_out(T · G^T) + columns       G: second low-rank factor, [P, R]

Forward: P = N, Q = K, op(W) = W^T, (F, G) = (A, B), dropout is D_in.  Backward (dx): P = K, Q = N, op(W) = W,
(F, G) = (B^T, A^T), dropout is D_out (``MASK_OUT``). ``T_READY``: T was written by ``shrink`` and its product starts
the accumulator; otherwise T is accumulated beside Z, and the programs of the first tile column store it. T leaves
without c, in fp32; ``t_scale`` is D_in's scale and c carries D_out's.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.dot import dot
from peftkern.backends.triton.kernels.tile import load_scaling, load_tile, store_tile
from peftkern.backends.triton.kernels.tile_order import grouped


@triton.jit(do_not_specialize=["M"])
def fused(
    X, stride_xm, stride_xq, Z, T, F, stride_fr, stride_fq, G, stride_gp, stride_gr,
    w_operands, drop_operands, column_operands,
    t_scale, scaling, scaling_tensor, M, P, Q, R,
    LOAD_W: tl.constexpr, DROP: tl.constexpr, ADAPTER: tl.constexpr, EPILOGUE: tl.constexpr,
    T_READY: tl.constexpr, BACKWARD: tl.constexpr, MASK_OUT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of Z."""
    tile_m, tile_p = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P), GROUP_M)
    m0, p0 = tile_m * BLOCK_M, tile_p * BLOCK_P
    c = load_scaling(scaling, scaling_tensor)
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)

    if T_READY:
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):  # its buffers are the main loop's to use
            t = load_tile(T, R, 1, m0, r0, M, R, BLOCK_M, BLOCK_R)
            g = load_tile(G, stride_gr, stride_gp, r0, p0, R, P, BLOCK_R, BLOCK_P)
            acc = ADAPTER(t * c, g, acc, DTYPE, PRECISION)
        if MASK_OUT:
            acc = DROP(drop_operands, acc, m0, p0, BLOCK_M, BLOCK_P)

    for q0 in range(0, Q, BLOCK_Q):
        x = load_tile(X, stride_xm, stride_xq, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        w = LOAD_W(w_operands, q0, p0, Q, P, BLOCK_Q, BLOCK_P, BACKWARD, DTYPE)
        acc = dot(x, w, acc, PRECISION)
        if not T_READY:
            f = load_tile(F, stride_fq, stride_fr, q0, 0, Q, R, BLOCK_Q, BLOCK_R)
            if not MASK_OUT:
                x = DROP(drop_operands, x, m0, q0, BLOCK_M, BLOCK_Q)
            t = ADAPTER(x, f, t, DTYPE, PRECISION)

    if not T_READY:
        t *= t_scale
        store_tile(T, R, t, m0, 0, tl.where(tile_p == 0, M, 0), R, BLOCK_M, BLOCK_R)
        g = load_tile(G, stride_gr, stride_gp, 0, p0, R, P, BLOCK_R, BLOCK_P)
        if MASK_OUT:
            low = ADAPTER(t * c, g, tl.zeros((BLOCK_M, BLOCK_P), tl.float32), DTYPE, PRECISION)
            acc += DROP(drop_operands, low, m0, p0, BLOCK_M, BLOCK_P)
        else:
            acc = ADAPTER(t * c, g, acc, DTYPE, PRECISION)

    acc = EPILOGUE(column_operands, acc, p0, P, c, BLOCK_P)
    store_tile(Z, P, acc, m0, p0, M, P, BLOCK_M, BLOCK_P)
