"""``nf4`` and ``fp4``: blocks of a flattened weight with 16 values each, bit for bit as bitsandbytes stores them.

With i = n·K + k the element's place in the row-major weight, b = i // blocksize its block:

    W[n, k] = code[q[i]] * absmax[b],   q[2j] = data[j] >> 4,   q[2j+1] = data[j] & 15
    absmax[b] = nested_code[scale[b]] * nested_absmax[b // 256] + offset      (double quantisation)

Blocks may begin in one row and end in the next. Products and sums are fp32, one rounding each.
bitsandbytes' own AVX-512 decoder (0.50.2) is wrong where K is no multiple of the blocksize; this one is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight
from peftkern.weights.groups import pack_nibbles
from peftkern.weights.saved import Saved, dtype_name, pack_facts, require, require_finite, require_group

# The quantiles of a normal distribution (Dettmers et al., QLoRA, 2023).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One sign, two exponent bits, one of mantissa, divided by the largest.
_FP4_SIZES = tuple(size / 12 for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4_CODE = (*_FP4_SIZES, *(-size for size in _FP4_SIZES))
NESTED_BLOCK = 256
_CHUNK = 2**18  # elements that are decoded at a time on a CPU: what stays in its caches


class FourBitWeight(FrozenWeight):
    """``data`` uint8 [ceil(N·K / 2)], ``scale`` fp32 (nested: uint8) [ceil(N·K / blocksize)], ``group_size`` the
    blocksize, ``tables`` (code fp32 [16]) and, nested, (nested_absmax fp32, nested_code fp32 [256], offset fp32 [1]).
    """

    packed = True
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
    code: tuple[float, ...]

    @property
    def nested(self) -> bool:
        """True where the blocks' scales are quantised themselves."""
        return len(self.tables) > 1

    def check_layout(self, name: str) -> None:
        N, K = self.shape
        device = self.data.device
        require_group(name, "blocksize", self.group_size, 32, 4096)
        require(name, self.data, torch.uint8, (-(-N * K // 2),), device)
        blocks = -(-N * K // self.group_size)
        wanted: list[tuple[torch.dtype, int]] = [(torch.float32, blocks), (torch.float32, 16)]
        if len(self.tables) not in (1, 4):
            raise ValueError(f"{name}.nested_* are all there or none")
        if self.nested:
            wanted[0] = (torch.uint8, blocks)
            wanted += [(torch.float32, length) for length in (-(-blocks // NESTED_BLOCK), 256, 1)]
        for part, tensor, (dtype, length) in zip(self.parts, (self.scale, *self.tables), wanted, strict=False):
            require(f"{name}.{part}", tensor, dtype, (length,), device)

    def check_values(self, name: str) -> None:
        for part, tensor in zip(self.parts, (self.scale, *self.tables), strict=False):
            if tensor is not None and tensor.dtype == torch.float32:
                require_finite(f"{name}.{part}", tensor, negative="absmax" not in part)

    def absmax(self) -> Tensor:
        """The blocks' scales, fp32."""
        assert self.scale is not None  # validate() has seen to it
        if not self.nested:
            return self.scale
        _, nested_absmax, nested_code, offset = self.tables
        sizes = nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(self.scale)]
        return nested_code[self.scale.int()].mul_(sizes).add_(offset)

    def materialize(self, dtype: torch.dtype) -> Tensor:
        n, size = self.shape[0] * self.shape[1], self.group_size
        code, absmax = self.tables[0], self.absmax()
        pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # of every byte
        out = torch.empty(n, dtype=dtype, device=self.device)
        step = _CHUNK if self.device.type == "cpu" else max(1, n)
        for begin in range(0, n, step):
            end = min(begin + step, n)
            values = pairs.index_select(0, self.data[begin // 2 : (end + 1) // 2].int()).view(-1)[: end - begin]
            scales = absmax[begin // size : -(-end // size)]
            if (end - begin) % size:
                values.mul_(scales.repeat_interleave(size)[: end - begin])
            else:
                values.view(-1, size).mul_(scales.unsqueeze(1))
            out[begin:end] = values
        return out.view(self.shape)

    @classmethod
    def pack(cls, tensor: Tensor, blocksize: int = 64, double_quant: bool = True) -> FourBitWeight:
        require_group(cls.format, "blocksize", blocksize, 32, 4096)
        n = tensor.numel()
        flat = torch.nn.functional.pad(tensor.float().reshape(-1), (0, -n % blocksize)).view(-1, blocksize)
        absmax = flat.abs().amax(dim=1)
        codes = cls.encode(flat * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).view(-1)[: n + n % 2]
        code = torch.tensor(cls.code, device=tensor.device)
        tables: tuple[Tensor, ...] = (code,)
        if double_quant:
            absmax, *nested = _quantize_absmax(absmax)
            tables = (code, *nested)
        return cls(pack_nibbles(codes), absmax, blocksize, tables, (tensor.shape[0], tensor.shape[1]))

    @classmethod
    def encode(cls, values: Tensor) -> Tensor:
        """The codes, uint8, nearest to values in [-1, 1]; of two that are as near the lower value's."""
        code = torch.tensor(cls.code)
        ascending, order = code.sort(stable=True)
        order = torch.where(ascending == 0, order[ascending == 0].min(), order)  # of two zeros the positive
        thresholds = ((ascending[1:] + ascending[:-1]) / 2).to(values.device)
        return order.to(values.device, torch.uint8)[torch.bucketize(values, thresholds)]

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        found = {name: self.data.unsqueeze(1)}
        found |= {f"{name}.{part}": tensor for part, tensor in zip(self.parts[:4], self.tensors[1:], strict=False)}
        facts = {"quant_type": self.format, "blocksize": self.group_size, "dtype": dtype_name(self.dtype)}
        facts["shape"] = list(self.shape)
        if self.nested:
            facts |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(self.tables[3]),
            }
        found[f"{name}.quant_state.{self.marker}"] = pack_facts(facts)
        return found

    @classmethod
    def from_saved(cls, content: Saved) -> FourBitWeight:
        shape, dtype, blocksize = content.shape(), content.dtype(), content.integer("blocksize")
        if content.facts.get("quant_type") != cls.format:
            raise ValueError(f"{content.key}: quant_type is {cls.format!r}, not {content.facts.get('quant_type')!r}")
        data = content.take("")
        data = data.contiguous().view(-1).view(torch.uint8)  # packed bytes, whatever dtype they are stored as
        absmax, tables = content.take("absmax"), [content.take("quant_map")]
        if (
            "nested_absmax" in content.entries
            or "nested_quant_map" in content.entries
            or "nested_offset" in content.facts
        ):
            if content.integer("nested_blocksize") != NESTED_BLOCK:
                raise ValueError(f"{content.key}: nested_blocksize is {NESTED_BLOCK}")
            content.dtype("nested_dtype")
            offset = torch.tensor([content.number("nested_offset")], dtype=torch.float32, device=data.device)
            tables += [content.take("nested_absmax"), content.take("nested_quant_map"), offset]
        content.finish()
        return cls(data, absmax, blocksize, tuple(tables), shape, dtype, name=content.name)


class NF4Weight(FourBitWeight):
    """4-bit NormalFloat."""

    format, marker, code = "nf4", "bitsandbytes__nf4", NF4_CODE


class FP4Weight(FourBitWeight):
    """4-bit floats."""

    format, marker, code = "fp4", "bitsandbytes__fp4", FP4_CODE


def dynamic_code() -> Tensor:
    """The 256 values of the signed dynamic data type: seven decades, with 1, 2, ... 64 linear steps each, and 0 and 1.

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        sizes = 10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [sizes, -sizes]
    return torch.cat(values).sort().values


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes uint8, nested_absmax, nested_code, offset) of the blocks' scales."""
    offset = absmax.mean().reshape(1)
    count = len(absmax)
    rest = torch.nn.functional.pad(absmax - offset, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    sizes = rest.abs().amax(dim=1)
    code = dynamic_code().to(absmax.device)
    scaled = rest * (1.0 / sizes.clamp(min=1e-38)).unsqueeze(1)
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8).view(-1)[:count]
    return codes, sizes, code, offset
