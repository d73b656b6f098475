"""fp8 by blocks as DeepSeek's and Qwen's checkpoints have it: read as it is, and fused below PEFT's layers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ALL_LINEAR, llama, randomise
from e2m1 import e4m3
from peft import LoraConfig, get_peft_model
from quantised_models import IDS, LAYERS, judge_patched
from torch import nn
from torch.nn.functional import linear

import peftkern
from peftkern.integrations.fine_grained_fp8 import from_fp8_linear
from peftkern.integrations.peft import why_not
from peftkern.weights import FrozenWeight

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
F32, BF16, E4M3, E8M0 = torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
SCALES = {"fp32": F32, "bf16": BF16, "e8m0": E8M0}


def checkpoint(N: int, K: int, scales: torch.dtype = F32, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """``weight`` and ``weight_scale_inv`` of every legal code, and what they are in fp32, one number at a time."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(254, (N, K), generator=generator)
    codes += codes >= 127  # neither 127 nor 255
    if scales is E8M0:
        exponents = torch.randint(100, 130, (-(-N // 128), -(-K // 128)), generator=generator)
        scale = exponents.to(torch.uint8).view(E8M0)
        sizes = [[2.0 ** (e - 127) for e in row] for row in exponents.tolist()]
    else:
        scale = torch.rand(-(-N // 128), -(-K // 128), generator=generator).to(scales)
        sizes = scale.double().tolist()
    W = [[e4m3(q) * sizes[n // 128][k // 128] for k, q in enumerate(row)] for n, row in enumerate(codes.tolist())]
    entries = {"weight": codes.to(torch.uint8).view(E4M3), "weight_scale_inv": scale}
    return entries, torch.tensor(W, dtype=torch.float64).float()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", [(128, 256), (130, 257), (5, 300), (300, 7)], ids=str)
def test_a_checkpoints_weight_is_taken_over_as_it_is(shape, scales):
    given, expected = checkpoint(*shape, SCALES[scales])
    name = "model.layers.0.mlp.down_proj.weight"
    entries = {key.replace("weight", name, 1): value for key, value in given.items()}
    weight = FrozenWeight.from_state_dict(entries | {"another": torch.ones(1)}, name)
    assert weight.format == "fp8" and weight.shape == shape and weight.dtype == BF16
    assert weight.data.data_ptr() == entries[name].data_ptr()
    for dtype in (F32, BF16, torch.float16):
        assert torch.equal(weight.materialize(dtype), expected.to(dtype))
    again = FrozenWeight.from_state_dict(weight.state_dict(name), name)
    assert torch.equal(again.materialize(F32), expected) and again.dtype == BF16
    x = torch.randn(3, shape[1])
    A, B = torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)
    y = peftkern.lora_linear(x, weight, A, B)
    assert (y - linear(x, expected)).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_one_scale_for_all(shape):
    given, _ = checkpoint(130, 140)
    weight = FrozenWeight.from_state_dict(given | {"weight_scale_inv": torch.full(shape, 0.3)})
    assert torch.equal(weight.materialize(F32), given["weight"].float() * torch.tensor(0.3))


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("weight", lambda t: t.to(BF16), r"weight is float8_e4m3fn \[130, 257\], got bfloat16"),
        ("weight", lambda t: t.view(torch.float8_e5m2), "weight is float8_e4m3fn"),
        ("weight", lambda t: t[None], r"weight is float8_e4m3fn \[N, K\] of one weight, got \[1, 130, 257\]"),
        ("weight", lambda t: t[:128], r"weight_scale_inv is float32 \[1, 3\], got float32 \[2, 3\]"),
        ("weight", lambda t: "text", "weight is missing or not a tensor: fp8"),
        ("weight_scale_inv", lambda t: t.double(), "weight_scale_inv is of one of float32, bfloat16"),
        ("weight_scale_inv", lambda t: t.T, r"weight_scale_inv is float32 \[2, 3\], got float32 \[3, 2\]"),
        ("weight_scale_inv", lambda t: t[:, :2], r"weight_scale_inv is float32 \[2, 3\], got float32 \[2, 2\]"),
        ("weight_scale_inv", lambda t: t.flatten(), r"weight_scale_inv is float32 \[2, 3\]"),
        ("weight_scale_inv", lambda t: t[:1, :0], r"weight_scale_inv is float32 \[2, 3\]"),
        ("weight_scale_inv", lambda t: t * math.nan, "weight_scale_inv has NaN or Inf"),
        ("weight_scale_inv", lambda t: t / 0, "weight_scale_inv has NaN or Inf"),
        ("weight_scale_inv", lambda t: -t, "weight_scale_inv has negative scales"),
        ("weight_scale_inv", lambda t: t.to(E8M0).view(torch.uint8).fill_(255).view(E8M0), "weight_scale_inv has NaN"),
        ("weight_scale_inv", lambda t: None, "weight_scale_inv is missing or not a tensor: fp8"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_names_its_key(key, change, words):
    good, _ = checkpoint(130, 257)
    with pytest.raises(ValueError, match=words):
        FrozenWeight.from_state_dict(good | {key: change(good[key])})
    with pytest.raises(ValueError, match="weight_scale_inv"):
        FrozenWeight.from_state_dict({key: good[key]})
    with pytest.raises(ValueError, match="unexpected: weight_scale_2: fp8"):
        FrozenWeight.from_state_dict(good | {"weight_scale_2": torch.ones(())})


def fp8_linear(given: nn.Linear, scales: torch.dtype = F32, **options) -> nn.Module:
    """The same layer as transformers loads it from such a checkpoint."""
    W, bias = given.weight.detach().float(), given.bias
    N, K = W.shape
    settings = dict(block_size=(128, 128), has_bias=bias is not None) | options
    layer = fp8.FP8Linear(K, N, **settings)
    ours = FrozenWeight.quantize(W, "fp8", scaling="block" if settings["block_size"] else "tensor")
    scale = ours.scale if settings["block_size"] else ours.scale[0]
    with torch.no_grad():
        scale = scale.to(scales).to(F32) * torch.linspace(0.5, 2, scale.numel()).view(scale.shape)
    layer.weight = nn.Parameter(ours.data, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale.to(scales), requires_grad=False)
    if bias is not None:
        layer.bias = bias
    return layer


def over_fp8(dtype: torch.dtype = F32, bias: bool = False, seed: int = 0, scales: torch.dtype = F32, **options):
    """PEFT's own model over a tiny Llama in fp8, with adapters that are not zero."""
    model = llama(dtype, seed, bias)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, fp8_linear(child, scales))
    settings = dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM") | options
    return randomise(get_peft_model(model, LoraConfig(**settings)), seed + 1)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_logits_and_gradients_are_those_of_the_dequantised_model(dtype, bias, calls):
    def values(base) -> torch.Tensor:
        assert base.weight_scale_inv.shape == (1, 1)  # of the tiny model
        return (base.weight.double() * base.weight_scale_inv.double()).to(dtype)

    judge_patched(lambda seed: over_fp8(dtype, bias, seed), dtype, values, calls)


def over(N: int = 200, K: int = 300, scales: torch.dtype = F32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(fp8_linear(nn.Linear(K, N), scales, **options))
    return randomise(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("scales", SCALES)
def test_a_layer_of_several_blocks(scales, compiled, calls):
    model = over(scales=SCALES[scales])
    assert peftkern.patch(model).fast
    layer = model.base_model.model[0]
    spread = layer.base_layer.weight_scale_inv.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    W = (layer.base_layer.weight.float() * spread[:200, :300]).double()
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    x = torch.randn(9, 300, requires_grad=True)
    y = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(x)
    y.sum().backward()
    merged = W + layer.scaling["default"] * B @ A
    expected = x.double() @ merged.T + layer.base_layer.bias
    assert (y - expected).norm() <= 1e-5 * expected.norm() and calls
    assert (x.grad - merged.sum(0)).norm() <= 1e-5 * x.grad.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_weight_of_one_scale(compiled, calls):
    model = over(block_size=None)
    assert peftkern.patch(model).fast
    layer = model.base_model.model[0].base_layer
    weight = from_fp8_linear(layer)
    assert torch.equal(weight.materialize(F32), layer.weight.float() * layer.weight_scale_inv)
    assert weight.data.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(2, 300)
    expected = linear(x, weight.materialize(F32), layer.bias)
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.zero_()
    y = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(x)
    assert (y - expected).norm() <= 1e-5 * expected.norm() and calls


@pytest.mark.parametrize("scales", SCALES)
def test_the_weight_is_never_stale(scales, calls):
    model = over(scales=SCALES[scales])
    peftkern.patch(model)
    layer, x = model.base_model.model[0], torch.randn(3, 300)
    base = layer.base_layer
    other = over(scales=SCALES[scales]).base_model.model[0].base_layer
    other.weight.data = other.weight.data.view(torch.uint8).flip(1).contiguous().view(E4M3)
    with torch.no_grad():
        other.weight_scale_inv.copy_(4 * other.weight_scale_inv.float())

    def base_output() -> torch.Tensor:
        return layer(x) - layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))

    for change in (
        lambda: base.weight.data.view(torch.uint8).fill_(0x38),
        lambda: base.weight_scale_inv.copy_(2 * base.weight_scale_inv.float()),
        lambda: base.load_state_dict(other.state_dict()),
        lambda: setattr(base, "weight", nn.Parameter(torch.ones_like(base.weight), requires_grad=False)),
    ):
        before = base_output()
        with torch.no_grad():
            change()
        dense = linear(x, from_fp8_linear(base).materialize(F32), base.bias)
        assert not torch.allclose(before, dense, atol=1e-3)
        assert (base_output() - dense).norm() <= 1e-5 * dense.norm()
    assert len(calls) == 8


def test_what_is_not_covered_is_pefts_with_its_reason(calls):
    def reason(model: nn.Module) -> str:
        return next(iter(peftkern.patch(model).skipped.values()))

    assert "quantised by the checkpoint's own activation_scale" in reason(over(activation_scheme="static"))
    model = over()
    layer = model.base_model.model[0]
    layer.base_layer.block_size = (125, 128)
    assert "is for blocks of [125, 128]" in reason(model)
    layer.base_layer.block_size = (128, 128)
    scale = layer.base_layer.weight_scale_inv
    layer.base_layer.weight_scale_inv = nn.Parameter(scale.T.contiguous(), requires_grad=False)
    assert "weight_scale_inv is float32 [2, 3], got float32 [3, 2]" in reason(model)
    layer.base_layer.weight_scale_inv = nn.Parameter(scale / 0, requires_grad=False)
    assert "weight_scale_inv has NaN or Inf" in reason(model)
    layer.base_layer.weight_scale_inv = scale
    layer.base_layer.weight.requires_grad_(True)
    assert why_not(layer) == "its base weight requires grad"
    layer.base_layer.weight = nn.Parameter(torch.ones(200, 300), requires_grad=False)  # which FP8Linear multiplies with
    assert "weight is float8_e4m3fn [200, 300], got float32" in reason(model)
    x = torch.randn(2, 300)
    expected = linear(x, torch.ones(200, 300), layer.base_layer.bias)
    expected += layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
    assert torch.allclose(model(x), expected, atol=1e-4) and not calls
    grouped = over()
    grouped.base_model.model[0].base_layer.__class__ = fp8.FP8GroupedLinear
    assert "is a FP8GroupedLinear, not a plain" in reason(grouped)


def test_dropout_shared_inputs_and_mixed_batches(calls):
    """transformers' own forward wants a kernel from the hub, for a GPU: patched, it runs here."""
    model = over_fp8(lora_dropout=0.1)
    report = peftkern.patch(model, share=True)
    assert len(report.fast) == LAYERS and not report.skipped
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == LAYERS and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    every = model(input_ids=IDS).logits
    assert torch.allclose(mixed[0], every[0], atol=1e-5) and not torch.allclose(mixed[1], every[1], atol=1e-3)
