"""Training adapters looked up by row, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from calls import all_of, bank_of, check_operators
from pairwise import pairwise
from test_bank_interpreter import MIXED, SMALL, TILES, Seen, as_if_on_a_device
from test_multi_lora import RANKS, ROUTINGS, Batch, call_of_batch, check, make, run

from peftkern.backends.triton import backend as triton_backend
from peftkern.backends.triton import launch, schedule, select
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import BANK, Choice
from peftkern.call import Span, arguments
from peftkern.ops import schema
from peftkern.segments import plan_on_device, plan_rows
from peftkern.testing import dropout_mask

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned", "one_thread"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
E = len(RANKS)


@pytest.fixture(params=[False, True], ids=["host ids", "device ids"])
def on_device(request, monkeypatch) -> Iterator[bool]:
    """Ids on the CPU take the way of those on a device."""
    if request.param:
        as_if_on_a_device(monkeypatch)
    return request.param


def only_base(batch: Batch) -> Batch:
    """The same rows, and no adapter."""
    return dataclasses.replace(batch, A=[], B=[], scaling=[], p=[], states=[], ids=torch.full_like(batch.ids, -1))


@pytest.mark.parametrize(
    ("routing", "dtype", "p", "device_ids"), pairwise(list(ROUTINGS), [F32, BF16, F16], [0.2, 0.0], [True, False])
)
def test_every_routing(routing: str, dtype: torch.dtype, p: float, device_ids: bool, monkeypatch) -> None:
    """The error rule for y and every gradient, each adapter with its own p or none; the base's bits elsewhere."""
    if device_ids:
        as_if_on_a_device(monkeypatch)
    batch = make(ROUTINGS[routing], dtype, **SMALL, p=p)
    assert len(set(batch.p)) == (3 if p else 1) and 0.0 in batch.p
    found, base = check(batch, "triton"), run(only_base(batch), "triton")
    rows = batch.ids == -1
    assert torch.equal(found["y"][rows], base["y"][rows]) and torch.equal(found["x"][rows], base["x"][rows])
    for e in range(E):
        if not (batch.ids == e).any():
            assert not found[f"A{e}"].any() and not found[f"B{e}"].any()


@pytest.mark.parametrize(
    ("tile", "dtype", "p", "extents", "precision", "bias", "narrow"),
    pairwise(
        list(TILES), [BF16, F32, F16], [0.3, 0.0], [SMALL, dict(K=39, N=23)], [None, "fp32"], [True, False],
        [False, True],
    ),
)  # fmt: skip
def test_every_way_to_run_a_tile(tile, dtype, p, extents, precision, bias, narrow) -> None:
    """``narrow``: adapters in the dtype of the base."""
    adapter_dtype = dtype if narrow else F32
    batch = make(MIXED, dtype, **extents, p=p, precision=precision, bias=bias, adapter_dtype=adapter_dtype)
    with select.forced(Choice(BANK, TILES[tile])):
        check(batch, "triton")


@pytest.mark.parametrize("sliced", [False, True])
def test_a_large_rank_beside_a_small_one(sliced: bool) -> None:
    """Ranks are walked in pieces of 64; the first adapter has more than two."""
    with select.forced(Choice(BANK, TILES["slices"])) if sliced else contextlib.nullcontext():
        check(make([0, 1, 2, 1, 1, -1, 2, 2, 1, 3], BF16, **SMALL, p=0.2, ranks=(130, 1, 64, 128)), "triton")


def test_adapters_of_several_dtypes() -> None:
    """Each gradient is in the dtype of its adapter: ``check`` asserts it."""
    batch = make(MIXED, BF16, **SMALL, p=0.2)
    for e in (3, 4):
        batch.A[e], batch.B[e] = batch.A[e].to(BF16), batch.B[e].to(BF16)
    check(batch, "triton")


