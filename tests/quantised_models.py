"""A quantised tiny Llama under PEFT, judged against the same model with dense linears of the values that it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from conftest import llama
from peft import get_peft_model
from torch import Tensor, nn

import peftkern
from peftkern.testing.numerics import assert_as_good_as

IDS = torch.arange(24).view(2, 12) % 64
LAYERS = 14


def dequantised(model: nn.Module, dtype: torch.dtype, values: Callable[[Any], Tensor]) -> nn.Module:
    """The same under plain PEFT with dense linears in ``dtype``; ``values``: those of the weight of a base layer."""
    twin = llama(dtype, bias=model.base_model.model.config.attention_bias)
    twin = get_peft_model(twin, copy.copy(model.peft_config["default"]))
    theirs = dict(model.named_modules())
    with torch.no_grad():
        for name, module in twin.named_modules():
            if hasattr(module, "base_layer"):
                base = theirs[name].base_layer
                module.base_layer.weight.copy_(values(base))
                if base.bias is not None:
                    module.base_layer.bias.copy_(base.bias)
        wanted = {n: p for n, p in model.named_parameters() if "base_layer" not in n}
        for name, parameter in twin.named_parameters():
            if name in wanted:
                parameter.copy_(wanted[name])
                parameter.data = parameter.data.to(torch.promote_types(wanted[name].dtype, dtype))
    return twin


def logits_and_gradients(model: nn.Module, autocast: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one step on IDS."""
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found.logits.detach().double(), gradients


def judge_patched(
    build: Callable[[int], nn.Module], dtype: torch.dtype, values: Callable[[Any], Tensor], calls: list[tuple]
) -> None:
    """Patch models of a few seeds: every layer is fused, and logits and gradients are as good, against fp64, as plain
    PEFT's over dense linears of the same values, with the same roundings: fp32 factors beside a 16-bit base are rounded
    as autocast does it. One rounding in an early layer moves all gradients of a model, so three models are pooled; the
    loss is a single number, whose error is luck.
    """
    rounded = None if dtype == torch.float32 else dtype
    logits, gradients = [], []
    for seed in range(1 if rounded is None else 3):
        model = build(seed)
        plain, truth = dequantised(model, dtype, values), dequantised(model, torch.float64, values)
        report = peftkern.patch(model)
        assert len(report.fast) == LAYERS and not report.skipped, str(report)
        calls.clear()
        found = logits_and_gradients(model), logits_and_gradients(plain, rounded), logits_and_gradients(truth)
        assert len(calls) == LAYERS
        names = found[0][1].keys()
        assert all(one.keys() == names for _, one in found) and len(names) == 2 * LAYERS
        logits.append(torch.stack([one.flatten() for one, _ in found]))
        gradients.append(torch.stack([torch.cat([one[name].flatten() for name in names]) for _, one in found]))
    assert_as_good_as(*torch.cat(logits, 1), "logits")
    assert_as_good_as(*torch.cat(gradients, 1), "gradients")


def quantise(model: nn.Module, kind: str, compute: torch.dtype | None, nested: bool = True) -> nn.Module:
    """Every linear of the decoder by bitsandbytes'; the odd sizes of the heads and the embedding stay."""
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, quantised_linear(linear, kind, compute, nested))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model


def quantised_linear(linear: nn.Linear, kind: str, compute: torch.dtype | None, nested: bool = True) -> nn.Module:
    """The same layer as bitsandbytes has it."""
    import bitsandbytes as bnb

    N, K = linear.weight.shape
    bias = linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(K, N, bias, compute_dtype=compute, quant_type=kind, compress_statistics=nested)
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested
        )
    if bias:
        layer.bias = linear.bias
    return layer.to("cpu")
