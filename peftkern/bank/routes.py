"""``Route``: which adapter each sequence or token of a batch takes, worked out once and used by every layer."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.bank.adapter import Adapter
from peftkern.segments import Routing, on_device, plan_on_device, plan_rows

Ids = Tensor | Sequence[Any]
_current: contextvars.ContextVar[Route | None] = contextvars.ContextVar("peftkern_route", default=None)


def current_route() -> Route | None:
    """The route of the innermost ``with route(...)`` of this context (thread, task)."""
    return _current.get()


class Route:
    """A batch's adapters, as they are when it is made. Made by ``route``; see there.

    Attributes: ``ids`` [batch] or [batch, tokens], int64 on the CPU or as they were on a device; ``adapters`` by id.
    Backward needs no route, but a checkpointed layer that runs again in it does: call ``backward()`` within the block.
    """

    def __init__(self, bank: object, ids: Tensor, adapters: dict[int, Adapter]) -> None:
        self.bank, self.ids, self.adapters = bank, ids, adapters
        self._plans: dict[tuple[torch.Size, torch.device], Routing] = {}
        self._batches: dict[int, int] = {}
        self._tokens: list[contextvars.Token[Route | None]] = []

    def __enter__(self) -> Route:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        _current.reset(self._tokens.pop())

    def plan(self, leading: torch.Size, device: torch.device) -> Routing:
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
