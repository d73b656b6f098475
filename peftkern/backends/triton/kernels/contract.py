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
def contract_codes(
    X, x_strides, W, w_operands, m0, p0, M, P, Q, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """acc of e4m3 codes on both sides, whose scales multiply sums.

    w_operands: W's strides along q and p, () for a descriptor of [N, K]; the scales of X's rows; W's, the distance from
    one to the next along q (None: the same for every q) and p, log2 of how many share one. A step of q shares one.
    """
    strides, row_scales, scales, along_q, along_p, shift = w_operands
    p = (p0 + tl.arange(0, BLOCK_P)) >> shift
    inside = p0 + tl.arange(0, BLOCK_P) < P
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for q0 in range(0, Q, BLOCK_Q):
        x = load_block(X, x_strides, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        if len(strides) == 0 and not BACKWARD:
            w = W.load([p0, q0]).T
        else:
            w = load_block(W, strides, q0, p0, Q, P, BLOCK_Q, BLOCK_P)
        if along_q is None:
            acc = dot(x, w, acc, "ieee")
        else:
            scale = tl.load(scales + (q0 >> shift) * along_q + p * along_p, mask=inside, other=0.0)
            acc += dot(x, w, tl.zeros((BLOCK_M, BLOCK_P), tl.float32), "ieee") * scale[None, :]
    if along_q is None:
        acc *= tl.load(scales + p * along_p, mask=inside, other=0.0)[None, :]
    m = m0 + tl.arange(0, BLOCK_M)
    return acc * tl.load(row_scales + m, mask=m < M, other=0.0)[:, None]


@triton.jit
def contract_with_thin(
    X, x_strides, W, w_operands, F, f_strides, drop_operands, m0, p0, begin, end, M, P, Q, R,
    LOAD_W: tl.constexpr, DROP: tl.constexpr, ADAPTER: tl.constexpr, BACKWARD: tl.constexpr, DROP_IN: tl.constexpr,
    WGMMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc and t from one pass over X. ``DROP_IN``: the mask is D_in's.

    ``WGMMA`` takes factors in DTYPE as they lie: then the frozen product comes first, so that nobody reads the
    registers of a product in flight. Wide ones pass through registers, meanwhile the frozen product runs on.
    """
    FROZEN_FIRST: tl.constexpr = WGMMA and F.dtype.element_ty == DTYPE
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for q0 in range(begin, end, BLOCK_Q):
        x = load_block(X, x_strides, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        w = LOAD_W(W, w_operands, q0, p0, Q, P, BLOCK_Q, BLOCK_P, BACKWARD, DTYPE)
        f = load_block(F, f_strides, q0, 0, Q, R, BLOCK_Q, BLOCK_R)
        kept = x
        if DROP_IN:
            kept = DROP(drop_operands, x, m0 + tl.arange(0, BLOCK_M), q0)
        if FROZEN_FIRST:
            acc = dot(x, w, acc, PRECISION)
            t = ADAPTER(kept, f, t, DTYPE, PRECISION)
        else:
            t = ADAPTER(kept, f, t, DTYPE, PRECISION)
            acc = dot(x, w, acc, PRECISION)
    return acc, t
