"""PEFT's layers over bitsandbytes' linears, patched: the same as dequantising first, or PEFT's own forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import ALL_LINEAR, llama, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_models import IDS, LAYERS, judge_patched, quantise, quantised_linear
from torch import nn

import peftkern
from peftkern.integrations import quantised
from peftkern.integrations.bitsandbytes import from_bitsandbytes
from peftkern.integrations.peft import why_not
from peftkern.testing.numerics import assert_as_good_as

bnb = pytest.importorskip("bitsandbytes")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["nf4", "fp4", "int8"]


def qlora(kind: str, dtype: torch.dtype = F32, bias: bool = False, seed: int = 0, **options) -> nn.Module:
    """PEFT's own model over a quantised tiny Llama, with adapters that are not zero."""
    model = quantise(llama(dtype, seed, bias), kind, dtype)
    settings = dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM") | options
    return randomise(get_peft_model(model, LoraConfig(**settings)), seed + 1)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_dequantised_model(kind, dtype, bias, calls):
    def values(base) -> torch.Tensor:
        return from_bitsandbytes(base).materialize(dtype)

    judge_patched(lambda seed: qlora(kind, dtype, bias, seed), dtype, values, calls)


def test_a_4_bit_layer_is_peft_over_bitsandbytes(calls):
    """K is a multiple of the blocksize, so that bitsandbytes decodes rightly everywhere: PEFT's own forward agrees."""
    torch.manual_seed(0)
    model = nn.Sequential(quantised_linear(nn.Linear(128, 96), "nf4", F32))
    model.is_loaded_in_4bit = True
    model = randomise(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])))
    x = torch.randn(3, 5, 128, requires_grad=True)
    expected = model(x)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    assert peftkern.patch(model).fast
    y = model(x)
    y.square().sum().backward()
    assert len(calls) == 1
    assert_as_good_as(y.detach(), expected.detach(), expected.detach().double(), "y")
    assert (x.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_8_bits_of_bitsandbytes_round_x_too_and_these_do_not(calls):
    """The one difference a user can see: peftkern is nearer to the dequantised weight's product."""
    torch.manual_seed(0)
    model = nn.Sequential(quantised_linear(nn.Linear(128, 96), "int8", None))
    model.is_loaded_in_8bit = True
    model = randomise(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])))
    layer = model.base_model.model[0]
    x = torch.randn(40, 128)
    model.eval()  # in training bitsandbytes multiplies with the dequantised weight on a CPU, too
    W = from_bitsandbytes(layer.base_layer).materialize(torch.float64)
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    truth = x.double() @ W.T + layer.base_layer.bias + layer.scaling["default"] * (x.double() @ A.T) @ B.T
    theirs = model(x).detach()
    peftkern.patch(model)
    for _ in range(2):  # bitsandbytes' first call has moved the weight; both places are read
        own = model(x).detach()
    assert len(calls) == 2
    assert (own - truth).norm() < 1e-6 * truth.norm() < 1e-2 * (theirs - truth).norm()


def reason(model: nn.Module) -> set[str | None]:
    return {why_not(module) for module in model.modules() if hasattr(module, "lora_A")}


def test_what_is_not_covered_is_pefts_with_its_reason(calls):
    model = qlora("nf4", use_dora=True)
    assert set(peftkern.patch(model).skipped.values()) == {"DoRA on a quantised base"}
    model = qlora("nf4")
    peftkern.patch(model)
    assert reason(model) == {None}
    with model.disable_adapter():
        assert reason(model) == {"its adapters are disabled"}
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    state, layer.base_layer.weight.quant_state = layer.base_layer.weight.quant_state, None
    assert "not quantised yet" in str(why_not(layer))
    layer.base_layer.weight.quant_state = state
    layer.base_layer.compute_type_is_set = False
    assert "first call" in str(why_not(layer))
    layer.base_layer.compute_type_is_set = True
    calls.clear()
    with peftkern.disabled():
        expected = layer(torch.ones(2, 32, dtype=torch.float64))
    assert torch.equal(layer(torch.ones(2, 32, dtype=torch.float64)), expected) and not calls


