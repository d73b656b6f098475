"""The tables that a bank's launches look adapters up in, and how they get to a device.

They are made on the host from what it knows: addresses, pitches, ranks and scalings of the factors, and where each
segment's rows begin. They are kept on the device for the next layer and the next call. With ids on a device nothing in
them depends on the ids, so a graph that captured a launch is replayed with others. What keys the masks is new in every
call, and sent along with it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.triton.kernels import dropout as drop
from peftkern.call import Update

_KEPT = 1024  # tables; most are of a few hundred bytes
_Numbers = tuple[int, ...]
FIELDS = 7  # of a segment in PIECES


def lookups(updates: Sequence[Update]) -> _Numbers:
    """FACTORS (see ``kernels.lookup``)."""
    values: list[int] = []
    for A, B, _, _, _, scaling, *_ in updates:
        for factor in (A, B):
            values += [0 if factor.is_meta else factor.data_ptr(), factor.stride(0)]
        values += [A.shape[0], bits(scaling)]
    return tuple(values)


def bits(value: float) -> int:
    """The bits of a number in fp32."""
    return int(struct.unpack("i", bytes(ctypes.c_float(value)))[0])


def masking(updates: Sequence[Update], device: torch.device) -> dict[str, Any]:
    """The DROP plug and its operand, ``drops`` (see ``kernels.lookup``)."""
    numbers: list[int] = []
    for update in updates:
        p = update.dropout_p
        assert update.span is not None
        numbers += [*update.span[2:], dropout.threshold(p), bits(dropout.scale(p))]
    return {"DROP": drop.philox, "drop_operands": (_sent(device, numbers),)}


def _sent(device: torch.device, numbers: list[int]) -> Tensor:
    """``numbers`` on a device, where nobody will ask for them again; the host does not wait."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _filled(device, numbers)
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").pin_memory().to(device, non_blocking=True)


def _filled(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """``numbers`` on a device while a graph is captured, when nothing can be copied from the host."""
    return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in numbers])


def as_they_are(numbers: _Numbers) -> _Numbers:
    """The table itself; of nothing, one that has an address."""
    return numbers or (0,)


def spans(numbers: _Numbers) -> _Numbers:
    """SPANS (see ``kernels.lookup``) of a chunk's rows, and start, length and rank of each segment."""
    rows, *fields = numbers
    spans: list[int] = []
    chunks: list[int] = []
    origin = 0
    for e, (start, length, R) in enumerate(zip(fields[::3], fields[1::3], fields[2::3], strict=True)):
        spans += [start, length, origin, 0]
        chunks += [number for i in range(0, length, rows) for number in (e, i)]
        origin += length * R
    return (len(fields) // 3, len(chunks) // 2, origin, 0, *spans, *chunks)


def pieces(numbers: _Numbers) -> _Numbers:
    """PIECES (see ``kernels.bank_grad``) of a run's rows, a piece's share of a rank, and FIELDS of each segment."""
    rows, block, *fields = numbers
    made: list[int] = []
    place = 0
    for e in range(len(fields) // FIELDS):
        _, length, _, R, *_ = fields[e * FIELDS : (e + 1) * FIELDS]
        runs = count_runs(length, rows)
        for r0 in range(0, R, block):
            made += [number for run in range(runs) for number in (e, r0, run * rows, run, runs, place)]
            place += runs if runs > 1 else 0
    return (len(fields) // FIELDS, *fields, *made)


def count_runs(length: int, rows: int) -> int:
    """Runs of ``rows`` rows of a segment; one where it has none, which stores the zeros."""
    return max(1, -(-length // rows))


_Key = tuple[torch.device, Callable[[_Numbers], _Numbers], _Numbers]
_tables: OrderedDict[_Key, Tensor] = OrderedDict()
_captured: dict[_Key, Tensor] = {}  # what a graph reads is kept for good


def on(device: torch.device, make: Callable[[_Numbers], _Numbers], numbers: _Numbers) -> Tensor:
    """``make(numbers)`` on a device: that of an earlier call, or a new one."""
    if device.type != "cuda":
        return torch.tensor(make(numbers), dtype=torch.int64, device=device)
    key = device, make, numbers
    capturing = torch.cuda.is_current_stream_capturing()
    found = _captured.get(key)
    if found is None:
        found = _tables.pop(key, None)
        if found is None and capturing:  # a warm call makes this one faster
            return _filled(device, make(numbers))
        if found is None:
            # From a thread of its own, as ``counters``: a pool that the caller's allocates from may take it back.
            found = _thread().submit(_copied, device, make(numbers)).result()
        (_captured if capturing else _tables)[key] = found
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    if not capturing:
        found.record_stream(torch.cuda.current_stream(device))  # its memory is not used again before this call is done
    return found


def _copied(device: torch.device, values: _Numbers) -> Tensor:
    """By a stream of its own, which alone is waited for: what is queued elsewhere goes on, and any may read it."""
    stream = _stream(device)
    with torch.cuda.stream(stream):
        table = torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    stream.synchronize()
    return table


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
