"""``env_report``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from peftkern import _env, _version
from peftkern.backends.cpp import stamp
from peftkern.backends.cpp.extension import extension
from peftkern.ops import dispatch

_PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "safetensors")
_VECTORS = {"avx512bf16": "AVX512-BF16", "avx512": "AVX-512", "avx2": "AVX2"}  # by the extension's names


def env_report() -> dict[str, object]:
    """Versions, devices, and each backend's state.

    Returns: a JSON-ready dict with keys platform, python, versions, device, threads, settings, backends; a backend's
    value is "ready" or the reason why it is not.
    """
    versions = {"peftkern": _own_version(), **{name: _version_of(name) for name in _PACKAGES}}
    cuda = torch.cuda.is_available()
    backends = {name: dispatch.backend_named(name) for name in _env.BACKENDS}
    settings = _env.settings()
    chosen = {"BACKEND": settings.backend, "SCHEDULE": settings.schedule}
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({_instructions()})",
        "threads": torch.get_num_threads(),
        "settings": {f"PEFTKERN_{name}": value for name, value in chosen.items()},
        "backends": {name: backend.unavailable() or "ready" for name, backend in backends.items()},
    }


def _own_version() -> str:
    """This copy's, and that of an installed one beside it which is another."""
    installed = _version_of("peftkern")
    if installed in (_version.__version__, "not installed"):
        return _version.__version__
    return f"{_version.__version__} (another copy is installed: {installed})"


def _version_of(name: str) -> str:
    """That of the distribution that brings a package, named where it is called otherwise, as triton-windows is."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    for distribution in importlib.metadata.packages_distributions().get(name, ()):
        return f"{importlib.metadata.version(distribution)} ({distribution})"
    return "not installed"


def _instructions() -> str:
    """The processor's best vectors, and AMX; where the extension is missing by torch's name, which says less."""
    module, features = extension()[0], stamp.processor_features() or frozenset()
    best = "" if module is None else module.instruction_sets()[0]
    vectors = _VECTORS.get(best, torch.backends.cpu.get_cpu_capability())
    return f"{vectors}, AMX" if "amx_bf16" in features else vectors
