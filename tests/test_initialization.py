"""PiSSA, OLoRA, Gaussian: PEFT's factors, a start that is the base, and a life as a module."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import adapted, linears, llama, logits
from torch import nn

import peftkern
from peftkern.adapters import lora_plus_groups
from peftkern.nn import LoRALinear
from peftkern.nn.initialization import split_weight

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
METHODS = ["pissa", "pissa_niter_8", "olora"]


def linear(dtype: torch.dtype = F32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(24, 16).to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_bit_is_pefts(method, dtype, use_rslora):
    """Of fp32 layers and every weight; PEFT rounds the factors of a 16-bit layer to its dtype, which is not needed."""
    options = dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=use_rslora, init_lora_weights=method)
    theirs, ours = adapted(dtype, zero=True, **options), llama(dtype)
    peftkern.inject(ours, **options)
    for name, peer in linears(theirs).items():
        layer = ours.get_submodule(name.removeprefix("base_model.model."))
        assert torch.equal(layer.lora_A.to(dtype).float(), peer.lora_A["default"].weight), name
        assert torch.equal(layer.lora_B.to(dtype).float(), peer.lora_B["default"].weight), name
        assert torch.equal(layer.weight, peer.base_layer.weight), name


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_parts_add_up_to_the_weight(method, dtype):
    weight = linear(dtype).weight.detach()
    A, B, residual = split_weight(weight, 4, 2.0, method)
    assert A.shape == (4, 24) and B.shape == (16, 4) and residual.dtype == dtype
    assert A.dtype == B.dtype == torch.promote_types(dtype, F32)
    whole = residual.double() + 2.0 * B.double() @ A.double()
    rounding = torch.finfo(dtype).eps * residual.abs().max() / 2 + 4 * torch.finfo(A.dtype).eps
    assert (whole - weight.double()).abs().max() <= rounding
    if method != "olora":
        assert residual.double().norm() < weight.double().norm()


def test_pissa_takes_the_principal_part_and_balances_it():
    torch.manual_seed(0)
    Q, R = (torch.linalg.qr(torch.randn(n, 16))[0] for n in (16, 24))
    weight = Q @ torch.diag(2.0 ** -torch.arange(16)) @ R.T  # a spectrum that subspace iteration separates
    for method in ("pissa", "pissa_niter_8"):
        A, B, residual = split_weight(weight, 4, 2.0, method)
        S = torch.linalg.svdvals(weight.double())
        torch.testing.assert_close(torch.linalg.svdvals(residual.double())[:4], S[4:8], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((B.T @ B).diag().double(), S[:4] / 2.0, rtol=1e-3, atol=1e-4)


def test_olora_is_orthonormal():
    A, B, _ = split_weight(linear().weight.detach(), 4, 2.0, "olora")
    torch.testing.assert_close(B.T @ B, torch.eye(4))
    assert torch.equal(A[:, :4], A[:, :4].triu())


def test_gaussian_is_pefts_distribution():
    torch.manual_seed(0)
    layer = LoRALinear(400, 30, 8, 16, init_lora_weights="gaussian")
    assert abs(layer.lora_A.std() - 1 / 8) < 0.005 and layer.lora_A.abs().max() > 3 / 8 and not layer.lora_B.any()


@pytest.mark.parametrize("method", [True, "gaussian", *METHODS])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_model_starts_as_its_base(method, dtype):
    model = llama(dtype)
    expected = logits(model)
    peftkern.inject(model, r=4, lora_alpha=8, init_lora_weights=method)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_given_layer_keeps_its_weight_and_the_new_one_can_give_it_back(method):
    given = linear()
    before = given.weight.detach().clone()
    layer = LoRALinear.from_linear(given, 4, 8, init_lora_weights=method)
    assert torch.equal(given.weight, before) and not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.base_weight(), before, rtol=0, atol=4e-7)
    assert f"init_lora_weights={method!r}" in repr(layer)


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_and_copies_hold_what_was_taken_out(method):
    layer = LoRALinear.from_linear(linear(), 4, 8, init_lora_weights=method)
    assert {"removed_A", "removed_B"} < set(layer.state_dict())
    other = LoRALinear.from_linear(linear(seed=1), 4, 8, init_lora_weights=method)
    with torch.no_grad():
        layer.lora_B.add_(1.0)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x)) and torch.equal(twin.base_weight(), layer.base_weight())
    with pytest.raises(RuntimeError, match="removed_A"):
        LoRALinear(24, 16, 4, 8).load_state_dict(layer.state_dict())
    layer.reset_lora_parameters()
    torch.testing.assert_close(layer(x), linear()(x))


def test_a_conv1d_gets_the_factors_of_its_transpose():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, twin = Conv1D(16, 24), linear()
    with torch.no_grad():
        conv.weight.copy_(twin.weight.T)
        conv.bias.copy_(twin.bias)
    before = conv.weight.detach().clone()
    layers = [LoRALinear.from_linear(module, 4, 8, init_lora_weights="pissa") for module in (conv, twin)]
    torch.testing.assert_close(layers[0].weight, layers[1].weight)
    assert torch.equal(conv.weight, before)


def test_reset_parameters_draws_a_new_base():
    layer = LoRALinear.from_linear(linear(), 4, 8, init_lora_weights="pissa")
    old = layer.base_weight().clone()
    layer.reset_parameters()
    new = layer.base_weight()
    assert not torch.allclose(new, old)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, new, layer.bias))


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method):
    with pytest.raises(ValueError, match="on the meta device"):
        LoRALinear(24, 16, 4, 8, device="meta", init_lora_weights=method)
    with pytest.raises(ValueError, match=r"needs r <= min\(16, 24\), got r=17"):
        LoRALinear(24, 16, 17, 8, init_lora_weights=method)
    broken = linear()
    with torch.no_grad():
        broken.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="holds a NaN"):
        LoRALinear.from_linear(broken, 4, 8, init_lora_weights=method)
    with pytest.raises(ValueError, match="'pissa_niter_x' is not one of"):
        LoRALinear(24, 16, 4, 8, init_lora_weights="pissa_niter_x")


# ------------------------------------------------------------------------------------------------------------- LoRA+


def rates(groups: list[dict], model: nn.Module) -> dict[str, tuple[float, float]]:
    """(rate, decay) by parameter name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


