"""The ``bank_grad`` body: both factors' gradients of every adapter of a batch, deterministic, without float atomics.

    dA_e [R_e, K] = c_e · T_e^T · D_e(X[rows_e])            dB_e [N, R_e] = c_e · DY[rows_e]^T · S_e

T_e and S_e are [length, R_e], zero in a row that is another's. A piece is a run of one segment's rows with as much of
its rank as BLOCK_R; a program takes a piece and a block of columns, first those of X, then those of DY. Where a segment
has several runs, each program stores its part, and the one that arrives last adds them up in the order of the runs. A
segment without rows has one run, of none.

PIECES int64: E; then [E, 7]: first place in ROWS, length, first element of T_e and S_e, R_e, bits of c_e in fp32, first
element of dA_e and of dB_e in OUT; then [n, 6]: segment, first of its rank, first row of the run, the run's number, how
many there are, and the parts that came before the first of them. ROWS and INSIDE are as in ``lookup``; a segment's own
rows come first in it.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.dropout import keep_all
from peftkern.backends.triton.kernels.lookup import drop_scale, dropped, float_of
from peftkern.backends.triton.kernels.matrix import load_block, store_block, sum_slices
from peftkern.backends.triton.kernels.protocol import arrived_last

_SOME = tl.constexpr(1024)  # flags counted at once


@triton.jit
def _own(INSIDE, begin, end):
    """How many rows of a run are its segment's."""
    found = 0
    for place in range(begin, end, _SOME):
        at = place + tl.arange(0, _SOME)
        found += tl.sum((tl.load(INSIDE + at, mask=at < end, other=0) != 0).to(tl.int32), axis=0)
    return found


@triton.jit
def _one_block(
    WIDE, wide_strides, THIN, ROWS, i0, stop, c0, C, r0, R, OUT, out_strides, c, part, run, runs, PARTIAL, counters,
    block, drops, e, DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """OUT[c0 :, r0 :] = c · D(WIDE[rows])^T · THIN over the rows i0 to stop of a segment, or this run's part of it."""
    col = c0 + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m0 in range(i0, stop, BLOCK_M):
        i = m0 + tl.arange(0, BLOCK_M)
        row = tl.load(ROWS + i, mask=i < stop, other=0)
        inside = (i < stop)[:, None] & (col < C)[None, :]
        wide = tl.load(WIDE + row[:, None] * wide_strides[0] + col[None, :] * wide_strides[1], mask=inside, other=0)
        thin = load_block(THIN, (R, 1), m0, r0, stop, R, BLOCK_M, BLOCK_R)
        wide = dropped(drops, e, wide, i, c0, DROP)
        acc = ADAPTER(tl.trans(wide), thin, acc, DTYPE, PRECISION)
    last = True
    if PARTIAL is not None:
        if runs > 1:
            SIZE: tl.constexpr = BLOCK_C * BLOCK_R
            parts = PARTIAL + tl.cast(part, tl.int64) * SIZE
            store_block(parts + run * SIZE, (BLOCK_R, 1), acc, 0, 0, BLOCK_C, BLOCK_R, BLOCK_C, BLOCK_R)
            last = arrived_last(counters, block, runs)
            if last:
                acc = sum_slices(parts, (BLOCK_R, 1), runs, SIZE, 0, 0, BLOCK_C, BLOCK_R, BLOCK_C, BLOCK_R)
    if last:
        store_block(OUT, out_strides, acc * c, c0, r0, C, R, BLOCK_C, BLOCK_R)


@triton.jit(do_not_specialize=["rows"])
def bank_grad(
    X, x_strides, DY, dy_strides, T, S, OUT, PIECES, ROWS, INSIDE, PARTIAL, counters, drop_operands, rows, K, N,
    DROP: tl.constexpr, ADAPTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One piece and one block of columns. Grid: pieces times blocks."""
    columns_x = tl.cdiv(K, BLOCK_C)
    columns = columns_x + tl.cdiv(N, BLOCK_C)
    column = tl.program_id(0) % columns
    piece = PIECES + 1 + tl.load(PIECES) * 7 + tl.program_id(0) // columns * 6
    e, r0, i0 = tl.load(piece), tl.load(piece + 1).to(tl.int32), tl.load(piece + 2).to(tl.int32)
    run, runs, place = tl.load(piece + 3), tl.load(piece + 4).to(tl.int32), tl.load(piece + 5).to(tl.int32)
    segment = PIECES + 1 + e * 7
    start, length, first = tl.load(segment), tl.load(segment + 1).to(tl.int32), tl.load(segment + 2)
    R, c = tl.load(segment + 3).to(tl.int32), float_of(tl.load(segment + 4))
    stop = tl.minimum(i0 + rows, length)
    if INSIDE is not None:
        stop = i0 + _own(INSIDE + start, i0, stop)
    part, block = place * columns + column * runs, place * columns + column
    if column < columns_x:
        _one_block(X, x_strides, T + first, ROWS + start, i0, stop, column * BLOCK_C, K, r0, R,
                   OUT + tl.load(segment + 5), (1, K), c * drop_scale(drop_operands, e), part, run, runs, PARTIAL,
                   counters, block, drop_operands, e, DROP, ADAPTER, DTYPE, PRECISION,
                   BLOCK_M, BLOCK_C, BLOCK_R)  # fmt: skip
    else:
        _one_block(DY, dy_strides, S + first, ROWS + start, i0, stop, (column - columns_x) * BLOCK_C, N, r0, R,
                   OUT + tl.load(segment + 6), (R, 1), c, part, run, runs, PARTIAL,
                   counters, block, (), e, keep_all, ADAPTER, DTYPE, PRECISION,
                   BLOCK_M, BLOCK_C, BLOCK_R)  # fmt: skip
