"""What the compiler makes of every kernel, for chips that are not here: registers, stack, shared memory, MMA kind.

Each row compiles the launch that the backend would start (``launch`` on meta tensors), with the tile that it would
choose, through ``triton.compile`` and a ``GPUTarget``; no GPU, no driver. ``key`` says, without compiling, whether that
would make another binary than the record's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from binaries.variants import Variant, variants
from peftkern.backends.triton import launch, select
from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.tiles import LIBRARY, SPLIT, Choice, bank_grad_tile, grad_tile, shrink_tile
from peftkern.call import Base, Call, Pair, Rows, Span, Update
from peftkern.weights import DenseWeight, FrozenWeight, split_format

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PINNED = "3.9.0"  # the Triton of this tree's environment
RECORDED = {PINNED: tuple(TARGETS), "3.6.0": ("sm_90",)}  # the chips on record, by version: Hopper machines have 3.6
_MMA = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync", "v_mfma": "mfma"}
_FP8 = re.compile(r"\.e4m3\.e4m3\b|kind::f8f6f4")  # of the matrix instructions' types
_REGISTERS = 65536  # of one unit
_SERIALISED = re.compile(r"\bC75(10|11|14)\b")  # ptxas: "wgmma.mma_async instructions are serialized due to ..."
_LARGE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}  # 64 rows and more
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant compiled to, and from (``key``). ``stack`` and ``spills`` in bytes (AMD: scratch, registers);
    ``serialised``: ptxas lets no two wgmma be in flight.
    """

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
    serialised: bool
    key: str


