"""The dropout mask, frozen: the same bits in every backend, never stored.

Element ``(row, col)`` of the flattened x is kept iff ``lane >= t`` with

    t      = round(65536 p)
    words  = Philox4x32-10(counter = (col // 8, row, offset_lo, offset_hi), key = (seed_lo, seed_hi))
    lane   = 16-bit half number ``col % 8`` of the four words (word 0 low half, word 0 high half, word 1 low, ...)

and kept elements are scaled by ``65536 / (65536 - t)``. ``seed`` and ``offset`` are the two int64 of ``rng_state``.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The number of the 65536 lane values that drop an element."""
    return round(65536 * p)


def scale(p: float) -> float:
    """The factor of a kept element; 0 where everything is dropped."""
    kept = 65536 - threshold(p)
    return 65536 / kept if kept else 0.0


def draw_rng_state(device: torch.device) -> Tensor:
    """Two int64 (seed, offset) from torch's default generator of ``device``; no host synchronisation."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds on int64 tensors that hold 32-bit words; products wrap at 64 bits, as they must."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ k0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def keep_mask(M: int, K: int, p: float, rng_state: Tensor) -> Tensor:
    """The keep mask that every backend applies to an x of M rows and K columns.

    Formula: element (row, col) is kept iff its 16-bit Philox4x32-10 lane is at least round(65536 p); kept elements are
        scaled by 65536 / (65536 - round(65536 p)). The module's docstring defines it in full.
    Args: M, K: shape of the flattened x; p: probability; rng_state: int64 [2] (seed, offset).
    Returns: bool [M, K] on rng_state's device, True where kept.
    Deterministic: the same bits for the same arguments on every device.
    """
    device = rng_state.device
    seed, offset = rng_state.unbind()
    row = torch.arange(M, device=device).unsqueeze(1)
    group = torch.arange((K + 7) // 8, device=device).unsqueeze(0)
    zero = torch.zeros_like(row + group)
    counter = [zero + group, zero + row, zero + (offset & _WORD), zero + ((offset >> 32) & _WORD)]
    words = _philox(counter, [seed & _WORD, (seed >> 32) & _WORD])
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return lanes.flatten(1)[:, :K] >= threshold(p)
