"""Adapters looked up by row, where only a GPU can show it: values, no waiting, graphs replayed with other ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from test_multi_lora import RANKS, ROUTINGS, Batch, make, plain, truth

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
    """design.md's rule, against the same on the CPU."""
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
