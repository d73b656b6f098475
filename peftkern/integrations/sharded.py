"""Packed weights that ``fully_shard`` shards: FSDP2 splits parameters, by rows, and knows nothing of scales."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from peftkern.integrations.bitsandbytes import int8_operands
from peftkern.nn.frozen import FrozenBuffers


def shardable(model: nn.Module) -> list[str]:
    """Make the packed weights of a model such that ``fully_shard``, called after it, leaves a rank its part of them.

    A quantised ``LoRALinear`` then holds its weight as one parameter of bytes, in which its scales are too; those
    of bitsandbytes' ``Linear8bitLt``, one a row, stay whole. A ``Linear4bit`` needs nothing, and its scales stay whole.
    Dense weights are parameters already. Results are the same bits.

    Args: model: any module. What it returns for the same input does not change.
    Returns: the names of the modules that were changed.
    Raises: ValueError for a Linear8bitLt that is not quantised yet.
    """
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenBuffers):
            if module.hold_bytes():
                changed.append(name)
        elif f"{type(module).__module__}.{type(module).__name__}" == "bitsandbytes.nn.modules.Linear8bitLt":
            if _keep_scales(name, module):
                changed.append(name)
    return changed


def _keep_scales(name: str, module: Any) -> bool:
    """Keep the scales of a Linear8bitLt on its state alone, which FSDP does not replace as it does the weight."""
    kind: type = type(module)
    if module.state.has_fp16_weights or "shardable" in kind.__dict__:
        return False
    data, scale = int8_operands(module)
    if scale is None:
        raise ValueError(f"{name}: its weight is not quantised yet: move the module to a device first")
    module.weight = nn.Parameter(data, requires_grad=False)
    module.state.CB, module.state.SCB = None, scale
    module.__class__ = _with_scales(kind)
    return True


@functools.cache
def _with_scales(kind: type) -> type:
    """bitsandbytes' class with a forward that finds the scales beside what FSDP has gathered, and with its name, by
    which others look for it.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(self.weight, "CB", None) is None:  # a merge puts a weight of bitsandbytes' there
            self.weight.CB, self.weight.SCB = self.weight.data, self.state.SCB
        return kind.forward(self, x)  # type: ignore[attr-defined]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"forward": forward, "shardable": True, **names})
