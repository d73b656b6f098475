"""Modules that stand where an ``nn.Linear`` stands."""

from peftkern.nn.lora_linear import LoRALinear

__all__ = ["LoRALinear"]
