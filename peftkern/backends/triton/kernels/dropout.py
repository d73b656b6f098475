"""Plugs that apply the dropout mask: DROP(operands, value, row, col0) -> value where kept, else 0.

``row`` int32 are the numbers of value's rows, ``col0`` that of its first column. The scale of what is kept is not
applied here: it multiplies the fp32 accumulator. The mask is that of ``peftkern.dropout``: one Philox4x32-10 call with
counter (col // 8, row, offset_lo, offset_hi) gives eight columns.
"""

import triton
import triton.language as tl


@triton.jit
def keep_all(operands, value, row, col0):
    """No dropout."""
    return value


@triton.jit
def philox(operands, value, row, col0):
    """operands: rng_state int64 [2] (seed, offset), threshold. col0 and the number of columns are multiples of 8."""
    ROWS: tl.constexpr = value.shape[0]
    COLS: tl.constexpr = value.shape[1]
    state, threshold = operands[0], operands[1]
    seed, offset = tl.load(state), tl.load(state + 1)
    group = (col0 // 8 + tl.arange(0, COLS // 8))[None, :]
    zero = tl.zeros((ROWS, COLS // 8), tl.int32)
    offset_lo, offset_hi = offset.to(tl.int32), (offset >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + row[:, None], zero + offset_lo, zero + offset_hi)
    # lane = 4 (w >> 1) + 2 (w & 1) + half: a join adds the minor digit, so the major one is joined first. Bytes are
    # joined, not lanes: what the compiler moves between layouts is four times smaller.
    low = tl.join(tl.join(_low(w0, threshold), _low(w2, threshold)), tl.join(_low(w1, threshold), _low(w3, threshold)))
    high = tl.join(
        tl.join(_high(w0, threshold), _high(w2, threshold)), tl.join(_high(w1, threshold), _high(w3, threshold))
    )
    keep = tl.reshape(tl.join(low, high), (ROWS, COLS))
    return tl.where(keep != 0, value, tl.zeros_like(value))


@triton.jit
def _low(word, threshold):
    return ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int8)


@triton.jit
def _high(word, threshold):
    return ((word >> 16).to(tl.int32) >= threshold).to(tl.int8)
