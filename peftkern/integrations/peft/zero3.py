"""DeepSpeed's ZeRO-3, which holds parameters in parts, at size 0, and gathers a module's own by hooks on that module.

A fused layer reads its children's, so it asks DeepSpeed to gather them with the layer: ``register_external_parameter``,
once. They are then there for the layer's forward and backward, in one fetch where PEFT's forward needs one a child.
(A leaf module would be, too, but DeepSpeed fails in one whose x needs no gradient: q, k and v of the first block.)
DeepSpeed is not imported: whoever meets its hooks has it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

BEING_FETCHED = "ZeRO-3 is fetching its weights"


def hooked(module: Any) -> bool:
    """Whether DeepSpeed gathers this module's own parameters for its calls, and lets go of them afterwards."""
    return "ds_id" in module.__dict__


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed holds this parameter in parts."""
    return hasattr(parameter, "ds_id")  # not of its __dict__: a compiler that traces a packed weight cannot read that


def is_own(hook: Any) -> bool:
    """Whether a hook is DeepSpeed's."""
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def gather(layer: Any) -> str | None:
    """Have what a fused call reads of a hooked layer's children here, or say why it cannot be."""
    if layer.disable_adapters or layer.merged_adapters:
        return None
    if torch.compiler.is_compiling():
        return "torch.compile traces a layer of ZeRO-3's"
    held = [p for p in _read(layer) if "ds_status" in p.__dict__ and "ds_z3_leaf_module" not in p.__dict__]
    known = layer.__dict__.get("_external_params", ())
    for parameter in held:
        if id(parameter) not in known:
            sys.modules["deepspeed"].zero.register_external_parameter(layer, parameter)
    states = [parameter.ds_status.name for parameter in held]
    if "INFLIGHT" in states:  # of the right shape, perhaps, and not filled yet
        return BEING_FETCHED
    missing = [p for p, state in zip(held, states, strict=True) if state == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather(missing)
    return None


def _read(layer: Any) -> Iterator[Any]:
    """The parameters that a fused call reads."""
    factors = [layer._modules[of]._modules.get(name) for name in layer.active_adapters for of in ("lora_A", "lora_B")]
    for child in (layer._modules["base_layer"], *factors):
        if child is not None:
            yield from (parameter for parameter in child._parameters.values() if parameter is not None)


@contextlib.contextmanager
def as_gathered(layer: Any) -> Iterator[None]:
    """Within the block what DeepSpeed gathers for a layer has the shape that it will have, and no data."""
    held = [
        (p, p.data)
        for p in layer.parameters()
        if "ds_shape" in p.__dict__ and p.shape != p.ds_shape and (hooked(layer) or "ds_z3_leaf_module" in p.__dict__)
    ]
    for parameter, data in held:
        parameter.data = data.new_empty(()).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
