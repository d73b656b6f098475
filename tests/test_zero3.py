"""ZeRO-3's partitioned parameters, over a stand-in for DeepSpeed: fused, whenever patched; never empty weights."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, assert_equal, randomise
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn
from zero3_stand_in import ZeRO3

import peftkern
from peftkern.integrations.peft import zero3

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(5))  # which needs no gradient, as a model's own input


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    ZeRO3.installed(monkeypatch)


def model_of(first: type[nn.Module] = nn.Linear, **options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(first(16, 24) if first is nn.Linear else first(24, 16), nn.GELU(), nn.Linear(24, 12))
    config = LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["0", "2"], lora_bias=True) | options)
    return randomise(get_peft_model(base, config)).train()


def step(model: nn.Module, partitions: ZeRO3 | None = None, seed: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(X)
    if partitions is not None:
        assert not partitions.held()
    y.square().sum().backward()
    if partitions is not None:
        partitions.end_of_backward()
    return {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def patched(**options) -> dict[str, Tensor]:
    """What a patched model gives that is not partitioned."""
    model = model_of(**options)
    peftkern.patch(model)
    return step(model)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_a_step_is_that_of_whole_parameters(when, p, calls):
    expected, plain = patched(lora_dropout=p), step(model_of())
    if not p:
        assert_close(expected, plain)
    model = model_of(lora_dropout=p)
    if when == "before":
        assert len(peftkern.patch(model).fast) == 2
    partitions = ZeRO3(model)
    if when == "later":  # PEFT's own forward has run
        assert_equal(step(model, partitions), step(model_of(lora_dropout=p)))
    assert len(peftkern.patch(model).fast) == 2 and not partitions.held()
    calls.clear()
    for _ in range(3):
        assert_equal(step(model, partitions), expected)
        assert not partitions.held()
    assert len(calls) == 3 * 2 and not peftkern.report(model).skipped
    peftkern.unpatch(model)
    assert_equal(step(model, partitions, 2), step(model_of(lora_dropout=p), seed=2))


@pytest.mark.parametrize("leaf", ["the model", "each layer"])
def test_leaf_modules_are_fused_too(leaf, calls):
    expected, model = patched(), model_of()
    layers = [model.base_model.model[i] for i in (0, 2)]
    for module in [model.base_model.model] if leaf == "the model" else layers:
        module._z3_leaf = True
    partitions = ZeRO3(model)
    assert len(peftkern.patch(model).fast) == 2
    calls.clear()
    assert_equal(step(model, partitions), expected)
    assert len(calls) == 2 and not any(layer.__dict__.get("_external_params") for layer in layers)


def test_what_is_still_being_fetched_is_not_read():
    """It has its shape. The child's own hook waits for it, and later the layer's."""
    expected, plain = patched(), step(model_of())
    model = model_of()
    partitions = ZeRO3(model)
    peftkern.patch(model)
    layer = model.base_model.model[2]
    for fetched, result in ((True, plain), (False, expected), (True, expected)):
        if fetched:
            partitions.prefetch(layer.base_layer.weight)
        torch.testing.assert_close(step(model, partitions)["y"], result["y"])
    assert peftkern.report(model).calls["base_model.model.2"] == {"fused": 2, zero3.BEING_FETCHED: 1}


def test_adapters_that_are_off_are_not_gathered():
    model = model_of()
    expected = step(model)
    partitions = ZeRO3(model)
    peftkern.patch(model)
    with model.disable_adapter(), torch.no_grad():
        y = model(X)
    assert not any(module.__dict__.get("_external_params") for module in model.modules()) and not partitions.held()
    assert not torch.allclose(y, expected["y"])
    assert_close(step(model, partitions), expected)


def named(model: nn.Module) -> set[str]:
    return {reason for counts in peftkern.report(model).calls.values() for reason in counts}


@pytest.mark.parametrize(
    ("reason", "options"),
    [("its Conv1D is ZeRO-3's", dict(first=Conv1D)), ("lora_magnitude_vector has hooks", dict(use_dora=True))],
)
def test_what_would_keep_the_gathered_is_pefts(reason, options, calls):
    model = model_of(**dict(lora_bias=False) | options)
    ZeRO3(model)
    assert reason in peftkern.patch(model).skipped.values()


@pytest.mark.parametrize("child", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_of_somebody_elses_is_still_a_reason(child, register):
    model = model_of(lora_dropout=0.1)
    ZeRO3(model)
    found = getattr(model.base_model.model[0], child)
    getattr(found if child == "base_layer" else found["default"], register)(lambda *_: None)
    assert list(peftkern.patch(model).skipped.values()) == [f"{child} has hooks"]


def test_a_mixed_batch_and_a_compiler_are_pefts():
    model = model_of(lora_bias=False).eval()
    expected = model.base_model.model[0](X, adapter_names=["default", "__base__", "default"])
    ZeRO3(model)
    peftkern.patch(model)
    layer = model.base_model.model[0]
    torch.testing.assert_close(layer(X, adapter_names=["default", "__base__", "default"]), expected)
    assert named(model) == {"a mixed batch under ZeRO-3"}
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "torch.compile" in zero3.gather(layer)


def test_layers_of_one_x_run_alone():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate_proj(x) * self.up_proj(x)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomise(get_peft_model(nn.Sequential(Two()), LoraConfig(r=4, target_modules=["gate_proj", "up_proj"])))

    expected, model = step(build()), build()
    assert len(peftkern.patch(model, share=True).fast) == 2
    partitions = ZeRO3(model)
    for _ in range(3):
        assert_close(step(model, partitions), expected)
    assert set(map(str, peftkern.report(model).calls.values())) == {"{'fused': 3}"}
