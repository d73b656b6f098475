"""Tables to be shipped for chips that nobody has measured: the analytic estimate over the large models' shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from peftkern.backends.triton import select, tables
from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.tables import Entry, Table
from peftkern.backends.triton.tiles import Pass
from peftkern.ops.problem import Problem
from peftkern.testing.problems import LAYERS, ROWS, Layer

RANKS = (16, 64)
BUCKETS = tuple(2**exponent for exponent in range(max(ROWS).bit_length()))
ADAPTERS = (torch.float32, torch.bfloat16)


def layers() -> list[Layer]:
    """Those of the large models, each shape once."""
    large = [layer for layer in LAYERS if layer.name.startswith(("llama3", "qwen2.5"))]
    return list({(layer.K, layer.N): layer for layer in large}.values())


def passes() -> Iterator[Pass]:
    """Every direction that a shipped table of estimates has an entry for."""
    features = itertools.product(layers(), RANKS, ADAPTERS, (False, True), (False, True), BUCKETS)
    for layer, R, adapter, dropout, backward, M in features:
        yield Pass(Problem("cuda", M, layer.K, layer.N, R, torch.bfloat16, adapter, dropout=dropout), backward)


def estimated(arch: Arch) -> Table:
    """The table of a chip's estimates."""
    entries: dict[str, dict[int, Entry]] = {}
    for launch in passes():
        entry = Entry(select.estimated(launch, arch), measured=False)
        entries.setdefault(tables.key_of(launch), {})[launch.problem.M] = entry
    return Table(arch.name, "", "", entries)


def chip(name: str) -> Arch:
    """The chip of that name. Raises: ValueError for an unknown one."""
    known = [arch for arch in ARCHES if arch != "interpreter"]
    if name not in known:
        raise ValueError(f"--arch {name} is not one of {', '.join(known)}")
    return ARCHES[name]
