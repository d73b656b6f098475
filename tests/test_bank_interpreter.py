"""Adapters looked up by row in the fused pass, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import dataclasses
import importlib
from collections import OrderedDict
from collections.abc import Iterator
from threading import get_ident

import pytest
import torch
from calls import bank_of
from test_multi_lora import RANKS, ROUTINGS, Batch, call_of_batch, make
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import multi_lora
from peftkern.backends.triton import backend as triton_backend
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import TileConfig
from peftkern.call import Span, arguments
from peftkern.multi_lora import multi_lora_linear
from peftkern.ops import schema
from peftkern.segments import plan_on_device

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned", "one_thread"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
E = len(RANKS)
SMALL = dict(K=40, N=24)
MIXED = [3, -1, 4, 4, 6, 6, 3, 3, -1, 4, 5, 3, 4, 6, 3, 3, 4]  # two tiles of 16 rows; four adapters of seven
TILES = {
    "several of everything": TileConfig(16, 16, 16, 4, 1, GROUP_M=2, resident=1),
    "slices": TileConfig(16, 16, 16, 4, 1, SLICES=2),
    "tma in sub-tiles": TileConfig(16, 32, 32, 4, 1, SUBTILES=2, resident=1, tma=True),
}


@pytest.fixture(params=[False, True], ids=["host ids", "device ids"])
def on_device(request, monkeypatch) -> Iterator[bool]:
    """Ids on the CPU take the way of those on a device."""
    if request.param:
        as_if_on_a_device(monkeypatch)
    return request.param


def as_if_on_a_device(monkeypatch) -> None:
    monkeypatch.setattr(multi_lora, "on_device", lambda ids: True)


def forward(batch: Batch, **changed) -> torch.Tensor:
    b = dataclasses.replace(batch, **changed)
    return multi_lora_linear(
        b.x, b.W, b.A, b.B, b.scaling, b.ids, bias=b.bias, precision=b.precision, backend="triton"
    )  # fmt: skip


def base(batch: Batch) -> torch.Tensor:
    ids = torch.full_like(batch.ids, -1)
    return multi_lora_linear(
        batch.x, batch.W, [], [], [], ids, bias=batch.bias, precision=batch.precision, backend="triton"
    )


def test_an_id_out_of_range_is_bounded_to_the_base(monkeypatch) -> None:
    as_if_on_a_device(monkeypatch)
    batch = make(MIXED, BF16, **SMALL)
    for bad in (E, -2, 2**40, -(2**63)):
        wrong = forward(batch, ids=batch.ids.where(batch.ids != 3, bad))
        assert torch.equal(wrong, forward(batch, ids=batch.ids.where(batch.ids != 3, -1)))


def test_ids_on_a_device_give_the_bits_of_those_on_the_host(monkeypatch) -> None:
    batch = make(MIXED, BF16, **SMALL)
    host = forward(batch)
    as_if_on_a_device(monkeypatch)
    assert torch.equal(forward(batch), host) and torch.equal(forward(batch), host)


def test_nan_and_infinity_stay_with_their_row_and_their_adapter() -> None:
    batch = make(MIXED, BF16, **SMALL)
    batch.x[4, 7] = float("nan")
    batch.A[5][1, 2] = float("inf")
    batch.B[4][3, 0] = float("nan")
    found = forward(batch)
    rows = torch.arange(len(found))
    expected = (batch.ids == 4) | (batch.ids == 5) | (rows == 4)
    assert torch.equal(~found.isfinite().all(1), expected)
    assert torch.equal(found.isnan().sum(1)[(batch.ids == 4) & (rows != 4)].unique(), torch.tensor([1]))


def test_old_memory_does_not_pass_for_an_adapter(monkeypatch) -> None:
    """The places of rows that nobody writes: whatever they hold, also what a call with other ids left there."""
    as_if_on_a_device(monkeypatch)
    batch = make(MIXED, BF16, **SMALL)
    M, expected = len(batch.ids), forward(batch)
    kept = torch.zeros(2, M, dtype=torch.int64)
    empty = torch.empty

    def the_same(*shape, **options):
        return kept if shape == (2, M) else empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", the_same)
    forward(batch, ids=batch.ids.flip(0))
    assert kept.any()
    assert torch.equal(forward(batch), expected)
    for fill in (0, 1, -1, 2**40, -(2**63)):
        kept.fill_(fill)
        assert torch.equal(forward(batch), expected)


def test_strides() -> None:
    batch = make(ROUTINGS["two rows each, the base between"], BF16, **SMALL)
    expected = forward(batch)
    assert torch.equal(forward(batch, x=batch.x.T.contiguous().T), expected)
    turned = [factor.T.contiguous().T for factor in batch.A], [factor.T.contiguous().T for factor in batch.B]
    assert torch.equal(forward(batch, A=turned[0], B=turned[1]), expected)
    wide = [torch.full((n, 43), float("nan")) for n in RANKS]
    for target, A in zip(wide, batch.A, strict=True):
        target[:, 2:42] = A
    assert torch.equal(forward(batch, A=[target[:, 2:42] for target in wide]), expected)


def test_s_is_what_the_operator_promises(on_device: bool) -> None:
    """[length, R] of each segment in its order, and zeros where a row is another's."""
    ids, A = torch.tensor([1, 0, -1, 1]), [torch.randn(2, 8), torch.randn(3, 8)]
    x, W, B = torch.randn(4, 8), torch.randn(5, 8), [torch.randn(5, 2), torch.randn(5, 3)]
    A[1][2, 3] = float("inf")  # which is not multiplied by the zeros that stand for another's row
    plan = plan_on_device(ids, range(2)) if on_device else multi_lora.plan_rows(ids)
    spans = [Span(span.start, span.length, 0, 0) for span in plan.spans]
    call = bank_of(W, None, [*zip(A, B, strict=True)], spans, plan.rows, plan.inside, scaling=[1.0, 2.0],
                   backend="triton")  # fmt: skip
    _, s = schema.forward(x, *arguments(call))
    own = [x[ids == e] @ A[e].T for e in range(2)]
    if on_device:
        own = [torch.cat([part, part.new_zeros(4 - len(part), part.shape[1])]) for part in own]
    torch.testing.assert_close(s, torch.cat([part.flatten() for part in own]))


