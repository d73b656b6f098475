"""Tiles of a strided matrix, and the scalar c; what every body needs and no plug decides."""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import narrow


@triton.jit
def load_tile(
    pointer, stride_0, stride_1, origin_0, origin_1, extent_0, extent_1, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr
):
    """matrix[origin_0 : +BLOCK_0, origin_1 : +BLOCK_1], zeros outside the extents; offsets are 64-bit."""
    index_0, index_1 = tl.arange(0, BLOCK_0), tl.arange(0, BLOCK_1)
    pointer += tl.cast(origin_0, tl.int64) * stride_0 + tl.cast(origin_1, tl.int64) * stride_1
    offsets = index_0.to(tl.int64)[:, None] * stride_0 + index_1.to(tl.int64)[None, :] * stride_1
    inside = (origin_0 + index_0 < extent_0)[:, None] & (origin_1 + index_1 < extent_1)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0)


@triton.jit
def store_tile(
    pointer, stride_0, value, origin_0, origin_1, extent_0, extent_1, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr
):
    """matrix[origin_0 : +BLOCK_0, origin_1 : +BLOCK_1] = value inside the extents; rows are contiguous."""
    index_0, index_1 = tl.arange(0, BLOCK_0), tl.arange(0, BLOCK_1)
    pointer += tl.cast(origin_0, tl.int64) * stride_0 + origin_1
    offsets = index_0.to(tl.int64)[:, None] * stride_0 + index_1[None, :]
    inside = (origin_0 + index_0 < extent_0)[:, None] & (origin_1 + index_1 < extent_1)[None, :]
    tl.store(pointer + offsets, narrow(value, pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_scaling(factor, tensor):
    """c = factor, times the 0-d tensor on the device where there is one."""
    if tensor is None:
        return factor
    else:
        return factor * tl.load(tensor).to(tl.float32)
