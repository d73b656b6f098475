"""What a call tells the kernels of csrc: sizes, addresses, strides, and which of the two schedules it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.cpp import packed, prepack
from peftkern.backends.cpp.extension import extension
from peftkern.call import Pair
from peftkern.weights import FrozenWeight, split_format

DECODE_ROWS = 16  # decode.h, kDecodeRows
FEW_ROWS_OF_DX = 128  # measured: 5.8x, 1.7x and 1.3x of torch's time at 1, 16 and 64 rows of 4096x4096, as fast at 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # problem.h, DType


def one_pass(dtype: torch.dtype, M: int, weight_format: str = "dense", forward: bool = True) -> bool:
    """Whether y and dx are computed here as a whole, rather than on top of torch's product with the frozen weight.

    That is where it was measured ahead (benchmarks/NOTES.md): with AVX2 and without AVX-512. Elsewhere torch's product
    is as good or better, or nobody has measured. Torch cannot multiply a packed weight, but with a decoded copy of all
    of it: for a handful of rows the copy costs many times the product, whatever the processor. dx of few rows in fp32
    stays torch's: the kernels share dx by its rows, and there each thread would read the whole weight, across its rows.
    """
    if split_format(weight_format)[1] is not None:  # the thin products read other rows than the frozen one
        return False
    if not forward and weight_format == "dense" and dtype == torch.float32 and M < FEW_ROWS_OF_DX:
        return False
    return extension()[0].instruction_set() == "avx2" or (weight_format != "dense" and M <= DECODE_ROWS)


def problem(pair: Pair, rows: Tensor, whole: bool) -> Any:
    """A Problem of problem.h for one adapter and the rows of x or dy; ``whole``: in one pass."""
    scaling = pair.scaling
    if pair.scaling_tensor is not None:
        scaling *= float(pair.scaling_tensor)
    (N, K), R = pair.weight.shape, pair.lora_A.shape[0]
    return extension()[0].Problem(
        rows.shape[0], K, N, R, DTYPES[rows.dtype], DTYPES[pair.lora_A.dtype], _rounds(pair.precision, rows),
        scaling, dropout.threshold(pair.dropout_p), address(pair.rng_state), torch.get_num_threads(), whole,
    )  # fmt: skip


def base_problem(shape: tuple[int, ...], rows: Tensor, whole: bool, precision: str = "base") -> Any:
    """``problem`` of a weight [N, K] without a low-rank pair."""
    (N, K), dtype = shape, DTYPES[rows.dtype]
    return extension()[0].Problem(
        rows.shape[0], K, N, 0, dtype, dtype, _rounds(precision, rows), 0.0, 0, 0, torch.get_num_threads(), whole
    )


def _rounds(precision: str, rows: Tensor) -> bool:
    """Whether the factors are rounded to the rows' dtype. Those of fp16 are multiplied in fp32, so there it would save
    nothing, and lose what fp16's range does not hold.
    """
    return precision == "base" and rows.dtype != torch.float16


def read_weight(problem: Any, frozen: FrozenWeight, rows: Tensor, forward: bool) -> Any:
    """Make a problem in one pass read the frozen weight, for y or for dx; what it returns must outlive the call."""
    if frozen.format != "dense":
        return packed.attach(problem, frozen)
    weight, panels = _unit_stride_somewhere(frozen.materialize(rows.dtype)), None
    strides = _strides(weight)
    if weight is frozen.data and rows.shape[0] > DECODE_ROWS:  # the caller's own tensor: its packed copy
        panels = prepack.panels(extension()[0], weight, DTYPES[weight.dtype], strides, forward)
    problem.read_dense(*strides, address(panels))
    return weight, panels


def unit_stride(rows: Tensor) -> Tensor:
    """Rows whose elements lie next to each other: one copy where they do not (a transposed or expanded tensor)."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _unit_stride_somewhere(weight: Tensor) -> Tensor:
    """A weight whose rows or columns (Conv1D's view) are contiguous: one copy where neither are."""
    return weight if 1 in weight.stride() or 1 in weight.shape else weight.contiguous()


def _strides(weight: Tensor) -> tuple[int, int, bool]:
    """Address, distance of its rows, and whether it is its columns that are contiguous."""
    transposed = weight.stride(1) != 1 and weight.shape[1] != 1
    return weight.data_ptr(), weight.stride(1 if transposed else 0), transposed