def test_no_rows_and_no_adapters_of_rank_one_and_more() -> None:
    assert forward(make([], BF16, **SMALL)).shape == (0, 24)
    batch = make([2, -1, 2], BF16, **SMALL)  # adapter 2 has rank 0
    assert torch.equal(forward(batch), base(batch))


def test_layers_of_a_bank_with_and_without_a_route(on_device: bool, monkeypatch, dispatch_env) -> None:
    from test_adapter_bank import K, bank_of, expected

    from peftkern.bank import bank as adapter_bank
    from peftkern.bank import routes as routing

    dispatch_env(PEFTKERN_BACKEND="triton")
    for module in (adapter_bank, routing):
        monkeypatch.setattr(module, "on_device", lambda ids: on_device)
    bank, x = bank_of("a", "gone", "b"), torch.randn(5, 2, K)
    bank.remove("gone")
    with bank.route(torch.tensor([2, 0, -1, -1, 2])):
        y = bank.layer(x)
    for row, name in enumerate(("b", "a", None, None, "b")):
        torch.testing.assert_close(y[row], expected(bank, name, x[row]))
    assert torch.equal(bank.layer(x)[2:4], y[2:4])


class Seen(TorchDispatchMode):
    """Every operator that a block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_neither_launches_nor_their_arguments_depend_on_ids_on_a_device(monkeypatch) -> None:
    """So a graph that captured a call is replayed with other ids; and nothing reads a value on the host."""
    from peftkern.backends.triton import launch

    batch = make([0, 3, -1, 3, 4, 4], BF16, **SMALL)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_to_copy", "copy_")
    made, seen = [], []
    monkeypatch.setattr(launch.Launch, "run", lambda self: made.append(self))
    for ids in ([0, 3, -1, 3, 4, 4], [6, 6, 6, 6, 6, 6], [-1] * 6, [99, 5, 1, -7, 0, 0]):
        with Seen() as mode:
            plan = plan_on_device(torch.tensor(ids), range(E))
            triton_backend.TritonBackend().forward(call_of_batch(batch, "triton", plan), batch.x)
        assert not [name for name in mode.names if any(word in name for word in waits)]
        seen.append(mode.names)
    assert len(made) == 4 and all(names == seen[0] for names in seen)
    for one in made[1:]:
        assert one.grid == made[0].grid and one.options == made[0].options
        for table in (0, 1):
            assert torch.equal(one.arguments["G"][table], made[0].arguments["G"][table])
        changing = ("T", "Z", "G", "counters")
        assert {n: v for n, v in one.arguments.items() if isinstance(v, (int, float, str))} == {
            n: v for n, v in made[0].arguments.items() if isinstance(v, (int, float, str))
        }
        assert all(one.arguments[n].shape == made[0].arguments[n].shape for n in changing if n != "G")


def test_the_tile_does_not_depend_on_the_adapters() -> None:
    problem = bank_of(torch.empty(24, 40, dtype=BF16), None, [], [], torch.empty(0)).problem(7, BF16)
    from peftkern.backends.triton import select
    from peftkern.backends.triton.tiles import Pass

    for arch in ARCHES.values():
        if not arch.protocols:
            continue
        others = [dataclasses.replace(problem, R=R, adapter_dtype=d, ids_on_device=R > 8) for R in (0, 9, 300)
                  for d in (F32, BF16)]  # fmt: skip
        assert len({select.choose(Pass(one, False), arch) for one in [problem, *others]}) == 1


def test_a_bank_and_a_pair_have_schedules_of_their_own() -> None:
    from peftkern.backends.triton import select
    from peftkern.backends.triton.tiles import BANK, SPLIT, Choice, Pass

    bank = bank_of(torch.empty(24, 40, dtype=BF16), None, [], [], torch.empty(0)).problem(7, BF16)
    pair = dataclasses.replace(bank, several_adapters=False, R=4)
    for problem, schedule, known in ((bank, SPLIT, "among bank"), (pair, BANK, "among one_pass")):
        choice = Choice(schedule, TILES["slices"])
        with select.forced(choice), pytest.raises(RuntimeError, match=f"there is no schedule '{schedule}' {known}"):
            select.choose(Pass(problem, False), ARCHES["sm_90"])


def test_what_is_refused_and_what_the_plan_says() -> None:
    backend = triton_backend.TritonBackend()
    problem = bank_of(torch.empty(24, 40), None, [], [], torch.empty(0)).problem(7, F32)
    assert backend.supports(problem) is None
    assert backend.supports(dataclasses.replace(problem, dropout=True)) is None
    assert "larger than" in backend.supports(dataclasses.replace(problem, R=1000))
    plan = backend.plan(problem)
    assert plan.schedule == "bank" and "looked up by row" in plan.tile


def test_a_table_is_made_once_and_kept_for_good_where_a_graph_reads_it(monkeypatch) -> None:
    """What ``_on`` does with CUDA, on stand-ins: no memory of a table goes while something may read it."""
    module = importlib.import_module("peftkern.backends.triton.launch.bank_tables")
    device, capturing, used = torch.device("cuda", 0), [False], []

    class Table(tuple):
        def record_stream(self, stream) -> None:
            used.append(self)

    monkeypatch.setattr(module, "_tables", OrderedDict())
    monkeypatch.setattr(module, "_captured", {})
    monkeypatch.setattr(module, "_KEPT", 3)
    threads = set()
    monkeypatch.setattr(module, "_copied", lambda device, values: threads.add(get_ident()) or Table(values))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "here")

    def on(*numbers: int):
        return module.on(device, module.as_they_are, numbers)

    first = on(1, 2)
    assert first == (1, 2) and on(1, 2) is first and used == [first, first]
    capturing[0] = True
    assert on(1, 2) is first and len(used) == 2  # a captured stream takes no record
    capturing[0] = False
    others = [on(i) for i in range(4)]
    assert on(1, 2) is first and on(3) is others[3] and on(0) is not others[0]
    assert len(module._tables) == 3 and len(module._captured) == 1
    # Not by the caller's: a compiler's warm-up has that allocate from a pool whose memory it takes back.
    assert threads and get_ident() not in threads
    spans = module.on(device, module.spans, (16, 5, 20, 3, 40, 1, 2))
    assert spans == (2, 3, 62, 0, 5, 20, 0, 0, 40, 1, 60, 0, 0, 0, 0, 16, 1, 0)


def test_parts_of_different_pieces_lie_apart() -> None:
    """Programs of all pieces run at once: no two may write one part. A segment of one run has none."""
    module = importlib.import_module("peftkern.backends.triton.launch.bank_tables")
    segments = [(0, 70, 0, 100, 0, 0, 0), (70, 20, 0, 5, 0, 0, 0), (90, 40, 0, 3, 0, 0, 0)]  # start, length, _, rank
    made = iter(module.pieces((32, 64, *sum(segments, ())))[1 + 3 * 7 :])
    pieces = list(zip(*6 * [made], strict=True))
    found = {(e, r0): range(place, place + runs) for e, r0, _, _, runs, place in pieces if runs > 1}
    assert [(e, r0, run) for e, r0, _, run, *_ in pieces if e != 1] == [
        *((0, r0, run) for r0 in (0, 64) for run in range(3)), *((2, 0, run) for run in range(2)),
    ]  # fmt: skip
    assert [part for parts in found.values() for part in parts] == list(range(3 + 3 + 2))


def test_what_keys_the_masks_is_pinned_whatever_the_default_device(monkeypatch) -> None:
    """``torch.set_default_device("cuda")`` would have it on the GPU, where nothing can be pinned."""
    module, pinned = importlib.import_module("peftkern.backends.triton.launch.bank_tables"), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.device.type) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: self)
    with torch.device("meta"):
        module._sent(torch.device("cuda", 0), [1, 2])
    assert pinned == ["cpu"]
