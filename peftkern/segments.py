"""Which rows of a batch belong to which adapter: sorted once, used by every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The rows ``rows[start : start + length]`` belong to adapter ``id``."""

    id: int
    start: int
    length: int


class Plan(NamedTuple):
    """Rows of x by adapter: ``rows`` int64 [m] on x's device, ``spans`` by ascending id; rows of the base are in none.

    Within a span the rows keep their order, so an adapter sees its own rows as if it were alone.
    """

    rows: Tensor
    spans: tuple[Span, ...]


def plan_rows(ids: Tensor, device: torch.device | str = "cpu") -> Plan:
    """Sort the rows of a batch by adapter.

    Args:
        ids: int64 or int32 [M] on the CPU, -1 for the base.
        device: where x is.
    Raises: TypeError or ValueError for ids of another dtype, shape or device, or below -1.
    Deterministic: yes; the sort is stable.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter ids are int64 or int32, not {ids.dtype}")
    if ids.ndim != 1 or ids.device.type != "cpu":
        raise ValueError(f"adapter ids are [M] on the CPU, got {tuple(ids.shape)} on {ids.device}")
    order = torch.argsort(ids, stable=True)
    found, counts = torch.unique_consecutive(ids[order], return_counts=True)
    spans, start = [], 0
    for id, count in zip(found.tolist(), counts.tolist(), strict=True):
        if id < -1:
            raise ValueError(f"adapter id {id} is below -1, which is the base")
        if id >= 0:
            spans.append(Span(id, start, count))
        start += count
    return Plan(order.to(device, non_blocking=True), tuple(spans))
