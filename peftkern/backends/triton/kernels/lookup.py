"""Plugs that look adapters up by row, for the "bank" source of ``fused``: no product of its own, no other body.

    T_e[i, R_e] = D_in(X)[rows_e[i], Q] · F_e^T       for the i-th row of segment e: ``thin_of_chunk``
    Z[m, P]    += c_e · D_out(T_e[i] · G_e^T)         for row m = rows_e[i], others as they were: ``add_updates``

Forward: (F, G) = (A, B), dropout is D_in. Backward: (F, G) = (B^T, A^T), dropout is D_out (``MASK_OUT``).

A chunk is BLOCK_M rows of one segment; it writes all of its T (zeros for a row that is another's) and, for each row of
its own, which segment and place that row has. Nobody writes that of a row of the base, and nobody clears it: what is
read there is believed only if that place names the row back, so that old memory cannot pass for an adapter's.

``bank`` is a tuple: FACTORS int64 [E, 6] (address and pitch of A_e and of B_e, R_e, bits of c_e in fp32); SPANS int64
(E, the number of chunks, the elements of T, 0; then [E, 4]: first place in ROWS, length, first element of T_e, 0; then
[chunks, 2]: segment, first row of it); ROWS int64; INSIDE uint8 like ROWS, or None; PLACES int64 [2, M], scratch; X and
its strides; a pointer of the factors' type; for all A and for all B 1 where every row begins at 16 bytes, or None. The
elements of a row of A, [R, K], and of B, [N, R], are adjacent. ``drops`` is () or a tuple of int64 [E, 4]: seed, offset
and threshold of each segment's mask, bits of its scale in fp32.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.matrix import load_block, store_block, sum_slices
from peftkern.backends.triton.kernels.protocol import arrived_last

NOBODY = tl.constexpr(2**30)


@triton.jit
def _factor(bank, e, FIELD: tl.constexpr):
    """Pointer and pitch of A_e (FIELD 0) or B_e (2)."""
    pointer = tl.load(bank[0] + e * 6 + FIELD).to(bank[8].dtype)
    pitch = tl.load(bank[0] + e * 6 + FIELD + 1)
    if bank[9 + FIELD // 2] is not None:
        ELEMENTS: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth  # of 16 bytes
        pointer, pitch = tl.multiple_of(pointer, 16), tl.multiple_of(pitch, ELEMENTS)
    return pointer, pitch


@triton.jit
def float_of(bits):
    """What an int64 holds the bits of."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def dropped(drops, e, value, row, col0, DROP: tl.constexpr):
    """value where segment e keeps it, else 0; unscaled."""
    if len(drops) == 0:
        return value
    else:
        state = drops[0] + e * 4
        return DROP((state, tl.load(state + 2).to(tl.int32)), value, row, col0)


@triton.jit
def drop_scale(drops, e):
    """What segment e multiplies the kept by."""
    if len(drops) == 0:
        return 1.0
    else:
        return float_of(tl.load(drops[0] + e * 4 + 3))


@triton.jit
def _span(bank, e):
    """First place in ROWS, length, first element of T."""
    span = bank[1] + 4 + e * 4
    return tl.load(span), tl.load(span + 1), tl.load(span + 2)


@triton.jit
def count_chunks(bank):
    """How many chunks there are, and how many elements T has."""
    return tl.load(bank[1] + 1).to(tl.int32), tl.load(bank[1] + 2)


