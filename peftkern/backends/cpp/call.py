"""What a call tells the kernels of csrc: sizes, addresses, strides, and which of the two schedules it takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.cpp import products, quantised
from peftkern.backends.cpp.extension import extension
from peftkern.call import Pair
from peftkern.weights import FrozenWeight, split_format

FEW_ROWS = 16  # few_rows.h, kFewRows
STREAMED_ROWS = 4  # streamed_rows.h, kStreamedRows
ROWS_OF_Y = {torch.float32: 4, torch.bfloat16: 2, torch.float16: FEW_ROWS}  # measured ahead of torch's with AVX-512
LARGEST_OF_DX = 2**22  # of one row in fp32: torch takes 0.6x of our time at 4096x4096, as long at 2048x2048
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # call.h, DType


def one_pass(
    dtype: torch.dtype, M: int, weight_format: str = "dense", forward: bool = True, by_rows: bool = True,
    precision: str = "base",
) -> bool:  # fmt: skip
    """Whether y and dx are computed here as a whole, rather than on top of torch's product with the frozen weight.

    That is where it was measured ahead: for a handful of rows and a weight whose rows are contiguous (``by_rows``), and
    for more rows on the processors of ``products``. Torch cannot multiply a quantised weight, but with a decoded copy
    of all of it: for a handful of rows the copy costs many times the product, whatever the processor, and for more rows
    our own is ahead, in every dtype, where it is in fp32. Factors that stay in fp32 beside rows of bf16 (precision
    "fp32") are not multiplied in pairs of bf16, which is what is fast.
    """
    kernels = extension()[0].instruction_set()
    slow = kernels == "avx512bf16" and dtype == torch.bfloat16 and precision != "base"
    if weight_format != "dense":  # the thin products read other rows than the frozen one, where that rounds them
        own = not slow and products.own_rows(kernels, torch.float32, True) is not None
        return split_format(weight_format)[1] is None and (M <= FEW_ROWS or own)
    rows = None if slow else products.own_rows(kernels, dtype, forward)
    if by_rows and kernels != "baseline" and M <= (ROWS_OF_Y[dtype] if forward else STREAMED_ROWS):
        return True
    return rows is not None and M >= rows


def takes(weight: FrozenWeight, rows: Tensor, forward: bool = True, precision: str = "base") -> bool:
    """``one_pass`` of rows of x, or of dy, and a weight."""
    dense, M, dtype = weight.format == "dense", rows.shape[0], rows.dtype
    if dense and not forward and dtype == torch.float32 and M == 1 and weight.data.numel() > LARGEST_OF_DX:
        return False
    return one_pass(dtype, M, weight.format, forward, not dense or weight.data.stride(1) == 1, precision)


@functools.lru_cache(maxsize=1024)
def shape(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype, precision: str, whole: bool,
    threads: int,
) -> Any:  # fmt: skip
    """A Problem of call.h, whose scaling and dropout a call fills in; ``whole``: in one pass.

    The factors are rounded to the rows' dtype in precision "base". Those of fp16 are multiplied in fp32, so there it
    would save nothing, and lose what fp16's range does not hold.
    """
    rounds = precision == "base" and dtype != torch.float16
    return extension()[0].Problem(M, K, N, R, DTYPES[dtype], DTYPES[adapter_dtype], rounds, threads, whole)


def of_pair(pair: Pair, rows: Tensor, whole: bool) -> tuple[Any, float, int, int]:
    """The Problem of a pair and the rows of x or dy, its scaling, and its dropout's threshold and state."""
    A, scaling, state = pair.lora_A, pair.scaling, pair.rng_state
    if pair.scaling_tensor is not None:
        scaling *= float(pair.scaling_tensor)
    (N, K), R = pair.weight.shape, A.shape[0]
    made = shape(rows.shape[0], K, N, R, rows.dtype, A.dtype, pair.precision, whole, torch.get_num_threads())
    if state is None:
        return made, scaling, 0, 0
    return made, scaling, dropout.threshold(pair.dropout_p), state.data_ptr()


def of_base(weight_shape: tuple[int, ...], rows: Tensor, whole: bool, precision: str = "base") -> Any:
    """The Problem of a weight [N, K] without a low-rank pair."""
    (N, K), dtype = weight_shape, rows.dtype
    return shape(rows.shape[0], K, N, 0, dtype, dtype, precision, whole, torch.get_num_threads())


def read_weight(problem: Any, frozen: FrozenWeight, rows: Tensor) -> tuple[Any, Any]:
    """A problem in one pass that reads the frozen weight, and what must outlive the call."""
    if frozen.format != "dense":
        return quantised.read(problem, frozen)
    weight = frozen.materialize(rows.dtype)
    if 1 not in weight.stride() and 1 not in weight.shape:  # neither its rows nor (Conv1D's view) its columns are
        weight = weight.contiguous()
    transposed = weight.stride(1) != 1 and weight.shape[1] != 1
    return problem.read_dense(weight.data_ptr(), weight.stride(1 if transposed else 0), transposed), weight


def unit_stride(rows: Tensor) -> Tensor:
    """Rows whose elements lie next to each other: one copy where they do not (a transposed or expanded tensor)."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
