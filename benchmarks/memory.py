"""Bytes that autograd keeps for backward, counted by storage, and the allocator's settings for a benchmark."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MIB = 2**20
# mallopt's numbers and values (malloc.h): all from the heap, which is never given back and grows by 64 MiB at a time
_KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 * MIB)}


def keep_freed_memory() -> dict[str, int] | str:
    """Have glibc's malloc keep what is freed, for the whole process: else steps are timed with their page faults.

    By default, whether a step gives memory back and faults it in again depends on the order of its allocations.

    Returns: what was set, for the record; a sentence where this is not glibc.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the system's own: not glibc"
    for name, (number, value) in _KEEP.items():
        if libc.mallopt(number, value) != 1:
            raise OSError(f"mallopt({name}, {value}) is refused")
    return {name: value for name, (_, value) in _KEEP.items()}


@dataclass(frozen=True)
class SavedBytes:
    """``total``: bytes of all storages; ``by_dtype``: the same per dtype (of a tensor in the storage)."""

    total: int
    by_dtype: Counter[str] = field(default_factory=Counter)

    @property
    def mib(self) -> float:
        """``total`` in MiB."""
        return self.total / MIB


class _Held:
    """One saved tensor, for as long as autograd keeps it; detached, since a saved output would hold its own node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def saved_for_backward(forward: Callable[[], object], model: nn.Module | None = None) -> SavedBytes:
    """What ``forward`` leaves saved for backward, beyond the model itself.

    Each storage counts once and in full, however many views of it are saved; storages of ``model``'s parameters and
    buffers do not count.

    Args:
        forward: runs the forward pass and returns its result, which keeps the graph alive while we count.
        model: the module whose parameters and buffers are not activations.
    """
    own = () if model is None else (*model.parameters(), *model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        packed = _Held(tensor)
        held.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        result = forward()
    sizes: dict[int, int] = {}
    by_dtype: Counter[str] = Counter()
    for packed in held:  # what the graph still holds; what forward dropped on its way is gone
        storage = packed.tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known and storage.data_ptr() not in sizes:
            sizes[storage.data_ptr()] = storage.nbytes()
            by_dtype[str(packed.tensor.dtype).removeprefix("torch.")] += storage.nbytes()
    del result
    return SavedBytes(sum(sizes.values()), by_dtype)
