"""Parameter groups for an optimiser."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def lora_plus_groups(
    model: nn.Module, lr: float, lr_ratio: float, *, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """LoRA+: parameter groups in which B learns ``lr_ratio`` times as fast as A, for any optimiser.

    Formula: lr for A and other trained matrices; lr * lr_ratio for B and trained vectors (biases, norms).
    Args:
        model: an injected model, or a PEFT model, patched or not; parameters are told apart by their names.
        lr, lr_ratio: the rate of A and B's multiple of it; the paper finds ratios well above 1 (about 16) best.
        weight_decay: of all groups but the vectors', which is 0.
        lr_embedding: of the adapters of embeddings (PEFT's lora_embedding_A and _B).
    Returns: a list of ``{"params", "lr", "weight_decay"}``, each parameter that requires grad in exactly one; empty
        groups are left out.
    Raises: ValueError for a rate or ratio that is not positive, or where nothing requires grad.
    Source: Hayou et al. 2024 (LoRA+); the groups of PEFT's create_loraplus_optimizer, but
        that no norm decays.
    """
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("lr_embedding", lr_embedding)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is positive and finite, got {value}")
    rates = {"matrix": lr, "embedding": lr_embedding, "lora_B": lr * lr_ratio, "vector": lr * lr_ratio}
    found: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_kind(name.split("."), parameter)].append(parameter)
    groups = [
        {"params": found[kind], "lr": rate, "weight_decay": 0.0 if kind == "vector" else weight_decay}
        for kind, rate in rates.items()
        if found[kind]
    ]
    if not groups:
        raise ValueError("no parameter of the model requires grad")
    return groups


def _kind(parts: list[str], parameter: nn.Parameter) -> str:
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        return "embedding"
    if parameter.ndim == 1:
        return "vector"
    return "lora_B" if "lora_B" in parts else "matrix"
