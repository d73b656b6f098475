"""Frozen weights packed once: fp32 panels in the kernels' own order, for y (W^T), for dx (W), or for both.

A copy belongs to one weight tensor and dies with it. It is used while the tensor's address, shape, strides, dtype and
version are what they were, and SAMPLES scattered words of its memory too: PEFT merges by ``weight.data += delta``,
which changes neither address nor version. What the samples cannot see is a write through ``.data`` (or another alias
with a version counter of its own) that changes a small part of the weight alone: one that changes a fraction f of the
words is missed with probability (1 - f)^512, 0.6 % at f = 1 %. ``drop()`` after such a write is always right.

A tensor is packed when it comes for the second time in the same direction, so that autocast's temporaries never are.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from peftkern import _env

SAMPLES = 512  # words compared at every call
_SEEN = 4096  # tensors remembered before they are packed

_lock = threading.Lock()
_entries: dict[tuple[int, bool], _Entry] = {}


class _Entry:
    """One weight in one direction."""

    def __init__(self, key: tuple[int, bool], weight: Tensor) -> None:
        self.owner = weakref.ref(weight, lambda _: _forget(key, self))
        self.state: tuple[Any, ...] = ()
        self.samples = torch.zeros(SAMPLES, dtype=torch.int32)
        self.panels: Tensor | None = None


def _forget(key: tuple[int, bool], entry: _Entry) -> None:
    """The weight is gone. Runs wherever the last reference ends, under the lock too: dict.pop alone needs none."""
    if _entries.get(key) is entry:
        _entries.pop(key, None)


def panels(extension: Any, weight: Tensor, dtype: int, strides: tuple[int, int, bool], forward: bool) -> Tensor | None:
    """The packed copy of ``weight`` for y or for dx, or None where the policy or a first call says no.

    Args: extension: peftkern._C; weight: [N, K]; dtype: its number in problem.h; strides: its address, the distance of
        its rows, and whether it is its columns that are contiguous.
    """
    policy = _env.settings().prepack
    if policy == "off" or (policy == "forward" and not forward) or weight.is_inference():
        return None
    key = id(weight), forward
    state = (weight._version, weight.shape, weight.dtype, strides, extension.instruction_set())
    with _lock:
        entry = _entries.get(key)
        if entry is None or entry.owner() is not weight:
            if len(_entries) >= _SEEN:
                return None
            _entries[key] = entry = _Entry(key, weight)
            entry.state = state
            return None
        same = extension.sample(strides[0], _bytes(weight), entry.samples.data_ptr(), SAMPLES)
        if entry.panels is None or not same or entry.state != state:
            entry.state = state
            entry.panels = _pack(extension, weight, dtype, strides, forward)
        return entry.panels


def _bytes(weight: Tensor) -> int:
    """From the first element to the last, whatever the strides."""
    (N, K), (by_n, by_k) = weight.shape, weight.stride()
    return ((N - 1) * by_n + (K - 1) * by_k + 1) * weight.element_size()


def _pack(extension: Any, weight: Tensor, dtype: int, strides: tuple[int, int, bool], forward: bool) -> Tensor:
    N, K = weight.shape
    P, Q = (N, K) if forward else (K, N)
    width = extension.panel_columns()
    packed = torch.empty(-(-P // width), Q, width, dtype=torch.float32)
    extension.pack_weight(K, N, dtype, *strides, forward, torch.get_num_threads(), packed.data_ptr())
    return packed


def held_bytes() -> int:
    """Bytes in packed copies now."""
    return sum(entry.panels.nbytes for entry in list(_entries.values()) if entry.panels is not None)


def drop() -> None:
    """Let go of every packed copy; the next calls pack again where the policy says so."""
    with _lock:
        _entries.clear()
