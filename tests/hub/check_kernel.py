"""The repository of ``make hub``, as the ``kernels`` package loads it: its own checks, and PEFT's numbers."""

from __future__ import annotations

import pathlib
import sys

import kernels
import peft
import pytest
import torch
import transformers
from kernels._rust import Build

REPOSITORY = pathlib.Path(__file__).resolve().parents[2] / "build" / "hub"
TOKENS = torch.arange(16).view(2, 8)


@pytest.fixture(scope="module")
def kernel():
    loaded = kernels.get_local_kernel(REPOSITORY)
    loaded.layers  # noqa: B018  loads what imports PEFT
    assert not [name for name in sys.modules if name.partition(".")[0] == "peftkern"]
    return loaded


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def kernelized(model, mode):
    kernels.replace_kernel_forward_from_hub(peft.tuners.lora.Linear, "LoraLinear")
    layer = kernels.LocalLayerRepository(REPOSITORY, layer_name="LoraLinear")
    with kernels.use_kernel_mapping(
        {"LoraLinear": {"cpu": {kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE: layer}}}
    ):
        return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)


def step(model) -> list[torch.Tensor]:
    """The logits and every gradient."""
    model.zero_grad()
    found = model(TOKENS, labels=TOKENS)
    found.loss.backward()
    return [found.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def refuse(*_, **__):
    raise AssertionError("PEFT's own forward was called")


def test_what_it_says_of_itself_is_understood(capfd):
    assert [str(backend).lower() for backend in Build.open(REPOSITORY).general.backends] == ["cpu", "cuda", "rocm"]
    assert "legacy" not in capfd.readouterr().err


def test_the_compiled_variant_is_taken(kernel):
    assert kernel.__name__.startswith("_peftkern_cpu_")
    assert kernel.env_report()["backends"]["cpp"] == "ready"


@pytest.mark.parametrize("mode", [kernels.Mode.TRAINING, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE], ids=str)
def test_a_kernelized_model_has_pefts_numbers(kernel, model, mode, monkeypatch):
    theirs = step(model)
    kernelized(model, mode)
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", refuse)
    for ours, right in zip(step(model), theirs, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_what_is_not_fused_runs_pefts_own_forward(kernel, model):
    kernelized(model, kernels.Mode.TRAINING)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, model.unload()(TOKENS).logits)


def test_a_kernelized_layer_is_one_graph(kernel, model):
    kernelized(model, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    layer, x = model.base_model.model.model.layers[0].mlp.up_proj, torch.randn(5, 32)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_it_runs_beside_the_package(kernel):
    import peftkern

    x, weight, A, B = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    ours = kernel.lora_linear(x, weight, A, B, 2.0)
    assert kernel.lora_linear is not peftkern.lora_linear
    torch.testing.assert_close(peftkern.lora_linear(x, weight, A, B, 2.0), ours)
    torch.testing.assert_close(ours, x @ weight.t() + 2.0 * x @ A.t() @ B.t())
