"""The launch of ``fused`` for a batch whose rows have adapters of their own, and the tables that it looks them up in.

The tables are made on the host from what it knows: addresses, pitches, ranks and scalings of the factors, and where
each segment's rows begin. They are kept on the device for the next layer and the next call. With ids on a device
nothing in them depends on the ids, so a graph that captured the launch is replayed with others.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.bank_tiles import bank_rank_block
from peftkern.backends.triton.kernels.fused import fused as fused_body
from peftkern.backends.triton.launch.operands import (
    Direction,
    Launch,
    columns,
    counters,
    masking,
    matrix,
    near,
    numerics,
)
from peftkern.backends.triton.tiles import TileConfig
from peftkern.ops.bank_problem import BankOperands, Segment
from peftkern.ops.problem import LoRAOperands
from peftkern.weights import DenseWeight

_KEPT = 1024  # tables; most are of a few hundred bytes


def bank(operands: BankOperands, X: Tensor, T: Tensor, Z: Tensor, tile: TileConfig, arch: Arch) -> Launch:
    """Z [M, N], and T, all segments' [length, R] one behind the other.

    As many programs, and the same arguments, whatever ids on a device are: every adapter has chunks for all rows there,
    of which one without rows of its own stores zeros and multiplies nothing.
    """
    M, P, Q = X.shape[0], Z.shape[1], X.shape[1]
    segments = _alike([segment for segment in operands.segments if segment.length and segment.R])
    R = max((segment.R for segment in segments), default=1)
    like = segments[0].lora_A if segments else X
    direction = Direction(
        LoRAOperands(DenseWeight(operands.weight), like, like, operands.bias, None, 1.0, None, 0.0, None,
                     operands.precision),
        False, X.dtype,
    )  # fmt: skip
    places = [number for segment in segments for number in (segment.start, segment.length, segment.R)]
    factors = _on(X.device, _as_they_are, _lookups(segments))
    spans = _on(X.device, _spans, (tile.BLOCK_M, *places))
    chunks = sum(triton.cdiv(segment.length, tile.BLOCK_M) for segment in segments)
    rows, inside = (operands.rows, operands.inside) if segments else (spans, None)
    pairs = [[segment.lora_A for segment in segments], [segment.lora_B for segment in segments]]
    looked_up = (
        factors, spans, rows, None if inside is None else inside.view(torch.uint8),
        torch.empty(2, M, dtype=torch.int64, device=X.device), X, *X.stride(), like, *map(_aligned, pairs),
    )  # fmt: skip
    produced = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(P, tile.BLOCK_P)
    partials = None
    if tile.SLICES > 1:
        partials = X.new_empty(tile.SLICES * (M * P + T.numel()), dtype=torch.float32)
    arguments: dict[str, Any] = {
        **matrix("X", X, (tile.BLOCK_M, tile.BLOCK_Q), tile.tma),
        **matrix("Z", Z, (tile.BLOCK_M, tile.BLOCK_P // tile.SUBTILES), tile.tma),
        **direction.loader(tile.BLOCK_Q, tile.BLOCK_P, tile.tma),
        "T": T, "F": None, "f_strides": (), "G": looked_up, "g_strides": (),
        "counters": counters(X), "PARTIALS": partials, "t_scale": 1.0, "scaling": 1.0, "scaling_tensor": None,
        "M": M, "P": P, "Q": Q, "R": 1,
        **masking(direction.operands, active=False), **columns(direction.operands, False),
        **numerics(direction.operands, X.dtype),
        "SOURCE": "bank", "BACKWARD": False, "MASK_OUT": False, "DEPENDENT": False,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q,
        "BLOCK_R": bank_rank_block(R, operands.precision),
        "GROUP_M": tile.GROUP_M, "SUBTILES": tile.SUBTILES, "SLICES": tile.SLICES,
    }  # fmt: skip
    programs = min((chunks + produced) * tile.SLICES, arch.units * max(1, tile.resident))
    thin = sum(segment.length * segment.R for segment in segments)
    return Launch(
        fused_body, (programs,), arguments, tile.num_warps, tile.num_stages,
        reads=(X, operands.weight, *pairs[0], *pairs[1]), writes=(Z, T), flops=2 * (M * P * Q + thin * (P + Q)),
        maxnreg=255,
    )  # fmt: skip


def _alike(segments: Sequence[Segment]) -> list[Segment]:
    """Factors of one dtype, the widest that there is, which is exact, with adjacent elements in their rows."""
    wide = torch.float32 if len({segment.lora_A.dtype for segment in segments}) > 1 else None

    def row_major(factor: Tensor) -> Tensor:
        factor = near(factor if wide is None else factor.to(wide))
        return factor if factor.stride(1) == 1 else factor.contiguous()

    return [
        segment._replace(lora_A=row_major(segment.lora_A), lora_B=row_major(segment.lora_B)) for segment in segments
    ]


def _aligned(factors: Sequence[Tensor]) -> int | None:
    """1 where every row of every factor begins at a multiple of 16 bytes; None to the compiler otherwise."""
    places = [factor.stride(0) * factor.itemsize for factor in factors]
    places += [0 if factor.is_meta else factor.data_ptr() for factor in factors]
    return 1 if all(place % 16 == 0 for place in places) else None


def _lookups(segments: Sequence[Segment]) -> tuple[int, ...]:
    """FACTORS (see ``kernels.lookup``)."""
    values: list[int] = []
    for A, B, scaling, *_ in segments:
        for factor in (A, B):
            values += [0 if factor.is_meta else factor.data_ptr(), factor.stride(0)]
        values += [A.shape[0], *struct.unpack("i", bytes(ctypes.c_float(scaling)))]
    return tuple(values)


def _as_they_are(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return numbers or (0,)


def _spans(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """SPANS (see ``kernels.lookup``) of a chunk's rows, and start, length and rank of each segment."""
    rows, *fields = numbers
    spans, chunks, origin = [], [], 0
    for e, (start, length, R) in enumerate(zip(fields[::3], fields[1::3], fields[2::3], strict=True)):
        spans += [start, length, origin, 0]
        chunks += [number for i in range(0, length, rows) for number in (e, i)]
        origin += length * R
    return (len(fields) // 3, len(chunks) // 2, origin, 0, *spans, *chunks)


_Key = tuple[torch.device, Callable[[tuple[int, ...]], tuple[int, ...]], tuple[int, ...]]
_tables: OrderedDict[_Key, Tensor] = OrderedDict()
_captured: dict[_Key, Tensor] = {}  # what a graph reads is kept for good


def _on(
    device: torch.device, make: Callable[[tuple[int, ...]], tuple[int, ...]], numbers: tuple[int, ...]
) -> Tensor:  # fmt: skip
    """``make(numbers)`` on a device: that of an earlier call, or a new one."""
    if device.type != "cuda":
        return torch.tensor(make(numbers), dtype=torch.int64, device=device)
    key = device, make, numbers
    capturing = torch.cuda.is_current_stream_capturing()
    found = _captured.get(key)
    if found is None:
        found = _tables.pop(key, None)
        if found is None and capturing:  # a copy from the host could not be captured: a warm call makes this one faster
            return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in make(numbers)])
        found = _copied(device, make(numbers)) if found is None else found
        (_captured if capturing else _tables)[key] = found
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    if not capturing:
        found.record_stream(torch.cuda.current_stream(device))  # its memory is not used again before this call is done
    return found


def _copied(device: torch.device, values: tuple[int, ...]) -> Tensor:
    """By a stream of its own, which alone is waited for: what is queued elsewhere goes on, and any may read it."""
    stream = _stream(device)
    with torch.cuda.stream(stream):
        table = torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    stream.synchronize()
    return table


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
