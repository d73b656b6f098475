"""patch(): PEFT's own models, faster, and in everything else PEFT's own."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
import transformers
from conftest import (
    ALL_LINEAR,
    ATTENTION,
    adapted,
    assert_close,
    assert_equal,
    linears,
    llama,
    logits,
    pooled,
    randomise,
    step,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peftkern
from peftkern.integrations.peft import PeftkernLoraLinear
from peftkern.testing.numerics import assert_as_good_as

BF16 = torch.bfloat16


# ----------------------------------------------------------------------------------------- what patch does, and undoes


def test_patch_reports_and_is_invisible(calls):
    model = adapted()
    text, keys, hidden = str(model), list(model.state_dict()), str(model.peft_config)
    report = peftkern.patch(model)
    assert report.fast == list(linears(model)) and len(report.fast) == 14 and not report.skipped
    assert set(report.backends) == set(report.fast) and set(report.backends.values()) <= {"cpp", "reference"}
    assert report.to_dict() == {"fast": report.fast, "backends": report.backends, "skipped": {}}
    assert "14 of 14 LoRA layers are fused" in str(report) and set(report.backends.values()).pop() in str(report)
    assert all(type(layer) is PeftkernLoraLinear for layer in linears(model).values())
    assert (str(model), list(model.state_dict()), str(model.peft_config)) == (text, keys, hidden)
    logits(model)
    assert len(calls) == 14


def test_patch_is_idempotent_and_unpatch_restores_the_classes(calls):
    model = adapted()
    classes = [type(module) for module in model.modules()]
    before = logits(model)
    first, second = peftkern.patch(model), peftkern.patch(model)
    assert first == second and all(cls.__mro__.count(PeftkernLoraLinear) <= 1 for cls in map(type, model.modules()))
    assert logits(model).shape == before.shape and calls
    peftkern.unpatch(model)
    peftkern.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    calls.clear()
    assert torch.equal(logits(model), before) and not calls


def test_a_model_without_lora_warns_and_gives_an_empty_report(caplog):
    report = peftkern.patch(nn.Sequential(nn.Linear(4, 4)))
    assert (report.fast, report.skipped, report.backends) == ([], {}, {})
    assert len(caplog.records) == 1 and "no LoRA layer" in caplog.text


@pytest.mark.parametrize("wrap", ["peft", "add_adapter", "bare", "sequential"])
def test_any_module_that_contains_the_layers(wrap, calls):
    model = adapted()
    if wrap == "add_adapter":
        model = llama()
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR))
        randomise(model)
    elif wrap == "bare":
        model = model.base_model.model
    elif wrap == "sequential":
        model = nn.ModuleList([model])
    assert len(peftkern.patch(model).fast) == 14
    logits(model[0] if wrap == "sequential" else model)
    assert len(calls) == 14


# --------------------------------------------------------------------------------------------- the same numbers as PEFT

VARIATIONS = {
    "plain": {},
    "lora_bias": dict(lora_bias=True),
    "rslora": dict(use_rslora=True),
    "rank and alpha patterns": dict(rank_pattern={"q_proj": 7, "down_proj": 1}, alpha_pattern={"k_proj": 3}),
    "base bias": dict(base_bias=True),
    "trainable base bias": dict(base_bias=True, bias="lora_only", target_modules=ATTENTION),
    "first step": dict(zero=True),
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_loss_and_gradients_are_pefts(variation, calls):
    model = adapted(**VARIATIONS[variation])
    expected = step(model)
    report = peftkern.patch(model)
    found = step(model)
    assert not report.skipped and len(calls) == len(report.fast)
    if variation == "first step":
        zeros = [name for name in expected if "lora_A" in name]
        assert zeros and not any(expected.pop(name).any() | found.pop(name).any() for name in zeros)
    assert any("bias" in name for name in found) == (variation in ("lora_bias", "trainable base bias"))
    assert_close(found, expected)


def test_bf16_base_with_fp32_adapters(calls):
    """The gradients and the logits: at most twice PEFT's own error against fp64."""
    model = adapted(BF16)
    exact = copy.deepcopy(model).double()
    truth, expected, true_logits, peft_logits = step(exact), step(model), logits(exact), logits(model)
    peftkern.patch(model)
    found = step(model)
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in expected.items()}
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")
    assert_as_good_as(logits(model), peft_logits, true_logits, "the logits")
    assert len(calls) == 28


