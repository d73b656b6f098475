"""Plugs that read a tile of the frozen weight: LOAD_W(W, operands, ...) -> op(W)[q0 : +BLOCK_Q, p0 : +BLOCK_P].

op(W)[q, p] is W[p, q] forward and W[q, p] backward, in DTYPE. Elements outside [Q, P] are zero. A loader agrees with
its format's ``materialize``. k0 and BLOCK_K are multiples of 16, the smallest run of K that shares a scale in every
format but the two flattened ones with rows of another length (``four_bit_any``). Where runs of 64 share one, ``wide``
is 1, a constant of the binary; else it is None.

What keeps a tile in few registers: a pointer moves by a 64-bit scalar and everything within the tile is 32 bits; masks
compare what is contiguous in memory, so that loads are of many bytes, and on the way while a tile before is decoded.
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


@triton.jit
def _as_asked(value, BACKWARD: tl.constexpr):
    """W[n0 : +BLOCK_N, k0 : +BLOCK_K] as op(W)'s tile."""
    if BACKWARD:
        return value
    else:
        return tl.trans(value)


@triton.jit
def _scale_runs(
    scale, along_n, along_k, shift_n, shift_k, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K / RUN]: scale[n >> shift_n, k >> shift_k] for every run along K; 0 outside."""
    n, k = tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K // RUN) * RUN
    inside = (n0 + n < N)[:, None] & (k < K)[None, :]
    scale += tl.cast(n0 >> shift_n, tl.int64) * along_n
    n = ((n0 & ((1 << shift_n) - 1)) + n) >> shift_n
    return tl.load(scale + (n[:, None] * along_n + (k >> shift_k)[None, :] * along_k), mask=inside, other=0)


@triton.jit
def _spread(runs, RUN: tl.constexpr):
    """[n, k] from [n, k / RUN]: each run's number for all of it."""
    ROWS: tl.constexpr = runs.shape[0]
    RUNS: tl.constexpr = runs.shape[1]
    return tl.reshape(tl.broadcast_to(runs[:, :, None], (ROWS, RUNS, RUN)), (ROWS, RUNS * RUN))


@triton.jit
def _nibbles(W, along_n, row_bytes, n0, k0, N, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] values below 16 from rows of bytes, the even ones high; 0 outside."""
    bytes = load_block(W, (along_n, 1), n0, k0 // 2, N, row_bytes, BLOCK_N, BLOCK_K // 2).to(tl.int32)
    return tl.reshape(tl.join(bytes >> 4, bytes & 15), (BLOCK_N, BLOCK_K))


@triton.jit
def int8_groups(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: data's strides along n and k, scale, its strides, log2 of the group, wide."""
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    RUN: tl.constexpr = 16 if operands[6] is None else min(64, BLOCK_K)
    n0, k0, N, K = (q0, p0, Q, P) if BACKWARD else (p0, q0, P, Q)
    data = load_block(W, (operands[0], operands[1]), n0, k0, N, K, BLOCK_N, BLOCK_K).to(tl.float32)
    runs = _scale_runs(operands[2], operands[3], operands[4], 0, operands[5], n0, k0, N, K, BLOCK_N, BLOCK_K, RUN)
    return _as_asked(narrow(data * _spread(runs, RUN), DTYPE), BACKWARD)


