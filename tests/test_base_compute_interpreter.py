"""``base_compute="fp8"`` by the Triton kernels, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import itertools

import pytest
import torch
from calls import call_of
from conftest import Case, Target, run

pytest.importorskip("triton")

import test_base_compute as plain
from test_base_compute import BF16, CASES, F16, F32, SCALINGS, judge, made

import peftkern
from peftkern.backends.triton import launch, select
from peftkern.backends.triton.tiles import Choice, TileConfig
from peftkern.call import Problem
from peftkern.ops import dispatch
from peftkern.weights import FrozenWeight
from peftkern.weights.fp8 import rounded

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned", "one_thread")]
TRITON = Target("triton", "cpu")


@pytest.mark.parametrize("backward", [False, True], ids=["x", "dy"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_quantise_is_the_definition_bit_for_bit(dtype, backward):
    """Rows of every size, ties, zeros, NaN and infinities; more columns than a tile, and rows that are no rows."""
    torch.manual_seed(0)
    grid = plain._GRID.float()
    x = torch.randn(41, 1030) * torch.exp2(torch.arange(-20, 21).float())[:, None]
    x[7], x[8, :253] = 0, torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    x[9, 1029], x[10, 3], x[11, 4] = torch.nan, torch.inf, -torch.inf
    x[12] *= 2.0**-110
    x[13, :2] = torch.tensor([2.0**-149, 2.0**-126])
    x = x.to(dtype)
    if dtype == BF16:  # whose subnormal numbers the interpreter reads as 0
        x[x.abs() < 2.0**-126] = 0
    weight = FrozenWeight.quantize(torch.randn(*((1030, 70) if backward else (70, 1030))), "fp8", base_compute="fp8")
    for rows in (x, x.T.contiguous().T, x[:, ::3], x[:1]):
        if backward and rows.shape[1] != 1030:
            continue
        r, _ = weight.split(backward)
        wide = rows.float() if r is None else rows.float() * r
        made_launch, codes = launch.quantise(weight, rows, backward)
        made_launch.run()
        found, expected = codes.data.float() * codes.scale[:, None], rounded(wide)
        assert torch.equal(found.nan_to_num(7e30), expected.nan_to_num(7e30))
        assert codes.scale.isfinite().equal(wide.isfinite().all(1))


NARROW = [case for case in CASES if case.dtype != F32]


@pytest.mark.parametrize(
    ("case", "scaling"),
    [*((case, "block") for case in NARROW), *zip(NARROW, itertools.cycle(("row", "tensor")), strict=False)],
    ids=str,
)
def test_y_and_every_gradient_against_fp64(case, scaling):
    t = made(case, scaling)
    judge(case, t, run(case, t, "triton"))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tile", [(16, 32, 32, 1), (64, 128, 128, 2), (32, 64, 64, 4)], ids=str)
def test_any_tile(tile, scaling):
    """Tiles larger and smaller than a block of 128, sub-tiles, a persistent grid."""
    BLOCK_M, BLOCK_P, BLOCK_Q, subtiles = tile
    case = Case(17, 150, 140, 8, BF16, F32, 0.2)
    t = made(case, scaling)
    config = TileConfig(BLOCK_M, BLOCK_P, BLOCK_Q, 8, 1, SUBTILES=subtiles, resident=int(subtiles == 4), tma=True)
    with select.forced(Choice("split", config)):
        judge(case, t, run(case, t, "triton"))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_row_with_one_number_is_the_weights_column(scaling):
    """Bit for bit the reference's y and dx: a product without a sum."""
    case = Case(40, 160, 140, 4, BF16, F32)
    t = made(case, scaling)
    t.lora_A, t.lora_B = t.lora_A * 0, t.lora_B * 0
    t.x, t.dy = torch.zeros_like(t.x), torch.zeros_like(t.dy)
    for i in range(40):
        t.x[i, 4 * i], t.dy[i, 3 * i] = 2.0 ** (i - 20), -(2.0 ** (20 - i))
    found, expected = run(case, t, "triton"), run(case, t, "reference")
    assert torch.equal(found["y"], expected["y"]) and torch.equal(found["x"], expected["x"])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_zeros_nan_and_infinities_stay_in_their_rows(dtype, scaling):
    plain.test_zeros_nan_and_infinities_stay_in_their_rows(dtype, scaling, TRITON)


def test_what_fp16_can_hold_stays_finite():
    plain.test_what_fp16_can_hold_stays_finite(TRITON)


def test_several_adapters_add_to_one_rounded_product():
    """The second adapter's update goes onto y and dx, whose frozen product is there."""
    from peftkern.call import Pair
    from peftkern.functional import run as run_call

    case = Case(33, 150, 140, 4, BF16, F32)
    t = made(case, "block")
    results = []
    for backend in ("triton", "reference"):
        x = t.x.clone().requires_grad_()
        adapters = [Pair(t.weight, t.lora_A, t.lora_B, None, None, c, None, 0.0, None, "base") for c in (1.0, 0.5)]
        (y,) = run_call(x, call_of(adapters, backend=backend))
        y.backward(t.dy)
        results.append((y.detach(), x.grad))
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() < 5e-3 * theirs.norm()


def test_what_the_backend_says():
    case = Case(33, 300, 200, 8, BF16, F32)
    t = made(case, "row")
    found = peftkern.explain(t.x, t.weight, t.lora_A, t.lora_B, backend="triton")
    assert found.schedule == "split" and "e4m3" in found.tile
    assert "e4m3 ones are for the frozen one alone" in found.refused["schedule one_pass/shared"]
    triton = dispatch.backend_named("triton")
    assert "float32 rows" in triton.supports(Problem("cpu", 16, 64, 64, 4, F32, F32, "fp8xfp8"))
    with pytest.raises(RuntimeError, match="float32 rows"):
        peftkern.lora_linear(t.x.float(), t.weight, t.lora_A, t.lora_B, backend="triton")
