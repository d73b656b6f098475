"""The rows of a batch that belong to each adapter: sorted once, used by every layer.

Ids on the host are counted there, and a plan says how many rows each adapter has. Ids on a device stay there: nothing
waits for it, so nobody on the host knows the counts, and a plan has room for every row with every adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern import _env


class Segment(NamedTuple):
    """The rows ``rows[start : start + length]`` belong to adapter ``id``."""

    id: int
    start: int
    length: int


class Routing(NamedTuple):
    """Rows of x by adapter: ``rows`` int64 [m] on x's device, ``spans`` by ascending id; rows of the base are in none.

    Within a span the rows keep their order, so an adapter sees its own rows as if it were alone. ``inside`` bool [m]
    is there where the ids are on a device: which of a span's rows are the adapter's, those at its beginning.
    """

    rows: Tensor
    spans: tuple[Segment, ...]
    inside: Tensor | None = None


def check_dtype(ids: Tensor) -> None:
    """Raise TypeError for ids of another dtype than int64 or int32."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter ids are int64 or int32, not {ids.dtype}")


def plan_rows(ids: Tensor, device: torch.device | str = "cpu") -> Routing:
    """Sort the rows of a batch by adapter.

    Args:
        ids: int64 or int32 [M] on the CPU, -1 for the base.
        device: where x is.
    Raises: TypeError or ValueError for ids of another dtype, shape or device, or below -1.
    Deterministic: yes; the sort is stable.
    """
    check_dtype(ids)
    if ids.ndim != 1 or ids.device.type != "cpu":
        raise ValueError(f"adapter ids are [M] on the CPU, got {tuple(ids.shape)} on {ids.device}")
    order = torch.argsort(ids, stable=True)
    found, counts = torch.unique_consecutive(ids[order], return_counts=True)
    spans, start = [], 0
    for id, count in zip(found.tolist(), counts.tolist(), strict=True):
        if id < -1:
            raise ValueError(f"adapter id {id} is below -1, which is the base")
        if id >= 0:
            spans.append(Segment(id, start, count))
        start += count
    return Routing(order.to(device, non_blocking=True), tuple(spans))


def on_device(ids: Tensor) -> bool:
    """True where reading the ids would make the host wait."""
    return ids.device.type != "cpu"


def plan_on_device(ids: Tensor, adapters: Sequence[int]) -> Routing:
    """The rows of each of ``adapters``, worked out where the ids are, in launches whose number does not depend on them.

    An id that is none of them is bounded: its row is the base's. With PEFTKERN_CHECK_IDS=1 it is an error, for which
    the host waits. A plan made in a captured graph follows, at each replay, the ids that lie in the same memory.

    Args: ids: int64 or int32 [M]. adapters: the ids that there are.
    Raises: TypeError or ValueError for ids of another dtype or shape; ValueError for an unknown id, if checked.
    Deterministic: yes.
    """
    check_dtype(ids)
    if ids.ndim != 1:
        raise ValueError(f"adapter ids are [M], got {tuple(ids.shape)}")
    if _env.settings().check_ids:
        for id in torch.unique(ids).tolist():
            if id != -1 and id not in adapters:
                raise ValueError(f"adapter id {id} is none of {list(adapters)}, and not -1, the base")
    M = len(ids)
    if not adapters:
        return Routing(ids.new_empty(0, dtype=torch.int64), ())
    mine = torch.stack([ids == id for id in adapters])
    rows = torch.argsort(~mine, dim=1, stable=True)
    inside = torch.arange(M, device=ids.device) < mine.sum(1, keepdim=True)
    return Routing(rows.flatten(), tuple(Segment(id, e * M, M) for e, id in enumerate(adapters)), inside.flatten())
