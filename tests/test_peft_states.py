"""``patch`` never raises for the state that a model is in: it names the reason, and judges again at the next call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import randomise
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import peftkern
from peftkern.integrations.peft import read


def model_of(base: nn.Module | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    settings = dict(r=4, target_modules=["0"], lora_bias=True) | options
    return randomise(get_peft_model(nn.Sequential(base or nn.Linear(16, 8)), LoraConfig(**settings)))


def partition(*names: str) -> Callable[[nn.Module], Callable[[], None]]:
    """As ``deepspeed.zero.Init`` leaves parameters: of size 0, the data elsewhere. Returns what gathers them."""

    def change(model: nn.Module) -> Callable[[], None]:
        held = {n: p for n, p in model.named_parameters() if n.endswith(names)}
        data = {n: p.data for n, p in held.items()}
        for parameter in held.values():
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        return lambda: [setattr(held[n], "data", data[n]) for n in held]

    return change


def to_meta(model: nn.Module) -> Callable[[], None]:
    layer = model.base_model.model[0]
    linear = [layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]]
    held = [(module, dict(module._parameters)) for module in linear]
    for module in linear:
        module.to("meta")
    return lambda: [module._parameters.update(kept) for module, kept in held]


def weight_to(kind: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], Callable[[], None]]:
    def change(model: nn.Module) -> Callable[[], None]:
        base = model.base_model.model[0].base_layer
        kept = base._parameters["weight"]
        base._parameters["weight"] = nn.Parameter(kind(kept.detach()), requires_grad=False)
        return lambda: base._parameters.update(weight=kept)

    return change


def parametrized(model: nn.Module) -> Callable[[], None]:
    base = model.base_model.model[0].base_layer
    parametrize.register_parametrization(base, "weight", nn.Identity())

    def end() -> None:
        parametrize.remove_parametrizations(base, "weight")
        base.weight.requires_grad_(False)

    return end


def offloaded(model: nn.Module) -> Callable[[], None]:
    hooks = pytest.importorskip("accelerate.hooks")
    base = model.base_model.model[0].base_layer
    hooks.add_hook_to_module(base, hooks.AlignDevicesHook("cpu", offload=True))
    return lambda: hooks.remove_hook_from_module(base)


STATES = {
    "ZeRO-3, the base": (partition("base_layer.weight", "base_layer.bias"), "partitioned"),
    "ZeRO-3, everything": (partition("weight", "bias"), "partitioned"),
    "ZeRO-3, lora_A": (partition("lora_A.default.weight"), "lora_A (0,)"),
    "ZeRO-3, lora_B": (partition("lora_B.default.weight"), "lora_B (0,)"),
    "ZeRO-3, the base's bias": (partition("base_layer.bias"), "its base bias is partitioned"),
    "ZeRO-3, lora_B's bias": (partition("lora_B.default.bias"), "lora_B's bias has 0 of 8"),
    "meta": (to_meta, "on meta"),
    "offloaded": (offloaded, "replaced forward"),
    "parametrized": (parametrized, "ParametrizedLinear"),
    "fp8": (weight_to(lambda w: w.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "integers": (weight_to(lambda w: w.to(torch.int8)), "int8"),
    "complex": (weight_to(lambda w: w.to(torch.complex64)), "complex64"),
    "flat": (weight_to(lambda w: w.flatten()), "base (128,)"),
}


@pytest.mark.parametrize("state", STATES)
def test_patch_names_the_reason_and_judges_again(state, calls):
    change, reason = STATES[state]
    model, x = model_of(), torch.randn(3, 16)
    expected = model(x)
    undo = change(model)
    report = peftkern.patch(model)
    assert not report.fast and reason in report.skipped["base_model.model.0"], report
    assert peftkern.report(model).skipped == report.skipped
    undo()
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 1 and peftkern.report(model).fast


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_comes_later_is_pefts_own(state, calls):
    """Its result or its error; and fast again when the state ends."""
    change, reason = STATES[state]
    model, x = model_of(), torch.randn(3, 16)
    peftkern.patch(model)

    def outcome() -> torch.Tensor | str:
        try:
            return model(x).detach()
        except Exception as error:  # noqa: BLE001 - PEFT's, whatever it is
            return f"{type(error).__name__}: {error}"

    expected = outcome()
    undo = change(model)
    found = outcome()
    with peftkern.disabled():
        own = outcome()
    assert type(found) is type(own) and (found == own if isinstance(own, str) else torch.equal(found, own))
    assert any(reason in text for text in peftkern.report(model).calls["base_model.model.0"])
    undo()
    calls.clear()
    torch.testing.assert_close(outcome(), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_that_is_partitioned_or_not_quantised_yet(kind):
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(16, 8, quant_type="nf4") if kind == "nf4" else bnb.nn.Linear8bitLt(16, 8)
    model = nn.Sequential(base)
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
    assert "base_model.model.0" in peftkern.patch(model).skipped
    base.to("cpu")
    base.weight.data = torch.empty(0, dtype=base.weight.dtype)
    assert "base_model.model.0" in peftkern.patch(model).skipped


@pytest.mark.parametrize("change", [partition("down_proj"), partition("lora_A.default.weight"), partition("proj")])
def test_experts_that_are_partitioned(change):
    experts = pytest.importorskip("test_experts")
    model = experts.adapted()
    expected = experts.run_experts(model)
    undo = change(model)
    skipped = peftkern.patch(model).skipped
    assert skipped and all("partitioned" in reason for reason in skipped.values())
    undo()
    found = experts.run_experts(model)
    torch.testing.assert_close(found["y"], expected["y"])
    assert not peftkern.report(model).skipped


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_dtype_that_the_kernels_have_not_is_pefts(dtype, calls):
    model = model_of(nn.Linear(16, 8, dtype=dtype), lora_bias=False)
    x = torch.randn(3, 16, dtype=dtype)
    expected = model(x)
    report = peftkern.patch(model)
    assert not report.fast and str(dtype) in str(report)
    assert torch.equal(model(x), expected) and not calls


def test_the_predicate_takes_the_dtypes_that_the_kernels_take_and_no_other():
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    taken = {dtype for dtype in every if read.why_not_dtypes(dtype, dtype, []) is None}
    assert taken == {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def test_a_reason_tells_somebody_elses_linear_from_torchs():
    other = type("Linear", (nn.Linear,), {"__module__": "somebody"})
    model = model_of()
    model.base_model.model[0].base_layer = other(16, 8)
    (reason,) = peftkern.patch(model).skipped.values()
    assert reason.startswith("base_layer is a somebody.Linear, not a plain torch.nn.modules.linear.Linear or ")
