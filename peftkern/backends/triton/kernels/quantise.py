"""The ``quantise`` body: rows as e4m3 codes and a power of two each, for products on FP8 tensor cores.

The arithmetic is ``peftkern.weights.fp8.rounded``'s, in integers and fp32: no chip's own conversion, so that the
interpreter runs what a GPU does.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.matrix import load_block, store_block


@triton.jit
def _folded(X, x_strides, FOLD, m0, q0, M, Q, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """A tile of X in fp32, times FOLD [Q] where there is one."""
    value = load_block(X, x_strides, m0, q0, M, Q, BLOCK_M, BLOCK_Q).to(tl.float32)
    if FOLD is not None:
        q = q0 + tl.arange(0, BLOCK_Q)
        value *= tl.load(FOLD + q, mask=q < Q, other=0.0)[None, :]
    return value


@triton.jit
def e4m3(value):
    """fp32 of at most 448 as e4m3's codes, to nearest, ties to even; a NaN is one."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # the exponent's bias: 127 to 7
    # From 2^14 on fp32's last bit is e4m3's smallest number, so an addition rounds to a multiple of it.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["M"])
def quantise(X, x_strides, FOLD, CODES, pitch, SCALES, M, Q, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """CODES [M, Q], ``pitch`` apart, and SCALES [M] of BLOCK_M rows, read twice, the second time from the cache."""
    m0 = tl.program_id(0) * BLOCK_M
    sizes = tl.zeros((BLOCK_M, BLOCK_Q), tl.int32)
    for q0 in range(0, Q, BLOCK_Q):
        value = _folded(X, x_strides, FOLD, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        sizes = tl.maximum(sizes, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(sizes, axis=1)  # as integers a NaN is larger than infinity
    # Rounded up at 1.75: 448 is 1.75 * 2^8. From 2^-117 on.
    exponent = tl.maximum((largest + 0x1FFFFF) >> 23, 18)
    inverse = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    for q0 in range(0, Q, BLOCK_Q):
        value = _folded(X, x_strides, FOLD, m0, q0, M, Q, BLOCK_M, BLOCK_Q)
        store_block(CODES, (pitch, 1), e4m3(value * inverse[:, None]), m0, q0, M, Q, BLOCK_M, BLOCK_Q)
    scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    m = m0 + tl.arange(0, BLOCK_M)
    tl.store(SCALES + m, tl.where(largest < 0x7F800000, scale, float("nan")), mask=m < M)
