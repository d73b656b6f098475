"""The class of patched AWQ layers. Imported where one is found."""

from __future__ import annotations

from peft.tuners.lora.awq import AwqLoraLinear

from peftkern.integrations.peft.layer import PeftkernLoraLinear


class PeftkernAwqLinear(AwqLoraLinear):
    """PEFT's LoRA over an AWQ base with peftkern's forward. Made by ``patch``, never constructed."""

    peft = AwqLoraLinear
    forward = PeftkernLoraLinear.forward

    def _get_name(self) -> str:
        return "AwqLoraLinear"  # print(model) looks as PEFT's does
