"""``base_compute="fp8"`` on FP8 tensor cores: its tiles, and what is legal beside ``tiles``' rules, without Triton."""

from __future__ import annotations

import torch

from peftkern.backends.triton.arch import Arch
from peftkern.call import Problem

TWO_READS = "its programs read the same rows for both products, and e4m3 ones are for the frozen one alone"
_LARGEST_STEP = 128  # a block's: what is contracted between two looks at the scales
_ANY, _NO = 99, -1
SCALED_STEPS = 10  # pressure: a step's sum beside the accumulator
# As in ``tiles``, by split alone.
SHIPPED: dict[str, dict[tuple[int, int, int, int, int], tuple[int, int, int]]] = {
    "sm_90": {
        (16, 64, 128, 4, 4): (_NO, _NO, _ANY),
        (64, 64, 128, 4, 4): (_NO, _NO, _ANY),
        (64, 128, 128, 4, 4): (_NO, _NO, _ANY),
        (128, 128, 128, 8, 4): (_NO, _NO, 14),
    },
    "sm_100": {
        (16, 64, 128, 4, 4): (_NO, _NO, _ANY),
        (64, 64, 128, 4, 4): (_NO, _NO, _ANY),
        (128, 64, 128, 8, 4): (_NO, _NO, _ANY),
        (128, 128, 128, 8, 4): (_NO, _NO, 14),
        (128, 256, 128, 8, 3): (_NO, _NO, 14),
    },
    "interpreter": {(32, 128, 64, 8, 1): (_NO, _NO, _ANY), (32, 32, 64, 8, 1): (_NO, _NO, _ANY)},
}


def refusal(problem: Problem, block_q: int, arch: Arch) -> str | None:
    """The reason why e4m3 codes cannot be multiplied with each other in steps of ``block_q``, or None."""
    if problem.dtype == torch.float32:
        return "FP8 tensor cores add in too few bits for float32 rows"
    if not arch.fp8:
        return f"there are no kernels for FP8 tensor cores on {arch.name}"
    if block_q > _LARGEST_STEP:
        return f"a step of {block_q} is more than a block of {_LARGEST_STEP}, which has a scale of its own"
    return None
