"""Adapter ids that lie on a device: bounded there, checked on request, and never waited for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import all_of
from calls import bank_of as bank_call
from test_adapter_bank import K, bank_of, expected
from test_multi_lora import RANKS, ROUTINGS, Batch, make, run
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern import multi_lora
from peftkern.backends.reference.library import ReferenceBackend
from peftkern.bank import bank as adapter_bank
from peftkern.bank import routes as routing
from peftkern.call import Span
from peftkern.segments import plan_on_device
from peftkern.testing.numerics import assert_as_good_as

E = len(RANKS)


@pytest.fixture
def as_if_on_a_device(monkeypatch) -> None:
    """Ids on the CPU take the way of those on a device."""
    for module in (multi_lora, adapter_bank, routing):
        monkeypatch.setattr(module, "on_device", lambda ids: True)


def in_fp64(batch: Batch) -> Batch:
    wide = {name: getattr(batch, name).double() for name in ("x", "W", "bias", "dy")}
    return dataclasses.replace(batch, A=[A.double() for A in batch.A], B=[B.double() for B in batch.B], **wide)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients_are_those_of_ids_on_the_host(routing, dtype, p, monkeypatch) -> None:
    batch = make(ROUTINGS[routing], dtype, p=p)
    truth, host = run(in_fp64(batch), "reference"), run(batch, "reference")
    monkeypatch.setattr(multi_lora, "on_device", lambda ids: True)
    found = run(batch, "reference")
    assert found.keys() == host.keys()
    for name in truth:
        if truth[name].any():
            assert_as_good_as(found[name], host[name], truth[name], name)
        else:
            assert not found[name].any(), name  # an adapter without rows


@pytest.mark.parametrize("bad", [E, -2, 2**40, -(2**63)])
def test_an_id_out_of_range_is_bounded_to_the_base(bad: int, poisoned, as_if_on_a_device) -> None:
    batch = make(ROUTINGS["interleaved"])
    wrong = dataclasses.replace(batch, ids=batch.ids.where(batch.ids != 3, bad))
    base = dataclasses.replace(batch, ids=batch.ids.where(batch.ids != 3, -1))
    found, wanted = run(wrong, "reference"), run(base, "reference")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not found["A3"].any() and not found["B3"].any()


@pytest.mark.parametrize("bad", [E, -2, 2**40])
def test_the_checked_mode_refuses_an_id_out_of_range(bad: int, dispatch_env, as_if_on_a_device) -> None:
    batch = make([0, 3, -1])
    expected = run(batch, "reference")["y"]
    dispatch_env(PEFTKERN_CHECK_IDS="1")
    assert torch.equal(run(batch, "reference")["y"], expected)
    with pytest.raises(ValueError, match=f"adapter id {bad} is none of .*, and not -1"):
        run(dataclasses.replace(batch, ids=torch.tensor([0, bad, -1])), "reference")


def test_ids_on_the_host_are_checked_in_any_mode() -> None:
    with pytest.raises(ValueError, match=f"adapter id {E} is out of range"):
        run(dataclasses.replace(make([0, 3]), ids=torch.tensor([0, E])), "reference")


def test_dtypes_and_devices_of_ids_are_checked(as_if_on_a_device) -> None:
    with pytest.raises(TypeError, match="int64 or int32, not torch.float32"):
        plan_on_device(torch.zeros(3), range(2))
    with pytest.raises(ValueError, match=r"\[M\], got \(1, 3\)"):
        plan_on_device(torch.zeros(1, 3, dtype=torch.int64), range(2))
    with pytest.raises(ValueError, match="got ids on meta, x on cpu"):
        run(dataclasses.replace(make([0, 3]), ids=torch.tensor([0, 3], device="meta")), "reference")
    assert plan_on_device(torch.zeros(3, dtype=torch.int64), ()).spans == ()


def test_a_nan_stays_with_its_row_and_its_adapter(as_if_on_a_device) -> None:
    batch = make(ROUTINGS["interleaved"])
    batch.x[4, 7] = float("nan")
    batch.A[5][1, 2] = float("inf")
    found, owner = run(batch, "reference"), int(batch.ids[4])
    bad = ~found["y"].isfinite().all(1)
    assert torch.equal(bad, (batch.ids == 5) | (torch.arange(len(bad)) == 4)) and owner not in (-1, 5)
    for e in range(E):
        assert found[f"A{e}"].isfinite().all() == (e != owner), e
        assert found[f"B{e}"].isfinite().all() == (e not in (owner, 5)), e


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_nothing_waits_for_the_device(p: float) -> None:
    """Fake tensors have no values: whatever would read one raises."""
    with FakeTensorMode():
        x, W = torch.empty(9, 6), torch.empty(5, 6)
        factors = [(torch.empty(r, 6), torch.empty(5, r)) for r in (2, 3)]
        plan = plan_on_device(torch.empty(9, dtype=torch.int64), range(2))
        spans = [Span(*span[1:], 1, 2) for span in plan.spans]
        call = bank_call(W, None, factors, spans, plan.rows, plan.inside, p=[p, p])
        (y,), thin = ReferenceBackend().forward(call, x)
        dx, _, dA, dB, _ = ReferenceBackend().backward(call, [torch.empty_like(y)], x, thin, all_of(call))
    assert y.shape == (9, 5) and dx is not None and dx.shape == (9, 6)
    assert [tuple(one.shape) for one in dA + dB] == [(2, 6), (3, 6), (5, 2), (5, 3)]


def test_the_backend_that_reads_rows_on_the_host_is_not_taken(as_if_on_a_device) -> None:
    batch = make([0, 3])
    assert torch.equal(run(batch, "")["y"], run(batch, "reference")["y"])
    with pytest.raises(RuntimeError, match="cpp"):
        run(batch, "cpp")


def test_a_route_of_a_bank(dispatch_env, as_if_on_a_device) -> None:
    bank = bank_of("a", "gone", "b")
    bank.remove("gone")
    x = torch.randn(5, 2, K)
    ids = torch.tensor([2, 0, -1, 1, 7], dtype=torch.int32)  # 1 has been removed, 7 has never been
    with bank.route(ids):
        ids.zero_()  # the route has a copy
        y = bank.layer(x)
    for row, name in enumerate(("b", "a", None, None, None)):
        torch.testing.assert_close(y[row], expected(bank, name, x[row]))
    dispatch_env(PEFTKERN_CHECK_IDS="1")
    for bad in (1, 7):
        with bank.route(torch.tensor([0, bad])), pytest.raises(ValueError, match=rf"id {bad} is none of \[0, 2\]"):
            bank.layer(x[:2])
