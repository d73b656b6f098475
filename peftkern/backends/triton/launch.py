"""From operands to launches: strides, plugs, grids. The only importer of the kernel bodies.

A builder returns a ``Launch`` with the arguments exactly as Triton gets them; ``run`` starts it, and
``inspect_kernels`` compiles the same object for chips that are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern import dropout
from peftkern.backends.triton import tiles
from peftkern.backends.triton.kernels import adapter, epilogue, weight_load
from peftkern.backends.triton.kernels import dropout as drop
from peftkern.backends.triton.kernels.fused import fused as fused_body
from peftkern.backends.triton.kernels.grad import grad as grad_body
from peftkern.backends.triton.kernels.grad import reduce as reduce_body
from peftkern.backends.triton.kernels.shrink import shrink as shrink_body
from peftkern.backends.triton.select import Choice
from peftkern.backends.triton.tiles import Arch
from peftkern.ops.problem import LoRAOperands

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LOADERS = {"dense": weight_load.dense, "int8": weight_load.int8}
_PARTIAL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the body, its grid, its arguments by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Start it on the current device and stream."""
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class Direction:
    """Forward or backward of one call: the operands by the names that the shared body gives them."""

    operands: LoRAOperands
    backward: bool
    dtype: torch.dtype

    @property
    def first(self) -> tuple[Tensor, int, int]:
        """F [R, Q] and its strides along r and q."""
        A, B = self.operands.lora_A, self.operands.lora_B
        return (B, B.stride(1), B.stride(0)) if self.backward else (A, A.stride(0), A.stride(1))

    @property
    def second(self) -> tuple[Tensor, int, int]:
        """G [P, R] and its strides along p and r."""
        A, B = self.operands.lora_A, self.operands.lora_B
        return (A, A.stride(1), A.stride(0)) if self.backward else (B, B.stride(0), B.stride(1))

    @property
    def extents(self) -> tuple[int, int, int]:
        """P, Q, R."""
        N, K = self.operands.weight.shape
        P, Q = (K, N) if self.backward else (N, K)
        return P, Q, self.operands.lora_A.shape[0]

    def weight(self) -> tuple[Any, ...]:
        """LOAD_W's operands."""
        weight = self.operands.weight
        along_n, along_k = weight.data.stride()
        strides = (along_n, along_k) if self.backward else (along_k, along_n)
        scale = () if weight.scale is None else (weight.scale, weight.scale.stride(0))
        return (weight.data, *strides, *scale)


def loads(weight_format: str) -> bool:
    """Whether there is a loader for a weight format."""
    return weight_format in _LOADERS


def _numerics(operands: LoRAOperands, dtype: torch.dtype, of_sums: bool = False) -> dict[str, Any]:
    """The ADAPTER plug and the dtypes of the products."""
    backends = torch.backends.cuda.matmul
    allowed = backends.fp32_precision == "tf32" if hasattr(backends, "fp32_precision") else backends.allow_tf32
    plug = adapter.rounded_sums if of_sums else adapter.rounded
    return {
        "ADAPTER": adapter.split if operands.precision == "fp32" and dtype != torch.float32 else plug,
        "DTYPE": _DTYPES[dtype],
        "PRECISION": "tf32" if allowed and dtype == torch.float32 else "ieee",
    }


def _dropout(operands: LoRAOperands, active: bool) -> dict[str, Any]:
    """The DROP plug and its operands."""
    if operands.rng_state is None or not active:
        return {"DROP": drop.keep_all, "drop_operands": ()}
    return {
        "DROP": drop.philox,
        "drop_operands": (operands.rng_state.contiguous(), dropout.threshold(operands.dropout_p)),
    }


def _dropout_scale(operands: LoRAOperands) -> float:
    return 1.0 if operands.rng_state is None else dropout.scale(operands.dropout_p)


def _epilogue(operands: LoRAOperands, backward: bool) -> dict[str, Any]:
    """The EPILOGUE plug and its operands."""
    vectors = (operands.bias, operands.lora_bias)
    if backward or vectors == (None, None):
        return {"EPILOGUE": epilogue.nothing, "column_operands": ()}
    fields = [field for v in vectors for field in ((None, None) if v is None else (v, v.stride(0)))]
    return {"EPILOGUE": epilogue.columns, "column_operands": tuple(fields)}


