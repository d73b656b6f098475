"""``save_adapter`` and ``load_adapter``: a model's adapters to and from PEFT's files."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkern.adapters.config import LoRAConfig
from peftkern.adapters.files import (
    AdapterFile,
    LoRATensors,
    check_base_weight,
    check_complete,
    check_tensor,
    key_of,
    keys_of,
    read_adapter,
    shapes_of,
    write_adapter,
)
from peftkern.adapters.injection import InjectReport, adapted_layers, put_adapters, refuse_peft, report_on
from peftkern.adapters.targets import short_targets
from peftkern.nn import initialization
from peftkern.nn.lora_linear import LoRALinear, why_not_linear

T = TypeVar("T", bound=Hashable)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, task_type: str | None = None) -> None:
    """Write the adapters of an injected model in PEFT's format, for the base model as it was given.

    PiSSA and OLoRA have changed the weights of the model; what they took out is subtracted in the file, which therefore
    holds a plain LoRA of rank 2r. It loads into the original base, here, in PEFT and elsewhere, and gives the same
    outputs but for the changed weight's rounding to the base's dtype.

    Args:
        model: any module with LoRALinear layers; a DDP or compiled wrapper is looked through.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``, whole or not at all (``write_adapter``).
        task_type: PEFT's, e.g. "CAUSAL_LM", for those who load with an AutoPeftModel.
    Raises: ValueError where there is no adapter, a value is not finite or layers differ in what one config can say;
        RuntimeError for a PEFT model (use its save_pretrained); ImportError where safetensors is not installed.
    """
    model = _unwrapped(model)
    refuse_peft(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no LoRALinear")
    tensors = {name: _tensors(name, layer) for name, layer in layers.items()}
    base_name = getattr(model, "name_or_path", None)
    extra = {
        "task_type": task_type,
        "base_model_name_or_path": (base_name if isinstance(base_name, str) else None) or None,
    }
    write_adapter(folder, _config(model, layers, tensors), tensors, **extra)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> InjectReport:
    """Read an adapter in PEFT's format into a model, which stays bit-identical where anything is wrong.

    Args:
        model: an injected model, whose layers must be the file's (dropout and what is trained stay the model's, ranks
            must agree, scaling becomes the file's); or a plain model, into which the file's layers are injected. Then
            an adapter saved by PEFT as "pissa" or "olora" takes its start out of the weights, as PEFT does.
        folder: as ``read_adapter``.
        is_trainable: of a plain model: whether the adapter is trained on.
    Returns: the report, as ``inject``.
    Raises: those of ``read_adapter``; ValueError naming the key and the expected shape, or a layer that one side lacks;
        TypeError for a layer that cannot be adapted; RuntimeError for a PEFT model (use its load_adapter).
    """
    model = _unwrapped(model)
    refuse_peft(model)
    file = read_adapter(folder)
    layers = adapted_layers(model)
    if layers:
        _check_injected(layers, file)
        _copy(file, layers)
        return report_on(model, layers)
    targets = _check_plain(model, file)
    put_adapters(model, file.config, targets)
    layers = adapted_layers(model)
    _copy(file, layers)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter.requires_grad and is_trainable)
    return report_on(model, layers)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = inner
        else:
            return model


# ------------------------------------------------------------------------------------------------------------- saving


def _tensors(name: str, layer: LoRALinear) -> LoRATensors:
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if layer.removed_A is not None and layer.removed_B is not None:
        c = float(layer.scaling)
        if c == 0.0:
            raise ValueError(f"{name}: what {layer.init_lora_weights!r} took out has no place at scaling 0")
        A = torch.cat([A, layer.removed_A.to(A.dtype)], 0)
        B = torch.cat([B, (-layer.removed_B / c).to(B.dtype)], 1)
    trained = layer.bias is not None and layer.bias.requires_grad
    return LoRATensors(A, B, layer.lora_bias, layer.bias if trained else None)


def _config(model: nn.Module, layers: Mapping[str, LoRALinear], tensors: Mapping[str, LoRATensors]) -> LoRAConfig:
    """One config that says what the layers are: the commonest values, and a pattern for each layer that differs."""
    if len({layer.lora_bias is None for layer in layers.values()}) > 1:
        raise ValueError("some layers have a lora_bias and some have none, which PEFT's format cannot say")
    use_rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: found.lora_A.shape[0] for name, found in tensors.items()}
    alphas = {name: _alpha(layer, ranks[name], use_rslora) for name, layer in layers.items()}
    r, lora_alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return LoRAConfig(
        r, lora_alpha, short_targets(model, list(layers)),
        lora_dropout=_commonest(layer.lora_dropout for layer in layers.values()),
        bias="lora_only" if any(found.bias is not None for found in tensors.values()) else "none",
        lora_bias=all(layer.lora_bias is not None for layer in layers.values()), use_rslora=use_rslora,
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != lora_alpha},
        fan_in_fan_out=any(layer.conv1d is not None for layer in layers.values()),
    )  # fmt: skip


def _alpha(layer: LoRALinear, r: int, use_rslora: bool) -> float:
    """lora_alpha that gives the layer's scaling at rank r: the layer's own where nothing has changed."""
    own = math.sqrt(layer.r) if layer.use_rslora else layer.r
    c = float(layer.scaling)
    if r == layer.r and use_rslora == layer.use_rslora and c == layer.lora_alpha / own:
        return layer.lora_alpha
    alpha = c * (math.sqrt(r) if use_rslora else r)
    return int(alpha) if alpha == int(alpha) else alpha


def _commonest(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


# ------------------------------------------------------------------------------------------------------------ loading


def _check_injected(layers: Mapping[str, LoRALinear], file: AdapterFile) -> None:
    for name, layer in layers.items():
        if layer.removed_A is not None:
            raise ValueError(
                f"{name} has a weight changed by {layer.init_lora_weights!r}, but a file belongs to the base as it was "
                "given: load into the plain model (to resume training, use state_dict)"
            )
    if initialization.changes_the_base(file.config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights={file.config.init_lora_weights!r} of the file changes the base: load into a plain model"
        )
    _check_same(set(layers), set(file.layers), "the model has no LoRALinear there")
    for name, layer in layers.items():
        _check_fit(name, file, layer.base_weight(), layer.bias, layer.r, layer.lora_A.dtype)
        found = file.layers[name]
        if (layer.lora_bias is None) != (found.lora_bias is None):
            state = "is missing" if layer.lora_bias is not None else "is there"
            wanted = layer.lora_bias is not None
            raise ValueError(f"{key_of(name, 'lora_bias')} {state}, but lora_bias={wanted} in the model")
        if layer.bias is not None and layer.bias.requires_grad and found.bias is None:
            raise ValueError(f"{key_of(name, 'bias')} {tuple(layer.bias.shape)} is missing, but the bias is trained")


def _check_plain(model: nn.Module, file: AdapterFile) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name in file.layers}
    _check_same(set(modules), set(file.layers), "the model has no such layer")
    for name, module in modules.items():
        reason = why_not_linear(module)
        if reason is not None:
            raise TypeError(f"{key_of(name, 'lora_A')}: {name} cannot be adapted: {reason}")
        given: Any = module
        weight = given.weight if isinstance(module, nn.Linear) else given.weight.t()
        adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        _check_fit(name, file, weight, given.bias, file.config.rank(name), adapter_dtype)
    check_complete((name for name, _ in model.named_modules() if name), file)
    return modules


def _check_same(mine: set[str], theirs: set[str], why: str) -> None:
    if unknown := sorted(theirs - mine):
        raise ValueError(f"{keys_of(unknown)} in the file, but {why}")
    if missing := sorted(mine - theirs):
        raise ValueError(f"{keys_of(missing)} missing in the file")


def _check_fit(
    name: str, file: AdapterFile, weight: Tensor, bias: Tensor | None, r: int, adapter_dtype: torch.dtype
) -> None:
    """Shapes against a base layer, and values against the dtypes that they get."""
    N, K = weight.shape
    found = file.layers[name]
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device, where {key_of(name, 'lora_A')} cannot be loaded")
    if found.bias is not None and bias is None:
        raise ValueError(f"{key_of(name, 'bias')} is there, but {name} has no bias")
    if found.bias is None and bias is not None and file.config.bias == "lora_only":
        raise ValueError(f"{key_of(name, 'bias')} ({N},) is missing, but bias='lora_only'")
    shapes = shapes_of(r, K, N)
    for field, tensor in found._asdict().items():
        if tensor is not None:
            dtype = bias.dtype if field == "bias" and bias is not None else adapter_dtype
            check_tensor(name, field, tensor, shapes[field], dtype)
    check_base_weight(name, found, weight)


@torch.no_grad()
def _copy(file: AdapterFile, layers: Mapping[str, LoRALinear]) -> None:
    config = file.config
    for name, layer in layers.items():
        merged = layer.merged_weight is not None
        if merged:
            layer.unmerge()
        for field, value in file.layers[name]._asdict().items():
            if value is not None and field != "weight":  # which has been found to be the same
                getattr(layer, field).copy_(value)
        layer.lora_alpha, layer.use_rslora = config.alpha(name), config.use_rslora
        layer.scaling = config.scaling(name)
        if merged:
            layer.merge()
