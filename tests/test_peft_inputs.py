"""What a patched layer does with an x that is not an ordinary one."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted, linears

import peftkern
from peftkern.integrations.peft import PeftkernLoraLinear


def test_an_x_of_the_wrong_width_is_pefts_own_error(calls):
    """The fast path hands x to the kernels as it is, so the predicate must see to its shape."""
    model = adapted()
    peftkern.patch(model)
    layer = next(iter(linears(model).values()))
    for shape in [(3, layer.in_features + 1), (2, 3, layer.in_features // 2), (layer.in_features - 1,), ()]:
        with pytest.raises(RuntimeError):
            layer(torch.zeros(shape))
    assert not calls


def first_layer(model):
    return next(iter(linears(model).values()))


def x_of(layer, *leading: int) -> torch.Tensor:
    return torch.randn(*leading, layer.in_features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scaling", [float("inf"), float("nan"), torch.tensor(2), torch.tensor([0.5])], ids=str)
def test_an_unusual_scaling_is_pefts_to_apply(scaling, calls):
    model = adapted()
    layer = first_layer(model)
    layer.scaling["default"] = scaling
    x = x_of(layer, 3)
    expected = layer(x)
    peftkern.patch(model)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0, equal_nan=True)
    assert not calls


def test_function_transforms_run_pefts_forward(calls):
    model = adapted().requires_grad_(False)
    layer = first_layer(model)
    x, v = x_of(layer, 3), x_of(layer, 3).flip(0)

    def results():
        tangent = torch.func.jvp(layer, (x,), (v,))[1]
        return tangent, torch.func.grad(lambda z: layer(z).square().sum())(x), torch.vmap(layer)(x)

    expected = results()
    peftkern.patch(model)
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)) and not calls


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_a_dropout_that_is_watched_or_replaced_is_called(change, calls):
    model = adapted(lora_dropout=0.5).train()
    peftkern.patch(model)
    layer, seen = first_layer(model), []
    dropout = layer.lora_dropout["default"]
    if change == "hook":
        dropout.register_forward_hook(lambda *_: seen.append(1))
    else:
        dropout.forward = lambda z: seen.append(1) or z * 0
    layer(x_of(layer, 3))
    assert seen and not calls


def test_unpatch_undoes_what_accelerate_bound(calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model = adapted()
    layer = first_layer(model)
    expected = layer(x_of(layer, 3))
    peftkern.patch(model)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    peftkern.unpatch(model)
    calls.clear()
    assert torch.equal(layer(x_of(layer, 3)), expected) and not calls
    with model.disable_adapter():
        layer(x_of(layer, 3))


def test_a_backend_that_refuses_leaves_the_model_as_it_was(dispatch_env):
    model = adapted()
    dispatch_env(PEFTKERN_BACKEND="triton")
    with pytest.raises(RuntimeError, match="layer .*q_proj.*triton"):
        peftkern.patch(model)
    assert not any(type(module) is PeftkernLoraLinear for module in model.modules())
    dispatch_env(PEFTKERN_BACKEND="no_such_backend")
    with pytest.raises(ValueError, match="no_such_backend"):
        peftkern.patch(model)
    assert not any(type(module) is PeftkernLoraLinear for module in model.modules())
