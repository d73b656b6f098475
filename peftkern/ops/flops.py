"""FLOPs of the operators for ``torch.utils.flop_counter``: the products of docs/numerics.md, 2 per multiply-add.

What a schedule computes twice counts once, and so do products that no gradient asks for: not at all. An update of some
rows counts its own; where their number is known to the device alone, as many as its span has room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

_Shape = Sequence[int]
# Positions behind x, or behind dy, x and s: see ``call.SCHEMA``.
_FACTS, _LORA_A, _LORA_B, _SPANS = 4, 6, 7, 14


def forward_flops(x_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """x W^T of each base, and of each update s = D(x) A^T and s B^T."""
    M = x_shape[0]
    facts = arguments[_FACTS]
    total = sum(M * N * K for N, K in zip(facts[::4], facts[1::4], strict=True))
    return 2 * (total + sum(m * R * (K + N) for m, R, K, N in _updates(M, arguments)))


def backward_flops(dy_shapes: Any, x_shape: Any, s_shapes: Any, *arguments: Any, **unused: Any) -> int:
    """dx = dy W of each base; of each update t = dy B where dx or dA is needed, t A, dA = t^T D(x), dB = dy^T s."""
    M, facts = dy_shapes[0][0], arguments[_FACTS]
    need_x, _, need_A, need_B, _ = arguments[-5:]
    total = need_x * sum(M * N * K for N, K in zip(facts[::4], facts[1::4], strict=True))
    for (m, R, K, N), A, B in zip(_updates(M, arguments), need_A, need_B, strict=True):
        total += m * R * (N * (need_x or A) + K * (need_x + A) + N * B)
    return 2 * total


def _updates(M: int, arguments: Sequence[Any]) -> Iterator[tuple[int, int, int, int]]:
    """Rows, R, K and N of each update."""
    counts = arguments[_SPANS][1::4]
    for i, ((R, K), (N, _)) in enumerate(zip(arguments[_LORA_A], arguments[_LORA_B], strict=True)):
        yield counts[i] if counts else M, R, K, N


def row_norm_flops(w_data_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """B A; squares and their sums are no products of matrices."""
    (R, K), (N, _) = arguments[4:6]
    return 2 * N * R * K


def dropped_product_flops(rows_shape: _Shape, *arguments: Any, **unused: Any) -> int:
    """The one product, of the same size in both directions."""
    N, K, *_ = arguments[4]
    return 2 * rows_shape[0] * N * K


def register() -> None:
    """Tell PyTorch's FLOP counter, which has been imported."""
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.peftkern, name))(formula)


def tell(modes: Sequence[Any]) -> None:
    """Tell counters that are at work: one has a copy of the formulas that there were when it was made."""
    from torch.utils.flop_counter import flop_registry

    for mode in modes:
        for counter in (mode, getattr(mode, "counter", None)):
            known = getattr(counter, "flop_registry", None)
            if isinstance(known, dict):
                ours = [getattr(torch.ops.peftkern, name) for name in _FORMULAS]
                known |= {operator: flop_registry[operator] for operator in ours if operator not in known}


_FORMULAS: dict[str, Any] = {
    "forward": forward_flops,
    "backward": backward_flops,
    "row_norm": row_norm_flops,
    "dropped_product": dropped_product_flops,
}
