"""Tiles of a matrix in memory, and the scalar c; what every body needs and no plug decides.

A matrix is a pointer with its two strides, or, where the strides are an empty tuple, a TMA descriptor whose block is
the tile. Both give zeros outside the extents and write nothing there.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.cast import narrow


@triton.jit
def load_block(matrix, strides, row0, col0, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """matrix[row0 : +BLOCK_ROWS, col0 : +BLOCK_COLS]. The origin's offset is 64-bit, those within it need not be."""
    if len(strides) == 0:
        return matrix.load([row0, col0])
    else:
        row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
        matrix += tl.cast(row0, tl.int64) * strides[0] + tl.cast(col0, tl.int64) * strides[1]
        offsets = row[:, None] * strides[0] + col[None, :] * strides[1]
        inside = (row0 + row < rows)[:, None] & (col0 + col < cols)[None, :]
        # An integer is no e4m3, and a float no integer.
        nothing: tl.constexpr = 0.0 if matrix.dtype.element_ty == tl.float8e4nv else 0
        return tl.load(matrix + offsets, mask=inside, other=nothing)


@triton.jit
def store_block(matrix, strides, value, row0, col0, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """matrix[row0 : +BLOCK_ROWS, col0 : +BLOCK_COLS] = value, rounded to the matrix's dtype."""
    if len(strides) == 0:
        matrix.store([row0, col0], narrow(value, matrix.dtype))
    else:
        row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
        matrix += tl.cast(row0, tl.int64) * strides[0] + tl.cast(col0, tl.int64) * strides[1]
        offsets = row[:, None] * strides[0] + col[None, :] * strides[1]
        inside = (row0 + row < rows)[:, None] & (col0 + col < cols)[None, :]
        tl.store(matrix + offsets, narrow(value, matrix.dtype.element_ty), mask=inside)


@triton.jit
def sum_slices(
    pointer, strides, slices, distance, row0, col0, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """The sum of ``slices`` fp32 matrices, ``distance`` elements apart, in their order."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for i in tl.range(0, slices, num_stages=1):
        part = pointer + tl.cast(i, tl.int64) * distance
        total += load_block(part, strides, row0, col0, rows, cols, BLOCK_ROWS, BLOCK_COLS)
    return total


@triton.jit
def load_scaling(factor, tensor):
    """c = factor, times the 0-d tensor on the device where there is one."""
    if tensor is None:
        return factor
    else:
        return factor * tl.load(tensor).to(tl.float32)
