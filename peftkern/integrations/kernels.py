"""The layer that the ``kernels`` package puts on PEFT's: tests/hub/build.py makes the repository that it loads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftkern.integrations.peft.layer import PeftkernLoraLinear


class LoraLinear(nn.Module):
    """The forward of a patched ``peft.tuners.lora.Linear``.

    ``kernelize`` takes the function alone and binds it to PEFT's layer, whose class stays PEFT's. So nothing is kept
    from call to call: a layer is judged anew at each, which ``patch`` does only after a change.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return PeftkernLoraLinear.forward(self, x, *args, **kwargs)  # type: ignore[arg-type]
