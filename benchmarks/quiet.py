"""Loggers of other packages that warn, in a demo, of what it does not use; their errors are shown all the same."""

from __future__ import annotations

import logging

_WARN = (
    "torchao",  # of its own libraries, which are for GPUs and other Pythons and do not load; PEFT imports it
    "torch.utils._pytree",  # of a deprecated call that torchao makes
    "bitsandbytes.backends.cpu.ops",  # of `kernels`, which is not installed; PEFT imports it
)


def others() -> None:
    """Errors only from them; to be called before PEFT is imported."""
    for name in _WARN:
        logging.getLogger(name).setLevel(logging.ERROR)
