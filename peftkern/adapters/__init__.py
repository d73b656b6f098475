"""Adapters of a model: in PEFT's files, into a model, out of it, and into an optimiser."""

from peftkern.adapters.checkpoint import load_adapter, save_adapter
from peftkern.adapters.config import LoRAConfig
from peftkern.adapters.files import AdapterFile, LoRATensors, read_adapter, write_adapter
from peftkern.adapters.groups import lora_plus_groups
from peftkern.adapters.injection import InjectReport, eject, inject

__all__ = [
    "AdapterFile",
    "InjectReport",
    "LoRAConfig",
    "LoRATensors",
    "eject",
    "inject",
    "load_adapter",
    "lora_plus_groups",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]