def test_a_subclass_of_the_base_is_left_alone():
    class Other(bnb.nn.Linear4bit):
        pass

    assert quantised.is_quantised(bnb.nn.Linear4bit(8, 8)) and not quantised.is_quantised(Other(8, 8))


def test_the_weight_is_shared_and_never_stale(calls):
    model = qlora("nf4")
    peftkern.patch(model)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    base = layer.base_layer
    x = torch.randn(3, 32)
    first, _ = quantised.frozen(base)
    assert quantised.frozen(base)[0] is first and first.data.data_ptr() == base.weight.data_ptr()

    def base_output() -> torch.Tensor:
        return layer(x) - layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))

    def dense() -> torch.Tensor:
        return x @ from_bitsandbytes(base).materialize(F32).T

    with torch.no_grad():
        for change in (
            lambda: base.weight.data.fill_(0x7F),  # in place
            lambda: setattr(base.weight, "data", torch.full_like(base.weight.data, 0x2E)),  # other memory
            lambda: base.weight.quant_state.absmax.fill_(200),
            lambda: setattr(base.weight.quant_state, "absmax", torch.full_like(base.weight.quant_state.absmax, 9)),
            lambda: setattr(base.weight.quant_state, "offset", torch.tensor(0.5)),
            lambda: setattr(base, "weight", quantised_linear(nn.Linear(32, 32), "nf4", F32).weight),
        ):
            before = base_output()
            change()
            assert not torch.allclose(before, dense(), atol=1e-3)
            assert torch.allclose(base_output(), dense(), atol=1e-5)
    assert len(calls) == 12


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_patch_is_reversible_and_copies_are_patched(kind, calls):
    model = qlora(kind)
    before = [type(module) for module in model.modules()]
    peftkern.patch(model)
    after = [type(module) for module in model.modules()]
    peftkern.patch(model)
    assert [type(module) for module in model.modules()] == after and after != before
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(3, 32)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and len(calls) == 2
    assert type(pickle.loads(pickle.dumps(type(layer)))) is type(type(layer))
    peftkern.unpatch(model)
    assert [type(module) for module in model.modules()] == before


@torch.inference_mode()
def evaluated(model: nn.Module) -> nn.Module:
    peftkern.patch(model)
    model(input_ids=IDS)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["patched inside", "copied", "unpickled", "quantised inside"])
def test_what_was_evaluated_first_in_inference_mode_trains(how, kind, calls):
    def step(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    fresh = qlora(kind)
    peftkern.patch(fresh)
    expected = step(fresh)
    if how == "quantised inside":
        config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
        model = randomise(get_peft_model(torch.inference_mode()(quantise)(llama(), kind, F32), config))
    else:
        model = qlora(kind)
    again = {"copied": copy.deepcopy, "unpickled": lambda m: pickle.loads(pickle.dumps(m))}.get(how, lambda m: m)
    found = step(again(evaluated(again(model))))
    assert len(calls) == 3 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_save_load_and_merge_are_pefts(kind, bits, tmp_path, calls):
    model = qlora(kind)
    peftkern.patch(model)
    y = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantise(llama(), kind, F32), tmp_path)
    assert len(peftkern.patch(again).fast) == LAYERS
    assert torch.equal(again(input_ids=IDS).logits, y)
    calls.clear()
    with pytest.warns(UserWarning, match=f"Merge lora module to {bits}-bit linear"):
        model.merge_adapter()  # PEFT requantises, with its own warning
    assert reason(model) == {"its adapter is merged"}
    merged = model(input_ids=IDS).logits
    assert not calls and merged.isfinite().all()


def test_a_step_of_training_moves_the_adapter_and_nothing_else(calls):
    model = qlora("nf4", BF16, lora_dropout=0.1)
    peftkern.patch(model)
    held = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(calls) == 8 * LAYERS
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items() if name in held)
