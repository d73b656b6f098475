"""Hugging Face PEFT: make every vanilla ``peft.tuners.lora.Linear`` of a model fast, in place and reversibly.

The class of each such layer is swapped for a subclass that overrides ``forward`` alone. A call that the fast path does
not cover runs PEFT's own ``forward``, bit for bit; ``why_not`` is the single predicate that decides, at every call, and
its text is the reason that the report shows.

    read.py    what is read of a layer, and the predicate
    layer.py   the class that a patched layer has
    experts.py, low_rank_stack.py   the same for parameters that a module reads itself: MoE experts, routers
    shared_input.py   the class of layers that look for others with the same x
    tally.py   how many calls of a layer were fused, and why the others were not
    swap.py    patch, unpatch and the report
"""

from peftkern.integrations.peft.layer import PeftkernLoraLinear, disabled
from peftkern.integrations.peft.read import why_not
from peftkern.integrations.peft.shared_input import shared_inputs
from peftkern.integrations.peft.swap import PatchReport, patch, report, unpatch

__all__ = ["PatchReport", "PeftkernLoraLinear", "disabled", "patch", "report", "shared_inputs", "unpatch", "why_not"]
