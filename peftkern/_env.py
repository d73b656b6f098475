"""Every environment variable that peftkern reads at run time, parsed once and typed; docs/tuning.md explains each.

An explicit backend or schedule that cannot run a problem raises with the reason; ``auto`` falls back.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("triton", "cpp", "reference")
ISAS = ("baseline", "avx2", "avx512", "avx512bf16")  # module.cpp, limit
SCHEDULES = ("one_pass/recompute", "one_pass/shared", "split", "library")


@dataclass(frozen=True, eq=False)
class Settings:
    """The parsed environment; of one parsing, one object, so that keys of caches hash its identity."""

    backend: str
    schedule: str
    batch_invariant: bool
    overlap: bool
    check_ids: bool
    max_isa: str


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or default
    if value not in (default, *allowed):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(dict.fromkeys((default, *allowed)))}")
    return value


def _switch(name: str, default: str) -> bool:
    return _choice(name, default, ("0", "1")) == "1"


@functools.cache
def settings() -> Settings:
    """Parse the environment, once; ``settings.cache_clear()`` makes the next call read it again."""
    return Settings(
        backend=_choice("PEFTKERN_BACKEND", "auto", BACKENDS),
        schedule=_choice("PEFTKERN_SCHEDULE", "auto", SCHEDULES),
        batch_invariant=_switch("PEFTKERN_BATCH_INVARIANT", "0"),
        overlap=_switch("PEFTKERN_OVERLAP", "1"),
        check_ids=_switch("PEFTKERN_CHECK_IDS", "0"),
        max_isa=_choice("PEFTKERN_MAX_ISA", "auto", ISAS),
    )


def cache_folder() -> Path:
    """The folder of the user's tables, read anew: PEFTKERN_CACHE, or peftkern below XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("PEFTKERN_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftkern"