PEFT_OPTIONS = [
    dict(base_bias=True, lora_bias=True, bias="lora_only"),
    dict(target_modules=["q_proj", "embed_tokens"]),
    dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
]


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # the MLP has no bias
@pytest.mark.parametrize("options", PEFT_OPTIONS, ids=["biases", "embedding", "modules_to_save"])
def test_lora_plus_groups_are_pefts(options):
    from peft.optimizers import create_loraplus_optimizer

    model = adapted(**options)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    expected = rates(theirs.param_groups, model)
    for patched in (False, True):
        if patched:
            peftkern.patch(model)
        assert rates(lora_plus_groups(model, 1e-3, 16.0, weight_decay=0.01), model) == expected


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_lora_plus_trains_an_injected_model(optimiser):
    model = llama(bias=True)
    peftkern.inject(model, r=4, lora_alpha=8, lora_bias=True, bias="lora_only")
    groups = lora_plus_groups(model, 1e-3, 16.0, weight_decay=0.01)
    found = rates(groups, model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, (rate, decay) in found.items():
        assert rate == (1e-3 if name.endswith("lora_A") else 1e-3 * 16.0)
        assert decay == (0.0 if name.endswith("bias") else 0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits(model).square().mean().backward()
    optimiser(groups).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in changed) and changed <= set(found)


def test_lora_plus_refusals():
    model = llama()
    with pytest.raises(ValueError, match="lr_ratio is positive and finite, got 0"):
        lora_plus_groups(model, 1e-3, 0)
    with pytest.raises(ValueError, match="lr is positive and finite, got nan"):
        lora_plus_groups(model, float("nan"), 2)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        lora_plus_groups(model.requires_grad_(False), 1e-3, 2)
