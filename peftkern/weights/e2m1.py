"""``mxfp4`` and ``nvfp4``: E2M1 codes, 0 0.5 1 1.5 2 3 4 6 and their negatives, in groups along K that share a scale.

    mxfp4:  W[n, k] = e2m1[q[n, k]] * 2^(scale[n, k // 32] - 127)                                   (OCP MX 1.0)
    nvfp4:  W[n, k] = e2m1[q[n, k]] * scale_map[scale[n, k // 16]],   scale_map[b] = e4m3[b] * global_scale

Products are fp32, one rounding each. Two elements share a byte, the even one in the low half; a row begins with a new
byte, and its last group may be short. ModelOpt multiplies by a global scale, compressed-tensors divides by one: what
the 256 scales then are is held in its place, so that both are, bit for bit, what their own packages make of them, and
nothing is divided in a kernel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.weights.base import FrozenWeight
from peftkern.weights.groups import grouped, spread
from peftkern.weights.saved import require, require_finite

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST, _LARGEST_SCALE = SIZES[-1], 448.0
_BIAS, _NAN = 127, 255  # of E8M0
_NAN_BYTE = 127  # of E4M3; negative ones follow
_CHUNK = 2**18  # elements that are decoded at a time on a CPU: what stays in its caches


class E2M1Weight(FrozenWeight):
    """``data`` uint8 [N, ceil(K / 2)], ``scale`` in a byte each [N, ceil(K / group)], ``group_size`` the format's."""

    packed = True
    group: int
    scale_dtype: torch.dtype

    def check_layout(self, name: str) -> None:
        self.check_keys(self.keys(name))

    def check_values(self, name: str) -> None:
        self.check_scales(self.keys(name))

    def keys(self, name: str) -> tuple[str, ...]:
        """What our state_dict calls ``tensors``."""
        return (name, *(f"{name}.{part}" for part in self.parts))

    def check_keys(self, keys: Sequence[str]) -> None:
        """``check_layout`` with a name for each of ``tensors``."""
        N, K = self.shape
        if self.group_size != self.group:
            raise ValueError(f"{keys[0]}: group_size is {self.group}, not {self.group_size}")
        require(keys[0], self.data, torch.uint8, (N, -(-K // 2)), self.device)
        require(keys[1], self.scale, self.scale_dtype, (N, -(-K // self.group)), self.device)
        if len(self.tables) != len(self.parts) - 1:
            raise ValueError(f"{keys[0]} has {len(self.parts) - 1} tables, not {len(self.tables)}")
        for key, table in zip(keys[2:], self.tables, strict=True):
            require(key, table, torch.float32, (256,), self.device)

    @abstractmethod
    def check_scales(self, keys: Sequence[str]) -> None:
        """``check_values`` with a name for each of ``tensors``."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """The groups' scales, fp32 [N, ceil(K / group)]."""

    def materialize(self, dtype: torch.dtype) -> Tensor:
        (N, K), group, sizes = self.shape, self.group, self.sizes()
        code = torch.tensor([*SIZES, *(-size for size in SIZES)], device=self.device)
        pairs = torch.stack((code.repeat(16), code.repeat_interleave(16)), dim=1)  # of every byte
        out = torch.empty(N, K, dtype=dtype, device=self.device)
        rows = max(1, _CHUNK // max(1, K)) if self.device.type == "cpu" else max(1, N)
        for begin in range(0, N, rows):
            some = slice(begin, begin + rows)
            values = pairs.index_select(0, self.data[some].reshape(-1).int()).view(-1, self.data.shape[1] * 2)[:, :K]
            if K % group:
                values.mul_(spread(sizes[some], group, K))
            else:
                values.view(-1, K // group, group).mul_(sizes[some].unsqueeze(2))
            out[some] = values
        return out

    @classmethod
    def from_checkpoint(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> FrozenWeight:
        """The weight that another package has saved under these names, in the order of one of ``spellings``.

        Raises: ValueError naming the key that holds what it should not.
        """
        data, scale, *tables = cls.arranged(keys, tensors)
        shape = (data.shape[0], 2 * data.shape[1])
        wanted = (shape[0], -(-shape[1] // cls.group))
        if scale.shape != wanted:
            text = f"{keys[1]} has {list(wanted)} scales for {keys[0]}, {list(data.shape)} bytes of two numbers each"
            raise ValueError(f"{text}, got {list(scale.shape)}")
        weight = cls.from_operands(cls.format, data, scale, cls.group, tuple(tables), shape)
        assert isinstance(weight, E2M1Weight)
        weight.dtype = torch.bfloat16  # such files do not say it
        weight.check_keys(keys)
        if not data.is_meta:
            weight.check_scales(keys)
        return weight

    @classmethod
    @abstractmethod
    def arranged(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``tensors`` from those of a checkpoint, ``data`` a matrix."""


class MXFP4Weight(E2M1Weight):
    """``scale`` uint8, E8M0: the exponent of a power of two, 127 more; 255, NaN, is refused."""

    format, group, scale_dtype = "mxfp4", 32, torch.uint8
    parts = ("scale",)
    spellings = (("_blocks", "_scales"),)  # gpt-oss's

    def check_scales(self, keys: Sequence[str]) -> None:
        assert self.scale is not None  # validate() has seen to it
        if (self.scale == _NAN).any():
            raise ValueError(f"{keys[1]} has NaN, the exponent {_NAN}")

    def sizes(self) -> Tensor:
        assert self.scale is not None
        return self.scale.view(torch.float8_e8m0fnu).float()

    @classmethod
    def pack(cls, tensor: Tensor) -> MXFP4Weight:
        groups = grouped(tensor.float(), cls.group)
        largest = groups.abs().amax(dim=2)
        exponent = (torch.frexp(largest).exponent - 3).clamp(min=-_BIAS)  # that of 6 is 2; frexp's parts are under 1
        exponent = torch.where(largest > 0, exponent, -_BIAS)
        codes = _codes(torch.ldexp(groups, -exponent.unsqueeze(2)))
        return cls(_bytes(codes, tensor.shape[1]), (exponent + _BIAS).to(torch.uint8), cls.group, (), _size(tensor))

    @classmethod
    def arranged(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        blocks, scales = tensors
        if blocks.ndim != 3 or blocks.shape[2] != cls.group // 2:
            shape = list(blocks.shape)
            raise ValueError(f"{keys[0]} is [N, K / 32, 16] of one weight, got {shape}: of several, take one at a time")
        return blocks.flatten(1), scales


class NVFP4Weight(E2M1Weight):
    """``scale`` float8_e4m3fn, ``tables`` (scale_map fp32 [256]): what each of its bytes is."""

    format, group, scale_dtype = "nvfp4", 16, torch.float8_e4m3fn
    parts = ("scale", "scale_map")
    spellings = (("", "_scale", "_scale_2"), ("_packed", "_scale", "_global_scale"))  # ModelOpt's, compressed-tensors'

    def check_scales(self, keys: Sequence[str]) -> None:
        assert self.scale is not None  # validate() has seen to it
        require_finite(keys[1], self.scale.float())
        require_finite(keys[2], self.tables[0][:_NAN_BYTE])

    def sizes(self) -> Tensor:
        assert self.scale is not None
        return self.tables[0][self.scale.view(torch.uint8).int()]

    @classmethod
    def pack(cls, tensor: Tensor) -> NVFP4Weight:
        groups = grouped(tensor.float(), cls.group)
        largest = groups.abs().amax(dim=2)
        global_scale = largest.amax().reshape(1) / (_LARGEST * _LARGEST_SCALE)
        divisor = torch.where(global_scale > 0, global_scale, 1.0)
        scale = (largest / _LARGEST / divisor).clamp_(max=_LARGEST_SCALE).to(torch.float8_e4m3fn)
        scale_map = _every_scale(tensor.device) * global_scale
        sizes = scale_map[scale.view(torch.uint8).int()]
        codes = _codes(groups / torch.where(sizes > 0, sizes, 1.0).unsqueeze(2))
        return cls(_bytes(codes, tensor.shape[1]), scale, cls.group, (scale_map,), _size(tensor))

    @classmethod
    def arranged(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        data, scale, factor = tensors
        if data.ndim != 2:
            raise ValueError(f"{keys[0]} is [N, K / 2], got {list(data.shape)}")
        factor = require(keys[2], factor, torch.float32, () if factor.ndim == 0 else (1,), data.device)
        divides, every = keys[2].endswith("_global_scale"), _every_scale(data.device)
        if not factor.is_meta:
            require_finite(keys[2], factor)
            if divides and not factor.all():
                raise ValueError(f"{keys[2]} is 0, which scales are divided by")
        return data, scale, every / factor if divides else every * factor


def _every_scale(device: torch.device) -> Tensor:
    """What the 256 bytes of E4M3 are, fp32."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def _codes(values: Tensor) -> Tensor:
    """uint8, nearest to values; of two that are as near the one with an even code. Beyond 6 it is 6."""
    middles = torch.tensor([(a + b) / 2 for a, b in zip(SIZES, SIZES[1:], strict=False)], device=values.device)
    middles[1::2] = middles[1::2].nextafter(middles.new_zeros(()))  # these belong to the larger
    return torch.bucketize(values.abs(), middles).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)


def _bytes(codes: Tensor, K: int) -> Tensor:
    """Groups of codes as rows of bytes, the even ones low; what is behind K is 0."""
    codes = codes.flatten(1)[:, : K + K % 2]
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _size(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1]