def test_a_long_segment_is_cut_into_runs_that_add_up(monkeypatch) -> None:
    """Its parts are added in the order of its rows: the same bits each time."""
    made = []
    real = launch.bank_grad
    monkeypatch.setattr(launch, "bank_grad", lambda *args: made.append(real(*args)) or made[-1])
    batch = make([1] * 150 + [0, -1, 1, 0], BF16, **SMALL, p=0.4, ranks=(5, 70))
    found = check(batch, "triton")
    assert made[0][0].arguments["PARTIAL"] is not None
    again = run(batch, "triton")
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_an_adapter_that_drops_everything() -> None:
    batch = make(MIXED, BF16, **SMALL)
    batch.p[3], base = 1.0, run(only_base(batch), "triton")
    found, rows = run(batch, "triton"), batch.ids == 3
    assert not found["A3"].any() and not found["B3"].any()
    assert torch.equal(found["y"][rows], base["y"][rows]) and torch.equal(found["x"][rows], base["x"][rows])


def test_nothing_leaks_from_one_adapter_into_another() -> None:
    """A NaN in a row, of x or of dy, and in a factor: only what reads them is not finite."""
    ids = [4, 0, -1, 3, 4, 5, 1, 4, 0]
    expected = run(make(ids, BF16, **SMALL, p=0.2), "triton")
    for where in ("x", "dy", "A", "B"):
        batch = make(ids, BF16, **SMALL, p=0.2)
        if where in "AB":
            getattr(batch, where)[4][3, 1] = float("nan")
        else:  # a row of the base is nobody's
            getattr(batch, where)[(batch.ids == 4) | (batch.ids == -1), 2] = float("nan")
        found = run(batch, "triton")
        assert not (found["A4"].isfinite().all() and found["B4"].isfinite().all()), where
        for e in set(range(E)) - {4}:
            assert torch.equal(found[f"A{e}"], expected[f"A{e}"]) and torch.equal(found[f"B{e}"], expected[f"B{e}"])
        others = (batch.ids != 4) & (batch.ids != -1)
        assert torch.equal(found["x"][others], expected["x"][others])


def test_a_dropped_nan_is_none() -> None:
    """As with one adapter: what the mask drops is 0, whatever it was."""
    batch = make([1] * 9, F32, **SMALL, p=0.9, ranks=(2, 3))
    state = torch.tensor(batch.states[1])
    row, column = (~dropout_mask(9, 40, batch.p[1], state)).nonzero()[0].tolist()
    expected = run(batch, "triton")
    batch.x[row, column] = float("nan")
    found = run(batch, "triton")
    assert torch.equal(found["A1"], expected["A1"]) and torch.equal(found["B1"], expected["B1"])


@pytest.mark.parametrize("ids", [[], [-1, -1, -1], [2, -1, 2]], ids=["no rows", "the base alone", "rank 0 alone"])
def test_gradients_of_adapters_without_rows_are_zeros(ids: list[int], on_device: bool) -> None:
    batch = make(ids, BF16, **SMALL, p=0.2)
    found, base = run(batch, "triton"), run(only_base(batch), "triton")
    assert torch.equal(found["x"], base["x"]) and found["x"].shape == (len(ids), 40)
    for e in range(E):
        assert not found[f"A{e}"].any() and found[f"A{e}"].shape == batch.A[e].shape
        assert not found[f"B{e}"].any() and found[f"B{e}"].shape == batch.B[e].shape


def test_dy_and_x_of_any_strides() -> None:
    batch = make(ROUTINGS["two rows each, the base between"], BF16, **SMALL, p=0.2)
    expected = run(batch, "triton")
    turned = run(dataclasses.replace(batch, x=batch.x.T.contiguous().T, dy=batch.dy.T.contiguous().T), "triton")
    assert all(torch.equal(turned[name], expected[name]) for name in expected)
    rows = run(dataclasses.replace(batch, dy=batch.dy[:1].expand(10, -1)), "triton")
    copied = run(dataclasses.replace(batch, dy=batch.dy[:1].repeat(10, 1)), "triton")
    assert all(torch.equal(rows[name], copied[name]) for name in rows)


def test_columns_further_apart_than_32_bits_count_are_brought_together() -> None:
    """The kernels look rows up with 64-bit offsets, and the columns in them with 32."""
    M, K = 2**20, 2**12

    def far(columns: int) -> torch.Tensor:
        return torch.empty(columns, M, dtype=BF16, device="meta").T

    A, B = torch.empty(2, K, device="meta"), torch.empty(K, 2, device="meta")
    W, numbers = torch.empty(K, K, dtype=BF16, device="meta"), torch.empty(M, dtype=torch.int64, device="meta")
    call = bank_of(W, None, [(A, B)], [Span(0, M, 0, 0)], numbers)
    arch = ARCHES["interpreter"]
    (forward,), _, s = schedule.produce_rows(call, far(K), False, arch)
    (backward, grad, _), _ = schedule.backward_rows(call, far(K), far(K), s, all_of(call), arch)
    strides = [one.arguments["G"][6:8] for one in (forward, backward)]
    strides += [grad.arguments[name] for name in ("x_strides", "dy_strides")]
    assert all((K - 1) * along_column < 2**31 for _, along_column in strides), strides


