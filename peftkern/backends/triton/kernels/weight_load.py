"""Plugs that read a tile of the frozen weight: LOAD_W(operands, ...) -> op(W)[q0 : +BLOCK_Q, p0 : +BLOCK_P] in DTYPE.

op(W)[q, p] is W[p, q] forward and W[q, p] backward; the strides in ``operands`` are those of p and q already.
Elements outside [Q, P] are zero. A loader agrees with its format's ``materialize``.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import narrow
from peftkern.backends.triton.kernels.tile import load_tile


@triton.jit
def dense(
    operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: W, its stride along q, its stride along p."""
    return load_tile(operands[0], operands[1], operands[2], q0, p0, Q, P, BLOCK_Q, BLOCK_P).to(DTYPE)


@triton.jit
def int8(
    operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """W[n, k] = data[n, k] * scale[n]. operands: data, its strides along q and p, scale, its stride."""
    data = load_tile(operands[0], operands[1], operands[2], q0, p0, Q, P, BLOCK_Q, BLOCK_P).to(tl.float32)
    if BACKWARD:
        n = q0 + tl.arange(0, BLOCK_Q)
        scale = tl.load(operands[3] + n * operands[4], mask=n < Q, other=0.0)[:, None]
    else:
        n = p0 + tl.arange(0, BLOCK_P)
        scale = tl.load(operands[3] + n * operands[4], mask=n < P, other=0.0)[None, :]
    return narrow(data * scale, DTYPE)
