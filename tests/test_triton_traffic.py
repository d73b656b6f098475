"""What each schedule launches and moves, from its launch records: no GPU, no interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from calls import all_of, bank_of

pytest.importorskip("triton")


from peftkern.backends.triton import schedule, select, tiles
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.call import Call, PairNeeds, Problem, Span
from peftkern.testing import problems
from peftkern.testing.traffic import Traffic, count, traffic

MIB = 2**20
BF16, F32 = torch.bfloat16, torch.float32


def choice(schedule: str, problem: Problem, backward: bool, arch: str = "sm_90") -> Choice:
    """The schedule on the largest of its tiles that both directions bear."""
    found = tiles.choices(Pass(problem, backward), ARCHES[arch])
    return max((c for c in found if c.schedule == schedule), key=lambda c: c.tile.BLOCK_M * c.tile.BLOCK_P)


def measured(schedule: str, problem: Problem, **options) -> tuple[Traffic, Traffic]:
    both = [choice(schedule, problem, backward) for backward in (False, True)]
    smaller = min(both, key=lambda c: c.tile.BLOCK_M * c.tile.BLOCK_P)
    with select.forced(smaller):
        return traffic(problem, **options)


def square(size: int, **options) -> Problem:
    return Problem("cuda", 8192, size, size, 16, BF16, F32, dropout=True, **options)


@pytest.mark.parametrize(("size", "floor"), [(4096, 448), (5120, 580), (8192, 1024)])
@pytest.mark.parametrize("schedule", ["one_pass/recompute", "one_pass/shared"])
def test_one_pass_moves_what_it_must(schedule: str, size: int, floor: int):
    """x, W, y; dy, W, dx; x, dy: each pass over a tensor once, and at most 2 % beside them."""
    forward, backward = measured(schedule, square(size))
    operands = 2 * (5 * 8192 * size + 2 * size * size) + 2 * 8192 * size
    assert floor * MIB <= operands + MIB <= (floor + 2) * MIB  # the figures, to the megabyte
    assert operands <= forward.bytes + backward.bytes <= 1.02 * floor * MIB


@pytest.mark.parametrize(
    ("schedule", "forward", "backward"),
    [
        ("one_pass/recompute", ("fused",), ("fused", "grad", "grad", "reduce")),
        ("one_pass/shared", ("fused",), ("fused", "grad", "grad", "reduce")),
        ("split", ("shrink", "fused"), ("shrink", "fused", "grad", "reduce")),
        ("library", ("shrink", "fused", "vendor"), ("shrink", "fused", "vendor", "grad", "reduce")),
    ],
)
def test_launches(schedule: str, forward: tuple, backward: tuple, dispatch_env):
    """At most three beyond dx; one less where dA does not have to wait for dB's launch to overlap with dx."""
    found = measured(schedule, square(4096))
    assert (found[0].launches, found[1].launches) == (forward, backward)
    dispatch_env(PEFTKERN_OVERLAP="0")
    alone = measured(schedule, square(4096))[1]
    assert alone.launches == tuple(
        name for i, name in enumerate(backward) if backward[i - 1 : i] != ("grad",) or name != "grad"
    )
    assert alone.bytes <= found[1].bytes


@pytest.mark.parametrize("schedule", ["split", "library"])
def test_what_the_others_read_again(schedule: str):
    x = 2 * 8192 * 4096
    one_pass, other = measured("one_pass/recompute", square(4096)), measured(schedule, square(4096))
    again = x if schedule == "split" else 3 * x  # x; and there y twice: what the vendor's product adds to
    for ours, theirs in zip(one_pass, other, strict=True):
        assert abs(theirs.bytes - ours.bytes - again) < 0.01 * ours.bytes


def test_flops():
    forward, backward = measured("one_pass/shared", square(4096))
    product, thin = 2 * 8192 * 4096 * 4096, 2 * 8192 * 4096 * 16
    assert forward.flops == product + 2 * thin
    assert product + 4 * thin <= backward.flops < 1.001 * (product + 4 * thin)


