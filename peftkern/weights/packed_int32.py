"""GPTQ's and AWQ's tensors of a linear layer: eight codes of four bits in an int32, N last.

    W[n, k] = (q[n, k] - z[n, g]) * scales[g, n],   g = k // group_size

    GPTQ:  qweight [K / 8, N], eight codes of neighbours along K, the first lowest;
           qzeros [G, N / 8], eight of neighbours along N, the first lowest, z - 1 in each
    AWQ:   qweight [K, N / 8] and qzeros [G, N / 8], eight of neighbours along N, in the order 0 2 4 6 1 3 5 7

GPTQ's ``g_idx`` says the group of each k, and may be absent. Of GPTQ this is what its files are, "gptq"; "gptq_v2", as
gptqmodel has it in memory, stores z itself, which no tensor tells: where every z would be 9 it is taken for that, and
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.weights.saved import dtype_name, require, require_finite, require_group

SPELLINGS = (("qweight", "qzeros", "scales", "g_idx"), ("qweight", "qzeros", "scales"))
_GPTQ, _AWQ = (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)  # in which nibble a neighbour is, 0 the lowest
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_SYMMETRIC = 8  # the zero point in the middle


class Read(NamedTuple):
    """``codes`` uint8 [N, K], ``scale`` fp32 [N, G], ``zero_point`` uint8 [N, G]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int


def read(keys: Sequence[str], tensors: Sequence[Tensor], stored_less_one: bool = True) -> Read:
    """The layer's codes, scales and zero points. Raises: ValueError naming the key, and what was expected.

    Args: stored_less_one: whether GPTQ's zero points are.
    """
    (qweight, qzeros, scales), g_idx = tensors[:3], tensors[3] if len(tensors) > 3 else None
    for key, tensor in zip(keys[:2], (qweight, qzeros), strict=True):
        if tensor.dtype != torch.int32 or tensor.ndim != 2:
            raise ValueError(f"{key} is an int32 matrix, not {dtype_name(tensor.dtype)} {list(tensor.shape)}")
    if scales.dtype not in _SCALES or scales.ndim != 2:
        known = ", ".join(map(dtype_name, _SCALES))
        raise ValueError(f"{keys[2]} is a matrix of {known}, not {dtype_name(scales.dtype)} {list(scales.shape)}")
    (G, N), device = scales.shape, qweight.device
    if qweight.is_meta:
        raise ValueError(f"{keys[0]} has no data to put in order: it is on meta")
    awq = qweight.shape[1] != N
    _require_four_bits(keys, qweight, qzeros, N, awq)
    require(keys[1], qzeros, torch.int32, (G, N // 8), device)
    require(keys[2], scales, scales.dtype, (G, N), device)
    K = qweight.shape[0] * (1 if awq else 8)
    group_size = _group_size(keys, K, G)
    if g_idx is not None:
        _require_in_order(keys[3], g_idx, K, group_size, device)
    require_finite(keys[2], scales)
    order = _AWQ if awq else _GPTQ
    codes = _nibbles(qweight, order) if awq else _nibbles(qweight.t(), order).t()
    zeros = _nibbles(qzeros, order)
    if stored_less_one and not awq:
        zeros = _of_v1(keys[1], zeros)
    return Read(codes.t().contiguous(), scales.t().float().contiguous(), zeros.t().contiguous(), group_size)


def _require_four_bits(keys: Sequence[str], qweight: Tensor, qzeros: Tensor, N: int, awq: bool) -> None:
    """Raise ValueError unless the columns are those of four bits, naming how many bits they are."""
    if N and qzeros.shape[1] * 8 == N and (not awq or qweight.shape[1] * 8 == N):
        return
    bits, rest = divmod(32 * qzeros.shape[1], max(1, N))
    if not rest and 1 <= bits <= 8 and bits != 4:
        raise ValueError(f"{keys[1]} has zero points of {bits} bits for the {N} columns of {keys[2]}: 4 bits are read")
    text = f"{keys[0]} is [K / 8, N] (GPTQ) or [K, N / 8] (AWQ), {keys[1]} [G, N / 8], {keys[2]} [G, N]"
    raise ValueError(f"{text}, got {list(qweight.shape)}, {list(qzeros.shape)} and N = {N}")


def _group_size(keys: Sequence[str], K: int, G: int) -> int:
    """Elements along K that share a scale. Raises: ValueError for what is no power of two."""
    size, rest = divmod(K, max(1, G))
    if rest or not size or not G:
        raise ValueError(f"{keys[2]} is [G, N] of groups of K / G, got G = {G} for the K = {K} of {keys[0]}")
    require_group(f"{keys[2]} [{G}, N] for the K = {K} of {keys[0]}", "a group's size", size)
    return size


def _require_in_order(key: str, g_idx: Tensor, K: int, group_size: int, device: torch.device) -> None:
    """Raise ValueError unless each k is in the group k // group_size."""
    if g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{key} is int32 [{K}], got {dtype_name(g_idx.dtype)} {list(g_idx.shape)}")
    require(key, g_idx, g_idx.dtype, (K,), device)
    if not torch.equal(g_idx, torch.arange(K, dtype=g_idx.dtype, device=device) // group_size):
        raise ValueError(f"{key} is not k // {group_size}: groups in an order of their own (desc_act) are not read")


def _of_v1(key: str, stored: Tensor) -> Tensor:
    """The zero points that are stored less one. Raises: ValueError for those that cannot be such."""
    if (stored == 15).any():
        raise ValueError(f"{key} has 15, the zero point 16, or 0 to some packages: it is not read")
    if (stored == _SYMMETRIC).all():
        raise ValueError(f"{key} is {_SYMMETRIC} everywhere, as in a symmetric gptq_v2 checkpoint: gptq's is read, 7")
    return stored + 1


def _nibbles(packed: Tensor, order: Sequence[int]) -> Tensor:
    """uint8 [rows, 8 columns] of int32 [rows, columns]."""
    each = [(packed >> 4 * place & 15).to(torch.uint8) for place in order]
    return torch.stack(each, dim=2).flatten(1)
