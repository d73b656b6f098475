"""PEFT's GPTQ and AWQ layers, patched. gptqmodel is not asked for: stand-ins have its classes' names and buffers."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise
from peft import LoraConfig
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from test_checkpoint_int4 import KINDS, checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear

import peftkern
from peftkern.integrations import gptqmodel
from peftkern.integrations.gptqmodel import from_gptqmodel
from peftkern.integrations.peft import why_not

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYERS = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear}


class StandIn(nn.Module):
    """What gptqmodel's layer is after loading: a checkpoint's buffers, GPTQ's zero points by default as they are."""

    def __init__(self, kind: str, format: int = 2, N: int = 24, K: int = 64) -> None:
        super().__init__()
        entries, self.dequantised = checkpoint(kind, N, K)
        if kind == "gptq" and format == 2:
            entries["qzeros"] = entries["qzeros"] + 0x11111111
        for name, value in (entries | {"bias": torch.randn(N).half()}).items():
            self.register_buffer(name, value)
        self.in_features, self.out_features, self.format = K, N, format
        self.adapter = None
        self.online_full_had = self.online_partial_had = False

    def qzero_format(self) -> int:
        return self.format

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dequantised.to(x.dtype), self.bias.to(x.dtype))


def named(name: str) -> type[StandIn]:
    module, _, last = name.rpartition(".")
    return type(last, (StandIn,), {"__module__": module, "__qualname__": last})


STAND_INS = {"gptq": named(gptqmodel.GPTQ), "awq": named(gptqmodel.AWQ)}


def over(kind: str, format: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, **options)
    layer = LAYERS[kind](STAND_INS[kind](kind, format), "default", config=config, r=4, lora_alpha=8)
    layer.requires_grad_(False)
    for factors in (layer.lora_A, layer.lora_B):
        factors.float().requires_grad_(True)
    return randomise(nn.Sequential(layer))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("kind", "format"), [("gptq", 1), ("gptq", 2), ("awq", 1)])
def test_a_layer_is_pefts_over_the_dequantised_weight(kind, format, dtype, calls):
    model = over(kind, format)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    expected = model(x)
    expected.sum().backward()
    wanted = [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    x.grad = None
    model.zero_grad()
    before = repr(model)
    assert peftkern.patch(model).fast == ["0"] and repr(model) == before
    y = model(x)
    y.sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert len(calls) == 1 and y.dtype == dtype and len(found) == 3
    bound = 1e-5 if dtype == F32 else torch.finfo(dtype).eps
    for one, other in zip([y, *found], [expected, *wanted], strict=True):
        assert (one - other).norm() <= bound * other.norm()
    peftkern.unpatch(model)
    assert type(model[0]) is LAYERS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_never_stale(kind, calls):
    model = over(kind)
    peftkern.patch(model)
    base, x = model[0].base_layer, torch.randn(3, 64)
    for change in (
        lambda: base.qweight.fill_(0x12345678),
        lambda: base.scales.mul_(2),
        lambda: base.qzeros.fill_(0x22222222),
        lambda: setattr(base, "scales", 3 * base.scales),
        lambda: setattr(base.qweight, "data", base.qweight.data + 1),
    ):
        before = model(x)
        change()
        update = model[0].scaling["default"] * model[0].lora_B["default"](model[0].lora_A["default"](x))
        expected = linear(x, from_gptqmodel(base).materialize(F32), base.bias.float()) + update
        assert not torch.allclose(before, expected, atol=1e-2)
        assert (model(x) - expected).norm() <= 1e-5 * expected.norm()
    assert len(calls) == 10


def test_what_is_not_covered_is_pefts_with_its_reason(calls):
    model = over("gptq")
    base = model[0].base_layer
    order, base.g_idx = base.g_idx, base.g_idx.flip(0)
    assert "g_idx is not k // 32" in next(iter(peftkern.patch(model).skipped.values()))
    base.g_idx, base.adapter = order, object()
    assert "its layer has adapter" in str(why_not(model[0]))
    base.adapter, base.online_full_had = None, True
    assert "its layer has online_full_had" in str(why_not(model[0]))
    base.online_full_had = False
    assert why_not(model[0]) is None
    base.adapter = object()  # of a layer that has been taken
    assert "its layer has adapter" in str(why_not(model[0]))
    base.adapter = None
    assert why_not(model[0]) is None
    held = dict(base._buffers)
    for name in gptqmodel.PARTS:
        base._buffers[name] = None
        assert name == "g_idx" or "is not there" in str(why_not(model[0])), name
        base._buffers[name] = held[name].to("meta")
        assert why_not(model[0]) is not None
        base._buffers[name] = held[name]
    assert why_not(model[0]) is None
    other = over("awq")
    other[0].base_layer.__class__ = StandIn
    assert "base_layer is a StandIn, not a plain" in next(iter(peftkern.patch(other).skipped.values()))
    with pytest.raises(TypeError, match="not test_peft_int4.StandIn"):
        from_gptqmodel(other[0].base_layer)
    x = torch.randn(2, 64)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-4)
    assert len(calls) == 1
