"""Every ``tl.dot`` of the backend goes through here.

    dot      acc + a · b
    product  acc + value · factor, where either may be fp32 and is rounded, or split into TERMS parts, of DTYPE

Splitting: v = v_0 + v_1 + ... with v_0 = round(v), v_1 = round(v - v_0), ...; the parts of a product below the last
part of either side are dropped, so bf16 in three terms is as good as fp32.

fp16 has little range. There, an fp32 operand is brought to about one by a power of two, which is exact, and the
accumulator takes the same step down and up again: a value's by row, a factor's by tile. A NaN or an infinity has no
say in the power, so it stays in its row or column.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import INTERPRETED, narrow


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b. PRECISION ("ieee" or "tf32") is for fp32 operands. The interpreter takes bf16 bits for numbers."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.float8e4nv:  # Hopper adds these in about 14 bits: no further than one step
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _magnitude(value):
    """|value| where it is finite, else 0."""
    size = tl.abs(value)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def _exponent(size):
    """That of the power of two just above ``size``, within what can be undone in fp32; 0 for 0."""
    exponent = tl.ceil(tl.log2(tl.where(size > 0.0, size, 1.0)))
    return tl.minimum(tl.maximum(exponent, -40.0), 60.0)


@triton.jit
def _split_dot(value, factor, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr, TERMS: tl.constexpr):
    """acc + value · factor in at most TERMS parts a side; an operand that has DTYPE already is one part."""
    VALUE_TERMS: tl.constexpr = 1 if value.dtype == DTYPE else TERMS
    FACTOR_TERMS: tl.constexpr = 1 if factor.dtype == DTYPE else TERMS
    value_rest = value
    for i in tl.static_range(VALUE_TERMS):
        value_part = narrow(value_rest, DTYPE)
        factor_rest = factor
        for j in tl.static_range(FACTOR_TERMS):
            if i + j < TERMS:
                factor_part = narrow(factor_rest, DTYPE)
                acc = dot(value_part, factor_part, acc, PRECISION)
                if j + 1 < FACTOR_TERMS:
                    factor_rest = factor_rest - factor_part.to(tl.float32)
        if i + 1 < VALUE_TERMS:
            value_rest = value_rest - value_part.to(tl.float32)
    return acc


@triton.jit
def product(value, factor, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr, TERMS: tl.constexpr):
    """acc + value · factor."""
    VALUE_POWER: tl.constexpr = DTYPE == tl.float16 and value.dtype == tl.float32
    FACTOR_POWER: tl.constexpr = DTYPE == tl.float16 and factor.dtype == tl.float32
    if VALUE_POWER or FACTOR_POWER:
        exponent = tl.zeros((value.shape[0], 1), tl.float32)
        if VALUE_POWER:
            exponent = _exponent(tl.max(_magnitude(value), axis=1))[:, None]
            value = value * tl.exp2(-exponent)
        if FACTOR_POWER:
            of_factor = _exponent(tl.max(tl.max(_magnitude(factor), axis=1), axis=0))
            factor = factor * tl.exp2(-of_factor)
            exponent = exponent + of_factor
        return _split_dot(value, factor, acc * tl.exp2(-exponent), DTYPE, PRECISION, TERMS) * tl.exp2(exponent)
    else:
        return _split_dot(value, factor, acc, DTYPE, PRECISION, TERMS)
