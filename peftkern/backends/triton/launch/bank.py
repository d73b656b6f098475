"""The launch of ``fused`` for a batch whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.bank_tiles import bank_rank_block
from peftkern.backends.triton.kernels.fused import fused as fused_body
from peftkern.backends.triton.launch import bank_tables as tables
from peftkern.backends.triton.launch.operands import (
    UNMASKED,
    Launch,
    columns,
    counters,
    matrix,
    near,
    numerics,
    present,
    weight_loader,
)
from peftkern.backends.triton.tiles import TileConfig
from peftkern.call import Call, Update


def bank(
    call: Call, X: Tensor, T: Tensor, Z: Tensor | None, tile: TileConfig, arch: Arch, backward: bool = False
) -> Launch:  # fmt: skip
    """Z [M, P], unless it is None, and T, all spans' [count, R] one behind the other.

    As many programs, and the same arguments, whatever ids on a device are: every adapter has chunks for all rows there,
    of which one without rows of its own stores zeros and multiplies nothing.
    """
    (((weight, bias),), rows), M, Q = (call.bases, call.rows), *X.shape
    assert rows is not None and rows.numbers is not None
    P = weight.shape[1 if backward else 0]
    updates = _alike([update for update in call.updates if update.span is not None and update.span.length and update.R])
    dropped = any(update.dropout_p for update in updates)
    R = max((update.R for update in updates), default=1)
    like = updates[0].lora_A if updates else X
    places = [number for u in updates if u.span is not None for number in (*u.span[:2], u.R)]
    factors = tables.on(X.device, tables.as_they_are, tables.lookups(updates))
    spans = tables.on(X.device, tables.spans, (tile.BLOCK_M, *places))
    chunks = sum(triton.cdiv(count, tile.BLOCK_M) for count in places[1::3])
    index, inside = rows if updates else (spans, None)
    A, B = [update.lora_A for update in updates], [update.lora_B for update in updates]
    looked_up = (
        factors, spans, index, None if inside is None else inside.view(torch.uint8),
        torch.empty(2, M, dtype=torch.int64, device=X.device), X, *X.stride(), like, _aligned(A), _aligned(B),
    )  # fmt: skip
    target = X.new_empty(1, P) if Z is None else Z  # of the same binary, which writes nothing there
    P = 0 if Z is None else P
    produced = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(P, tile.BLOCK_P)
    partials = None
    if tile.SLICES > 1:
        partials = X.new_empty(tile.SLICES * (M * P + T.numel()), dtype=torch.float32)
    arguments: dict[str, Any] = {
        **matrix("X", X, (tile.BLOCK_M, tile.BLOCK_Q), tile.tma),
        **matrix("Z", target, (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES), tile.tma),
        **weight_loader(weight, backward, tile.BLOCK_Q, tile.BLOCK_P, tile.tma),
        "T": T, "F": None, "f_strides": (), "G": looked_up, "g_strides": (),
        "counters": counters(X), "PARTIALS": partials, "t_scale": 1.0, "scaling": 1.0, "scaling_tensor": None,
        "M": M, "P": P, "Q": Q, "R": 1,
        **(tables.masking(updates, X.device) if dropped else UNMASKED),
        **columns(bias, None, backward),
        **numerics(call.precision, X.dtype),
        "SOURCE": "bank", "BACKWARD": backward, "MASK_OUT": backward and dropped, "DEPENDENT": False,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q,
        "BLOCK_R": bank_rank_block(R, call.precision, backward and dropped),
        "GROUP_M": tile.GROUP_M, "SUBTILES": tile.SUBTILES, "SLICES": tile.SLICES,
    }  # fmt: skip
    programs = min((chunks + produced) * tile.SLICES, arch.units * max(1, tile.resident))
    thin = sum(count * rank for count, rank in zip(places[1::3], places[2::3], strict=True))
    return Launch(
        fused_body, (programs,), arguments, tile.num_warps, tile.num_stages,
        reads=present(*(X, weight.data) * (Z is not None), *((X, T) if updates else ()), *A, *B, partials),
        writes=present(Z, T, partials), flops=2 * (M * P * Q + thin * (P + Q)),
        maxnreg=255,
    )  # fmt: skip


def _alike(updates: Sequence[Update]) -> list[Update]:
    """Factors of one dtype, the widest that there is, which is exact, with adjacent elements in their rows."""
    wide = torch.float32 if len({update.lora_A.dtype for update in updates}) > 1 else None

    def row_major(factor: Tensor) -> Tensor:
        factor = near(factor if wide is None else factor.to(wide))
        return factor if factor.stride(1) == 1 else factor.contiguous()

    return [update._replace(lora_A=row_major(update.lora_A), lora_B=row_major(update.lora_B)) for update in updates]


def _aligned(factors: Sequence[Tensor]) -> int | None:
    """1 where every row of every factor begins at a multiple of 16 bytes; None to the compiler otherwise."""
    places = [factor.stride(0) * factor.itemsize for factor in factors]
    places += [0 if factor.is_meta else factor.data_ptr() for factor in factors]
    return 1 if all(place % 16 == 0 for place in places) else None
