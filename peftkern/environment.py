"""``env_report``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from peftkern import _env, _version
from peftkern.ops import dispatch

_PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "safetensors")


def env_report() -> dict[str, object]:
    """Versions, devices, and each backend's state.

    Returns: a JSON-ready dict with keys platform, python, versions, device, threads, settings, backends, held_bytes; a
    backend's value is "ready" or the reason why it is not, held_bytes what packed copies of frozen weights take now.
    """
    versions = {"peftkern": _version.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.cuda.is_available()
    backends = {name: dispatch.backend_named(name) for name in _env.BACKENDS}
    settings = _env.settings()
    chosen = {"BACKEND": settings.backend, "SCHEDULE": settings.schedule, "PREPACK": settings.prepack}
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "settings": {f"PEFTKERN_{name}": value for name, value in chosen.items()},
        "backends": {name: backend.unavailable() or "ready" for name, backend in backends.items()},
        "held_bytes": sum(backend.held_bytes() for backend in backends.values()),
    }
