"""LoRA-FA, where A is frozen: a linear saves s [M, R] for backward, and nothing of M K or M N."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import pytest
import torch
from conftest import TARGETS, Case, Target, adapted, leaves_of, linears, make, randomise
from conftest import step as llama_step
from pairwise import pairwise
from peft import LoraConfig, get_peft_model
from quantised_models import quantised_linear
from test_readme import written
from test_weight_formats import QUANTISED
from torch import Tensor, nn

import peftkern
from benchmarks.memory import MIB, saved_for_backward
from peftkern.integrations import quantised
from peftkern.weights import FrozenWeight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
M, R = 48, 4
ANYWHERE = [*TARGETS, pytest.param(Target("triton", "cpu"), id="triton", marks=pytest.mark.interpreter)]


def kept(forward: Callable[[], object], held: Iterable[Tensor | None]) -> int:
    """Bytes that ``forward`` leaves saved, but for those of ``held``."""
    own = nn.ParameterList(nn.Parameter(t.detach(), requires_grad=False) for t in held if t is not None)
    return saved_for_backward(forward, own).total


def s_alone(rows: int, p: float, rank: int = R) -> int:
    """s in fp32, and where there is dropout the two int64 that its mask comes from."""
    return rows * rank * 4 + (16 if p else 0)


OPTIONS = pairwise(
    [("dense", {}), *QUANTISED], [F32, BF16, F16], [None, F32], [0.0, 0.3],
    [("x", "lora_B"), ("lora_B", "bias"), ("x", "lora_B", "lora_bias")],
)  # fmt: skip


@pytest.mark.parametrize(("weight_format", "dtype", "adapter", "p", "needs"), OPTIONS, ids=str)
@pytest.mark.parametrize("target", ANYWHERE)
def test_s_alone_is_saved_of_every_format(target, weight_format, dtype, adapter, p, needs):
    t = make(Case(M, 64, 96, R, dtype, adapter, p, bias=True, lora_bias=True), target.device)
    name, options = weight_format
    weight = t.weight if name == "dense" else FrozenWeight.quantize(t.weight, name, **options)
    leaf = leaves_of(t, needs)
    factors = [leaf[n] for n in ("lora_A", "lora_B", "bias", "lora_bias")]
    scaling = torch.tensor(2.0, device=target.device)  # of which a snapshot is saved
    found = kept(
        lambda: peftkern.lora_linear(
            leaf["x"], weight, *factors[:2], scaling, bias=factors[2], lora_bias=factors[3], dropout_p=p,
            backend=target.backend,
        ),
        [*factors, *(weight.tensors if isinstance(weight, FrozenWeight) else [weight])],
    )  # fmt: skip
    assert found == s_alone(M, p) + 4


# ---------------------------------------------------------------------------------------------------- PEFT's layers


def freeze_A(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def over(base: str, dtype: torch.dtype, p: float) -> nn.Module:
    """One layer of PEFT's, A frozen, over a base that computes in ``dtype``."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    model = nn.Sequential(linear.to(dtype) if base == "dense" else quantised_linear(linear, base, dtype))
    if base != "dense":
        setattr(model, "is_loaded_in_8bit" if base == "int8" else "is_loaded_in_4bit", True)
    return freeze_A(randomise(get_peft_model(model, LoraConfig(r=R, lora_dropout=p, target_modules=["0"]))))


def held_by(model: nn.Module) -> list[Tensor]:
    """Parameters, and the tables of a quantised base, which are no parameters."""
    base = model.base_model.model[0].base_layer
    tables = quantised.frozen(base)[0].tensors if quantised.is_quantised(base) else []
    return [*model.parameters(), *tables]


