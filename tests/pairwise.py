"""Few cases that hold every pair of choices, for where a product of all choices would hold every tuple."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis: each two values of two axes stand together in a row. The same rows every time.

    Greedy: a row begins with the first pair that is missing, and takes of each other axis, the longest first, the value
    that adds most pairs; of such the one used least.
    """
    if len(axes) < 2:
        raise ValueError(f"pairs are of two axes at least, not of {len(axes)}")
    values = [[(a, i) for i in range(len(axis))] for a, axis in enumerate(axes)]  # by place: they need not be hashable
    missing = {pair for two in itertools.combinations(values, 2) for pair in itertools.product(*two)}
    used: Counter[tuple[int, int]] = Counter()
    rows = []
    while missing:
        row = list(min(missing))
        fixed = {a for a, _ in row}
        for axis in sorted((axis for a, axis in enumerate(values) if a not in fixed), key=len, reverse=True):
            gains = {v: sum(tuple(sorted((v, other))) in missing for other in row) for v in axis}
            row.append(max(axis, key=lambda v: (gains[v], -used[v])))
        row.sort()
        missing.difference_update(itertools.combinations(row, 2))
        used.update(row)
        rows.append(tuple(axes[a][i] for a, i in row))
    return rows


def covering(*axes: Sequence[Any]) -> list[Any]:
    """Parameters of a test: the product of all axes, of which the long lane alone runs what is not in ``pairwise``."""
    few = pairwise(*axes)
    return [pytest.param(*row, marks=() if row in few else pytest.mark.long) for row in itertools.product(*axes)]
