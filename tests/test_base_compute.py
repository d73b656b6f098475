"""``base_compute="fp8"``: the frozen products of e4m3 rows and an e4m3 weight, against their definition in fp64."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from calls import all_of, check_operators
from conftest import NAMES, Case, Found, Target, Tensors, grads, leaves_of, make, run
from test_torch_integration import a_call
from torch import Tensor, nn

import peftkern
from peftkern.call import Problem
from peftkern.nn import LoRALinear
from peftkern.ops import dispatch
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as, relative_error
from peftkern.weights import FP8Weight, FrozenWeight
from peftkern.weights.fp8 import rounded

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SCALINGS = ("tensor", "row", "block")
_GRID = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # e4m3's numbers from 0 to 448


def quantised(rows: Tensor) -> Tensor:
    """Q(rows) in fp64 for finite rows, from the list of e4m3's numbers: the nearest, on a tie the one of even code."""
    made, grid = torch.empty_like(rows, dtype=F64), _GRID.to(rows.device)
    for i, row in enumerate(rows.double()):
        k = -117
        while row.abs().max() > 448 * 2.0**k:
            k += 1
        size = row.abs() / 2.0**k
        above = torch.searchsorted(grid, size).clamp(max=126)
        below = (above - 1).clamp(min=0)
        down, up = size - grid[below], grid[above] - size
        code = torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
        made[i] = torch.copysign(grid[code], row) * 2.0**k
    return made


def definition(weight: FrozenWeight) -> tuple[Tensor, Tensor]:
    """V [N, K] and r [N] in fp64: W = diag(r) V."""
    W = weight.materialize(F64)
    if weight.group_size or len(weight.scale) == 1:
        return W, W.new_ones(len(W))
    return weight.data.double(), weight.scale.double()


class _Plain(torch.autograd.Function):
    """The frozen product and its gradient by out-of-place PyTorch, in x's dtype; of fp16 in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight, dtype = weight, F32 if x.dtype == F16 else x.dtype
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(quantised(x).to(dtype), weight.materialize(dtype), bias).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        dtype, (V, r) = F32 if dy.dtype == F16 else dy.dtype, definition(ctx.weight)
        dx = (quantised(dy.float() * r.float()).to(dtype) @ V.to(dtype)).to(dy.dtype)
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None


def plain(case: Case, t: Tensors) -> Found:
    """The definition in PyTorch's own operators, with the roundings that the dtypes ask for."""
    leaf = leaves_of(t)
    thin = torch.promote_types(case.dtype, F32) if case.precision == "fp32" or case.dtype == F16 else case.dtype
    dropped = leaf["x"]
    if case.p:
        kept = dropout_mask(case.M, case.K, case.p, t.rng_state)
        lanes = round(65536 * case.p)
        dropped = torch.where(kept, dropped, torch.zeros_like(dropped)) * (65536 / (65536 - lanes))
    update = dropped.to(thin) @ leaf["lora_A"].to(case.dtype if case.precision == "base" else thin).to(thin).T
    update = update @ leaf["lora_B"].to(case.dtype if case.precision == "base" else thin).to(thin).T
    if leaf["lora_bias"] is not None:
        update = update + leaf["lora_bias"].to(thin)
    y = _Plain.apply(leaf["x"], t.weight, leaf["bias"]) + (case.scaling * update).to(case.dtype)
    return grads(y, leaf, t.dy)


def truth(case: Case, t: Tensors) -> Found:
    """The definition in fp64; dy r is rounded to fp32 before it is rounded to e4m3."""
    x, dy, A, B, c = t.x.double(), t.dy.double(), t.lora_A.double(), t.lora_B.double(), case.scaling
    V, r = definition(t.weight)
    mask = torch.ones_like(x)
    if case.p:
        lanes = round(65536 * case.p)
        mask = dropout_mask(case.M, case.K, case.p, t.rng_state).double() * (65536 / (65536 - lanes))
    s, thin = (mask * x) @ A.T, dy @ B
    y = quantised(t.x) @ (V * r[:, None]).T + c * s @ B.T
    y = y + (0 if t.bias is None else t.bias.double()) + (0 if t.lora_bias is None else c * t.lora_bias.double())
    dx = quantised(t.dy.float() * r.float()) @ V + c * mask * (thin @ A)
    sums = dy.sum(0)
    return {"y": y, "x": dx, "lora_A": c * thin.T @ (mask * x), "lora_B": c * dy.T @ s, "bias": sums,
            "lora_bias": c * sums}  # fmt: skip


def made(case: Case, scaling: str, device: str = "cpu", seed: int = 0) -> Tensors:
    t = make(case, device, seed)
    t.weight = FrozenWeight.quantize(t.weight.float(), "fp8", scaling=scaling, base_compute="fp8")
    return t


