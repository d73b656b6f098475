"""``route``: which adapter each sequence or token of a batch takes, worked out once and used by every layer."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkern.segments import Plan, on_device, plan_on_device, plan_rows

if TYPE_CHECKING:
    from peftkern.nn.adapter_bank import Adapter, AdapterBank

Ids = Tensor | Sequence[Any]
_current: contextvars.ContextVar[Route | None] = contextvars.ContextVar("peftkern_route", default=None)
live_banks: weakref.WeakSet[AdapterBank] = weakref.WeakSet()


def route(ids: Ids, bank: AdapterBank | None = None) -> Route:
    """Send the sequences or tokens of a batch to their adapters: ``with peftkern.route(ids): model(...)``.

    Args:
        ids: one entry per sequence [batch], or per token [batch, tokens]: adapters' names, None for the base, or their
            ids (``bank.id_of(name)``), -1 for the base; or an int64 or int32 tensor of ids, which is copied. One on a
            GPU stays there, and nothing waits for it: a graph that captures the route too is replayed with other ids
            (and with the dropout masks that it captured: they are keyed by numbers of the host).
            The rows of an id that is no adapter's are then the base's, or with PEFTKERN_CHECK_IDS=1 an error. Where
            Triton does not run it costs as if all rows were each adapter's; a list is faster, if there is one.
        bank: whose adapters are meant; without it, the only bank that is alive in the process.
    Returns: a Route: a context manager, and what the ``route`` argument of ``MultiLoRALinear`` takes. It holds on to
        its adapters: one that is removed or replaced meanwhile is used until the route is dropped.
    Raises: ValueError for an unknown name or id, ragged ids, or where it is not clear which bank is meant; TypeError
        for ids of another kind.
    """
    if bank is None:
        if len(live_banks) > 1:
            gc.collect()
        found = list(live_banks)
        if len(found) != 1:
            raise ValueError(f"{len(found)} adapter banks are alive: say which one is meant, route(ids, bank)")
        bank = found[0]
    return Route(bank, *bank.resolve(ids))


def current_route() -> Route | None:
    """The route of the innermost ``with route(...)`` of this context (thread, task)."""
    return _current.get()


class Route:
    """A batch's adapters, as they are when it is made. Made by ``route``; see there.

    Attributes: ``ids`` [batch] or [batch, tokens], int64 on the CPU or as they were on a device; ``adapters`` by id.
    Backward needs no route, but a checkpointed layer that runs again in it does: call ``backward()`` within the block.
    """

    def __init__(self, bank: AdapterBank, ids: Tensor, adapters: dict[int, Adapter]) -> None:
        self.bank, self.ids, self.adapters = bank, ids, adapters
        self._plans: dict[tuple[torch.Size, torch.device], Plan] = {}
        self._batches: dict[int, int] = {}
        self._tokens: list[contextvars.Token[Route | None]] = []

    def __enter__(self) -> Route:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        _current.reset(self._tokens.pop())

    def plan(self, leading: torch.Size, device: torch.device) -> Plan:
        """The rows of an x of shape [*leading, K] by adapter, kept for the next layer.

        Raises: ValueError where the ids fit neither its tokens nor its sequences.
        """
        key = (leading, device)
        if key not in self._plans:
            ids = self._by_row(leading)
            self._plans[key] = plan_on_device(ids, tuple(self.adapters)) if on_device(ids) else plan_rows(ids, device)
        return self._plans[key]

    def _by_row(self, leading: torch.Size) -> Tensor:
        ids = self.ids
        if ids.shape == leading or leading == (ids.numel(),):
            return ids.reshape(-1)
        if ids.ndim == 1 and len(leading) > 1 and leading[0] == len(ids):
            return ids.repeat_interleave(leading[1:].numel())
        raise ValueError(
            f"the route has ids {list(ids.shape)}, one per sequence or per token, and x has leading dimensions "
            f"{list(leading)}"
        )

    def batch_number(self, adapter: Adapter) -> int:
        """The number of earlier routes that have drawn this adapter's dropout: one for all layers, also again."""
        if adapter.id not in self._batches:
            self._batches[adapter.id] = adapter.next_batch()
        return self._batches[adapter.id]
