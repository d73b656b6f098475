"""``test_factor_range`` by the Triton kernels, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import pytest
from test_factor_range import CASES, UNITS, batch_errors_at, errors_at

pytestmark = pytest.mark.interpreter
SIZES = [1e-8, 1e-4, 1e3]


@pytest.mark.parametrize("schedule", ["one_pass/recompute", "one_pass/shared", "split", "library"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("size", SIZES)
def test_no_factor_is_lost(size, factor, schedule, dispatch_env):
    dispatch_env(PEFTKERN_SCHEDULE=schedule)
    for case in CASES[:2]:
        found = errors_at(size, factor, "triton", case)
        assert max(found.values()) <= UNITS, (case, found)


@pytest.mark.parametrize("case", CASES[2:], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_nor_beside_a_packed_weight_or_in_full_precision(size, case):
    found = errors_at(size, "lora_B", "triton", case)
    assert max(found.values()) <= UNITS, found
    if case.precision == "fp32":
        assert max(found["lora_A"], found["lora_B"]) <= UNITS**2, found


@pytest.mark.parametrize("size", SIZES)
def test_nor_in_a_batch_of_several_adapters(size):
    found = batch_errors_at(size, "triton")
    assert max(found) <= UNITS, found