@triton.jit
def thin_of_chunk(
    bank, T, PARTIALS, counters, drops, block, chunk, part, begin, end, M, Q, DROP: tl.constexpr, ADAPTER: tl.constexpr,
    BACKWARD: tl.constexpr, MASK_IN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """T and the places of one chunk, or a slice of its T; whether the chunk is done, and this program has ended it."""
    of_chunk = bank[1] + 4 + tl.load(bank[1]) * 4 + chunk * 2
    e, i0 = tl.load(of_chunk), tl.load(of_chunk + 1)
    start, length, origin = _span(bank, e)
    i = i0 + tl.arange(0, BLOCK_M)
    mine = i < length
    row = tl.load(bank[2] + start + i, mask=mine, other=0)
    if bank[3] is not None:
        mine = mine & (tl.load(bank[3] + start + i, mask=mine, other=0) != 0)
    if part == 0:
        tl.store(bank[4] + row, start + i, mask=mine)
        tl.store(bank[4] + M + row, tl.zeros((BLOCK_M,), tl.int64) + e, mask=mine)
    R = tl.load(bank[0] + e * 6 + 4).to(tl.int32)
    F, pitch = _factor(bank, e, 2 if BACKWARD else 0)
    f_strides = (pitch, 1) if BACKWARD else (1, pitch)
    end = tl.where(tl.sum(mine.to(tl.int32), axis=0) > 0, end, begin)
    strides, distance = (R, 1), tl.load(bank[1] + 2)
    target = T + origin
    if SLICES > 1:
        target = PARTIALS + part * distance + origin
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for q0 in range(begin, end, BLOCK_Q):
            q = q0 + tl.arange(0, BLOCK_Q)
            inside = mine[:, None] & (q < Q)[None, :]
            x = tl.load(bank[5] + row[:, None] * bank[6] + q[None, :] * bank[7], mask=inside, other=0)
            f = load_block(F, f_strides, q0, r0, Q, R, BLOCK_Q, BLOCK_R)
            if MASK_IN:
                x = dropped(drops, e, x, i.to(tl.int32), q0, DROP)
            t = ADAPTER(x, f, t, DTYPE, PRECISION)
        if MASK_IN:
            t *= drop_scale(drops, e)
        t = tl.where(mine[:, None], t, 0.0)  # not 0 times an infinity of F
        store_block(target, strides, t, i0, r0, length, R, BLOCK_M, BLOCK_R)
    done = True
    if SLICES > 1:
        done = arrived_last(counters, block, SLICES)
        if done:
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                t = sum_slices(PARTIALS + origin, strides, SLICES, distance, i0, r0, length, R, BLOCK_M, BLOCK_R)
                store_block(T + origin, strides, t, i0, r0, length, R, BLOCK_M, BLOCK_R)
    return done


@triton.jit
def owners(bank, m0, M, BLOCK_M: tl.constexpr):
    """Of each row of a tile the segment, NOBODY for the base, and the place in it; the chunks have been waited for."""
    row = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
    place = tl.load(bank[4] + row, mask=row < M, other=-1)
    e = tl.load(bank[4] + M + row, mask=row < M, other=-1)
    found = (e >= 0) & (e < tl.load(bank[1]))
    start = tl.load(bank[1] + 4 + e * 4, mask=found, other=0)
    length = tl.load(bank[1] + 4 + e * 4 + 1, mask=found, other=0)
    found = found & (place >= start) & (place < start + length)
    found = found & (tl.load(bank[2] + place, mask=found, other=-1) == row)
    if bank[3] is not None:
        found = found & (tl.load(bank[3] + place, mask=found, other=0) != 0)
    return tl.where(found, e, NOBODY).to(tl.int32), tl.where(found, place - start, 0)


@triton.jit
def add_updates(
    acc, owned, T, bank, drops, p0, P, DROP: tl.constexpr, ADAPTER: tl.constexpr, BACKWARD: tl.constexpr,
    MASK_OUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc with each row's update, adapter after adapter of those that the tile has; ``owned`` is by ``owners``."""
    e, i = owned
    now = tl.min(e, axis=0)
    while now < NOBODY:
        mine = (e == now)[:, None]
        wide = now.to(tl.int64)
        R = tl.load(bank[0] + wide * 6 + 4).to(tl.int32)
        c = float_of(tl.load(bank[0] + wide * 6 + 5))
        G, pitch = _factor(bank, wide, 0 if BACKWARD else 2)
        g_strides = (pitch, 1) if BACKWARD else (1, pitch)
        _, _, first = _span(bank, wide)
        origin = T + first
        low = acc
        if MASK_OUT:
            c *= drop_scale(drops, wide)
            low = tl.zeros_like(acc)
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_R)
            chunk = tl.load(origin + i[:, None] * R + r[None, :], mask=mine & (r < R)[None, :], other=0.0)
            g = load_block(G, g_strides, r0, p0, R, P, BLOCK_R, BLOCK_P)
            low = ADAPTER(chunk * c, g, low, DTYPE, PRECISION)
        if MASK_OUT:
            low = acc + dropped(drops, wide, low, i.to(tl.int32), p0, DROP)
        acc = tl.where(mine, low, acc)  # a NaN of G stays with its own rows
        now = tl.min(tl.where(e > now, e, NOBODY), axis=0)
    return acc