def judge(case: Case, t: Tensors, found: Found) -> None:
    """y and every gradient against fp64, beside plain PyTorch by the same definition."""
    peer, exact = plain(case, t), truth(case, t)
    for name in NAMES:
        like = t.dy if name == "y" else getattr(t, name)
        if like is None:
            assert found[name] is None
            continue
        assert (found[name].shape, found[name].dtype) == (like.shape, like.dtype)
        assert_as_good_as(found[name], peer[name], exact[name], f"{name} of {case}")


def refused(dtype: torch.dtype, target: Target) -> bool:
    """Whether the target has no FP8 tensor cores for this dtype, and says so."""
    chosen = dispatch.backend_named(target.backend)
    reason = chosen.supports(Problem(target.device, 1, 128, 128, 4, dtype, F32, "fp8xfp8"))
    assert reason is None or (target.backend == "triton" and "FP8 tensor cores" in reason)
    return reason is not None


CASES = [
    Case(33, 300, 200, 8, BF16, F32, 0.2, bias=True, lora_bias=True),
    Case(7, 131, 150, 4, BF16, BF16),
    Case(1, 257, 129, 3, F16, F32, bias=True),
    Case(40, 77, 50, 8, F16, F16, 0.3, lora_bias=True),
    Case(40, 300, 200, 8, F32, F32, 0.2, bias=True, lora_bias=True),
    Case(5, 129, 257, 16, BF16, F32, 0.1, bias=True, precision="fp32"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_every_gradient_against_fp64(case, scaling, target: Target):
    if refused(case.dtype, target):
        return
    t = made(case, scaling, target.device)
    judge(case, t, run(case, t, target.backend))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_rounding_is_to_the_nearest_of_e4m3_by_a_power_of_two(dtype):
    """Ties, both signs, rows of one size and of all sizes, zeros; and fp64's own range."""
    torch.manual_seed(0)
    rows = torch.randn(40, 257) * torch.exp2(torch.arange(-14, 6).float()).repeat(2)[:, None]
    ties = torch.cat([_GRID.float(), (_GRID[1:] + _GRID[:-1]).float() / 2])
    rows[3, : len(ties)] = ties
    rows[4, : len(ties)] = -ties
    rows[5] = 0
    rows[6], rows[7] = 448, 449
    rows = rows.to(dtype)
    wide = rows.to(torch.promote_types(dtype, F32))
    found = rounded(wide)
    assert found.dtype == wide.dtype and torch.equal(found.double(), quantised(rows))
    assert torch.equal(found[5], torch.zeros(257, dtype=wide.dtype))
    if dtype != F16:
        assert torch.equal(found.to(dtype).to(wide.dtype), found)  # exact in the dtype of the rows
    if dtype == F64:
        assert torch.equal(rounded(rows * 2.0**900), found * 2.0**900)


def test_rows_of_the_ends_of_the_range():
    """Subnormal rows give no infinity, what is too small gives 0, and the largest numbers stay finite."""
    tiny = torch.tensor([[2.0**-149, 2.0**-127, 2.0**-126, 0.0], [2.0**-149, 2.0**-148, -(2.0**-130), 0.0]])
    assert rounded(tiny).tolist() == [[0.0, 0.0, 2.0**-126, 0.0], [0.0, 0.0, -0.0, 0.0]]
    assert torch.equal(rounded(tiny).double(), quantised(tiny))
    large = torch.tensor([[1.9 * 2.0**127, -1.0, 2.0**110, 0.0]])
    assert rounded(large).isfinite().all() and torch.equal(rounded(large).double(), quantised(large))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_zeros_nan_and_infinities_stay_in_their_rows(dtype, scaling, target: Target):
    """A row is finite in y (dx) where the plain fp8 weight's is, and only there."""
    if refused(dtype, target):
        return
    case = Case(6, 150, 140, 4, dtype, F32, scaling=0.5)
    t = made(case, scaling, target.device)
    t.x[0], t.dy[0] = 0, 0
    t.x[1, 3] = t.dy[1, 3] = torch.nan
    t.x[2, 5] = t.dy[2, 7] = torch.inf
    t.x[3, 149] = t.dy[3, 139] = -torch.inf
    found = run(case, t, target.backend, ("x",))
    t.weight = t.weight.with_base_compute(None)
    usual = run(case, t, target.backend, ("x",))
    for name in ("y", "x"):
        finite = torch.tensor([True, False, False, False, True, True], device=target.device)
        assert torch.equal(found[name].isfinite().all(1), finite)
        assert torch.equal(found[name].isfinite(), usual[name].isfinite())
        assert not found[name][0].any()


def test_what_fp16_can_hold_stays_finite(target: Target):
    """e4m3's neighbour of fp16's largest is 65536, and dy times a small scale would be 0 in fp16."""
    if refused(F16, target):
        return
    case = Case(2, 128, 160, 2, F16, F32)
    t = made(case, "row", target.device)
    t.lora_A, t.lora_B = t.lora_A * 0, t.lora_B * 0
    t.x[:] = 65504
    t.x[:, ::2] = -65504
    t.dy *= 2.0**-10
    t.weight.scale.mul_(2.0**-12)
    judge(case, t, run(case, t, target.backend))


def test_no_rows(target: Target):
    case = Case(0, 40, 24, 4, BF16, F32, 0.2, bias=True, lora_bias=True)
    t = made(case, "row", target.device)
    found = run(case, t, target.backend)
    assert found["y"].shape == (0, 24) and found["x"].shape == (0, 40)
    assert all(not found[name].any() for name in ("lora_A", "lora_B", "bias", "lora_bias"))


def test_the_error_beside_the_plain_fp8_weight(target: Target):
    """The figures of docstring and docs/measured.md: 2.65 % of y and of dx, of normal numbers, for every scaling."""
    if refused(BF16, target):
        return
    case = Case(256, 1024, 1024, 8, BF16)
    for scaling in SCALINGS:
        t = made(case, scaling, target.device)
        t.lora_A, t.lora_B = t.lora_A * 0, t.lora_B * 0
        found = run(case, t, target.backend)
        t.weight = t.weight.with_base_compute(None)
        usual = run(case, t, target.backend)
        for name in ("y", "x"):
            assert 0.0255 < relative_error(found[name], usual[name].double()) < 0.0275
        for name in ("lora_A", "lora_B"):  # from x and dy as they are
            assert torch.equal(found[name], usual[name])


def test_gradients_that_are_not_needed_change_nothing(target: Target):
    case = CASES[0]
    if refused(case.dtype, target):
        return
    t = made(case, "row", target.device)
    whole = run(case, t, target.backend)
    for needs in (("x",), ("lora_A", "lora_B"), ("bias",), ("lora_B", "lora_bias")):
        part = run(case, t, target.backend, needs)
        assert all(torch.equal(part[name], whole[name]) for name in ("y", *needs))


def test_autocast_and_vmap(target: Target):
    if refused(BF16, target):
        return
    case = Case(6, 150, 140, 4, BF16, F32)
    t = made(case, "block", target.device)
    expected = peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, 1.75, backend=target.backend)
    with torch.autocast(target.device, BF16):
        found = peftkern.lora_linear(t.x.float(), t.weight, t.lora_A, t.lora_B, 1.75, backend=target.backend)
    assert found.dtype == BF16 and torch.equal(found, expected)
    one = lambda row: peftkern.lora_linear(row, t.weight, t.lora_A, t.lora_B, 1.75)  # noqa: E731
    wide = one(t.x.float())
    assert relative_error(torch.func.vmap(one)(t.x.float()[:, None])[:, 0], wide.double()) < 1e-6


def test_explain_says_it_and_chooses_nothing_silently(target: Target):
    if refused(BF16, target):
        return
    case = Case(16, 64, 64, 4, BF16)
    t = made(case, "row", target.device)
    found = peftkern.explain(t.x, t.weight, t.lora_A, t.lora_B, backend=target.backend)
    assert found.backend == target.backend and "rounded to e4m3" in found.tile
    usual = t.weight.with_base_compute(None)
    assert "e4m3" not in peftkern.explain(t.x, usual, t.lora_A, t.lora_B, backend=target.backend).tile
    assert Problem("cpu", 1, 1, 1, 1, F32, F32, "fp8").base_compute is None
    assert Problem("cpu", 1, 1, 1, 1, F32, F32, t.weight.format).base_compute == "fp8"


def test_what_it_is_refused_for():
    W = torch.randn(32, 64)
    for name in ("nf4", "int8", "dense"):
        with pytest.raises(ValueError, match=f"base_compute='fp8' of a weight of format '{name}'"):
            FrozenWeight.quantize(W, name, base_compute="fp8")
        with pytest.raises(ValueError, match=f"base_compute='fp8' of a weight of format '{name}'"):
            LoRALinear.from_linear(nn.Linear(64, 32), 4, 8, weight_format=name, base_compute="fp8")
    for value in ("int8", "bf16", 8, True):
        with pytest.raises(ValueError, match=f"base_compute={value!r} of a weight of format 'fp8'"):
            FrozenWeight.quantize(W, "fp8", base_compute=value)
    with pytest.raises(ValueError, match="unknown weight format 'fp8xfp8'"):
        FrozenWeight.quantize(W, "fp8xfp8")


def layer(base_compute: str | None = "fp8", scaling: str = "row") -> LoRALinear:
    torch.manual_seed(0)
    found = LoRALinear.from_linear(
        nn.Linear(77, 50, dtype=BF16), 4, 8, weight_format="fp8", base_compute=base_compute, scaling=scaling
    )
    nn.init.normal_(found.lora_B)
    return found


def test_a_layer_keeps_it_and_its_state_dict_does_not():
    """Copied, pickled, cast and moved it computes as before; what it saves is the fp8 weight, which both load."""
    mine, usual = layer(), layer(None)
    assert "weight_format=fp8, base_compute=fp8" in repr(mine) and "base_compute" not in repr(usual)
    assert repr(mine.frozen_weight()).endswith("format='fp8', N=50, K=77, device='cpu', base_compute='fp8')")
    x = torch.randn(6, 77, dtype=BF16)
    y = mine(x)
    assert not torch.equal(y, usual(x))
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for copied in (copy.deepcopy(mine), torch.load(file, weights_only=False), copy.deepcopy(mine).to("cpu").half()):
        assert copied.frozen_weight().base_compute == "fp8"
    assert torch.equal(copy.deepcopy(mine)(x), y)
    assert pickle.loads(pickle.dumps(mine.held)) == mine.held
    mine, state, usuals = layer(), layer().state_dict(), usual.state_dict()
    assert state.keys() == usuals.keys()
    assert all(torch.equal(value.view(torch.uint8), state[key].view(torch.uint8)) for key, value in usuals.items())
    for one, out in ((layer(), y), (layer(None), usual(x))):
        nn.init.zeros_(one.lora_A)
        assert str(one.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(one(x), out)
    assert isinstance(FrozenWeight.from_state_dict(state), FP8Weight)
    assert FrozenWeight.from_state_dict(state).base_compute is None
    with pytest.raises(RuntimeError, match="format: fp8 here, nf4 in"):
        mine.load_state_dict(LoRALinear.from_linear(nn.Linear(77, 50), 4, 8, weight_format="nf4").state_dict())
    assert mine.to("meta").frozen_weight().base_compute == "fp8"
    with pytest.raises(NotImplementedError, match="fp8"):
        layer().merge()


def test_a_compiled_layer_trains(target: Target):
    torch.compiler.reset()
    one = layer().to(target.device)
    x = torch.randn(6, 77, dtype=BF16, device=target.device)

    def step(module: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        one.zero_grad()
        y = module(leaf)
        y.sum().backward()
        return [y, leaf.grad, one.lora_A.grad, one.lora_B.grad]

    expected = step(one)
    found = step(torch.compile(one, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_opcheck(scaling, target: Target):
    """All of it but the check for mutated arguments, which multiplies them: torch has no product of e4m3 tensors."""
    if refused(BF16, target):
        return
    case = Case(6, 24, 16, 4, BF16, F32, 0.25, bias=True, lora_bias=True)
    t = made(case, scaling, target.device)
    call = a_call(case, t, target.backend, False)
    check_operators(
        call, t.x, [t.dy], all_of(call), ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_it_learns_as_the_plain_fp8_weight_does(target: Target):
    """A regression towards another low-rank update: the losses after some steps are within a few percent."""
    torch.manual_seed(0)
    x = torch.randn(64, 77, device=target.device, dtype=BF16)
    aim = (torch.randn(50, 4) @ torch.randn(4, 77) * 0.1).to(target.device)
    losses = []
    for base_compute in (None, "fp8"):
        one = layer(base_compute).to(target.device)
        nn.init.zeros_(one.lora_B)
        base = layer(None).to(target.device)
        nn.init.zeros_(base.lora_B)
        wanted = base(x).float() + x.float() @ aim.T
        optimizer = torch.optim.Adam([one.lora_A, one.lora_B], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (one(x).float() - wanted.detach()).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.1 * aim.square().sum(1).mean().item()
    assert math.isclose(losses[1], losses[0], rel_tol=0.1)


def test_dora_and_several_adapters_round_the_same_rows(target: Target):
    """The other operators that multiply with the weight: each frozen product is of the rounded rows."""
    weight = made(Case(5, 64, 48, 4, F32), "row", target.device).weight
    x = torch.randn(5, 64, device=target.device)
    state = torch.tensor([1, 2], device=target.device)
    chosen = dispatch.backend_named(target.backend)
    kept = chosen.kept(x, 0.3, state)
    V, r = definition(weight)
    y = dispatch.dropped_product(weight, x, 0.3, state, False, target.backend)
    assert relative_error(y, quantised(kept) @ (V * r[:, None]).T) < 1e-6
    dy = torch.randn(5, 48, device=target.device)
    dx = dispatch.dropped_product(weight, dy, 0.3, state, True, target.backend)
    exact = quantised(dy * r.float()) @ V
    assert relative_error(dx, torch.where(dropout_mask(5, 64, 0.3, state), exact, 0.0)) < 1e-6
