"""Plugs for what is added to each column of Z: EPILOGUE(operands, acc, p0, P, c, ...) -> acc."""

import triton
import triton.language as tl


@triton.jit
def nothing(operands, acc, p0, P, c, BLOCK_P: tl.constexpr):
    """Z as it is."""
    return acc


@triton.jit
def columns(operands, acc, p0, P, c, BLOCK_P: tl.constexpr):
    """acc + bias + c lora_bias. operands: bias, its stride, lora_bias, its stride; either pointer may be None."""
    p = p0 + tl.arange(0, BLOCK_P).to(tl.int64)
    if operands[0] is not None:
        acc += tl.load(operands[0] + p * operands[1], mask=p < P, other=0.0).to(tl.float32)[None, :]
    if operands[2] is not None:
        acc += c * tl.load(operands[2] + p * operands[3], mask=p < P, other=0.0).to(tl.float32)[None, :]
    return acc
