"""Routing: names and ids per sequence and per token, what is refused, and which route a layer sees."""

from __future__ import annotations

import threading

import pytest
import torch
from test_adapter_bank import K, bank_of, expected

import peftkern
from peftkern.segments import Segment, plan_rows


def test_rows_are_sorted_by_adapter_in_their_order() -> None:
    plan = plan_rows(torch.tensor([2, -1, 0, 2, 0, -1], dtype=torch.int32))
    assert plan.spans == (Segment(0, 2, 2), Segment(2, 4, 2)) and plan.rows.tolist() == [1, 5, 2, 4, 0, 3]
    assert plan_rows(torch.tensor([-1, -1])).spans == () and plan_rows(torch.zeros(0, dtype=torch.int64)).spans == ()


@pytest.mark.parametrize(
    "ids",
    [
        ["a", None, "b"],
        [0, -1, 1],
        torch.tensor([0, -1, 1]),
        torch.tensor([0, -1, 1], dtype=torch.int32),
        [["a"] * 4, [None] * 4, ["b"] * 4],
        torch.tensor([[0] * 4, [-1] * 4, [1] * 4]),
    ],
)
def test_every_way_to_say_the_same(ids) -> None:
    bank = bank_of("a", "b")
    x = torch.randn(3, 4, K)
    with bank.route(ids):
        y = bank.layer(x)
    for row, name in enumerate(("a", None, "b")):
        torch.testing.assert_close(y[row], expected(bank, name, x[row]))
    assert torch.equal(bank.layer(x, route=bank.route(ids)), y)


def test_a_list_is_the_hosts_whatever_the_default_device() -> None:
    bank = bank_of("a", "b")
    with torch.device("meta"):  # "cuda" would take ids where nobody checks them
        assert torch.equal(bank.route(["b", None]).ids, torch.tensor([1, -1], device="cpu"))
        with pytest.raises(ValueError, match="no adapter with id 7"):
            bank.route([7])


def test_per_sequence_ids_serve_prefill_and_decoding_and_per_token_ids_flattened_tokens() -> None:
    bank = bank_of("a", "b")
    with bank.route(["b", "a"]) as route:
        for tokens in (5, 1):
            x = torch.randn(2, tokens, K)
            torch.testing.assert_close(bank.layer(x)[0], expected(bank, "b", x[0]))
        assert len(route._plans) == 2
        x = torch.randn(2, 5, K)
        plan = route.plan(torch.Size([2, 5]), x.device)
        bank.layer(x)
        assert route.plan(torch.Size([2, 5]), x.device) is plan
    x = torch.randn(2, 2, K)
    with bank.route([["a", "b"], [None, "a"]]):
        assert torch.equal(bank.layer(x.view(4, K)), bank.layer(x).view(4, -1))


def test_without_a_route_every_row_is_the_base() -> None:
    bank, other = bank_of("a"), bank_of("a")
    x = torch.randn(3, K)
    base = bank.layer(x)
    torch.testing.assert_close(base, expected(bank, None, x))
    with other.route(["a"] * 3):
        assert torch.equal(bank.layer(x), base)
        with bank.route([None, "a", None]):
            y = bank.layer(x)
        assert torch.equal(bank.layer(x), base)
    assert torch.equal(y[::2], base[::2]) and not torch.equal(y[1], base[1])


def test_the_only_bank_is_meant_where_none_is_named() -> None:
    bank = bank_of("a")
    x = torch.randn(3, K)
    with peftkern.route(["a"] * 3):
        torch.testing.assert_close(bank.layer(x), expected(bank, "a", x))
    other = bank_of("a")
    with pytest.raises(ValueError, match="2 adapter banks are alive"):
        peftkern.route(["a"])
    with peftkern.route(["a"] * 3, other):
        assert torch.equal(bank.layer(x), bank.layer(x, route=bank.route([None] * 3)))
    del other, bank
    with pytest.raises(ValueError, match="0 adapter banks are alive"):
        peftkern.route(["a"])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["c"], ValueError, "no adapter 'c'; the bank holds 'a', 'b'"),
        ([2], ValueError, r"no adapter with id 2; the bank has ids \[0, 1\]"),
        ([-2], ValueError, "no adapter with id -2"),
        (torch.tensor([0, 9]), ValueError, "no adapter with id 9"),
        (torch.tensor([0.0]), TypeError, "int64 or int32, not torch.float32"),
        (torch.tensor(0), ValueError, r"\[batch\] or \[batch, tokens\], got \[\]"),
        ("a", TypeError, "a list of names, numbers and None"),
        ([0.5], TypeError, "a name, a number or None, not 0.5"),
        ([True], TypeError, "not True"),
        ([["a"], ["a", "b"]], ValueError, "as many for each sequence"),
        ([["a"], "b"], ValueError, "as many for each sequence"),
        ([[["a"]]], ValueError, r"got \[1, 1, 1\]"),
    ],
)
def test_bad_ids_are_refused_before_any_kernel(ids, error, message) -> None:
    bank = bank_of("a", "b")
    with pytest.raises(error, match=message):
        bank.route(ids)


@pytest.mark.parametrize("shape", [(4, K), (4, 2, K), (1, 3, K), (K,)])
def test_ids_that_do_not_fit_x_are_refused(shape) -> None:
    bank = bank_of("a")
    with bank.route(["a"] * 3), pytest.raises(ValueError, match=r"ids \[3\], one per sequence or per token"):
        bank.layer(torch.randn(shape))


def test_a_route_belongs_to_its_thread_and_ends_with_its_block_also_on_errors() -> None:
    bank = bank_of("a")
    x = torch.randn(3, K)
    base, seen = bank.layer(x), []
    with bank.route(["a"] * 3):
        thread = threading.Thread(target=lambda: seen.append(bank.layer(x)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], base)
    with pytest.raises(RuntimeError, match="boom"), bank.route(["a"] * 3):
        raise RuntimeError("boom")
    assert torch.equal(bank.layer(x), base)
