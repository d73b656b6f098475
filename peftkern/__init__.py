"""peftkern: a LoRA linear layer for the price of the frozen one.

    y = x W^T + c (D(x) A^T) B^T

in fused kernels, forward and backward, for ``nn.Linear`` and for every vanilla LoRA layer of Hugging Face PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkern._version import __version__
from peftkern.functional import Explanation, explain, lora_linear
from peftkern.multi_lora import multi_lora_linear

if TYPE_CHECKING:
    from peftkern.adapters import InjectReport, eject, inject, load_adapter, save_adapter
    from peftkern.bank import route, serve, unserve
    from peftkern.environment import env_report
    from peftkern.integrations.peft import PatchReport, disabled, patch, report, shared_inputs, unpatch
    from peftkern.integrations.sharded import shardable

__all__ = [
    "Explanation",
    "InjectReport",
    "PatchReport",
    "__version__",
    "disabled",
    "eject",
    "env_report",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "multi_lora_linear",
    "patch",
    "report",
    "route",
    "save_adapter",
    "serve",
    "shardable",
    "shared_inputs",
    "unpatch",
    "unserve",
]

# Loaded on first use: they import what the core does not need (PEFT takes seconds).
_LAZY = {
    name: module
    for module, names in {
        "peftkern.adapters": "adapters InjectReport eject inject load_adapter save_adapter",
        "peftkern.bank": "bank route serve unserve",
        "peftkern.environment": "env_report",
        "peftkern.integrations.peft": "PatchReport disabled patch report shared_inputs unpatch",
        "peftkern.integrations.sharded": "shardable",
        "peftkern.nn": "nn",
        "peftkern.testing": "testing",
        "peftkern.weights": "weights",
    }.items()
    for name in names.split()
}


def __getattr__(name: str):
    import importlib

    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"peftkern.{name}" else getattr(module, name)