def test_dropout_is_reproducible_and_off_in_evaluation(calls):
    model = adapted(lora_dropout=0.5)
    peftkern.patch(model)
    model.train()
    first, again, other = step(model, 1), step(model, 1), step(model, 2)
    assert_equal(again, first)
    assert not torch.equal(other["loss"], first["loss"])
    model.eval()
    with peftkern.disabled():
        expected = step(model)
    assert_close(step(model, 5), expected)


def test_dropout_gradients_are_loras_with_the_mask_of_the_drawn_state(monkeypatch):
    layer = linears(adapted(lora_dropout=0.3))["base_model.model.model.layers.0.mlp.up_proj"]
    holder = nn.ModuleList([layer]).train()
    peftkern.patch(holder)
    drawn = []
    genuine = peftkern.dropout.draw_rng_state
    monkeypatch.setattr(peftkern.dropout, "draw_rng_state", lambda device: drawn.append(genuine(device)) or drawn[-1])
    x, dy = torch.randn(9, 32, requires_grad=True), torch.randn(9, 48)
    layer(x).backward(dy)
    assert len(drawn) == 1
    keep = peftkern.testing.dropout_mask(9, 32, 0.3, drawn[0]) * (65536 / (65536 - round(65536 * 0.3)))
    A, B, W = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    t = dy @ B.detach()
    torch.testing.assert_close(A.grad, 2 * t.T @ (x.detach() * keep))
    torch.testing.assert_close(B.grad, 2 * dy.T @ ((x.detach() * keep) @ A.detach().T))
    torch.testing.assert_close(x.grad, dy @ W + 2 * (t @ A.detach()) * keep)


def test_training_leaves_the_base_bit_identical_and_disable_adapter_is_the_base(calls):
    base = llama(BF16)
    expected = logits(base)
    model = adapted(BF16, zero=True, lora_dropout=0.1)
    peftkern.patch(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(step(model)["loss"].item())
        optimizer.step()
    assert losses[-1] < losses[0] and len(calls) == 8 * 14
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)
    trained = model.unload().state_dict()
    assert_equal(trained, base.state_dict())


def test_save_and_load_by_plain_peft(tmp_path):
    model = adapted(lora_bias=True).eval()
    peftkern.patch(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert not any(isinstance(module, PeftkernLoraLinear) for module in fresh.modules())
    peftkern.unpatch(model)
    assert torch.equal(logits(fresh), logits(model))
    peftkern.patch(fresh)
    assert torch.equal(logits(fresh), expected)


# ------------------------------------------------------------------------------ fallbacks: PEFT's own result, exactly


def unfreeze(model):
    for layer in linears(model).values():
        layer.base_layer.weight.requires_grad_()


def hook(model):
    for layer in linears(model).values():
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)


def base_hook(model):
    for layer in linears(model).values():
        layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced_forward(model):
    for layer in linears(model).values():
        genuine = layer.lora_B["default"].forward
        layer.lora_B["default"].forward = lambda x, genuine=genuine: genuine(x) * 3


def replaced_dropout(model):
    for layer in linears(model).values():
        layer.lora_dropout["default"] = nn.Tanh()


SITUATIONS = {
    "unfrozen base": (unfreeze, "requires grad"),
    "merged": (lambda model: model.merge_adapter(), "merged"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "disabled"),
    "hooks on lora_A": (hook, "lora_A has hooks"),
    "hooks on the base": (base_hook, "base_layer has hooks"),
    "forward replaced": (replaced_forward, "lora_B has a replaced forward"),
    "another dropout": (replaced_dropout, "its dropout is a Tanh"),
}


