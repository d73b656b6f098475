"""The classes of patched bitsandbytes layers. Imported where one is found: PEFT has none without bitsandbytes."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from peftkern.integrations.peft.layer import PeftkernLoraLinear


class PeftkernLinear4bit(Linear4bit):
    """PEFT's LoRA over a 4-bit base with peftkern's forward. Made by ``patch``, never constructed."""

    peft = Linear4bit
    forward = PeftkernLoraLinear.forward
    _get_name = PeftkernLoraLinear._get_name


class PeftkernLinear8bitLt(Linear8bitLt):
    """PEFT's LoRA over an 8-bit base with peftkern's forward. Made by ``patch``, never constructed.

    y is the product with the dequantised weight. bitsandbytes' own forward rounds x to 8 bits too, all but its
    outliers, except in training on a CPU.
    """

    peft = Linear8bitLt
    forward = PeftkernLoraLinear.forward
    _get_name = PeftkernLoraLinear._get_name
