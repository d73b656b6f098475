"""Several adapters by the Triton kernels, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from pairwise import pairwise
from test_adapters import a_sum, found, fresh, ours, plain

from peftkern.testing.numerics import assert_as_good_as

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned"),
]

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


CASES = (Case(37, 40, 24, 0, F32, bias=True), Case(37, 40, 24, 0, BF16, F32))


@pytest.mark.parametrize(
    ("case", "needs", "invariant"), pairwise(CASES, [None, ("x",), ("lora_A1", "lora_B0")], ["", "1"]), ids=str
)
def test_further_adapters_are_added_in_place(case, needs, invariant, dispatch_env):
    if invariant:
        dispatch_env(PEFTKERN_BATCH_INVARIANT="1")
    s = a_sum(case, ranks=(4, 7), ps=(0.3, 0.5))
    mine, peer, wide = fresh(s, needs=needs), fresh(s, needs=needs), fresh(s, F64, needs)
    results = found(ours(s, mine, "triton"), mine, s.dy)
    truth = found(plain(s, wide, F64), wide, s.dy.double())
    peers = found(ours(s, peer, "reference"), peer, s.dy)
    assert results.keys() == truth.keys() == peers.keys()
    for names in (["y"], [name for name in truth if name != "y"]):
        pool = [
            torch.cat([(r[n].double() / truth[n].norm()).flatten() for n in names]) for r in (results, peers, truth)
        ]
        assert_as_good_as(*pool, f"{names} of {case}")
