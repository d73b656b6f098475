"""The ``shrink`` body: T alone, for the split and library schedules.

    T[M, R] = D(X)[M, Q] · F^T                                     F: first low-rank factor, [R, Q]

Forward: s = D(x) A^T.  Backward: t = dy B, without dropout. T leaves in fp32; ``t_scale`` is D's scale. Where there are
few rows, Q is cut into slices; the one that arrives last adds them up in their order. ``FOLLOWED``: the next launch may
begin before this one ends (programmatic dependent launch) and waits where it reads T.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.matrix import load_block, store_block, sum_slices
from peftkern.backends.triton.kernels.protocol import arrived_last


@triton.jit(do_not_specialize=["M"])
def shrink(
    X, x_strides, T, F, f_strides, drop_operands, counters, PARTIALS, t_scale, M, Q, R,
    DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FOLLOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of T, or one slice of it. Grid: row blocks, rank chunks, slices."""
    m0, r0, part = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    if FOLLOWED:
        tl.extra.cuda.gdc_launch_dependents()
    steps = tl.cdiv(tl.cdiv(Q, BLOCK_Q), SLICES) * BLOCK_Q
    begin = part * steps
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for q0 in range(begin, tl.minimum(begin + steps, Q), BLOCK_Q):
        x = load_block(X, x_strides, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        f = load_block(F, f_strides, q0, r0, Q, R, BLOCK_Q, BLOCK_R)
        x = DROP(drop_operands, x, m0 + tl.arange(0, BLOCK_M), q0)
        t = ADAPTER(x, f, t, DTYPE, PRECISION)
    t *= t_scale
    if SLICES > 1:
        distance = tl.cast(M, tl.int64) * R
        store_block(PARTIALS + part * distance, (R, 1), t, m0, r0, M, R, BLOCK_M, BLOCK_R)
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if arrived_last(counters, block, SLICES):
            t = sum_slices(PARTIALS, (R, 1), SLICES, distance, m0, r0, M, R, BLOCK_M, BLOCK_R)
            store_block(T, (R, 1), t, m0, r0, M, R, BLOCK_M, BLOCK_R)
    else:
        store_block(T, (R, 1), t, m0, r0, M, R, BLOCK_M, BLOCK_R)
