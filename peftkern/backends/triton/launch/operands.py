"""What every builder needs: the launch record, one direction's operands, and the plugs that they select."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern import dropout
from peftkern.backends.triton.kernels import adapter, epilogue, weight_load
from peftkern.backends.triton.kernels import dropout as drop
from peftkern.backends.triton.tiles import COUNTERS, FAR, TileConfig
from peftkern.call import Pair
from peftkern.weights import FrozenWeight

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
UNMASKED: dict[str, Any] = {"DROP": drop.keep_all, "drop_operands": ()}
_FORMATS = ("dense", "int8", "int4", "nf4", "fp4", "mxfp4", "nvfp4", "fp8", "fp8xfp8")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the body, its grid, its arguments by name, and the compiler's options.

    ``reads`` and ``writes`` are the tensors that it passes over, each once; ``flops`` what it multiplies and adds.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    flops: int
    dependent: bool = False  # it may begin before the launch ahead of it ends
    maxnreg: int | None = None  # registers a thread may have, where ptxas would take fewer and spill

    @property
    def name(self) -> str:
        """The body's."""
        return self.kernel.__name__

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's and the launcher's."""
        found: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        found |= {"launch_pdl": True} if self.dependent else {}
        return found | ({} if self.maxnreg is None else {"maxnreg": self.maxnreg})

    def run(self) -> Any:
        """Start it on the current device and stream. Returns: Triton's compiled kernel; None by the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True)
class VendorProduct:
    """Z += X op(W) by the vendor's GEMM, which reads Z in its epilogue."""

    left: Tensor
    right: Tensor
    out: Tensor
    name: ClassVar[str] = "vendor"

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """Both factors, and what their product is added to."""
        return self.left, self.right, self.out

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """The sum."""
        return (self.out,)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.left.shape[0] * self.left.shape[1] * self.right.shape[1]

    def run(self) -> None:
        """Start it on the current device and stream."""
        self.out.addmm_(self.left, self.right)


@dataclass(frozen=True)
class Direction:
    """Forward or backward of one call: the operands by the names that the shared body gives them."""

    operands: Pair
    backward: bool
    dtype: torch.dtype

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        return near(self.operands.lora_A), near(self.operands.lora_B)

    @property
    def first(self) -> tuple[Tensor, tuple[int, int]]:
        """F^T [Q, R]: the tensor, and its strides along q and r."""
        A, B = self._factors
        return (B, (B.stride(0), B.stride(1))) if self.backward else (A, (A.stride(1), A.stride(0)))

    @property
    def second(self) -> tuple[Tensor, tuple[int, int]]:
        """G^T [R, P]: the tensor, and its strides along r and p."""
        A, B = self._factors
        return (A, (A.stride(0), A.stride(1))) if self.backward else (B, (B.stride(1), B.stride(0)))

    @property
    def extents(self) -> tuple[int, int, int]:
        """P, Q, R."""
        N, K = self.operands.weight.shape
        P, Q = (K, N) if self.backward else (N, K)
        return P, Q, self.operands.lora_A.shape[0]

    @property
    def masks_in(self) -> bool:
        """Whether dropout falls on X."""
        return self.operands.rng_state is not None and not self.backward

    @property
    def masks_out(self) -> bool:
        """Whether dropout falls on the low-rank product."""
        return self.operands.rng_state is not None and self.backward

    @property
    def dropout_scale(self) -> float:
        """What dropout multiplies the kept by."""
        return 1.0 if self.operands.rng_state is None else dropout.scale(self.operands.dropout_p)


def weight_loader(weight: FrozenWeight, backward: bool, tile: TileConfig) -> dict[str, Any]:
    """LOAD_W, W and LOAD_W's operands."""
    if weight.format != "dense":
        return quantised(weight, backward)
    W: Any = near(weight.data)
    along_n, along_k = W.stride()
    strides: tuple[Any, ...] = (along_n, along_k) if backward else (along_k, along_n)
    if tile.tma and describable(W):
        block = [tile.BLOCK_Q, tile.BLOCK_P] if backward else [tile.BLOCK_P, tile.BLOCK_Q]
        W, strides = TensorDescriptor.from_tensor(W, block), ()
    return {"LOAD_W": weight_load.dense, "W": W, "w_operands": strides}