def test_only_what_is_needed_has_a_gradient() -> None:
    batch = make([0, 3, -1, 4, 3], BF16, **SMALL, p=0.1)
    expected = run(batch, "triton")
    for needs in (("x",), ("A",), ("B",), ("bias",), ("x", "A"), ("A", "B")):
        found = run(batch, "triton", needs)
        assert {name.rstrip("0123456789") for name in found} == {"y", *needs}
        assert all(torch.equal(found[name], expected[name]) for name in found)


def backward_of(batch: Batch, device_ids: bool, need_pairs: list[bool], need_x: bool = True) -> list[torch.Tensor]:
    plan = plan_on_device(batch.ids, range(E)) if device_ids else plan_rows(batch.ids)
    given = arguments(call_of_batch(batch, "triton", plan))
    _, s = schema.forward(batch.x, *given)
    return schema.backward(
        [batch.dy], batch.x, [s], *given, need_x, [False], need_pairs, need_pairs, [False] * E
    )  # fmt: skip


@pytest.mark.parametrize(("need_x", "device_ids"), [(True, True), (False, False)])
def test_a_frozen_pair_beside_trained_ones(need_x: bool, device_ids: bool) -> None:
    batch = make([4, 0, -1, 3, 4, 5, 6, 4, 0], BF16, **SMALL, p=0.1)
    every = backward_of(batch, device_ids, [True] * E)
    dx, dA, dB = every[0], every[1 : 1 + E], every[1 + E :]
    need = [e in (0, 4, 6) for e in range(E)]
    found = backward_of(batch, device_ids, need, need_x)
    expected = [*([dx] if need_x else []), *(column[e] for column in (dA, dB) for e in (0, 4, 6))]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_operators_pass_opcheck() -> None:
    """No gradient shares memory with another, although one launch writes them into one tensor."""
    batch = make([0, 3, -1, 3], ranks=(2, 3, 1, 4), p=0.2)
    call = call_of_batch(batch, "triton")
    check_operators(call, batch.x, [batch.dy], all_of(call, updates=[True, True, False, True]))


def numbers_of(one: launch.Launch) -> dict:
    return {name: value for name, value in one.arguments.items() if isinstance(value, (int, float, str))}


def test_neither_launches_nor_their_arguments_depend_on_ids_on_a_device(monkeypatch) -> None:
    """Three launches; so a captured step is replayed with other ids, and nothing reads a value on the host."""
    batch = make([0, 3, -1, 3, 4, 4], BF16, **SMALL)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_to_copy", "copy_")
    made, seen = [], []
    monkeypatch.setattr(launch.Launch, "run", lambda self: made.append(self))
    for ids in ([0, 3, -1, 3, 4, 4], [6, 6, 6, 6, 6, 6], [-1] * 6, [99, 5, 1, -7, 0, 0]):
        plan = plan_on_device(torch.tensor(ids), range(E))
        call = call_of_batch(dataclasses.replace(batch, p=[0.1] * E, bias=None), "triton", plan)
        s = torch.zeros(call.thin_size)
        with Seen() as mode:
            triton_backend.TritonBackend().backward(call, [batch.dy], batch.x, [s], all_of(call))
        names = [name for name in mode.names if "_foreach_copy_" not in name]  # the last launch of three
        assert not [name for name in names if any(word in name for word in waits)]
        seen.append(mode.names)
    assert [one.name for one in made] == ["fused", "bank_grad"] * 4 and all(names == seen[0] for names in seen)
    for first, *others in (made[::2], made[1::2]):
        for one in others:
            assert one.grid == first.grid and one.options == first.options
            assert numbers_of(one) == numbers_of(first)
            assert torch.equal(one.arguments["drop_operands"][0], first.arguments["drop_operands"][0])
    assert all(torch.equal(one.arguments["PIECES"], made[1].arguments["PIECES"]) for one in made[1::2])
