"""Modules that stand where an ``nn.Linear`` stands."""

from __future__ import annotations

from peftkern.nn.lora_linear import LoRALinear

__all__ = ["LoRALinear"]

# Names that were here before ``peftkern.adapters`` and ``peftkern.bank`` were, for code that imports them from here.
_MOVED = {
    "peftkern.adapters": {
        "AdapterFile", "InjectReport", "LoRAConfig", "LoRATensors", "eject", "inject", "load_adapter",
        "lora_plus_groups", "read_adapter", "save_adapter", "write_adapter",
    },
    "peftkern.bank": {
        "Adapter", "AdapterBank", "JobBatch", "MultiLoRALinear", "Route", "join_batches", "losses_by_job", "pack_jobs",
        "route", "serve", "unserve",
    },
}  # fmt: skip


def __getattr__(name: str):
    import importlib

    for module, names in _MOVED.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'peftkern.nn' has no attribute {name!r}")
