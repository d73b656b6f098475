"""The main loops over Q: Z's accumulator, alone or with T's beside it.

acc[BLOCK_M, BLOCK_P] = X[m0 :, begin : end] · op(W)[begin : end, p0 :]
t  [BLOCK_M, BLOCK_R] = D_in(X)[m0 :, begin : end] · F^T[begin : end, :]
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.dot import dot
from peftkern.backends.triton.kernels.matrix import load_block


@triton.jit
def contract(
    X, x_strides, W, w_operands, m0, p0, begin, end, M, P, Q, LOAD_W: tl.constexpr, BACKWARD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """acc alone."""
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for q0 in range(begin, end, BLOCK_Q):
        x = load_block(X, x_strides, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        w = LOAD_W(W, w_operands, q0, p0, Q, P, BLOCK_Q, BLOCK_P, BACKWARD, DTYPE)
        acc = dot(x, w, acc, PRECISION)
    return acc


@triton.jit
def contract_with_thin(
    X, x_strides, W, w_operands, F, f_strides, drop_operands, m0, p0, begin, end, M, P, Q, R,
    LOAD_W: tl.constexpr, DROP: tl.constexpr, ADAPTER: tl.constexpr, BACKWARD: tl.constexpr, DROP_IN: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc and t from one pass over X. ``DROP_IN``: the mask is D_in's."""
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for q0 in range(begin, end, BLOCK_Q):
        x = load_block(X, x_strides, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        w = LOAD_W(W, w_operands, q0, p0, Q, P, BLOCK_Q, BLOCK_P, BACKWARD, DTYPE)
        f = load_block(F, f_strides, q0, 0, Q, R, BLOCK_Q, BLOCK_R)
        acc = dot(x, w, acc, PRECISION)
        if DROP_IN:
            x = DROP(drop_operands, x, m0, q0, BLOCK_M, BLOCK_Q)
        t = ADAPTER(x, f, t, DTYPE, PRECISION)
    return acc, t
