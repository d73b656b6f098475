"""Which binaries are put on record: the combinations of the slots that are compiled for every chip."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.tiles import (
    LIBRARY,
    SCHEDULES,
    SHARED,
    SPLIT,
    Choice,
    Pass,
    TileConfig,
    choices,
    grad_gives_t,
    pressure,
    supports,
)
from peftkern.call import Problem

_PACKED: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("nf4", ()), ("int4", ()), ("fp8", ()), ("nf4", (("double_quant", False),)), ("fp8", (("scaling", "block"),)),
    ("fp4", ()), ("int4", (("group_size", 16),)), ("nf4", (("blocksize", 32),)), ("fp8", (("scaling", "tensor"),)),
)  # fmt: skip


_E2M1: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (("mxfp4", ()), ("nvfp4", ()))


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination of the slots; body: a schedule (of ``fused``), "onto" (Z is there), "bank", "shrink", ..."""

    body: str
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.bfloat16
    precision: str = "base"
    weight_format: str = "dense"
    dropout: bool = False
    bias: bool = False
    backward: bool = False
    M: int = 8192
    K: int = 4096
    N: int = 4096
    R: int = 16
    tile: TileConfig | None = None  # of a schedule; the selected one where None
    options: tuple[tuple[str, Any], ...] = ()  # of the weight's format

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        features = [name[self.dtype], f"{name[self.adapter_dtype]}/{self.precision}", self.weight_format]
        features += [word for word in ("dropout", "bias", "backward") if getattr(self, word)]
        features += [f"{name}={value}" for name, value in self.options]
        return f"{self.body} {' '.join(features)} M={self.M} R={self.R}{'' if self.K % 8 == 0 else f' K={self.K}'}"

    @property
    def launch(self) -> Pass:
        """The direction, as schedules and tiles see it."""
        problem = Problem(
            "cuda", self.M, self.K, self.N, self.R, self.dtype, self.adapter_dtype, self.weight_format, self.dropout,
            self.bias, self.bias, self.precision, several_adapters=self.body.startswith("bank"),
            scaled_steps="x" in self.weight_format and ("scaling", "block") in self.options,
        )  # fmt: skip
        return Pass(problem, self.backward)


def variants(arch: Arch) -> Iterator[Variant]:
    """Every schedule on every shipped tile: forward and backward with the most that it bears, and a usual call."""
    usual = Variant("", adapter_dtype=torch.float32, dropout=True)
    for base in _on_tiles(usual, arch):
        yield from _hardest(base, arch)
    yield from _decoded(arch)
    for dtype, adapter, precision in (
        (torch.bfloat16, torch.float32, "base"),
        (torch.float16, torch.float32, "fp32"),
        (torch.float32, torch.float32, "base"),
    ):
        thin = Variant("", dtype, adapter, precision, dropout=True, bias=True)
        yield replace(thin, body="shrink", bias=False)
        yield replace(thin, body="shrink", bias=False, M=64, R=512)
        yield replace(thin, body="grad")
        yield replace(thin, body="grad", R=512)
        if grad_gives_t(dtype, thin.R, precision, arch):
            yield replace(thin, body="grad with t", dropout=False)
        yield Variant("kept", dtype, dropout=True)
        yield replace(thin, body="onto", bias=False)
        yield replace(thin, body="onto", bias=False, backward=True)
        if arch.protocols:
            yield from _banked(Variant("bank", dtype, adapter, precision, R=64))
    for M in (16, 128, 8192) if arch.protocols else ():
        yield Variant("bank", torch.bfloat16, torch.float32, "fp32", bias=True, M=M, R=5)
    if arch.fp8:
        yield from _coded(arch)


def _banked(base: Variant) -> Iterator[Variant]:
    """Serving and training of several adapters, with dropout where it is harder."""
    for M, K in itertools.product((16, 128, 8192), (4096, 4100)):
        yield replace(base, bias=True, M=M, K=K, N=K)
    for M in (16, 8192):
        yield replace(base, bias=True, dropout=True, M=M, K=4100, N=4100)
    for M in (16, 128, 8192):
        yield replace(base, backward=True, dropout=True, M=M)
    yield replace(base, backward=True)
    for R in (16, 64):
        yield replace(base, body="bank_grad", dropout=True, R=R)