def gradients(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        y = model(x)
    y.square().sum().backward()
    return {"x": x.grad} | {n: q.grad for n, q in model.named_parameters() if q.grad is not None}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    ("base", "dtype", "x_dtype", "autocast", "p"),
    [
        row
        for row in pairwise(["dense", "nf4", "int8"], [F32, BF16, F16], [None, F32], [None, BF16], [0.0, 0.3])
        if row[0] != "dense" or row[2] is None or row[3]  # x in another dtype than a dense base needs autocast
    ],
    ids=str,
)
def test_a_layer_of_pefts_saves_s_alone(base, dtype, x_dtype, autocast, p, calls):
    """And x and B get the gradients that they get beside a trained A. A dense base that autocast rounds is kept rounded
    for dx, as F.linear keeps it."""
    model = over(base, dtype, p)
    rounded = 48 * 64 * 2 if base == "dense" and autocast not in (None, dtype) else 0
    assert peftkern.patch(model).fast
    x = torch.randn(3, M // 3, 64, generator=torch.Generator().manual_seed(3)).to(x_dtype or dtype).requires_grad_()
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        assert kept(lambda: model(x), held_by(model)) == s_alone(M, p) + rounded
    found = gradients(model, x.detach(), autocast)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    expected = gradients(model, x.detach(), autocast)
    assert len(calls) == 3 and {n for n in expected if "lora_A" in n} == expected.keys() - found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


class ThreeOfOne(nn.Module):
    """Layers that read one x."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 48), nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_so_do_several_adapters_and_layers_that_read_one_x(adapters, shared):
    config = LoraConfig(r=R, lora_dropout=0.3, target_modules=["q", "k", "v"])
    model = get_peft_model(ThreeOfOne(), config)
    if adapters == 2:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    freeze_A(randomise(model))
    assert len(peftkern.patch(model, share=[("q", "k", "v")] if shared else ()).fast) == 3
    x = torch.randn(M, 64, requires_grad=True)
    assert bool(peftkern.shared_inputs(model)) == shared
    assert kept(lambda: model(x), model.parameters()) == 3 * adapters * s_alone(M, 0.3)


@pytest.mark.parametrize("patched_first", [False, True])
def test_pefts_lorafa_optimizer(patched_first, calls):
    """Three steps are plain PEFT's, and each layer saves s alone. The optimizer rounds B's gradients to bf16."""
    optimizers = pytest.importorskip("peft.optimizers")

    def train(patch: Callable[[nn.Module], object]) -> tuple[nn.Module, list[Tensor]]:
        model, losses = adapted(lora_dropout=0.0), []
        if patched_first:
            patch(model)
        optimizer = optimizers.create_lorafa_optimizer(model, r=R, lora_alpha=8, lr=1e-2)
        patch(model)
        for _ in range(3):
            losses.append(llama_step(model)["loss"])
            optimizer.step()
        return model, losses

    expected, losses = train(lambda model: None)
    assert not calls and losses[2] < losses[0]
    found, own_losses = train(peftkern.patch)
    assert len(calls) == 3 * 14
    torch.testing.assert_close(own_losses, losses, rtol=2e-5, atol=0)
    for own, other, start in zip(*(model.parameters() for model in (found, expected, adapted())), strict=True):
        assert (own - other).norm() <= 1e-2 * (other - start).norm()
    for layer in linears(found).values():
        x = torch.randn(M, layer.in_features, requires_grad=True)
        assert kept(lambda m=layer, x=x: m(x), found.parameters()) == s_alone(M, 0.0)


def test_the_readmes_figure():
    """The seven linears of a block of SmolLM2-135M, 512 tokens, r=16, p=0.05, fp32: PEFT's own keep the dropped x."""
    widths = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    widths |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    kept_bytes = {"PEFT": 0, "peftkern": 0}
    for K, N in widths.values():
        model = nn.Sequential(nn.Linear(K, N, bias=False))
        model = freeze_A(get_peft_model(model, LoraConfig(r=16, lora_dropout=0.05, target_modules=["0"])))
        x = torch.randn(512, K, requires_grad=True)
        kept_bytes["PEFT"] += kept(lambda m=model, x=x: m(x), model.parameters())
        peftkern.patch(model)
        kept_bytes["peftkern"] += kept(lambda m=model, x=x: m(x), model.parameters())
    assert kept_bytes["peftkern"] == len(widths) * s_alone(512, 0.05, rank=16)
    figure = f"{kept_bytes['peftkern'] / MIB:.2f} MiB where PEFT's own keep {kept_bytes['PEFT'] / MIB:.1f}"
    assert figure in " ".join(written().split())
