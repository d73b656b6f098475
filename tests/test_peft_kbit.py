"""PEFT over a quantised base that computes in another dtype than x: ``prepare_model_for_kbit_training``, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ALL_LINEAR, randomise
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from quantised_models import LAYERS, quantise, quantised_linear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.integrations.bitsandbytes import from_bitsandbytes
from peftkern.ops import dispatch

pytest.importorskip("bitsandbytes")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
KINDS = [("nf4", BF16), ("nf4", F16), ("nf4", F32), ("int8", None), ("torchao", None)]
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")


def over(kind: str, compute: torch.dtype | None, trained_bias: bool = False) -> nn.Module:
    """One layer; K is a multiple of the blocksize, so that bitsandbytes decodes rightly everywhere."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
        model = nn.Sequential(linear)
    else:
        model = nn.Sequential(quantised_linear(linear, kind, compute))
        setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    config = LoraConfig(r=4, target_modules=["0"], bias="lora_only" if trained_bias else "none")
    return randomise(get_peft_model(model, config))


def step(model: nn.Module, x: Tensor, dy: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        y = model(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def truth(model: nn.Module, kind: str, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same in fp64, over a dense linear of the values held."""
    layer = model.base_model.model[0]
    base = layer.base_layer
    W = base.weight.dequantize() if kind == "torchao" else from_bitsandbytes(base).materialize(F32)
    dense = nn.Sequential(nn.Linear(64, 48, dtype=torch.float64))
    with torch.no_grad():
        dense[0].weight.copy_(W)
        dense[0].bias.copy_(base.bias)
    twin = get_peft_model(dense, copy.copy(model.peft_config["default"]))
    for (_, theirs), (_, own) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if theirs.requires_grad:
            own.data = theirs.detach().double()
    return step(twin, x.double(), dy.double(), None)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((found[n].double() - exact[n]).norm() / exact[n].norm()).item() for n in exact}


@pytest.fixture
def left_to_peft(monkeypatch) -> list[str]:
    """The layers that ran PEFT's own forward."""
    from peft.tuners.lora import bnb, torchao

    ran: list[str] = []
    for kind in (bnb.Linear4bit, bnb.Linear8bitLt, torchao.TorchaoLoraLinear):
        genuine = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *a, f=genuine, **o: ran.append(str(self)) or f(self, *a, **o))
    return ran


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("autocast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "compute"), KINDS, ids=str)
def test_any_x_is_fused_and_has_pefts_dtypes(kind, compute, dtype, autocast, training, left_to_peft, monkeypatch):
    """Within two units of the coarsest dtype that takes part; PEFT's own products are in the same ones."""
    x, dy = torch.randn(5, 64).to(dtype), torch.randn(5, 48)
    model = over(kind, compute).train(training)
    expected = step(copy.deepcopy(model), x, dy, autocast)
    left_to_peft.clear()
    dy = dy.to(expected["y"].dtype)
    exact = truth(model, kind, x, dy)
    assert peftkern.patch(model).fast
    products = []
    for name in ("forward", "pair"):
        genuine = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *a, f=genuine: products.append(a[-1].dtype) or f(*a))
    found = step(model, x, dy, autocast)
    assert not left_to_peft and products == [compute or autocast or dtype]
    assert {n: value.dtype for n, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    coarsest = max(torch.finfo(d).eps for d in (dtype, compute or autocast or dtype, expected["y"].dtype))
    assert max(errors(found, exact).values()) <= 2 * coarsest


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("autocast", [None, F16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_gradient_is_lost_in_fp16(kind, autocast, size, left_to_peft):
    """Where x is fp32, no fp16 gradient need be: neither of dy nor of dx."""
    if kind == "int8" and autocast is None:
        pytest.skip("it computes in x's own fp32")
    model = over(kind, F16, trained_bias=True).train(kind == "nf4")  # training 8 bits under autocast gives y in fp16
    x, dy = torch.randn(7, 64), torch.randn(7, 48) * size
    exact = truth(model, kind, x, dy)
    peftkern.patch(model)
    found = step(model, x, dy, autocast)
    assert not left_to_peft and max(errors(found, exact).values()) <= 2 * torch.finfo(F16).eps
    nothing = step(model, x, torch.zeros_like(dy), autocast)
    assert all(not nothing[n].any() for n in nothing if n != "y")
    dy[3, 5] = torch.nan
    found = step(model, x, dy, autocast)
    assert found["x"][3].isnan().all() and found["x"][4:].isfinite().all()


def wide_llama(kind: str, compute: torch.dtype | None) -> nn.Module:
    """As every tutorial has it: a 16-bit model in 4 or 8 bits, prepared, with fp32 adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, vocab_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = prepare_model_for_kbit_training(
        quantise(LlamaForCausalLM(config).to(compute or BF16), kind, compute), use_gradient_checkpointing=False
    )
    return randomise(get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR)))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("kind", "compute"), [*KINDS[:2], ("int8", None)], ids=str)
def test_the_recipe_of_qlora_is_fused_and_learns_as_pefts(kind, compute, autocast, left_to_peft):
    def losses(model: nn.Module) -> list[float]:
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        found = []
        for _ in range(32):
            optimiser.zero_grad()
            with torch.autocast("cpu", BF16, enabled=autocast):
                loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found

    model = wide_llama(kind, compute).train()
    expected = losses(copy.deepcopy(model))
    assert len(left_to_peft) == 32 * LAYERS
    left_to_peft.clear()
    assert len(peftkern.patch(model).fast) == LAYERS
    found = losses(model)
    assert not left_to_peft and found[-1] < found[0]
    assert max(abs(own - theirs) / theirs for own, theirs in zip(found, expected, strict=True)) <= 1e-2