def test_x_without_a_gradient_takes_one_read_of_dy():
    problem = square(4096, bias=True)
    _, backward = traffic(problem, needs=PairNeeds(False, True, True, True, False))
    assert backward.launches == ("grad", "grad", "reduce")
    dy = 2 * 8192 * 4096
    t_parts = 2 * 4 * 8192 * 16 * (4096 // 128)  # written and read
    assert 2 * dy + t_parts <= backward.bytes < 1.1 * 2 * dy + t_parts
    _, of_A = traffic(problem, needs=PairNeeds(False, True, False, False, False))
    assert of_A.launches == ("shrink", "grad", "reduce")
    _, nothing = traffic(problem, needs=PairNeeds(False, False, False, False, False))
    assert nothing.launches == () and nothing.bytes == 0


@pytest.mark.parametrize("M", [1, 4, 16])
@pytest.mark.parametrize("layer", [layer for layer in problems.LAYERS if layer.K * layer.N >= 2**20], ids=str)
def test_decode_is_one_launch_that_reads_the_weight_once(layer, M: int):
    for arch in ("sm_80", "sm_90"):
        problem = Problem("cuda", M, layer.K, layer.N, 16, BF16, F32)
        forward, _ = traffic(problem, arch)
        slices = select.choose(Pass(problem, False), ARCHES[arch]).tile.SLICES
        partials = 2 * 4 * slices * M * (layer.N + 16) if slices > 1 else 0  # written and read
        weight, rows = 2 * layer.K * layer.N, M * (2 * layer.K + 2 * layer.N + 4 * 16)
        assert forward.launches == ("fused",)
        assert forward.bytes == weight + rows + 4 * 16 * (layer.K + layer.N) + partials


def test_the_few_rows_between_decode_and_training_fill_the_chip():
    """``shrink`` is cut into slices of Q where row blocks are too few for the units."""
    arch = ARCHES["sm_90"]
    few = tiles.shrink_tile(Pass(Problem("cuda", 64, 14336, 4096, 16, BF16, F32), False), arch)
    many = tiles.shrink_tile(Pass(Problem("cuda", 16384, 14336, 4096, 16, BF16, F32), False), arch)
    assert few.SLICES == 16 and many.SLICES == 1


def banked(M: int, counts: list[int], R: int = 16, p: float = 0.05, on_device: bool = False) -> Call:
    """A batch of which each adapter has so many rows, or, with ids on a device, may have any."""
    lengths = [M] * len(counts) if on_device else counts
    starts = [0, *itertools.accumulate(lengths)]

    def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    factors = [(empty(R, 4096, dtype=F32), empty(4096, R, dtype=F32)) for _ in counts]
    spans = [Span(start, length, 0, 0) for start, length in zip(starts, lengths, strict=False)]
    inside = empty(starts[-1], dtype=torch.bool) if on_device else None
    numbers = empty(starts[-1], dtype=torch.int64)
    return bank_of(empty(4096, 4096), None, factors, spans, numbers, inside, p=[p] * len(counts))


def of_bank(call: Call, M: int, need_x: bool = True) -> tuple[Traffic, Traffic]:
    arch, x = ARCHES["sm_90"], torch.empty(M, 4096, dtype=BF16, device="meta")
    forward, _, s = schedule.produce_rows(call, x, False, arch)
    return count(forward), count(schedule.backward_rows(call, x, x, s, all_of(call, need_x), arch)[0])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("adapters", [1, 8, 64])
def test_a_bank_is_one_launch_forward_and_three_backward_however_many_adapters(adapters: int, on_device: bool):
    """The weight once each way. Rows are read for T and for Z, and once more for the factors' gradients, which lie
    together first and are copied apart."""
    M, counts = 8192, [8192 // adapters] * adapters
    forward, backward = of_bank(banked(M, counts, on_device=on_device), M)
    assert (forward.launches, backward.launches) == (("fused",), ("fused", "bank_grad", "part"))
    rows, weight, factors = 2 * M * 4096, 2 * 4096 * 4096, adapters * 2 * 4 * 16 * 4096
    thin = 4 * 16 * M * (adapters if on_device else 1)
    assert forward.bytes == 3 * rows + weight + factors + 2 * thin
    parts = backward.bytes - (3 * rows + weight + factors + 2 * thin) - (2 * rows + 2 * thin + 3 * factors)
    assert 0 <= parts <= 0.2 * rows and (adapters == 1 or on_device or parts == 0)


def test_a_bank_on_an_x_without_a_gradient_reads_no_weight():
    operands = banked(8192, [4000, 0, 192])
    _, backward = of_bank(operands, 8192, need_x=False)
    assert backward.launches == ("fused", "bank_grad", "part")
    assert backward.bytes < 4 * 2 * 8192 * 4096
    assert of_bank(banked(8192, [0, 0]), 8192, need_x=False)[1].launches == ("bank_grad", "part")  # zeros
