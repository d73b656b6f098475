"""The ``grad`` body and its second stage: the parameters' gradients, deterministic, without atomics.

    partial[i] = D(wide)^T · thin,   sums[i] = column sums of wide,   both over the i-th run of rows       (grad)
    out        = scale · sum_i partial[i]                                                                  (reduce)

dA^T [K, R]: wide = x with dropout, thin = t.  dB [N, R] and the bias sums: wide = dy, thin = s. Partials are fp32 and
added in the order of i; ``scale`` is c (with D's scale for dA, 1 for dbias).
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import narrow
from peftkern.backends.triton.kernels.tile import load_scaling, load_tile, store_tile


@triton.jit(do_not_specialize=["M", "rows"])
def grad(
    WIDE, stride_wm, stride_wc, THIN, PARTIAL, SUMS, drop_operands, M, C, R, rows,
    DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of one partial, from ``rows`` rows of wide. THIN or SUMS may be None."""
    c0, r0, run = tl.program_id(0) * BLOCK_C, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    start = run * rows
    stop = tl.minimum(start + rows, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for m0 in range(start, stop, BLOCK_M):
        wide = load_tile(WIDE, stride_wm, stride_wc, m0, c0, stop, C, BLOCK_M, BLOCK_C)
        if SUMS is not None:
            total += tl.sum(wide.to(tl.float32), axis=0)
        if THIN is not None:
            thin = load_tile(THIN, R, 1, m0, r0, stop, R, BLOCK_M, BLOCK_R)
            wide = DROP(drop_operands, wide, m0, c0, BLOCK_M, BLOCK_C)
            acc = ADAPTER(tl.trans(wide), thin, acc, DTYPE, PRECISION)
    if THIN is not None:
        base = PARTIAL + tl.cast(run, tl.int64) * C * R
        store_tile(base, R, acc, c0, r0, C, R, BLOCK_C, BLOCK_R)
    if SUMS is not None:
        column = c0 + tl.arange(0, BLOCK_C)
        extent = tl.where(tl.program_id(1) == 0, C, 0)  # one program of each column stores them
        tl.store(SUMS + tl.cast(run, tl.int64) * C + column, total, mask=column < extent)


@triton.jit(do_not_specialize=["runs"])
def reduce(
    PARTIAL, OUT, stride_oc, stride_or, scaling, scaling_tensor, runs, C, R,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """OUT[c, r] = scale · sum_i PARTIAL[i, c, r], in OUT's dtype."""
    c0, r0 = tl.program_id(0) * BLOCK_C, tl.program_id(1) * BLOCK_R
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for run in range(runs):
        base = PARTIAL + tl.cast(run, tl.int64) * C * R
        total += load_tile(base, R, 1, c0, r0, C, R, BLOCK_C, BLOCK_R)
    total *= load_scaling(scaling, scaling_tensor)
    column, rank = c0 + tl.arange(0, BLOCK_C), r0 + tl.arange(0, BLOCK_R)
    offsets = column.to(tl.int64)[:, None] * stride_oc + rank.to(tl.int64)[None, :] * stride_or
    inside = (column < C)[:, None] & (rank < R)[None, :]
    tl.store(OUT + offsets, narrow(total, OUT.dtype.element_ty), mask=inside)
