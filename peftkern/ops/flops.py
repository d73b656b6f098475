"""FLOPs of the operators for ``torch.utils.flop_counter``: the products of the README's table, 2 per multiply-add.

What a schedule computes twice counts once, and so do products that no gradient asks for: not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_Shape = Sequence[int]


def forward_flops(x_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """x W^T, s = D(x) A^T and s B^T."""
    (M, K), (R, N) = x_shape, _rank_and_width(arguments)
    return _forward(M, K, N, R)


def backward_flops(
    dy_shape: _Shape, x_shape: _Shape | None, s_shape: _Shape | None, *arguments: Any, **unused: Any
) -> int:
    """t = dy B where dx or dA is needed; dx = dy W + t A; dA = t^T D(x); dB = dy^T s."""
    M, N = dy_shape
    R, K = arguments[4]
    need_x, need_A, need_B, *_ = arguments[-5:]
    return _backward(M, N, K, R, need_x, need_A, need_B)


def forward_shared_flops(x_shape: _Shape, weights: Any, lora_A: Any, *arguments: Any, **unused: Any) -> int:
    """Those of every layer."""
    M, K = x_shape
    return sum(_forward(M, K, N, R) for (N, _), (R, _) in zip(weights, lora_A, strict=True))


def backward_shared_flops(
    dy_shapes: Any, x_shape: Any, s_shapes: Any, weights: Any, lora_A: Any, *arguments: Any, **unused: Any
) -> int:
    """Those of every layer; the sum that dx is counts nothing."""
    need_x, *needs = arguments[-5:-2]
    layers = zip(dy_shapes, lora_A, *needs, strict=True)
    return sum(_backward(M, N, K, R, need_x, A, B) for (M, N), (R, K), A, B in layers)


def _forward(M: int, K: int, N: int, R: int) -> int:
    return 2 * M * (N * K + R * K + N * R)


def _backward(M: int, N: int, K: int, R: int, need_x: bool, need_A: bool, need_B: bool) -> int:
    low_rank = N * R * (need_x or need_A) + R * K * (need_x + need_A) + N * R * need_B
    return 2 * M * (N * K * need_x + low_rank)


def forward_adapters_flops(x_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """x W^T, and for each adapter s = D(x) A^T and s B^T."""
    M, K = x_shape
    lora_B = arguments[6]
    return 2 * M * (lora_B[0][0] * K + sum(R * K + N * R for N, R in lora_B))


def backward_adapters_flops(
    dy_shape: _Shape, x_shape: _Shape | None, s_shapes: Any, *arguments: Any, **unused: Any
) -> int:
    """dx = dy W once; for each adapter what ``backward_flops`` counts beside it."""
    M, N = dy_shape
    need_x, _, need_A, need_B, _ = arguments[-5:]
    lora_A = arguments[5]
    total = N * lora_A[0][1] * need_x
    for (R, K), A, B in zip(lora_A, need_A, need_B, strict=True):
        total += N * R * (need_x or A) + R * K * (need_x + A) + N * R * B
    return 2 * M * total


def row_norm_flops(w_data_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """B A; squares and their sums are no products of matrices."""
    (R, K), (N, _) = arguments[3:5]
    return 2 * N * R * K


def dropped_product_flops(rows_shape: _Shape, w_data_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """The one product, of the same size in both directions."""
    N, K = w_data_shape
    return 2 * rows_shape[0] * N * K


def _rank_and_width(arguments: Sequence[Any]) -> tuple[int, int]:
    """(R, N), read off lora_B, which stands behind w_data, w_scale, w_format, group_size and lora_A."""
    N, R = arguments[5]
    return R, N


def register() -> None:
    """Tell PyTorch's FLOP counter, which has been imported."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.peftkern.forward)(forward_flops)
    register_flop_formula(torch.ops.peftkern.backward)(backward_flops)
    register_flop_formula(torch.ops.peftkern.forward_adapters)(forward_adapters_flops)
    register_flop_formula(torch.ops.peftkern.backward_adapters)(backward_adapters_flops)
    register_flop_formula(torch.ops.peftkern.row_norm)(row_norm_flops)
    register_flop_formula(torch.ops.peftkern.dropped_product)(dropped_product_flops)


def register_shared() -> None:
    """The same for the operators of layers that read one x."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.peftkern.forward_shared)(forward_shared_flops)
    register_flop_formula(torch.ops.peftkern.backward_shared)(backward_shared_flops)
