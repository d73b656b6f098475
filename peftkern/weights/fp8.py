"""``fp8``: e4m3 (no infinities, largest 448) with fp32 scales: one, one a row, or one for every 128 x 128 block.

W[n, k] = data[n, k] * scale[...],   scale = max |W| / 448 over what shares it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight
from peftkern.weights.saved import dtype_name, require, require_finite

_LARGEST = 448.0
_SMALLEST = -117  # the exponent with which e4m3's smallest, 2^-9, is fp32's and bf16's smallest that is not subnormal
BLOCK = 128
_SAVED_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # of checkpoints: each is a number of fp32


class FP8Weight(FrozenWeight):
    """``data`` float8_e4m3fn [N, K], ``scale`` fp32 [1], [N] or (group_size 128) [ceil(N / 128), ceil(K / 128)]."""

    format = "fp8"
    parts = ("scale",)
    spellings = (("", "_scale_inv"),)  # DeepSeek's and Qwen's

    def check_layout(self, name: str) -> None:
        N, K = self.shape
        require(name, self.data, torch.float8_e4m3fn, (N, K), self.data.device)
        if self.group_size not in (0, BLOCK):
            raise ValueError(f"{name}: group_size is 0 or {BLOCK}, not {self.group_size}")
        shape: tuple[int, ...] = (-(-N // BLOCK), -(-K // BLOCK)) if self.group_size else (N,)
        if not self.group_size and self.scale is not None and self.scale.shape == (1,):
            shape = (1,)
        require(f"{name}.scale", self.scale, torch.float32, shape, self.data.device)

    def materialize(self, dtype: torch.dtype) -> Tensor:
        assert self.scale is not None  # validate() has seen to it
        return (self.data.float() * _spread(self.scale, self.group_size, self.shape)).to(dtype)

    @classmethod
    def pack(cls, tensor: Tensor, scaling: str = "row") -> FP8Weight:
        wide, shape = tensor.float(), (tensor.shape[0], tensor.shape[1])
        size, group_size = wide.abs(), 0
        if scaling == "tensor":
            largest = size.amax().reshape(1)
        elif scaling == "row":
            largest = size.amax(dim=1)
        elif scaling == "block":
            padded = torch.nn.functional.pad(size, (0, -shape[1] % BLOCK, 0, -shape[0] % BLOCK))
            largest = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).amax(dim=(1, 3))
            group_size = BLOCK
        else:
            raise ValueError(f"scaling={scaling!r} is not one of 'tensor', 'row', 'block'")
        scale = largest / _LARGEST
        divisor = _spread(torch.where(scale > 0, scale, 1.0), group_size, shape)
        return cls((wide / divisor).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale, group_size)

    @classmethod
    def from_checkpoint(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> FrozenWeight:
        """The weight of DeepSeek's and Qwen's checkpoints, and of transformers' ``FP8Linear``.

        Its scales multiply, whatever their name says. Raises: ValueError naming the key that holds what it should not.
        """
        data, scale = tensors
        if data.ndim != 2:
            raise ValueError(f"{keys[0]} is float8_e4m3fn [N, K] of one weight, got {list(data.shape)}")
        N, K = data.shape
        require(keys[0], data, torch.float8_e4m3fn, (N, K), data.device)
        if scale.dtype not in _SAVED_SCALES:
            known = ", ".join(map(dtype_name, _SAVED_SCALES))
            raise ValueError(f"{keys[1]} is of one of {known}, not {dtype_name(scale.dtype)}")
        single = scale.ndim < 2 and scale.numel() == 1
        shape = tuple(scale.shape) if single else (-(-N // BLOCK), -(-K // BLOCK))
        wide = require(keys[1], scale, scale.dtype, shape, data.device).float()
        if not scale.is_meta:
            require_finite(keys[1], wide)
        return cls(data, wide.view(1) if single else wide, 0 if single else BLOCK, dtype=torch.bfloat16)


class FP8ComputedWeight(FP8Weight):
    """An fp8 weight of ``base_compute="fp8"``: whatever is multiplied with it is rounded to e4m3 first, row by row.

    Formula, with W = diag(r) V, r the scales where there is one for each of several rows, else 1:
        y = Q(x) W^T,   dx = Q(dy r) V,   Q(v)[i, :] = 2^k e4m3(v[i, :] / 2^k),
        2^k the smallest power of two, from 2^-117 on, with max |v[i, :]| <= 448 * 2^k

    The low-rank pair, the biases and every parameter's gradient are those of x and dy as they are. dy r is rounded to
    fp32. Q(x) is a bf16 and an fp32 number, so the result does not depend on who multiplies: FP8 tensor cores get the
    codes and apply scales to sums, everybody else multiplies the rounded numbers. A row that holds a NaN or an infinity
    is NaN in y; zeros stay zeros, and what is under 2^-127 becomes 0.

    Numerics: beside the products of the plain fp8 weight, y and dx have relative errors of 2.65 % where x and dy are
        normal (e4m3 has four bits), for every scaling of the weight; the weight's own error is as large. Through the 30
        layers of SmolLM2-135M the adapters' gradients are 28 % away from the plain fp8 weight's, which are 27 % away
        from the dense weight's; of that 26 % are x's rounding and 7.5 % dy's. Under torch.func, forward-mode AD,
        torch.export and tracing, dx is that of dy as it is.
    On GPUs: Triton on compute capability 9.0 and 10.0, x in a 16-bit dtype (Hopper adds e4m3 products in few bits, and
        these are added up in fp32 every step); a launch before reads x twice, the second time from the cache, and
        writes codes, M K bytes. From 64 rows on the products are FP8 matrix instructions. No GPU has run it yet.
    Elsewhere: the products of the plain fp8 weight, of rounded rows; what is to be had there is the same result.
    Deterministic: rounding is to nearest, ties to even.
    """

    format = "fp8xfp8"
    marker = FP8Weight.marker
    base_compute = "fp8"

    def factors(self, rows: Tensor, backward: bool) -> tuple[Tensor, FrozenWeight]:
        """Rows in their own dtype, those of fp16 in fp32, which has the range."""
        wide, (r, met) = rows.to(torch.promote_types(rows.dtype, torch.float32)), self.split(backward)
        wide = wide if r is None else wide * r
        return rounded(wide).to(torch.float32 if rows.dtype == torch.float16 else rows.dtype), met

    def split(self, backward: bool) -> tuple[Tensor | None, FP8Weight]:
        """r where rows are to be multiplied by it, and the weight that they then meet: W forward, V backward."""
        assert self.scale is not None
        r = self.scale if backward and not self.group_size and len(self.scale) > 1 else None
        scale = self.scale if r is None else torch.ones_like(r[:1])
        return r, cast(FP8Weight, self.from_operands(FP8Weight.format, self.data, scale, self.group_size))


def rounded(rows: Tensor) -> Tensor:
    """Q(rows [M, C]) in their dtype, fp32 or fp64."""
    largest = rows.abs().amax(1, keepdim=True)
    part, exponent = torch.frexp(largest)  # largest = part 2^exponent, 0.5 <= part < 1; 448 = 0.875 * 2^9
    exponent = (exponent - 9 + (part > 0.875)).clamp(min=_SMALLEST)
    one = torch.ones_like(largest)
    scale = torch.where(largest < torch.inf, torch.ldexp(one, exponent), torch.nan)
    return (rows * torch.ldexp(one, -exponent)).to(torch.float8_e4m3fn).to(rows.dtype) * scale


def _spread(scale: Tensor, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The scales as what broadcasts over [N, K]."""
    if not group_size:
        return scale.unsqueeze(1)
    return scale.repeat_interleave(group_size, 0)[: shape[0]].repeat_interleave(group_size, 1)[:, : shape[1]]
