"""Named problems: the layers, rows, ranks and probabilities that tests, the tuner and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A linear layer K -> N."""

    name: str
    K: int
    N: int


LAYERS = (
    Layer("llama3-8b.qo", 4096, 4096),
    Layer("llama3-8b.kv", 4096, 1024),
    Layer("llama3-8b.up", 4096, 14336),
    Layer("llama3-8b.down", 14336, 4096),
    Layer("qwen2.5-7b.qo", 3584, 3584),
    Layer("qwen2.5-7b.kv", 3584, 512),
    Layer("qwen2.5-7b.up", 3584, 18944),
    Layer("qwen2.5-7b.down", 18944, 3584),
    Layer("llama3-70b.qo", 8192, 8192),
    Layer("llama3-70b.kv", 8192, 1024),
    Layer("llama3-70b.up", 8192, 28672),
    Layer("llama3-70b.down", 28672, 8192),
    Layer("smollm2-135m.qo", 576, 576),
    Layer("smollm2-135m.kv", 576, 192),
    Layer("smollm2-135m.up", 576, 1536),
    Layer("smollm2-135m.down", 1536, 576),
    Layer("odd", 1000, 1100),
)
# Small enough for Triton's interpreter; no extent is a multiple of anything.
SMALL_LAYERS = (Layer("small.65", 65, 33), Layer("small.129", 129, 257))

ROWS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
RANKS = (1, 4, 8, 16, 24, 32, 64, 128, 256, 512)
SMALL_RANKS = (1, 2, 3, 7, 16, 24, 64, 512)
DROPOUT = (0.0, 0.05, 0.1)
# A CPU is asked for no more than this many multiplications.
CPU_LIMIT = 2**30


def layer(name: str) -> Layer:
    """The layer of that name. Raises: ValueError for an unknown one."""
    for candidate in (*LAYERS, *SMALL_LAYERS):
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown layer {name!r}; known: {', '.join(c.name for c in (*LAYERS, *SMALL_LAYERS))}")
