"""Rounding to a narrower dtype, as the hardware does it, in the interpreter too."""

import triton
import triton.language as tl

# triton.jit looks at the same switch when it decorates.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """``value`` in DTYPE, rounded to nearest even. The interpreter (3.6 to 3.9) would cut fp32 off to bf16."""
    if INTERPRETED and DTYPE == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value).to(DTYPE)
    else:
        return value.to(DTYPE)
