"""Modules that stand where an ``nn.Linear`` stands, and how they come into a model, out of it, and to files."""

from peftkern.nn.adapter_config import LoRAConfig
from peftkern.nn.adapter_files import AdapterFile, LoRATensors, read_adapter, write_adapter
from peftkern.nn.checkpoint import load_adapter, save_adapter
from peftkern.nn.injection import InjectReport, eject, inject
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.optimizer_groups import lora_plus_groups

__all__ = [
    "AdapterFile",
    "InjectReport",
    "LoRAConfig",
    "LoRALinear",
    "LoRATensors",
    "eject",
    "inject",
    "load_adapter",
    "lora_plus_groups",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]
