"""What a load could change of a model, and that it has not."""

from __future__ import annotations

import torch
from torch import nn


def bits(model: nn.Module) -> dict[str, tuple]:
    """Everything that a load could change."""
    state = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    kinds = {name: (type(module), getattr(module, "scaling", None)) for name, module in model.named_modules()}
    return {"state": state, "kinds": kinds}


def assert_same_bits(model: nn.Module, before: dict[str, tuple]) -> None:
    after = bits(model)
    assert after["kinds"] == before["kinds"] and after["state"].keys() == before["state"].keys()
    for name, (value, trained) in before["state"].items():
        found, now_trained = after["state"][name]
        assert torch.equal(found, value) and trained == now_trained, name
