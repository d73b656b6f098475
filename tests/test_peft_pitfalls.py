"""PEFT's pitfalls that no other file holds: shapes and strides of x, GPT-2, who is frozen, files, tying, the cost."""

from __future__ import annotations

import copy
import io
import time
from collections import Counter

import pytest
import torch
import transformers
from conftest import ALL_LINEAR, adapted, assert_close, assert_equal, linears, llama, logits, pooled, randomise, step
from peft import LoraConfig, get_peft_model
from torch import nn

import peftkern
from peftkern.integrations.peft import PeftkernLoraLinear, layer, read, swap
from peftkern.testing.numerics import assert_as_good_as

BF16, F16 = torch.bfloat16, torch.float16


def up_proj(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """One layer of a patched model, 32 to 48."""
    model = adapted(dtype, **options)
    peftkern.patch(model)
    return linears(model)["base_model.model.model.layers.0.mlp.up_proj"]


def run(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()  # keeps its strides
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_any_number_of_leading_dimensions_and_no_rows(leading, calls):
    module = up_proj()
    x, dy = torch.randn(*leading, 32), torch.randn(*leading, 48)
    found = run(module, x, dy)
    assert calls == [(*leading, 32)]
    with peftkern.disabled():
        expected = run(module, x, dy)
    for mine, peft in zip(found, expected, strict=True):
        assert mine.shape == peft.shape
        torch.testing.assert_close(mine, peft)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_strided_x_and_dy(dtype, calls):
    """A transposed batch, every second column, an expanded gradient."""
    module = up_proj(dtype)
    strided = [
        (torch.randn(5, 3, 32).to(dtype).transpose(0, 1), torch.randn(5, 3, 48).to(dtype).transpose(0, 1)),
        (torch.randn(3, 5, 64).to(dtype)[..., ::2], torch.randn(48, 3, 5).to(dtype).permute(1, 2, 0)),
        (torch.randn(32, 7).to(dtype).t(), torch.randn(1, 1).to(dtype).expand(7, 48)),
    ]
    for x, dy in strided:
        assert not x.is_contiguous() and not dy.is_contiguous()
        packed = run(module, x.contiguous(), dy.contiguous())
        for mine, expected in zip(run(module, x, dy), packed, strict=True):
            torch.testing.assert_close(mine, expected)
    assert len(calls) == 6


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_fp32_x_beside_a_16_bit_base_needs_autocast(dtype, calls):
    module, x = up_proj(dtype), torch.randn(3, 32)
    with pytest.raises(RuntimeError, match="dtype"):
        module(x)
    assert not calls
    with torch.autocast("cpu", dtype):
        y = module(x)
        assert y.dtype == dtype and len(calls) == 1
        with peftkern.disabled():
            expected = module(x)
    exact = copy.deepcopy(module).double()
    assert_as_good_as(y, expected, exact(x.double()))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_gets_no_gradient_and_keeps_no_operand(frozen, calls):
    model = adapted()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    expected = step(model)
    assert len(peftkern.patch(model).fast) == 14
    assert_close(step(model), expected)
    assert len(calls) == 14 and not any(frozen in name for name in expected)
    module, x = next(iter(linears(model).values())), torch.randn(3, 32)
    held = {tensor.data_ptr() for tensor in module(x).grad_fn.saved_tensors if tensor is not None}
    assert (x.data_ptr() in held) == (frozen == "lora_B")


def test_mica_is_vanilla_with_a_frozen_lora_b(calls):
    model = adapted(init_lora_weights="mica", zero=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    expected, truth = step(model), step(copy.deepcopy(model).double())
    assert len(peftkern.patch(model).fast) == 14
    found = step(model)
    assert len(calls) == 14 and not any("lora_B" in name for name in found) and found.keys() == expected.keys()
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gpt2_trains_through_conv1d(dtype, calls):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0.0)
    config.embd_pdrop = config.attn_pdrop = 0.0
    options = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, bias="lora_only")
    model = get_peft_model(transformers.GPT2LMHeadModel(config).to(dtype), LoraConfig(r=4, lora_alpha=8, **options))
    randomise(model)
    truth, expected = step(copy.deepcopy(model).double()), step(model)
    report = peftkern.patch(model)
    found = step(model)
    assert len(report.fast) == 8 and not report.skipped and len(calls) == 8
    assert any(name.endswith("base_layer.bias") for name in found)
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")


def test_the_whole_model_through_torch_save(calls):
    model = adapted(lora_dropout=0.2).eval()
    peftkern.patch(model)
    expected, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert all(type(module) is PeftkernLoraLinear for module in linears(twin).values())
    assert torch.equal(logits(twin), expected) and len(calls) == 28
    plain = adapted(lora_dropout=0.2).eval()
    plain.load_state_dict(model.state_dict())
    peftkern.unpatch(model)
    assert torch.equal(logits(plain), logits(model))


def test_an_adapter_on_a_tied_head(calls):
    torch.manual_seed(0)
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = randomise(get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head", "q_proj"])))
    expected = step(model)
    report = peftkern.patch(model)
    assert any("lm_head" in name for name in report.fast) and not report.skipped
    assert_close(step(model), expected)
    assert len(calls) == 3


def test_disable_adapter_without_gradients_and_back(calls):
    model = adapted(lora_dropout=0.3).eval()
    peftkern.patch(model)
    with torch.no_grad(), model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(llama())) and not calls
    assert not torch.equal(logits(model), base) and len(calls) == 14


def test_parametrized_and_quantised_children_are_called_and_named(calls):
    class Narrow(nn.Module):
        def forward(self, weight):
            return weight.to(BF16).float()

    plain, patched = adapted(), adapted()
    for model in (plain, patched):
        for module in linears(model).values():
            nn.utils.parametrize.register_parametrization(module.lora_A["default"], "weight", Narrow())
    report = peftkern.patch(patched)
    assert set(report.skipped.values()) == {"lora_A is a ParametrizedLinear, not a plain Linear"}
    assert_equal(step(patched), step(plain))
    assert not calls


def test_patching_a_7b_tree_asks_each_layer_twice(monkeypatch, capsys):
    """224 layers; the work is counted, the time is only shown (NOTES holds a measured one)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=2, vocab_size=16
    )
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=2, target_modules=ALL_LINEAR))
    seen: Counter[int] = Counter()
    genuine = read.plain_parts

    def counted(module, **options):
        seen[id(module)] += 1
        return genuine(module, **options)

    for user in (layer, swap):
        monkeypatch.setattr(user, "plain_parts", counted)
    start = time.perf_counter()
    report = peftkern.patch(model)
    print(f"patch of {len(report.fast)} layers: {1e3 * (time.perf_counter() - start):.1f} ms")
    assert len(report.fast) == len(seen) == 224 and max(seen.values()) <= 2


def several(model: nn.Module) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


IN_PLACE = {
    "one": ({}, None),
    "dropout": (dict(lora_dropout=0.1), None),
    "several": ({}, several),
    "DoRA": (dict(use_dora=True), None),
}


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_x_changed_in_place_after_the_layer_is_an_error_that_names_the_layer(kind, copied):
    """The price of saving x itself, also where PEFT saves a copy."""
    options, change = IN_PLACE[kind]
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["1"], **options)
    model = randomise(get_peft_model(nn.Sequential(nn.Identity(), nn.Linear(16, 16)), config))
    if change:
        change(model)
    peftkern.patch(model)
    model = copy.deepcopy(model) if copied else model
    h = torch.randn(5, 16, requires_grad=True) * 1
    h += model(h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        h.sum().backward()
    assert str(caught.value).startswith("layer base_model.model.1: ") and "h = h + layer(h)" in str(caught.value)
    h = torch.randn(5, 16, requires_grad=True) * 1
    h = h + model(h)
    h.sum().backward()
    with pytest.raises(RuntimeError) as caught:  # another error is torch's own
        h.sum().backward()
    assert not str(caught.value).startswith("layer")
