"""Plugs that read a tile of the frozen weight: LOAD_W(W, operands, ...) -> op(W)[q0 : +BLOCK_Q, p0 : +BLOCK_P].

op(W)[q, p] is W[p, q] forward and W[q, p] backward, in DTYPE. Elements outside [Q, P] are zero. A loader agrees with
its format's ``materialize``.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import narrow
from peftkern.backends.triton.kernels.matrix import load_block


@triton.jit
def dense(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: W's strides along q and p, or nothing where W is the descriptor of the [N, K] tensor."""
    if len(operands) == 0 and not BACKWARD:
        return W.load([p0, q0]).T
    else:
        return load_block(W, operands, q0, p0, Q, P, BLOCK_Q, BLOCK_P).to(DTYPE)


@triton.jit
def int8(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """W[n, k] = data[n, k] * scale[n]. operands: data's strides along q and p, scale, its stride."""
    data = load_block(W, (operands[0], operands[1]), q0, p0, Q, P, BLOCK_Q, BLOCK_P).to(tl.float32)
    if BACKWARD:
        n = q0 + tl.arange(0, BLOCK_Q).to(tl.int64)
        scale = tl.load(operands[2] + n * operands[3], mask=n < Q, other=0.0)[:, None]
    else:
        n = p0 + tl.arange(0, BLOCK_P).to(tl.int64)
        scale = tl.load(operands[2] + n * operands[3], mask=n < P, other=0.0)[None, :]
    return narrow(data * scale, DTYPE)
