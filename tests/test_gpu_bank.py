"""Adapters looked up by row, where only a GPU can show it: values, gradients, no waiting, graphs and other ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from test_multi_lora import RANKS, ROUTINGS, Batch, make, plain, run, truth

from peftkern.multi_lora import multi_lora_linear
from peftkern.testing.numerics import assert_as_good_as

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E = len(RANKS)
SHAPES = [dict(K=1024, N=768), dict(K=1025, N=777)]
IDS = {
    **ROUTINGS,
    "decode": [e % 8 - 1 for e in range(16)],
    "prefill": [4] * 700 + [-1] * 60 + [0] * 500 + [5] + [6] * 130,
    "interleaved prefill": [e % 8 - 1 for e in range(900)],
}


def there(batch: Batch) -> Batch:
    """The batch on the GPU; its ids stay on the host."""
    moved = {name: getattr(batch, name).cuda() for name in ("x", "W", "dy")}
    bias = None if batch.bias is None else batch.bias.cuda()
    return dataclasses.replace(
        batch, A=[A.cuda() for A in batch.A], B=[B.cuda() for B in batch.B], bias=bias, **moved
    )  # fmt: skip


def forward(batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    return multi_lora_linear(
        batch.x, batch.W, batch.A, batch.B, batch.scaling, ids, bias=batch.bias, precision=batch.precision,
        backend="triton",
    )  # fmt: skip


def base(batch: Batch) -> torch.Tensor:
    ids = torch.full_like(batch.ids, -1)
    return multi_lora_linear(batch.x, batch.W, [], [], [], ids, bias=batch.bias, precision=batch.precision,
                             backend="triton")  # fmt: skip


def judge(batch: Batch, y: torch.Tensor, ids: Sequence[int] | torch.Tensor) -> None:
    """The error rule, against the same on the CPU."""
    one = dataclasses.replace(batch, ids=torch.as_tensor(ids))
    assert_as_good_as(y.cpu(), plain(one)["y"], truth(one)["y"], "y")


@pytest.mark.parametrize("precision", ["base", "fp32"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("routing", IDS)
def test_values(routing: str, dtype: torch.dtype, precision: str, poisoned) -> None:
    """The rule; the same bits twice and from ids on the device; the base's where there is no adapter."""
    for shape in SHAPES:
        batch = make(IDS[routing], dtype, **shape, precision=precision)
        on = there(batch)
        y = forward(on, batch.ids)
        judge(batch, y, batch.ids)
        assert all(torch.equal(forward(on, batch.ids), y) for _ in range(5))
        assert torch.equal(forward(on, batch.ids.cuda()), y)
        rows = batch.ids == -1
        assert torch.equal(y.cpu()[rows], base(on).cpu()[rows])


def test_nothing_waits_for_the_device() -> None:
    batch = make(IDS["decode"], BF16, K=1024, N=768)
    on, ids = there(batch), batch.ids.cuda()
    expected = forward(on, ids)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            found = forward(on, ids)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("warm", [True, False], ids=["after warm calls", "at once"])
@pytest.mark.parametrize("routing", ["decode", "interleaved prefill"])
def test_a_graph_is_replayed_with_other_ids(routing: str, warm: bool) -> None:
    batch = make(IDS[routing], BF16, K=1024, N=768)
    if not warm:  # other tables than any call before had; the kernels themselves are compiled before a capture
        forward(there(batch), batch.ids.cuda())
    on, ids = there(batch), batch.ids.cuda()
    if warm:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                forward(on, ids)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(on, ids)
    M = len(batch.ids)
    for fresh in (batch.ids.flip(0), torch.full((M,), -1), torch.full((M,), 3), torch.arange(M) % (E + 3) - 2):
        ids.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        bounded = fresh.where((fresh >= 0) & (fresh < E), -1)
        judge(batch, y, bounded)
        assert torch.equal(y, forward(on, bounded))


def judge_all(batch: Batch, found: dict[str, torch.Tensor]) -> None:
    """The error rule for y and every gradient, those of all adapters pooled; exact zeros where there are no rows."""
    expected, peer = truth(batch), plain(batch)
    assert found.keys() == expected.keys()
    for pool in ("y", "x", "bias", "A", "B"):
        names = [name for name in expected if name.rstrip("0123456789") == pool]
        if names:
            joined = (torch.cat([of[n].flatten().double().cpu() for n in names]) for of in (found, peer, expected))
            assert_as_good_as(*joined, pool)
    for e in range(E):
        assert found[f"A{e}"].dtype == batch.A[e].dtype
        if not (batch.ids == e).any():
            assert not found[f"A{e}"].any() and not found[f"B{e}"].any()


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["base", "fp32"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("routing", IDS)
def test_gradients(routing: str, dtype: torch.dtype, precision: str, p: float, poisoned) -> None:
    """The rule; the same bits five times; dx of a row of the base as without adapters; ids on the device as well."""
    for shape in SHAPES:
        batch = make(IDS[routing], dtype, **shape, precision=precision, p=p)
        on = there(batch)
        found = run(on, "triton")
        judge_all(batch, found)
        for _ in range(4):
            again = run(on, "triton")
            assert all(torch.equal(again[name], found[name]) for name in found)
        judge_all(batch, run(dataclasses.replace(on, ids=batch.ids.cuda()), "triton"))
        alone = dataclasses.replace(on, A=[], B=[], scaling=[], p=[], states=[], ids=torch.full_like(batch.ids, -1))
        rows = (batch.ids == -1).cuda()
        assert torch.equal(found["x"][rows], run(alone, "triton")["x"][rows])


def test_adapters_of_several_dtypes_and_large_ranks() -> None:
    batch = make([e % 6 - 1 for e in range(900)], BF16, K=1024, N=768, ranks=(130, 8, 64, 128, 1), p=0.2)
    batch.A[1], batch.B[1] = batch.A[1].to(BF16), batch.B[1].to(BF16)
    on = there(batch)
    found = run(on, "triton")
    expected, peer = truth(batch), plain(batch)
    for pool in ("y", "x", "A", "B"):
        names = [name for name in expected if name.rstrip("0123456789") == pool]
        joined = (torch.cat([of[n].flatten().double().cpu() for n in names]) for of in (found, peer, expected))
        assert_as_good_as(*joined, pool)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_step_waits_for_nothing(p: float) -> None:
    batch = make(IDS["interleaved prefill"], BF16, K=1024, N=768, p=p)
    on = dataclasses.replace(there(batch), ids=batch.ids.cuda())
    expected = run(on, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)
            found = run(on, "triton")
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_captured_step_is_replayed_with_other_ids(p: float) -> None:
    """Masks are keyed by numbers of the call, so a replay has those of the capture."""
    batch = make(IDS["interleaved prefill"], BF16, K=1024, N=768, p=p)
    on = dataclasses.replace(there(batch), ids=batch.ids.cuda())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(on, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(on, "triton")
    for fresh in (batch.ids.flip(0), torch.full_like(batch.ids, -1), torch.full_like(batch.ids, 3)):
        on.ids.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        judge_all(dataclasses.replace(batch, ids=fresh), found)
