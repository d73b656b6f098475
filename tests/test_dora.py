"""DoRA: the row norms, values and gradients against fp64, PEFT's own layers, and what PEFT keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import call_of
from conftest import Case, Target, adapted, linears, logits, make, pooled, step
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import dropout
from peftkern.call import Pair
from peftkern.functional import run_dora
from peftkern.ops import eager, norm, schema
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as, relative_error
from peftkern.weights import DenseWeight

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("x", "lora_A", "lora_B", "bias", "magnitude")


# ------------------------------------------------------------------------------------------------------- the row norms


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_row_norms_against_fp64_and_pefts_formula(dtype, monkeypatch):
    t = make(Case(1, 96, 70, 5, dtype, F32 if dtype in (BF16, F16) else dtype))
    scaled = 1.7 * t.lora_B.double() @ t.lora_A.double()
    truth = torch.linalg.norm(t.weight.double() + scaled, dim=1)
    peft = torch.linalg.norm(t.weight.to(t.lora_A.dtype) + 1.7 * (t.lora_B @ t.lora_A), dim=1)
    for block in (2**17, 96 * 8, 1):
        monkeypatch.setitem(norm._BLOCK, "cpu", block)
        found = norm.row_norm(DenseWeight(t.weight), t.lora_A, t.lora_B, 1.7, None)
        assert_as_good_as(found, peft, truth, f"norms in blocks of {block}")
    tensor = norm.row_norm(DenseWeight(t.weight), t.lora_A, t.lora_B, 2.0, torch.tensor(0.85))
    torch.testing.assert_close(tensor, found)


def test_row_norms_where_the_update_cancels_the_weight():
    """By the expanded square most of these would be lost."""
    t = make(Case(1, 96, 70, 5))
    W = -(t.lora_B @ t.lora_A) + 1e-4 * t.weight
    truth = torch.linalg.norm(W.double() + t.lora_B.double() @ t.lora_A.double(), dim=1)
    found = norm.row_norm(DenseWeight(W), t.lora_A, t.lora_B, 1.0, None)
    peft = torch.linalg.norm(W + t.lora_B @ t.lora_A, dim=1)
    assert_as_good_as(found, peft, truth)
    B, A = t.lora_B, t.lora_A
    expanded = (W**2).sum(1) + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    assert not relative_error(expanded.clamp(0).sqrt(), truth) <= 10 * relative_error(peft, truth)


def test_row_norms_never_hold_the_sum_in_memory(monkeypatch):
    monkeypatch.setitem(norm._BLOCK, "cpu", 96 * 8)
    t, sizes = make(Case(1, 96, 70, 5, BF16, F32)), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == F32:
                sizes.append(result.numel())
            return result

    with Sizes():
        norm.row_norm(DenseWeight(t.weight), t.lora_A, t.lora_B, 1.7, None)
    assert max(sizes) == 96 * 8


# ----------------------------------------------------------------------------------------------- values and gradients


def leaves_of(case: Case, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    t = make(case, device)
    leaves = {"x": t.x, "lora_A": t.lora_A, "lora_B": t.lora_B, "bias": t.bias}
    # around the norm of a row, of either sign, one of them zero: then y cannot be divided by the gain
    leaves["magnitude"] = torch.linspace(-1, 2, case.N, device=device).to(t.lora_A.dtype)
    leaves["magnitude"][case.N // 2] = 0
    return {n: v.detach() for n, v in leaves.items() if v is not None}, t.weight, t.dy


def fresh(leaves: dict[str, Tensor], dtype=None, needs=NAMES) -> dict[str, Tensor]:
    return {n: v.clone().to(dtype or v.dtype).requires_grad_(n in needs) for n, v in leaves.items()}


STATE = torch.tensor([7, 2**40 + 1])


def ours(v: dict[str, Tensor], W: Tensor, backend: str, p: float = 0.0, scaling=1.75, tensor=None) -> Tensor:
    operands = Pair(
        DenseWeight(W), v["lora_A"], v["lora_B"], v.get("bias"), None, scaling, tensor,
        p, STATE.to(W.device) if p else None, "base",
    )  # fmt: skip
    return run_dora(v["x"], call_of([operands], backend=backend), v["magnitude"])


def plain(v: dict[str, Tensor], W: Tensor, thin: torch.dtype, p: float = 0.0, wide: torch.dtype = F32) -> Tensor:
    """PEFT's formulas: without dropout g h + bias, with it base(x) + (g - 1) D(x) W^T + g c D(x) A^T B^T."""
    A, B, x = v["lora_A"].to(thin), v["lora_B"].to(thin), v["x"]
    size = torch.linalg.norm(W.to(wide) + 1.75 * v["lora_B"].to(wide) @ v["lora_A"].to(wide), dim=1).detach()
    g = v["magnitude"].to(wide) / size
    dropped = x
    if p:
        keep = dropout_mask(*x.shape, p, STATE.to(x.device))
        dropped = torch.where(keep, x * dropout.scale(p), torch.zeros_like(x))
    update = (1.75 * (dropped @ A.T @ B.T)).to(x.dtype)
    y = x @ W.T + (g - 1) * (dropped @ W.T) + g * update if p else g * (x @ W.T + update)
    return (y if "bias" not in v else y + v["bias"]).to(x.dtype)