def _on_tiles(usual: Variant, arch: Arch) -> Iterator[Variant]:
    """A call on every tile that multiplies its weight as it is stored, by every schedule, in bf16 and fp32."""
    for schedule, dtype in itertools.product(SCHEDULES, (torch.bfloat16, torch.float32)):
        legal = [c for M in (16, 8192) for c in choices(replace(usual, dtype=dtype, M=M, dropout=False).launch, arch)]
        tiles_of = {c.tile for c in legal if c.schedule == schedule and not c.decoded}
        for tile in sorted(tiles_of, key=str):
            same = schedule != SHARED and tile.resident > 0  # as another tile's: only the grid differs
            if same or tile.SLICES not in (1, 4) or (schedule == LIBRARY and tile.BLOCK_M != 64):
                continue
            yield replace(usual, body=schedule, dtype=dtype, tile=tile, M=16 if tile.BLOCK_M == 16 else 8192)


def _decoded(arch: Arch) -> Iterator[Variant]:
    """Packed formats, on every tile one, in turn, and another on every chip: they are too many for each on each."""
    first = list(ARCHES).index(arch.name)
    usual = Variant("", adapter_dtype=torch.float32, weight_format="nf4", dropout=True)
    for formats in (_PACKED, _E2M1):
        turn = itertools.islice(itertools.cycle(formats), 3 * first, None)
        for base in _on_tiles(usual, arch):
            if base.body != LIBRARY and base.tile is not None and base.tile.SLICES == 1:
                weight_format, options = next(turn)
                base = replace(base, weight_format=weight_format, options=options)
                calls = list(_hardest(base, arch, (weight_format,)))
                yield from calls[: 3 if base.dtype == torch.bfloat16 else 2]
    grouped = itertools.cycle(itertools.product((16, 64), (0, 1)))
    for base in _on_tiles(replace(usual, weight_format="int8"), arch):
        if base.body == SPLIT:
            group_size, way = next(grouped)
            base = replace(base, options=(("group_size", group_size),))
            yield from list(_hardest(base, arch, ("int8",)))[way : way + 1]


def _coded(arch: Arch) -> Iterator[Variant]:
    """base_compute "fp8": a usual call and the one of highest pressure on every tile that bears it."""
    usual = Variant("split", adapter_dtype=torch.float32, weight_format="fp8xfp8", dropout=True)
    most = replace(usual, dtype=torch.float16, precision="fp32", R=64)
    for backward in (False, True):
        yield replace(usual, body="quantise", backward=backward)
        for options, v in itertools.product(((), (("scaling", "block"),)), (usual, most)):
            v = replace(v, backward=backward, bias=not backward, options=options)
            for M in (16, 8192):
                for tile in dict.fromkeys(choice.tile for choice in choices(replace(v, M=M).launch, arch)):
                    if not tile.resident and (tile.BLOCK_M == 16) == (M == 16):
                        yield replace(v, tile=tile, M=M)


def _hardest(base: Variant, arch: Arch, weight_formats: tuple[str, ...] = ("int8", "dense")) -> Iterator[Variant]:
    """The forward and the backward variant of highest pressure that the tile bears, and ``base``."""
    assert base.tile is not None
    choice = Choice(base.body, base.tile)
    found: dict[bool, tuple[int, Variant]] = {}
    dtypes = (torch.float16, torch.bfloat16) if base.dtype != torch.float32 else (torch.float32,)
    slots = itertools.product(dtypes, ("fp32", "base"), weight_formats, (True, False), (64, 32, 16), (True, False))
    for dtype, precision, weight_format, dropout, R, backward in slots:
        v = replace(base, dtype=dtype, precision=precision, weight_format=weight_format, dropout=dropout, R=R,
                    backward=backward, bias=not backward)  # fmt: skip
        if supports(v.launch, choice, arch) is None:
            now = pressure(v.launch, choice)
            if backward not in found or now > found[backward][0]:
                found[backward] = now, v
    hardest = [v for _, v in found.values()]
    yield from hardest
    if base not in hardest and supports(base.launch, choice, arch) is None:
        yield base