def near(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its elements lie too far apart for one tile's offsets."""
    return tensor if max(tensor.stride(), default=0) < FAR else tensor.contiguous()


def gathered(matrix: Tensor) -> Tensor:
    """``near`` where a kernel looks rows up: there, a column's offset in its row has 32 bits, too."""
    matrix = near(matrix)
    return matrix if matrix.stride(1) * matrix.shape[1] < 2**31 else matrix.contiguous()


def describable(matrix: Tensor) -> bool:
    """Whether a TMA descriptor can describe a matrix: rows of adjacent elements, 16-byte aligned, none in another."""
    size = matrix.dtype.itemsize
    address = 0 if matrix.is_meta else matrix.data_ptr()
    aligned = address % 16 == 0 and matrix.stride(0) * size % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
    return matrix.stride(1) == 1 and aligned and matrix.numel() > 0 and max(matrix.shape) < 2**31


def matrix(name: str, tensor: Tensor, block: tuple[int, int], tma: bool) -> dict[str, Any]:
    """The argument ``name`` and its strides: a descriptor with the strides (), or a pointer."""
    strides = f"{name.lower()}_strides"
    if tma and describable(tensor):
        return {name: TensorDescriptor.from_tensor(tensor, list(block)), strides: ()}
    return {name: tensor, strides: (tensor.stride(0), tensor.stride(1))}


def loads(weight_format: str) -> bool:
    """Whether there is a loader for a weight format."""
    return weight_format in _FORMATS


def quantised(weight: FrozenWeight, backward: bool) -> dict[str, Any]:
    """LOAD_W, W and LOAD_W's operands for a weight that is decoded in registers."""
    W, scale = near(weight.data), weight.scale
    assert scale is not None
    K, group = weight.shape[1], weight.group_size
    shift = max(0, group.bit_length() - 1)
    wide = None if group % 64 or (weight.format != "int8" and K % 64) else 1
    along_n, along_k = W.stride() if W.ndim == 2 else (0, 1)
    if weight.format in ("nf4", "fp4"):
        nested = weight.tables[1:] or (None, None, None)
        plug, row = (weight_load.four_bit_any, K) if K % 16 else (weight_load.four_bit, K // 16)
        fields: tuple[Any, ...] = (row, shift, scale, weight.tables[0], *nested, wide)
    elif weight.format == "int4":
        plug = weight_load.int4
        fields = (along_n, W.shape[1], scale, weight.tables[0], scale.stride(0), shift, wide)
    elif weight.format in ("mxfp4", "nvfp4"):
        plug = weight_load.mxfp4 if weight.format == "mxfp4" else weight_load.nvfp4
        scale = scale.view(torch.uint8)
        fields = (along_n, W.shape[1], scale, scale.stride(0), None if K % 2 else 1, *weight.tables)
    elif weight.format == "fp8":
        W, plug = W.view(torch.uint8), weight_load.fp8
        by_row = int(scale.ndim == 1 and len(scale) > 1)
        strides = scale.stride() if scale.ndim == 2 else (by_row, 0)
        fields = (along_n, along_k, scale, *strides, shift)
    elif group:
        plug, fields = weight_load.int8_groups, (along_n, along_k, scale, *scale.stride(), shift, wide)
    else:
        along = (along_n, along_k) if backward else (along_k, along_n)
        plug, fields = weight_load.int8, (*along, scale, scale.stride(0))
    return {"LOAD_W": plug, "W": W, "w_operands": fields}


def numerics(precision: str, dtype: torch.dtype) -> dict[str, Any]:
    """The ADAPTER plug and the dtypes of the products."""
    return {
        "ADAPTER": adapter.split if precision == "fp32" and dtype != torch.float32 else adapter.rounded,
        "DTYPE": _DTYPES[dtype],
        "PRECISION": "tf32" if dtype == torch.float32 and tf32() else "ieee",
    }


def tf32() -> bool:
    """Whether torch's own switch allows TF32 in products of fp32."""
    backends = torch.backends.cuda.matmul
    return backends.fp32_precision == "tf32" if hasattr(backends, "fp32_precision") else backends.allow_tf32


def masking(operands: Pair, active: bool) -> dict[str, Any]:
    """The DROP plug and its operands."""
    if operands.rng_state is None or not active:
        return dict(UNMASKED)
    return {
        "DROP": drop.philox,
        "drop_operands": (operands.rng_state.contiguous(), dropout.threshold(operands.dropout_p)),
    }


def columns(bias: Tensor | None, lora_bias: Tensor | None, backward: bool) -> dict[str, Any]:
    """The EPILOGUE plug and its operands."""
    vectors = (bias, lora_bias)
    if backward or vectors == (None, None):
        return {"EPILOGUE": epilogue.nothing, "column_operands": ()}
    fields = [field for v in vectors for field in ((None, None) if v is None else (v, v.stride(0)))]
    return {"EPILOGUE": epilogue.columns, "column_operands": tuple(fields)}


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple(tensor for tensor in tensors if tensor is not None)


_SLAB = 2**20  # counters of captured launches on one device, 4 MB: a graph of a thousand launches takes a tenth


class _Counters:
    """The zeroed counters of one device: one set a stream, and a slab of which captured launches get their own."""

    def __init__(self) -> None:
        self.of_stream: dict[int, Tensor] = {}
        self.slab: Tensor | None = None
        self.taken = 0

    def take(self, count: int) -> Tensor | None:
        """Some of the slab, for good: a graph may run at any time, beside whatever else there is."""
        if self.slab is None or self.taken + count > _SLAB:
            return None
        self.taken += count
        return self.slab[self.taken - count : self.taken]


_counters: dict[torch.device, _Counters] = {}


def counters(like: Tensor, blocks: int = COUNTERS - 2) -> Tensor:
    """Zeroed int32 counters of a launch of so many blocks; the kernels leave them zero, so a stream's are made once.

    A captured launch gets its own, of a slab that the device's first launch outside of captures makes; without one, or
    where it is used up, their clearing is captured with the launch.
    """
    device, count = like.device, blocks + 2
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    held = _counters.setdefault(device, _Counters())
    if torch.cuda.is_current_stream_capturing():
        found = held.take(count)
        return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found
    stream = torch.cuda.current_stream(device)
    found = held.of_stream.get(stream.cuda_stream)
    if found is None:
        # From a thread of its own: a pool that the caller's thread allocates from, such as a compiler's for its graphs,
        # may take its memory back.
        with ThreadPoolExecutor(1) as thread:
            sizes = (COUNTERS,) if held.slab is not None else (COUNTERS, _SLAB)
            made, ready = thread.submit(_cleared, device, sizes).result()
        stream.wait_event(ready)
        found = held.of_stream[stream.cuda_stream] = made[0]
        if held.slab is None:
            held.slab = made[1]
    return found


def _cleared(device: torch.device, sizes: tuple[int, ...]) -> tuple[list[Tensor], torch.cuda.Event]:
    with torch.cuda.device(device):
        found = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]
        ready = torch.cuda.Event()
        ready.record()
    return found, ready