def found(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    y.backward(dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


CASES = [
    Case(37, 40, 24, 4, F32, bias=True),
    Case(37, 40, 24, 7, BF16, F32, bias=True),
    Case(19, 64, 48, 16, BF16, BF16),
    Case(19, 64, 48, 4, F16, F32, bias=True),
    Case(1, 33, 57, 3, F32),
    Case(37, 40, 24, 4, F32, p=0.1, bias=True),
    Case(37, 130, 24, 7, BF16, F32, p=0.5, bias=True),
    Case(19, 64, 48, 16, BF16, BF16, p=0.1),
    Case(70, 65, 48, 4, F16, F32, p=0.3, bias=True),
    Case(9, 33, 57, 3, F32, p=0.9),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_every_gradient_against_fp64(case, target: Target, poisoned):
    leaves, W, dy = leaves_of(case, target.device)
    mine, peer, wide = fresh(leaves), fresh(leaves), fresh(leaves, F64)
    results = found(ours(mine, W, target.backend, case.p), mine, dy)
    peers = found(plain(peer, W, case.dtype, case.p), peer, dy)
    truth = found(plain(wide, W.double(), F64, case.p, F64), wide, dy.double())
    assert results.keys() == truth.keys()
    for name, value in results.items():
        assert value.dtype == (dy if name == "y" else leaves[name]).dtype
        assert_as_good_as(value, peers[name], truth[name], f"{name} of {case}")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("magnitude",), ("bias",)], ids="+".join)
def test_only_what_needs_a_gradient_gets_one(needs, p, target: Target):
    leaves, W, dy = leaves_of(CASES[0], target.device)
    every, some = fresh(leaves), fresh(leaves, needs=needs)
    full, partial = found(ours(every, W, target.backend, p), every, dy), None
    y = ours(some, W, target.backend, p)
    saved = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
    assert any(tensor.shape == dy.shape for tensor in saved) == ("magnitude" in needs)
    partial = found(y, some, dy)
    assert partial.keys() == {"y", *needs}
    for name in partial:
        torch.testing.assert_close(partial[name], full[name])


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_gradcheck_with_the_norm_held_constant(p, monkeypatch):
    leaves, W, _ = leaves_of(Case(5, 7, 4, 3, F64, F64, bias=True))
    constant = norm.row_norm(DenseWeight(W), leaves["lora_A"], leaves["lora_B"], 1.75, None)
    monkeypatch.setattr(eager, "row_norm", lambda *_: constant)
    v = fresh(leaves)
    assert torch.autograd.gradcheck(lambda *t: ours(dict(zip(v, t, strict=True)), W, "", p), tuple(v.values()))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_tensor_scaling_no_rows_and_no_grad(p, target: Target):
    leaves, W, dy = leaves_of(CASES[0], target.device)
    v = fresh(leaves)
    expected = found(ours(v, W, target.backend, p), v, dy)
    other, scaling = fresh(leaves), torch.tensor(1.75, device=target.device)
    y = ours(other, W, target.backend, p, 1.0, scaling)
    scaling.fill_(9.0)  # backward uses what forward saw
    results = found(y, other, dy)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])
    with torch.no_grad():
        assert torch.equal(ours(v, W, target.backend, p), expected["y"])
    empty = fresh(leaves) | {"x": v["x"].detach()[:0].requires_grad_()}
    nothing = found(ours(empty, W, target.backend, p), empty, dy[:0])
    assert nothing["x"].shape == (0, 40) and not any(value.any() for value in nothing.values())