@triton.jit
def fp8(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: the bytes' strides along n and k, scale, its strides, log2 of how many n and k share one.

    Exponent and mantissa move to fp32's places, which is off by 2^120 and right for subnormals too: no chip's own fp8.
    """
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    RUN: tl.constexpr = min(128, BLOCK_K)  # a block's, or a part of a row's
    n0, k0, N, K = (q0, p0, Q, P) if BACKWARD else (p0, q0, P, Q)
    bits = load_block(W, (operands[0], operands[1]), n0, k0, N, K, BLOCK_N, BLOCK_K).to(tl.int32)
    size = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    size = tl.where((bits & 127) == 127, float("nan"), size)
    value = tl.where(bits > 127, -size, size)
    runs = _scale_runs(operands[2], operands[3], operands[4], operands[5], operands[5], n0, k0, N, K, BLOCK_N, BLOCK_K,
                       RUN)  # fmt: skip
    return _as_asked(narrow(value * _spread(runs, RUN), DTYPE), BACKWARD)


@triton.jit
def int4(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: from row to row in bytes, bytes a row, scale, zero_point, groups a row, log2 of the group, wide."""
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    RUN: tl.constexpr = 16 if operands[6] is None else min(64, BLOCK_K)
    n0, k0, N, K = (q0, p0, Q, P) if BACKWARD else (p0, q0, P, Q)
    codes = _nibbles(W, operands[0], operands[1], n0, k0, N, BLOCK_N, BLOCK_K)
    runs = _scale_runs(operands[2], operands[4], 1, 0, operands[5], n0, k0, N, K, BLOCK_N, BLOCK_K, RUN)
    zeros = _scale_runs(operands[3], operands[4], 1, 0, operands[5], n0, k0, N, K, BLOCK_N, BLOCK_K, RUN)
    value = (codes.to(tl.float32) - _spread(zeros.to(tl.float32), RUN)) * _spread(runs, RUN)
    if operands[6] is None:  # a row may end within a run
        value = tl.where((k0 + tl.arange(0, BLOCK_K) < K)[None, :], value, 0.0)
    return _as_asked(narrow(value, DTYPE), BACKWARD)


@triton.jit
def _absmax(operands, origin, local, inside):
    """The scales of the blocks that hold the elements origin + local; 0 outside. operands: see ``four_bit``."""
    shift = operands[1]
    first = origin >> shift
    block = ((origin & ((1 << shift) - 1)).to(tl.int32) + local) >> shift  # from the first on
    found = tl.load(operands[2] + first + block, mask=inside, other=0)
    if operands[4] is not None:
        nested = operands[4] + (first >> 8)
        size = tl.load(nested + (((first & 255).to(tl.int32) + block) >> 8), mask=inside, other=0.0)
        product = tl.load(operands[5] + found.to(tl.int32)) * size
        # A selection, which changes nothing: the compiler would round the product and the sum as one.
        found = tl.where(inside, tl.where(size == size, product, size) + tl.load(operands[6]), 0.0)
    return found


@triton.jit
def _looked_up(table, codes):
    """table[codes] for 16 fp32: from shared memory, not from loads that the compiler would keep a tile of in flight."""
    values = tl.gather(tl.load(table + tl.arange(0, 16)), tl.reshape(codes, (codes.numel,)), 0)
    return tl.reshape(values, codes.shape)


@triton.jit
def four_bit(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """K a multiple of 16: whole bytes, and runs of 16 that lie in one block.

    operands: K / 16, log2 of the blocksize, absmax, code, and nested_absmax, nested_code, offset, or None three times;
    wide.
    """
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    RUN: tl.constexpr = 16 if operands[7] is None else min(64, BLOCK_K)
    n0, k0, N = (q0, p0, Q) if BACKWARD else (p0, q0, P)
    K, row_bytes = operands[0] * 16, operands[0] * 8
    codes = _nibbles(W, row_bytes, row_bytes, n0, k0, N, BLOCK_N, BLOCK_K)
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K // RUN) * RUN
    inside = (n0 + n < N)[:, None] & (k0 + k < K)[None, :]
    runs = _absmax(operands, tl.cast(n0, tl.int64) * K + k0, n[:, None] * K + k[None, :], inside)
    return _as_asked(narrow(_looked_up(operands[3], codes) * _spread(runs, RUN), DTYPE), BACKWARD)


@triton.jit
def four_bit_any(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """Any K: element by element; rows may begin within a byte and blocks anywhere. operands: as ``four_bit``, but K."""
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    n0, k0, N, K = (q0, p0, Q, P) if BACKWARD else (p0, q0, P, Q)
    origin = tl.cast(n0, tl.int64) * operands[0] + k0
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = (n0 + n < N)[:, None] & (k0 + k < K)[None, :]
    local = n[:, None] * operands[0] + k[None, :]
    place = (origin & 1).to(tl.int32) + local
    byte = tl.load(W + (origin >> 1) + (place >> 1), mask=inside, other=0).to(tl.int32)
    code = tl.load(operands[3] + tl.where((place & 1) == 0, byte >> 4, byte & 15))
    return _as_asked(narrow(code * _absmax(operands, origin, local, inside), DTYPE), BACKWARD)


@triton.jit
def _e2m1(W, along_n, row_bytes, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_N, BLOCK_K] fp32 numbers from rows of bytes, the even ones low; 0 outside. EVEN: None where K may be odd.

    Exponent and mantissa move to fp32's places, which is off by 2^126 and right for the subnormal too.
    """
    bytes = load_block(W, (along_n, 1), n0, k0 // 2, N, row_bytes, BLOCK_N, BLOCK_K // 2).to(tl.int32)
    low, high = ((bytes & 7) << 22) | ((bytes & 8) << 28), ((bytes & 112) << 18) | ((bytes & 128) << 24)
    bits = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))
    if EVEN is None:
        bits = tl.where((k0 + tl.arange(0, BLOCK_K) < K)[None, :], bits, 0)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def mxfp4(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: from row to row in bytes, bytes a row, scale, groups a row, 1 where K is even or None."""
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    RUN: tl.constexpr = min(32, BLOCK_K)
    n0, k0, N, K = (q0, p0, Q, P) if BACKWARD else (p0, q0, P, Q)
    value = _e2m1(W, operands[0], operands[1], n0, k0, N, K, BLOCK_N, BLOCK_K, operands[4])
    runs = _scale_runs(operands[2], operands[3], 1, 0, 5, n0, k0, N, K, BLOCK_N, BLOCK_K, RUN).to(tl.int32)
    # 0 is a subnormal's exponent, and 255 NaN's
    runs = ((runs << 23) | tl.where(((runs + 1) & 255) < 2, 1 << 22, 0)).to(tl.float32, bitcast=True)
    return _as_asked(narrow(value * _spread(runs, RUN), DTYPE), BACKWARD)


@triton.jit
def nvfp4(
    W, operands, q0, p0, Q, P, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr
):
    """operands: as ``mxfp4``, and what the 256 scales are."""
    BLOCK_N: tl.constexpr = BLOCK_Q if BACKWARD else BLOCK_P
    BLOCK_K: tl.constexpr = BLOCK_P if BACKWARD else BLOCK_Q
    n0, k0, N, K = (q0, p0, Q, P) if BACKWARD else (p0, q0, P, Q)
    value = _e2m1(W, operands[0], operands[1], n0, k0, N, K, BLOCK_N, BLOCK_K, operands[4])
    runs = _scale_runs(operands[2], operands[3], 1, 0, 4, n0, k0, N, K, BLOCK_N, BLOCK_K, 16).to(tl.int32)
    return _as_asked(narrow(value * _spread(tl.load(operands[5] + runs), 16), DTYPE), BACKWARD)
