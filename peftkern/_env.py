"""Every environment variable that peftkern reads at run time, parsed once and typed.

========================  =======================================  ========
variable                  values                                   default
========================  =======================================  ========
``PEFTKERN_BACKEND``      ``auto | triton | cpp | reference``       ``auto``
``PEFTKERN_SCHEDULE``     ``auto | one_pass | split``               ``auto``
========================  =======================================  ========

An explicit backend or schedule that cannot run a problem raises with the reason;
``auto`` falls back. The README carries the same table.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

BACKENDS = ("triton", "cpp", "reference")
SCHEDULES = ("one_pass", "split")


@dataclass(frozen=True)
class Settings:
    """The parsed environment."""

    backend: str
    schedule: str


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value != "auto" and value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of auto, {', '.join(allowed)}")
    return value


@functools.cache
def settings() -> Settings:
    """Parse the environment, once; ``settings.cache_clear()`` makes the next call read it again."""
    return Settings(
        backend=_choice("PEFTKERN_BACKEND", BACKENDS),
        schedule=_choice("PEFTKERN_SCHEDULE", SCHEDULES),
    )