@pytest.mark.parametrize("when", ["before patch", "after patch"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_fallback_is_pefts_own_result(situation, when, calls):
    change, reason = SITUATIONS[situation]
    plain, patched = adapted(), adapted()
    change(plain)
    if when == "after patch":
        assert len(peftkern.patch(patched).fast) == 14
    change(patched)
    report = peftkern.patch(patched)
    assert not report.fast and all(reason in text for text in report.skipped.values()) and len(report.skipped) == 14
    assert reason in str(report)
    assert torch.equal(logits(patched), logits(plain))
    if situation not in ("merged", "disabled"):
        assert_equal(step(patched), step(plain))
    assert not calls


def test_the_fast_path_comes_back_when_the_reason_goes(calls):
    model = adapted().eval()
    peftkern.patch(model)
    expected = logits(model)
    model.merge_adapter()
    logits(model)
    model.unmerge_adapter()
    unfreeze(model)
    with model.disable_adapter():
        logits(model)
    for layer in linears(model).values():
        layer.base_layer.weight.requires_grad_(False)
    assert len(calls) == 14
    torch.testing.assert_close(logits(model), expected)  # PEFT's merge and unmerge round
    assert len(calls) == 28


@pytest.mark.filterwarnings("ignore:.*tie")  # PEFT remarks on tied embeddings
def test_conv1d_is_fast_and_embeddings_are_left_alone_with_their_reason(calls):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    options = dict(r=4, lora_alpha=8, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    model = randomise(get_peft_model(transformers.GPT2LMHeadModel(config), LoraConfig(**options))).eval()
    expected = logits(model)
    report = peftkern.patch(model)
    assert [name.rsplit(".", 1)[-1] for name in report.fast] == ["c_attn"]
    assert "Embedding" in next(reason for name, reason in report.skipped.items() if name.endswith("wte"))
    torch.testing.assert_close(logits(model), expected)
    assert len(calls) == 1


# ----------------------------------------------------------------------------------------- state that changes later


def test_scaling_is_read_at_every_call(calls):
    model = adapted().eval()
    peftkern.patch(model)
    for change in (
        lambda layer: layer.scale_layer(3.0),
        lambda layer: setattr(layer, "scaling", {"default": 0.25}),
        lambda layer: layer.scaling.update(default=torch.tensor(1.5)),
        lambda layer: layer.scaling["default"].fill_(-2.0),
    ):
        for layer in linears(model).values():
            change(layer)
        found = logits(model)
        with peftkern.disabled():
            torch.testing.assert_close(found, logits(model))
    assert len(calls) == 4 * 14


def test_set_adapter_and_an_adapter_added_after_patch(calls):
    model = adapted().eval()
    peftkern.patch(model)
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=6, lora_alpha=4, target_modules=ATTENTION))
    randomise(model, 3)
    randomised = logits(model)
    model.set_adapter("second")
    assert len(peftkern.patch(model).fast) == 8  # the others do not have it
    calls.clear()
    second = logits(model)
    assert len(calls) == 8 and not torch.equal(first, second) and not torch.equal(randomised, second)
    with peftkern.disabled():
        torch.testing.assert_close(second, logits(model))


def test_copies_stay_patched_and_equal(calls):
    model = adapted().eval()
    peftkern.patch(model)
    expected = logits(model)
    layer = linears(model)["base_model.model.model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is PeftkernLoraLinear and torch.equal(twin(x), layer(x))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    peftkern.unpatch(twin)
    assert torch.equal(logits(model), expected) and not any(type(m) is PeftkernLoraLinear for m in twin.modules())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_with_input_gradients(use_reentrant, calls):
    model = adapted(lora_dropout=0.4)
    peftkern.patch(model)
    model.train()
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls.clear()
    assert_equal(step(model), expected)
    assert len(calls) > 14  # the forward, and again in backward


# ---------------------------------------------------------------------------------------------------------- contexts


def test_disabled_is_pefts_own_forward_nested_and_after_an_error(calls):
    plain, model = adapted(), adapted()
    peftkern.patch(model)
    expected = step(plain)
    with peftkern.disabled():
        with peftkern.disabled():
            assert_equal(step(model), expected)
        assert_equal(step(model), expected)
    with contextlib.suppress(KeyError), peftkern.disabled():
        raise KeyError
    assert not calls
    logits(model)
    assert len(calls) == 14


def test_disabled_is_of_its_own_thread(calls):
    model = adapted().eval()
    peftkern.patch(model)
    with peftkern.disabled():
        thread = threading.Thread(target=logits, args=(model,))
        thread.start(), thread.join()
        assert len(calls) == 14
        logits(model)
        assert len(calls) == 14
