"""The coverings that other tests take their cases from."""

from __future__ import annotations

import itertools

import pytest
from pairwise import covering, pairwise


@pytest.mark.parametrize(
    ("sizes", "most"), [((5, 2, 2, 2), 12), ((3, 3), 9), ((4, 5, 3, 2, 6), 36), ((2,) * 9, 10), ((1, 4, 1), 4)], ids=str
)
def test_each_pair_is_there_in_few_rows(sizes: tuple[int, ...], most: int) -> None:
    axes = [[f"{axis}.{i}" for i in range(size)] for axis, size in zip("abcdefghi", sizes, strict=False)]
    rows = pairwise(*axes)
    for (a, first), (b, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) <= most and rows == pairwise(*axes)


def test_values_need_be_neither_hashable_nor_different() -> None:
    assert pairwise([{}, {"p": 1}], [0, 0]) == [({}, 0), ({}, 0), ({"p": 1}, 0), ({"p": 1}, 0)]


def test_fewer_than_two_axes_have_no_pairs() -> None:
    with pytest.raises(ValueError, match="not of 1"):
        pairwise([1, 2])


def test_the_long_lane_has_the_rest_of_the_product() -> None:
    axes = [1, 2, 3], ["a", "b"], [{}, {"p": 1}]
    found = covering(*axes)
    assert [one.values for one in found] == list(itertools.product(*axes))
    assert [one.values for one in found if not one.marks] == sorted(pairwise(*axes), key=str)
    assert {mark.name for one in found for mark in one.marks} == {"long"}
