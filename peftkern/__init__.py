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
    from peftkern.adapters import InjectReport as InjectReport
    from peftkern.adapters import eject as eject
    from peftkern.adapters import inject as inject
    from peftkern.adapters import load_adapter as load_adapter
    from peftkern.adapters import save_adapter as save_adapter
    from peftkern.bank import route as route
    from peftkern.bank import serve as serve
    from peftkern.bank import unserve as unserve
    from peftkern.environment import env_report as env_report
    from peftkern.integrations.peft import PatchReport as PatchReport
    from peftkern.integrations.peft import disabled as disabled
    from peftkern.integrations.peft import patch as patch
    from peftkern.integrations.peft import report as report
    from peftkern.integrations.peft import shared_inputs as shared_inputs
    from peftkern.integrations.peft import unpatch as unpatch
    from peftkern.integrations.sharded import shardable as shardable

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
    "PatchReport": "peftkern.integrations.peft",
    "disabled": "peftkern.integrations.peft",
    "patch": "peftkern.integrations.peft",
    "report": "peftkern.integrations.peft",
    "shared_inputs": "peftkern.integrations.peft",
    "unpatch": "peftkern.integrations.peft",
    "shardable": "peftkern.integrations.sharded",
    "env_report": "peftkern.environment",
    "InjectReport": "peftkern.adapters",
    "eject": "peftkern.adapters",
    "inject": "peftkern.adapters",
    "load_adapter": "peftkern.adapters",
    "route": "peftkern.bank",
    "save_adapter": "peftkern.adapters",
    "serve": "peftkern.bank",
    "unserve": "peftkern.bank",
    "adapters": "peftkern.adapters",
    "bank": "peftkern.bank",
    "nn": "peftkern.nn",
    "testing": "peftkern.testing",
    "weights": "peftkern.weights",
}


def __getattr__(name: str):
    import importlib

    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"peftkern.{name}" else getattr(module, name)
