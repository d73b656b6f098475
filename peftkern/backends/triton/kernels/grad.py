"""The ``grad`` body and its second stage: the parameters' gradients, deterministic, without float atomics.

    partial[i] = D(wide)^T · thin,   sums[i] = column sums of wide,   both over the i-th run of rows       (grad)
    out        = scale · sum_i partial[i]                                                                  (reduce)

dA^T [K, R]: wide = x with dropout, thin = t.  dB [N, R] and the bias sums: wide = dy, thin = s. One launch does both
sides, each wide read once. Partials are fp32 and added in the order of i; ``scale`` is c (with D's scale for dA, 1 for
dbias). ``WITH_T``: where x needs no gradient, the side of dy computes t = dy F^T from the same read; each column block
stores its part, and the one that arrives last for a run adds them up in their order.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import narrow
from peftkern.backends.triton.kernels.dropout import keep_all
from peftkern.backends.triton.kernels.matrix import load_block, load_scaling, store_block, sum_slices
from peftkern.backends.triton.kernels.protocol import arrived_last


@triton.jit
def _one_side(
    program, WIDE, wide_strides, THIN, PARTIAL, SUMS, drop_operands, M, C, R, rows,
    T, T_PARTS, F, f_strides, counters, WITH_T: tl.constexpr,
    DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of one partial, from ``rows`` rows of wide. THIN or SUMS may be None."""
    columns, chunks = tl.cdiv(C, BLOCK_C), tl.cdiv(R, BLOCK_R)
    c0, r0 = program % columns * BLOCK_C, program // columns % chunks * BLOCK_R
    run = program // (columns * chunks)
    start = run * rows
    stop = tl.minimum(start + rows, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    distance = tl.cast(M, tl.int64) * R
    for m0 in range(start, stop, BLOCK_M):
        wide = load_block(WIDE, wide_strides, m0, c0, stop, C, BLOCK_M, BLOCK_C)
        if SUMS is not None:
            total += tl.sum(wide.to(tl.float32), axis=0)
        if WITH_T:
            f = load_block(F, f_strides, c0, 0, C, R, BLOCK_C, BLOCK_R)
            t = ADAPTER(wide, f, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), DTYPE, PRECISION)
            part = T_PARTS + program % columns * distance
            store_block(part, (R, 1), t, m0, 0, stop, R, BLOCK_M, BLOCK_R)
        if THIN is not None:
            thin = load_block(THIN, (R, 1), m0, r0, stop, R, BLOCK_M, BLOCK_R)
            wide = DROP(drop_operands, wide, m0 + tl.arange(0, BLOCK_M), c0)
            acc = ADAPTER(tl.trans(wide), thin, acc, DTYPE, PRECISION)
    if WITH_T:
        if arrived_last(counters, run, columns):
            for m0 in range(start, stop, BLOCK_M):
                t = sum_slices(T_PARTS, (R, 1), columns, distance, m0, 0, stop, R, BLOCK_M, BLOCK_R)
                store_block(T, (R, 1), t, m0, 0, stop, R, BLOCK_M, BLOCK_R)
    if THIN is not None:
        base = PARTIAL + tl.cast(run, tl.int64) * C * R
        store_block(base, (R, 1), acc, c0, r0, C, R, BLOCK_C, BLOCK_R)
    if SUMS is not None:
        column = c0 + tl.arange(0, BLOCK_C)
        extent = tl.where(r0 == 0, C, 0)  # one program of each column stores them
        tl.store(SUMS + tl.cast(run, tl.int64) * C + column, total, mask=column < extent)


@triton.jit(do_not_specialize=["M", "rows_x", "rows_dy", "programs_x"])
def grad(
    X, x_strides, THIN_X, PARTIAL_X, K, rows_x, programs_x,
    DY, dy_strides, THIN_DY, PARTIAL_DY, SUMS, N, rows_dy,
    T, T_PARTS, F, f_strides, counters, drop_operands, M, R,
    WITH_T: tl.constexpr, DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first ``programs_x`` programs take the side of x, the others that of dy; either side may be None."""
    program = tl.program_id(0)
    if X is not None:
        if program < programs_x:
            _one_side(program, X, x_strides, THIN_X, PARTIAL_X, None, drop_operands, M, K, R, rows_x,
                      None, None, None, (), None, False,
                      DROP, ADAPTER, DTYPE, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R)  # fmt: skip
    if DY is not None:
        if program >= programs_x:
            _one_side(program - programs_x, DY, dy_strides, THIN_DY, PARTIAL_DY, SUMS, (), M, N, R, rows_dy,
                      T, T_PARTS, F, f_strides, counters, WITH_T,
                      keep_all, ADAPTER, DTYPE, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R)  # fmt: skip


@triton.jit
def _reduce_matrix(program, PARTIAL, OUT, out_strides, scale, runs, C, R, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """OUT[c, r] = scale · sum_i PARTIAL[i, c, r], in OUT's dtype."""
    columns = tl.cdiv(C, BLOCK_C)
    c0, r0 = program % columns * BLOCK_C, program // columns * BLOCK_R
    distance = tl.cast(C, tl.int64) * R
    total = sum_slices(PARTIAL, (R, 1), runs, distance, c0, r0, C, R, BLOCK_C, BLOCK_R) * scale
    store_block(OUT, out_strides, total, c0, r0, C, R, BLOCK_C, BLOCK_R)


@triton.jit
def _reduce_sums(program, SUMS, BIAS, LORA_BIAS, scale, runs, C, BLOCK_C: tl.constexpr):
    """BIAS = sum_i SUMS[i], LORA_BIAS = scale · sum_i SUMS[i]; either may be None."""
    column = program * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for run in range(runs):
        total += tl.load(SUMS + tl.cast(run, tl.int64) * C + column, mask=column < C, other=0.0)
    if BIAS is not None:
        tl.store(BIAS + column, narrow(total, BIAS.dtype.element_ty), mask=column < C)
    if LORA_BIAS is not None:
        tl.store(LORA_BIAS + column, narrow(total * scale, LORA_BIAS.dtype.element_ty), mask=column < C)


@triton.jit(do_not_specialize=["runs_x", "runs_dy", "programs_x", "programs_dy"])
def reduce(
    PARTIAL_X, DA, da_strides, runs_x, K, programs_x, PARTIAL_DY, DB, db_strides, runs_dy, N, programs_dy,
    SUMS, BIAS, LORA_BIAS, scale_x, scaling, scaling_tensor, R, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA^T, then dB, then the bias sums: each a range of programs, each may be None."""
    program = tl.program_id(0)
    if PARTIAL_X is not None:
        if program < programs_x:
            scale = load_scaling(scale_x, scaling_tensor)
            _reduce_matrix(program, PARTIAL_X, DA, da_strides, scale, runs_x, K, R, BLOCK_C, BLOCK_R)
    if PARTIAL_DY is not None:
        if (program >= programs_x) & (program < programs_x + programs_dy):
            scale = load_scaling(scaling, scaling_tensor)
            _reduce_matrix(program - programs_x, PARTIAL_DY, DB, db_strides, scale, runs_dy, N, R, BLOCK_C, BLOCK_R)
    if SUMS is not None:
        if program >= programs_x + programs_dy:
            scale = load_scaling(scaling, scaling_tensor)
            _reduce_sums(program - programs_x - programs_dy, SUMS, BIAS, LORA_BIAS, scale, runs_dy, N, BLOCK_C)
