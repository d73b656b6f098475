"""The ``shrink`` body: T alone, for the split schedule and where x needs no gradient.

    T[M, R] = D(X)[M, Q] · F^T                                     F: first low-rank factor, [R, Q]

Forward: s = D(x) A^T.  Backward: t = dy B, without dropout. T leaves in fp32; ``t_scale`` is D's scale.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.tile import load_tile, store_tile


@triton.jit(do_not_specialize=["M"])
def shrink(
    X, stride_xm, stride_xq, T, F, stride_fr, stride_fq, drop_operands, t_scale, M, Q, R,
    DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of T."""
    m0, r0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for q0 in range(0, Q, BLOCK_Q):
        x = load_tile(X, stride_xm, stride_xq, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        f = load_tile(F, stride_fq, stride_fr, q0, r0, Q, R, BLOCK_Q, BLOCK_R)
        x = DROP(drop_operands, x, m0, q0, BLOCK_M, BLOCK_Q)
        t = ADAPTER(x, f, t, DTYPE, PRECISION)
    store_tile(T, R, t * t_scale, m0, r0, M, R, BLOCK_M, BLOCK_R)
