"""Plugs for the thin products: ADAPTER(value, factor, acc, DTYPE, PRECISION) -> acc + value · factor.

A factor arrives in the dtype it has in memory and is rounded, or split, in registers.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.dot import product


@triton.jit
def rounded(value, factor, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Both sides rounded to DTYPE, as autocast would, but within fp16's range."""
    return product(value, factor, acc, DTYPE, PRECISION, 1)


@triton.jit
def split(value, factor, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Both sides in as many parts of DTYPE as fp32 needs: three of bf16, two of fp16."""
    return product(value, factor, acc, DTYPE, PRECISION, 3 if DTYPE == tl.bfloat16 else 2)
