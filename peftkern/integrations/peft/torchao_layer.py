"""The class of patched torchao layers. Imported where one is found."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora.torchao import TorchaoLoraLinear

from peftkern.integrations.peft.layer import PeftkernLoraLinear


class PeftkernTorchaoLinear(TorchaoLoraLinear):
    """PEFT's LoRA over one of torchao's weights with peftkern's forward. Made by ``patch``, never constructed."""

    peft = TorchaoLoraLinear
    forward = PeftkernLoraLinear.forward

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's ``merge``, which quantises the sum again and does not say so."""
        warnings.warn("merging into a base of torchao's quantises the sum again: the outputs change", stacklevel=2)
        super().merge(*args, **kwargs)

    def _get_name(self) -> str:
        return "TorchaoLoraLinear"  # print(model) looks as PEFT's does
