"""Bytes that autograd keeps for backward, counted by storage, and bytes that a frozen base holds."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftkern.integrations.bitsandbytes import from_bitsandbytes

MIB = 2**20


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


class Frozen(NamedTuple):
    """Bytes that a model's frozen base holds: its linear layers with all their scales and tables, and everything."""

    linears: int
    elements: int  # of the linear layers
    total: int


def frozen_bytes(model: nn.Module) -> Frozen:
    """What the frozen parameters of a PEFT model hold, with what bitsandbytes keeps beside its 4-bit layers."""
    linears = elements = 0
    total = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if base is not None:
            quantised = from_bitsandbytes(base) if hasattr(base.weight, "quant_state") else None
            held = base.weight.nbytes if quantised is None else quantised.nbytes
            total += held - base.weight.nbytes
            linears += held
            elements += math.prod(base.weight.shape if quantised is None else quantised.shape)
    return Frozen(linears, elements, total)


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
