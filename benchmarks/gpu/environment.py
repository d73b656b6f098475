"""The card: its name, driver, clocks and versions, and the ceilings that every roofline uses."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import peftkern
from benchmarks.gpu import measure
from benchmarks.gpu.bench import Bench, Wrong
from benchmarks.gpu.roofline import name_of
from benchmarks.gpu.task import Result, Task
from benchmarks.gpu.variants import Linear
from benchmarks.linear import SCALING
from peftkern.testing.problems import Layer

_QUERY = (
    "name", "driver_version", "vbios_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "memory.total", "mig.mode.current", "ecc.mode.current",
)  # fmt: skip


def tasks(bench: Bench) -> list[Task]:
    """What the card says of itself, without which no figure says anything, its ceilings, and a first sign of life."""
    return [
        Task("card", card, 60.0),
        Task("ceilings", lambda: ceilings(bench), 120.0),
        Task("one call", lambda: one_call(bench), 60.0),
        Task("packages", packages, 60.0),
    ]


def card() -> Result:
    """What the driver says; only what can be read."""
    found: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found = {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "units": properties.multi_processor_count, "memory": properties.total_memory, "cuda": torch.version.cuda,
        }  # fmt: skip
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        at_once = (_query(tool, ",".join(_QUERY)) or "").split(", ")
        if len(at_once) == len(_QUERY):
            return found | dict(zip(_QUERY, at_once, strict=True))
        for name in _QUERY:  # an older driver does not know them all
            done = _query(tool, name)
            if done is not None:
                found[name] = done
    return found


def _query(tool: str, names: str) -> str | None:
    command = [tool, f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def packages() -> Result:
    """Which competitors can be imported here."""
    import importlib.util

    names = ("peft", "transformers", "unsloth", "liger_kernel", "matplotlib", "triton")
    return {"importable": {name: importlib.util.find_spec(name) is not None for name in names}}


def one_call(bench: Bench) -> Result:
    """A small call with its gradients, by plain PyTorch and by the backend that is judged, and how it is explained."""
    one, found = Linear(bench.plan.cell(Layer("small", 576, 576), 128), bench.plan), {}
    x, W, A, B, dy = one.o
    rest = {"dropout_p": one.cell.p, "rng_state": one.rng_state}
    for name in ("reference", bench.plan.backend):

        def run(name: str = name) -> tuple[torch.Tensor, ...]:
            y = peftkern.lora_linear(x, W, A, B, SCALING, **rest, backend=name)
            return (y.detach(), *torch.autograd.grad(y, one.inputs, dy))

        found[name], reason = one.check("peftkern", run)
        if reason is not None:
            raise Wrong(f"{name}: {reason}")
    return {"errors": found, "explained": str(peftkern.explain(x, W, A, B, SCALING, **rest))}


def ceilings(bench: Bench) -> Result:
    """FLOP/s of a large vendor product of random operands, bytes/s of a large copy; medians."""
    size, copied = (64, 2**16) if bench.plan.dry else (8192, 2**30)
    device, flops = bench.plan.device, {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        edge = size if dtype.itemsize == 2 else size // 2
        x, W = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        seconds = _median(bench, lambda x=x, W=W: F.linear(x, W))
        flops[name_of(dtype)] = 2 * edge**3 / seconds
    source = torch.empty(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = _median(bench, lambda: target.copy_(source))
    return {"flops": flops, "bandwidth": 2 * copied / seconds, "product": size, "copied": copied}


def _median(bench: Bench, run: Callable[[], object]) -> float:
    samples = bench.time({"run": run})["run"]
    return measure.interval(samples)[1]
