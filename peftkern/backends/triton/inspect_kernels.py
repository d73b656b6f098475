"""What the compiler makes of every kernel, for chips that are not here: registers, stack, shared memory, MMA kind.

Each row compiles the launch that the backend would start (``launch.py`` on meta tensors), with the tile that it would
choose, through ``triton.compile`` and a ``GPUTarget``; no GPU, no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern.backends.triton import launch, select
from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.tiles import Choice, Pass, TileConfig, grad_tile, shrink_tile
from peftkern.ops.problem import LoRAOperands, Problem
from peftkern.weights import DenseWeight, FrozenWeight, Int8Weight

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_MMA = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync", "v_mfma": "mfma"}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination of the slots. ``body`` is a schedule (its ``fused``), "shrink" or "grad"."""

    body: str
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.bfloat16
    precision: str = "base"
    weight_format: str = "dense"
    dropout: bool = False
    bias: bool = False
    backward: bool = False
    M: int = 8192
    K: int = 4096
    N: int = 4096
    R: int = 16
    tile: TileConfig | None = None  # of a schedule; the selected one where None

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        features = [name[self.dtype], f"{name[self.adapter_dtype]}/{self.precision}", self.weight_format]
        features += [word for word in ("dropout", "bias", "backward") if getattr(self, word)]
        return f"{self.body} {' '.join(features)} M={self.M} R={self.R}"

    @property
    def launch(self) -> Pass:
        """The direction, as schedules and tiles see it."""
        problem = Problem(
            "cuda", self.M, self.K, self.N, self.R, self.dtype, self.adapter_dtype, self.weight_format, self.dropout,
            self.bias, self.bias, self.precision,
        )  # fmt: skip
        return Pass(problem, self.backward)


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant compiled to. ``stack`` and ``spills`` in bytes (on AMD: scratch, spilled registers)."""

    target: str
    variant: str
    tile: str
    registers: int
    stack: int
    spills: int
    shared_memory: int
    shared_memory_limit: int
    mma: str
    tma: bool
    traps: bool


def _launch(variant: Variant, arch: Arch) -> tuple[launch.Launch, str]:
    """The launch the backend would start for a variant, on meta tensors, and its tile."""
    v = variant

    def empty(*shape: int, dtype: torch.dtype = v.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight: FrozenWeight = DenseWeight(empty(v.N, v.K))
    if v.weight_format == "int8":
        weight = Int8Weight(empty(v.N, v.K, dtype=torch.int8), empty(v.N, dtype=torch.float32))
    A, B = empty(v.R, v.K, dtype=v.adapter_dtype), empty(v.N, v.R, dtype=v.adapter_dtype)
    bias, lora_bias = (empty(v.N), empty(v.N, dtype=v.adapter_dtype)) if v.bias else (None, None)
    rng_state = empty(2, dtype=torch.int64) if v.dropout else None
    operands = LoRAOperands(
        weight, A, B, bias, lora_bias, 2.0, None, 0.05 if v.dropout else 0.0, rng_state, v.precision
    )
    direction = launch.Direction(operands, v.backward, v.dtype)
    P, Q, R = direction.extents
    X, T = empty(v.M, Q), empty(v.M, R, dtype=torch.float32)
    if v.body == "shrink":
        return launch.shrink(direction, X, T, v.launch, arch, arch.dependent_launch), str(shrink_tile(v.launch, arch))
    if v.body == "grad":
        x, dy = empty(v.M, v.K), empty(v.M, v.N)
        made, _ = launch.grad(direction, x, T, dy, T, v.bias, arch)
        return made, str(grad_tile(v.dtype, R, False, arch))
    if v.body == "grad with t":
        made, _ = launch.grad(direction, None, None, empty(v.M, v.N), T, v.bias, arch, t_out=T)
        return made, str(grad_tile(v.dtype, R, True, arch))
    choice = Choice(v.body, v.tile) if v.tile else select.choose(v.launch, arch)
    return launch.fused(direction, X, T, empty(v.M, P), choice, arch), str(choice.tile)


def _describe(value: Any, path: tuple[int, ...], specialize: bool, source: dict[str, Any]) -> Any:
    """The signature of one argument; adds to the constants and attributes what Triton's own launcher would."""
    if isinstance(value, tuple):
        return tuple(_describe(item, (*path, i), specialize, source) for i, item in enumerate(value))
    if value is None or (specialize and type(value) is int and value == 1):
        source["constexprs"][path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor) or (specialize and value % 16 == 0):
        source["attrs"][path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _compile(made: launch.Launch, target: GPUTarget) -> Any:
    source: dict[str, Any] = {"signature": {}, "constexprs": {}, "attrs": {}}
    for i, parameter in enumerate(made.kernel.params):
        value = made.arguments[parameter.name]
        if parameter.is_constexpr:
            source["constexprs"][(i,)] = value
            source["signature"][parameter.name] = "constexpr"
        else:
            source["signature"][parameter.name] = _describe(value, (i,), not parameter.do_not_specialize, source)
    options = {"num_warps": made.num_warps, "num_stages": made.num_stages}
    options |= {"launch_pdl": True} if made.dependent else {}
    return triton.compile(ASTSource(made.kernel, **source), target=target, options=options)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern}")
    return int(found.group(1))


def _usage(compiled: Any) -> tuple[int, int, int]:
    """Registers a thread, stack bytes, spills, as the binary says."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        fields = (r"\.vgpr_count:", r"\.private_segment_fixed_size:", r"\.vgpr_spill_count:")
        registers, stack, spills = (_number(field + r"\s*(\d+)", text) for field in fields)
        return registers, stack, spills
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True).stdout
        registers, stack = (_number(rf"\b{field}:(\d+)", text) for field in ("REG", "STACK"))
        if stack == 0:
            return registers, 0, 0
        code = subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    widths = re.findall(r"\bSTL(?:\.(\d+))?\b", code)
    return registers, stack, sum(int(width or 32) // 8 for width in widths)


def inspect(variant: Variant, target: str) -> Row:
    """Compile one variant for one target. Raises: whatever the compiler raises."""
    arch = ARCHES[target]
    made, tile = _launch(variant, arch)
    compiled = _compile(made, TARGETS[target])
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    mma = next((kind for instruction, kind in _MMA.items() if instruction in text), "none")
    registers, stack, spills = _usage(compiled)
    return Row(
        target, str(variant), tile, registers, stack, spills, compiled.metadata.shared, arch.shared_memory, mma,
        "cp.async.bulk.tensor" in text, re.search(r"^\s*trap;", text, re.M) is not None,
    )  # fmt: skip