def test_opcheck():
    t = make(Case(5, 70, 24, 3))
    torch.library.opcheck(
        schema.row_norm, (t.weight, None, [], "dense", [24, 70, 0, 0], t.lora_A, t.lora_B, 1.75, None)
    )


# ----------------------------------------------------------------------------------------------------- PEFT's layers


def dora(dtype=F32, **options) -> nn.Module:
    """Magnitudes away from the norms, as after some training."""
    model = adapted(dtype, use_dora=True, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.copy_(parameter.abs() * 1.3 + 0.05)
    return model


@pytest.mark.parametrize("options", [{}, dict(base_bias=True), dict(use_rslora=True)], ids=str)
def test_loss_and_gradients_are_pefts(options, calls):
    model = dora(**options)
    keys = list(model.state_dict())
    expected, truth = step(model), step(copy.deepcopy(model).double())
    report = peftkern.patch(model)
    found = step(model)
    assert len(report.fast) == 14 and len(calls) == 14 and list(model.state_dict()) == keys
    assert found.keys() == expected.keys() and any("magnitude" in name for name in found)
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 base", "fp32 base under autocast"])
def test_16_bit(autocast, calls):
    model = dora(F32 if autocast else BF16)
    truth, exact = step(copy.deepcopy(model).double()), logits(copy.deepcopy(model).double())
    with torch.autocast("cpu", BF16, enabled=autocast):
        expected, peft_logits = step(model), logits(model)
        peftkern.patch(model)
        found = step(model)
        assert_as_good_as(logits(model), peft_logits, exact, "the logits")
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in expected.items()}
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")
    assert len(calls) == 28


def test_two_adapters_with_dora_are_pefts(calls):
    plain, patched = dora().eval(), dora().eval()
    for model in (plain, patched):
        model.add_adapter("extra", LoraConfig(r=3, target_modules=["up_proj"]))
        model.base_model.set_adapter(["default", "extra"])
    report = peftkern.patch(patched)
    assert set(report.skipped.values()) == {"2 adapters are active, and one of them uses DoRA"}
    assert len(report.skipped) == 2 and len(report.fast) == 12
    layer, twin = (linears(model)["base_model.model.model.layers.0.mlp.up_proj"] for model in (patched, plain))
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), twin(x)) and not calls


def test_an_x_of_one_dimension_is_pefts(calls):
    """Whose y has one more."""
    layer = next(iter(linears(dora()).values()))
    x = torch.randn(32)
    expected = layer(x)
    peftkern.patch(nn.ModuleList([layer]))
    assert torch.equal(layer(x), expected) and expected.ndim == 2 and not calls
    assert layer(x[None]).shape == expected.shape and len(calls) == 1


def test_the_norm_follows_merges_into_the_base_and_training_steps(calls):
    """Nothing of it is cached: PEFT's merge moves no version counter."""
    model = dora().eval()
    peftkern.patch(model)
    logits(model)
    for layer in linears(model).values():
        layer.base_layer.weight.data += 0.05
        layer.lora_B["default"].weight.data *= 1.5
    found = logits(model)
    with peftkern.disabled():
        torch.testing.assert_close(found, logits(model))
    assert len(calls) == 28


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_conv1d(calls):
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(Conv1D(12, 8)), LoraConfig(use_dora=True, fan_in_fan_out=True, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 8)
    expected = layer(x)
    assert len(peftkern.patch(model).fast) == 1
    torch.testing.assert_close(layer(x), expected)
    assert len(calls) == 1


def test_a_watched_magnitude_is_called(calls):
    model, seen = dora(), []
    layer = next(iter(linears(model).values()))
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: seen.append(1))
    peftkern.patch(model)
    layer(torch.randn(3, layer.in_features))
    assert seen and not calls


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_in_one_graph(p):
    torch._dynamo.reset()
    model = dora(target_modules=["up_proj"], lora_dropout=p).train()
    layer, x = next(iter(linears(model).values())), torch.randn(3, 32, requires_grad=True)
    peftkern.patch(model)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        gradients = {name: leaf.grad.clone() for name, leaf in layer.named_parameters() if leaf.grad is not None}
        results.append({"y": y.detach(), "x": x.grad} | gradients)
    assert results[1].keys() == results[0].keys() and len(results[0]) == 5
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name])