def fused(direction: Direction, X: Tensor, T: Tensor, Z: Tensor, choice: Choice) -> Launch:
    """Z, and T too unless the choice is split (then T holds what ``shrink`` wrote)."""
    operands, backward, tile = direction.operands, direction.backward, choice.tile
    F, stride_fr, stride_fq = direction.first
    G, stride_gp, stride_gr = direction.second
    P, Q, R = direction.extents
    M = X.shape[0]
    scale = _dropout_scale(operands)
    arguments = {
        "X": X, "stride_xm": X.stride(0), "stride_xq": X.stride(1), "Z": Z, "T": T,
        "F": F, "stride_fr": stride_fr, "stride_fq": stride_fq,
        "G": G, "stride_gp": stride_gp, "stride_gr": stride_gr,
        "w_operands": direction.weight(), "LOAD_W": _LOADERS[operands.weight.format],
        "t_scale": 1.0 if backward else scale,
        "scaling": operands.scaling * (scale if backward else 1.0), "scaling_tensor": operands.scaling_tensor,
        "M": M, "P": P, "Q": Q, "R": R,
        **_dropout(operands, active=choice.one_pass or backward), **_epilogue(operands, backward),
        **_numerics(operands, direction.dtype),
        "T_READY": not choice.one_pass, "BACKWARD": backward,
        "MASK_OUT": backward and operands.rng_state is not None,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q,
        "BLOCK_R": tiles.fused_rank_block(choice.launch), "GROUP_M": tile.GROUP_M,
    }  # fmt: skip
    grid = (triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(P, tile.BLOCK_P),)
    return Launch(fused_body, grid, arguments, tile.num_warps, tile.num_stages)


def shrink(direction: Direction, X: Tensor, T: Tensor, arch: Arch) -> Launch:
    """T = D(X) F^T."""
    operands, backward = direction.operands, direction.backward
    F, stride_fr, stride_fq = direction.first
    _, Q, R = direction.extents
    tile = tiles.shrink_tile(direction.dtype, arch)
    arguments = {
        "X": X, "stride_xm": X.stride(0), "stride_xq": X.stride(1), "T": T,
        "F": F, "stride_fr": stride_fr, "stride_fq": stride_fq,
        "t_scale": 1.0 if backward else _dropout_scale(operands), "M": X.shape[0], "Q": Q, "R": R,
        **_dropout(operands, active=not backward), **_numerics(operands, direction.dtype),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_Q": tile.BLOCK_Q, "BLOCK_R": tiles.rank_block(R),
    }  # fmt: skip
    grid = (triton.cdiv(X.shape[0], tile.BLOCK_M), triton.cdiv(R, tiles.rank_block(R)))
    return Launch(shrink_body, grid, arguments, tile.num_warps, tile.num_stages)


def grad(
    operands: LoRAOperands, wide: Tensor, thin: Tensor | None, sums: bool, masked: bool, arch: Arch
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """Stage one: D(wide)^T thin and the column sums of wide, as partials [runs, C, R] and [runs, C]."""
    M, C = wide.shape
    R = 1 if thin is None else thin.shape[1]
    tile = tiles.grad_tile(wide.dtype, R, arch)
    BLOCK_R = tiles.rank_block(R)
    columns, chunks = triton.cdiv(C, tile.BLOCK_P), triton.cdiv(R, BLOCK_R)
    wanted = max(1, 2 * arch.units // (columns * chunks))
    runs = min(wanted, triton.cdiv(M, 2 * tile.BLOCK_M), max(1, _PARTIAL_BYTES // (4 * C * R)))
    rows = triton.cdiv(triton.cdiv(M, runs), tile.BLOCK_M) * tile.BLOCK_M
    runs = triton.cdiv(M, rows)
    partial = None if thin is None else wide.new_empty(runs, C, R, dtype=torch.float32)
    total = wide.new_empty(runs, C, 1, dtype=torch.float32) if sums else None
    arguments = {
        "WIDE": wide, "stride_wm": wide.stride(0), "stride_wc": wide.stride(1), "THIN": thin,
        "PARTIAL": partial, "SUMS": total, "M": M, "C": C, "R": R, "rows": rows,
        **_dropout(operands, active=masked), **_numerics(operands, wide.dtype, of_sums=True),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_C": tile.BLOCK_P, "BLOCK_R": BLOCK_R,
    }  # fmt: skip
    return Launch(grad_body, (columns, chunks, runs), arguments, tile.num_warps, tile.num_stages), partial, total


def reduce(partial: Tensor, out: Tensor, scaling: float, scaling_tensor: Tensor | None) -> Launch:
    """Stage two: out [C, R] (any strides) = scaling · sum of the partials, in out's dtype."""
    runs, C, R = partial.shape
    BLOCK_R = min(triton.next_power_of_2(R), 64)
    BLOCK_C = max(16, 2048 // BLOCK_R)
    arguments = {
        "PARTIAL": partial, "OUT": out, "stride_oc": out.stride(0), "stride_or": out.stride(1),
        "scaling": scaling, "scaling_tensor": scaling_tensor, "runs": runs, "C": C, "R": R,
        "BLOCK_C": BLOCK_C, "BLOCK_R": BLOCK_R,
    }  # fmt: skip
    return Launch(reduce_body, (triton.cdiv(C, BLOCK_C), triton.cdiv(R, BLOCK_R)), arguments, 4, 2)


def adapter_scale(operands: LoRAOperands) -> float:
    """What multiplies t^T D(x) besides the scaling tensor: c and D's scale."""
    return operands.scaling * _dropout_scale(operands)
