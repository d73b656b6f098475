"""Weights whose loader holds more than int8's: the tiles that decode them, and what is legal, without Triton."""

from __future__ import annotations

import torch

from peftkern.backends.triton.arch import Arch
from peftkern.call import Problem

FORMATS = ("int4", "nf4", "fp4", "fp8")
_ANY, _NO = 99, -1
# As in ``tiles``. Eight warps: what is decoded is few registers a thread.
SHIPPED: dict[str, dict[tuple[int, int, int, int, int], tuple[int, int, int]]] = {
    "sm_80": {
        (16, 64, 64, 8, 3): (14, _NO, _ANY),
        (32, 64, 64, 8, 3): (14, _NO, _ANY),
        (64, 64, 64, 8, 3): (8, 7, _ANY),
        (64, 128, 64, 8, 3): (8, _NO, _ANY),
        (128, 128, 32, 8, 4): (_NO, _NO, _ANY),
    },
    "sm_90": {
        (16, 64, 64, 8, 3): (14, _NO, _ANY),
        (32, 64, 64, 8, 3): (12, _NO, _NO),
        (32, 128, 64, 8, 3): (_NO, _NO, _ANY),
        (64, 64, 64, 8, 3): (13, 13, _ANY),
        (64, 128, 64, 8, 3): (12, 12, _ANY),
        (128, 128, 64, 8, 3): (12, 12, _ANY),
    },
    "sm_100": {
        (16, 64, 64, 8, 3): (14, _NO, _ANY),
        (32, 64, 64, 8, 4): (12, _NO, _NO),
        (32, 128, 64, 8, 3): (_NO, _NO, _ANY),
        (64, 64, 64, 8, 3): (12, _NO, _ANY),
        (128, 64, 64, 8, 3): (13, 13, _NO),
        (128, 128, 64, 8, 3): (12, 11, _ANY),
    },
}
# As in ``tiles``: by no tensor cores, for rows and weights of fp32.
SHIPPED_FP32: dict[tuple[int, int, int, int, int], tuple[int, int, int]] = {
    (16, 32, 16, 8, 3): (_ANY, _NO, _ANY),
}


def tiles_on(arch: Arch, problem: Problem) -> dict[tuple[int, int, int, int, int], tuple[int, int, int]]:
    """The shipped tiles with their limits."""
    found = SHIPPED.get(arch.name, {})
    return SHIPPED_FP32 if found and problem.dtype == torch.float32 else found


def refusal(problem: Problem, arch: Arch) -> str | None:
    """The reason why no tile decodes this weight, or None."""
    if arch.name == "interpreter" or problem.weight_format not in FORMATS:
        return None
    if arch.name not in SHIPPED:
        return f"no tile is known that decodes {problem.weight_format} on {arch.name}"
    if problem.weight_format in ("nf4", "fp4") and problem.K % 16:
        return f"rows of {problem.K} begin within a run of 16 or a byte, and are decoded number by number, once"
    return None