def _launch(variant: Variant, arch: Arch) -> tuple[launch.Launch, str]:
    """The launch the backend would start for a variant, on meta tensors, and its tile."""
    v = variant

    def empty(*shape: int, dtype: torch.dtype = v.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight: FrozenWeight = DenseWeight(empty(v.N, v.K))
    if v.weight_format != "dense":
        stored, compute = split_format(v.weight_format)
        weight = FrozenWeight.quantize(empty(v.N, v.K), stored, base_compute=compute, **dict(v.options))
    A, B = empty(v.R, v.K, dtype=v.adapter_dtype), empty(v.N, v.R, dtype=v.adapter_dtype)
    bias, lora_bias = (empty(v.N), empty(v.N, dtype=v.adapter_dtype)) if v.bias else (None, None)
    rng_state = empty(2, dtype=torch.int64) if v.dropout else None
    operands = Pair(weight, A, B, bias, lora_bias, 2.0, None, 0.05 if v.dropout else 0.0, rng_state, v.precision)
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
    if v.body == "kept":
        made = launch.kept(X, empty(v.M, Q), operands.dropout_p, empty(2, dtype=torch.int64))
        return made, "{BLOCK_M}x{BLOCK_COLS}".format(**made.arguments)
    rows: torch.Tensor | launch.Codes = X
    if weight.base_compute is not None:
        made, rows = launch.quantise(weight, X, v.backward)
        if v.body == "quantise":
            return made, "{BLOCK_M}x{BLOCK_Q}".format(**made.arguments)
    if v.body in ("bank", "bank_grad"):
        p, rows_of_all = operands.dropout_p, Rows(empty(2 * v.M, dtype=torch.int64), empty(2 * v.M, dtype=torch.bool))
        updates = tuple(Update(A, B, None, None, None, 2.0, p, 0, Span(e * v.M, v.M, 0, 0)) for e in range(2))
        bank = Call((Base(DenseWeight(empty(v.N, v.K)), bias),), updates, v.precision, "", rows_of_all)
        T = empty(bank.thin_size, dtype=torch.float32)
        if v.body == "bank_grad":
            made, *_ = launch.bank_grad(bank, empty(v.M, v.K), T, empty(v.M, v.N), T, range(2), arch)
            return made, str(bank_grad_tile(v.dtype, R, arch))
        tile = select.choose(v.launch, arch).tile
        return launch.bank(bank, X, T, empty(v.M, P), tile, arch, v.backward), str(tile)
    if v.body == "onto":
        choice = select.accumulating(v.launch, arch)
        return launch.fused(direction, X, T, empty(v.M, P), choice, arch, onto=True), str(choice.tile)
    choice = Choice(v.body, v.tile) if v.tile else select.choose(v.launch, arch)
    dependent = choice.schedule == SPLIT and arch.dependent_launch
    return launch.fused(direction, rows, T, empty(v.M, P), choice, arch, dependent), str(choice.tile)


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


def _source(made: launch.Launch) -> ASTSource:
    source: dict[str, Any] = {"signature": {}, "constexprs": {}, "attrs": {}}
    for i, parameter in enumerate(made.kernel.params):
        value = made.arguments[parameter.name]
        if parameter.is_constexpr:
            source["constexprs"][(i,)] = value
            source["signature"][parameter.name] = "constexpr"
        else:
            source["signature"][parameter.name] = _describe(value, (i,), not parameter.do_not_specialize, source)
    return ASTSource(made.kernel, **source)


def _compile(made: launch.Launch, target: GPUTarget) -> Any:
    return triton.compile(_source(made), target=target, options=made.options)


def _key(made: launch.Launch, target: GPUTarget) -> str:
    text = f"{_source(made).hash()} {target} {sorted(made.options.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(variant: Variant, target: str) -> tuple[str, str]:
    """Its tile, and a digest of all that one compiler makes a binary from; nothing is compiled.

    Triton's cache goes by the same: the text of the body, of its plugs and of what they call, the constants that these
    read, the types and alignments of the arguments, the options. Not: files' names and line ends, the launch's code.
    """
    made, tile = _launch(variant, ARCHES[target])
    return tile, _key(made, TARGETS[target])


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


def _serialised(text: str) -> bool:
    """Whether ptxas, asked again, says so: Triton keeps what it says of a kernel that it assembles to itself."""
    if "wgmma.mma_async" not in text:
        return False
    from triton.backends.nvidia import compiler

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [compiler.get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        command += ["--regAllocOptLevel=2"] if "regAllocOptLevel" in Path(compiler.__file__).read_text() else []
        said = subprocess.run(command, check=True, capture_output=True, text=True)
    return _SERIALISED.search(said.stdout + said.stderr) is not None


def inspect(variant: Variant, target: str) -> Row:
    """Compile one variant for one target. Raises: whatever the compiler raises."""
    arch = ARCHES[target]
    made, tile = _launch(variant, arch)
    compiled = _compile(made, TARGETS[target])
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    mma = next((kind for instruction, kind in _MMA.items() if instruction in text), "none")
    mma += " fp8" if _FP8.search(text) else ""
    registers, stack, spills = _usage(compiled)
    return Row(
        target, str(variant), tile, registers, stack, spills, compiled.metadata.shared, arch.shared_memory, mma,
        "cp.async.bulk.tensor" in text, re.search(r"^\s*trap;", text, re.M) is not None, _serialised(text),
        _key(made, TARGETS[target]),
    )  # fmt: skip


def failure(row: Row, variant: Variant) -> str | None:
    """Why a binary may not be shipped, or None."""
    if (row.stack, row.spills) != (0, 0):
        return f"{row.stack} bytes of stack, {row.spills} bytes spilled"
    if row.traps:
        return "the compiler gave up and left a trap"
    if row.shared_memory > row.shared_memory_limit:
        return f"{row.shared_memory} bytes of shared memory, {row.shared_memory_limit} there are"
    tile, narrow = variant.tile, variant.dtype != torch.float32
    if tile and tile.resident > 1:
        threads = 32 * tile.num_warps * tile.resident
        if row.shared_memory * tile.resident > row.shared_memory_limit or row.registers * threads > _REGISTERS:
            return f"{tile.resident} programs do not fit on one unit"
    if narrow and row.mma == "none" and variant.body not in ("kept", "quantise"):
        return "no matrix instruction"
    if row.serialised:
        return "no two wgmma are in flight: ptxas says C7510, C7511 or C7514"
    large = _LARGE[row.target] + (" fp8" if variant.launch.problem.base_compute is not None else "")
    if tile and narrow and tile.BLOCK_M >= 64 and row.mma != large:
        return f"{row.mma} where {large} was expected"
    if tile and tile.tma and not row.tma and variant.body != LIBRARY:
        return "no bulk copies"
    return None


def rows() -> Iterator[tuple[Row, str | None]]:
    """Every variant on every target of this Triton's record, and why it may not be shipped."""
    for target in RECORDED.get(triton.__version__, tuple(TARGETS)):
        for variant in dict.fromkeys(variants(ARCHES[target])):
            row = inspect(variant, target)
            yield row, failure(row, variant)


def record_of(version: str) -> Path:
    """Where the record is kept of what this version of Triton compiles."""
    return Path(__file__).parent / f"triton-{version}.json"


def digest(keys: Iterable[str]) -> str:
    """One for all keys."""
    return hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()[:16]


def as_json(found: list[Row]) -> str:
    """The record that tests/test_triton_compile.py compares: Triton's version, and one row a line.

    Another Triton has other keys for the same tree: its record has the digest of the pinned one's, beside which it was
    made.
    """
    pinned = json.loads(record_of(PINNED).read_text())
    keys = [row.key for row in found] if triton.__version__ == PINNED else [row[-1] for row in pinned["rows"]]
    lines = [f"  {json.dumps(list(dataclasses.astuple(row)))}" for row in found]
    names = json.dumps([field.name for field in dataclasses.fields(Row)])
    version = json.dumps(triton.__version__)
    head = f' "triton": {version},\n "beside": "{digest(keys)}",\n "columns": {names},\n'
    return "{\n" + head + ' "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def kernels_table(json_wanted: bool) -> str:
    """The rows as a table for people, or as JSON. Raises: ValueError naming every binary that may not be shipped."""
    found, failures = [], []
    for row, reason in rows():
        found.append(row)
        if reason is not None:
            failures.append(f"{row.target} {row.variant}, {row.tile}: {reason}")
    if failures:
        raise ValueError("\n".join(failures))
    if json_wanted:
        return as_json(found).rstrip()
    header = [field.name for field in dataclasses.fields(Row) if field.name != "key"]
    lines = [header, *([str(getattr(row, name)) for name in header] for row in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
