"""PEFT's layers over torchao's int8 and fp8 weights, patched: the same as dequantising first, or PEFT's own forward."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import ALL_LINEAR, llama, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_models import IDS, LAYERS, judge_patched
from torch import nn

import peftkern
from peftkern.integrations.peft import why_not
from peftkern.integrations.torchao import from_torchao

pytest.importorskip("torchao")
from torchao.quantization import (  # noqa: E402
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4PlainInt32Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerTensor,
    quantize_,
)
from torchao.quantization.granularity import PerBlock, PerGroup  # noqa: E402
from torchao.quantization.quant_primitives import MappingType  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
GRAINS = {
    "row": Int8WeightOnlyConfig(),
    "tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "group": Int8WeightOnlyConfig(granularity=PerGroup(16)),
    "4 bits in groups": IntxWeightOnlyConfig(torch.int4, PerGroup(16)),
    "fp8 row": Float8WeightOnlyConfig(),
    "fp8 tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")


def quantised(dtype: torch.dtype, bias: bool = False, grain: str = "row", seed: int = 0) -> nn.Module:
    model = llama(dtype, seed, bias)
    quantize_(model.model, GRAINS[grain])
    return model


def qlora(dtype: torch.dtype = F32, bias: bool = False, grain: str = "row", seed: int = 0, **options) -> nn.Module:
    """PEFT's own model over a quantised tiny Llama, with adapters that are not zero."""
    settings = dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM") | options
    return randomise(get_peft_model(quantised(dtype, bias, grain, seed), LoraConfig(**settings)), seed + 1)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("grain", GRAINS)
def test_logits_and_gradients_are_those_of_the_dequantised_model(grain, dtype, bias, calls):
    def values(base) -> torch.Tensor:
        return base.weight.dequantize().to(dtype)

    judge_patched(lambda seed: qlora(dtype, bias, grain, seed), dtype, values, calls)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("grain", GRAINS)
def test_the_weight_is_torchaos_and_shared(grain, dtype):
    layer = nn.Linear(64, 48, dtype=dtype)
    quantize_(layer, GRAINS[grain])
    weight = from_torchao(layer.weight)
    assert torch.equal(weight.materialize(dtype), layer.weight.dequantize()) and weight.dtype == dtype
    assert weight.data.data_ptr() == layer.weight.qdata.data_ptr()


def test_blocks_of_fp8(calls):
    model = over(Int8WeightOnlyConfig(), 384, 256)
    layer, x = model.base_model.model[0], torch.randn(3, 384)
    theirs = Float8Tensor.from_hp(torch.randn(256, 384), granularity=PerBlock([128, 128]))
    assert theirs.scale.shape == (2, 3)
    layer.base_layer.weight = nn.Parameter(theirs, requires_grad=False)
    assert torch.equal(from_torchao(theirs).materialize(F32), theirs.dequantize())
    assert peftkern.patch(model).fast
    expected = nn.functional.linear(x, theirs.dequantize(), layer.base_layer.bias)
    expected += layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        assert (call(x) - expected).norm() <= 1e-5 * expected.norm()
    assert calls


def reason(model: nn.Module) -> set[str | None]:
    return {why_not(module) for module in model.modules() if hasattr(module, "lora_A")}


def over(config, K: int = 64, N: int = 48) -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N))
    quantize_(model, config)
    return randomise(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])))


def test_what_is_not_covered_is_pefts_with_its_reason(calls):
    model = over(Int8DynamicActivationInt8WeightConfig())
    assert "the inputs of this weight" in next(iter(peftkern.patch(model).skipped.values()))
    assert model(torch.randn(5, 64)).isfinite().all()
    model = over(Float8WeightOnlyConfig(granularity=PerGroup(16)))
    assert "this fp8 weight has scales for blocks of [1, 16]" in next(iter(peftkern.patch(model).skipped.values()))
    model = over(Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2))
    assert "weight is float8_e4m3fn [48, 64], got float8_e5m2" in next(iter(peftkern.patch(model).skipped.values()))
    model = over(IntxWeightOnlyConfig(torch.int4, PerGroup(16), MappingType.ASYMMETRIC))
    assert "zero points" in next(iter(peftkern.patch(model).skipped.values()))
    model = over(Int8WeightOnlyConfig())
    layer = model.base_model.model[0].base_layer
    scale = torch.ones(4, 48, dtype=BF16)
    layer.weight = nn.Parameter(
        Int4PlainInt32Tensor(torch.zeros(48, 8, dtype=torch.int32), scale, scale.to(torch.int8), [1, 16], (48, 64)),
        requires_grad=False,
    )
    assert "a weight of type Int4PlainInt32Tensor" in next(iter(peftkern.patch(model).skipped.values()))
    model = over(Int8WeightOnlyConfig())
    layer = model.base_model.model[0]
    layer.base_layer.weight.zero_point.fill_(1)
    assert "zero points" in next(iter(peftkern.patch(model).skipped.values()))
    model = qlora(use_dora=True)
    assert set(peftkern.patch(model).skipped.values()) == {"DoRA on a quantised base"}
    assert not calls
    with pytest.raises(TypeError, match="not Parameter"):
        from_torchao(nn.Linear(4, 4).weight)


def test_a_weight_that_is_replaced_is_seen(calls):
    model = over(Int8WeightOnlyConfig())
    assert peftkern.patch(model).fast
    layer, x = model.base_model.model[0], torch.randn(3, 64)

    def expected() -> torch.Tensor:
        with peftkern.disabled():
            return layer(x)

    for change in (
        lambda: layer.base_layer.weight.qdata.fill_(5),
        lambda: layer.base_layer.weight.scale.mul_(2),
        lambda: setattr(layer.base_layer, "weight", over(Int8WeightOnlyConfig()).base_model.model[0].base_layer.weight),
    ):
        before = layer(x)
        change()
        assert not torch.allclose(layer(x), before, atol=1e-3)
        assert torch.allclose(layer(x), expected(), atol=1e-4)
    assert len(calls) == 9


def test_patch_is_reversible_and_prints_as_pefts(calls):
    model = qlora()
    before, text = [type(module) for module in model.modules()], repr(model)
    peftkern.patch(model)
    assert repr(model) == text and [type(module) for module in model.modules()] != before
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(3, 32)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and len(calls) == 2
    peftkern.unpatch(model)
    assert [type(module) for module in model.modules()] == before


def test_save_and_load_are_pefts_and_a_merge_says_what_it_does(tmp_path, calls):
    model = qlora()
    peftkern.patch(model)
    y = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(F32), tmp_path)
    assert len(peftkern.patch(again).fast) == LAYERS
    assert torch.equal(again(input_ids=IDS).logits, y)
    with pytest.warns(UserWarning, match="quantises the sum again"), pytest.raises(ValueError, match="re-quantize"):
        model.merge_adapter()  # PEFT was not told how
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.get_apply_tensor_subclass = Int8WeightOnlyConfig
    with pytest.warns(UserWarning, match="quantises the sum again"):
        layer.merge()
    assert why_not(layer) == "its adapter is merged"
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = layer(torch.randn(3, 32))
    assert merged.isfinite().all() and not calls
