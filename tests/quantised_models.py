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


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one step on IDS."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def judge_patched(model: nn.Module, dtype: torch.dtype, values: Callable[[Any], Tensor], calls: list[tuple]) -> None:
    """Patch it: every layer is fused, and loss and gradients are as good, against fp64, as plain PEFT's over
    dense linears of the same values in the base's dtype."""
    plain, truth = dequantised(model, dtype, values), dequantised(model, torch.float64, values)
    report = peftkern.patch(model)
    assert len(report.fast) == LAYERS and not report.skipped, str(report)
    (loss, own), (plain_loss, peer), (true_loss, true) = map(loss_and_gradients, (model, plain, truth))
    assert len(calls) == LAYERS
    assert own.keys() == peer.keys() == true.keys() and len(own) == 2 * LAYERS
    bound = 2 * (plain_loss.double() - true_loss).abs() / true_loss + 1e-6
    assert (loss.double() - true_loss).abs() / true_loss <= bound + torch.finfo(dtype).eps / 2
    every = [torch.cat([found[name].flatten().double() for name in own]) for found in (own, peer, true)]
    assert_as_good_as(*every, "gradients")


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
