"""The class of patched GPTQ layers. Imported where one is found."""

from __future__ import annotations

from peft.tuners.lora.gptq import GPTQLoraLinear

from peftkern.integrations.peft.layer import PeftkernLoraLinear


class PeftkernGPTQLinear(GPTQLoraLinear):
    """PEFT's LoRA over a GPTQ base with peftkern's forward. Made by ``patch``, never constructed."""

    peft = GPTQLoraLinear
    forward = PeftkernLoraLinear.forward

    def _get_name(self) -> str:
        return "GPTQLoraLinear"  # print(model) looks as PEFT's does
