"""The formats of E2M1 codes by tables of their own, which share nothing with the package's."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.weights import FrozenWeight, MXFP4Weight, NVFP4Weight

GROUPS = {"mxfp4": 32, "nvfp4": 16}


def e2m1(code: int) -> float:
    """A sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if code & 8 else size


def e4m3(byte: int) -> float:
    """Four bits of exponent, three of mantissa; 127 is NaN and there is no infinity."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return float("nan") if byte & 127 == 127 else -size if byte & 128 else size


def decoded(data: Tensor, sizes: Tensor, group: int, K: int) -> Tensor:
    """fp32 [N, K] from bytes and the groups' sizes in fp32, one number at a time."""
    rows = []
    for bytes_of_row, of_groups in zip(data.tolist(), sizes.double().tolist(), strict=True):
        codes = [code for byte in bytes_of_row for code in (byte & 15, byte >> 4)][:K]
        rows.append([e2m1(code) * of_groups[k // group] for k, code in enumerate(codes)])
    return torch.tensor(rows, dtype=torch.float64).float()


def every_e2m1(name: str, K: int = 512, factor: float = 1 / 3) -> tuple[FrozenWeight, Tensor]:
    """Every scale that is legal with every code: a weight, and what it is in fp32."""
    group = GROUPS[name]
    bytes_ = range(255) if name == "mxfp4" else [byte for byte in range(256) if byte & 127 != 127 and byte <= 128]
    columns = -(-K // group)
    N = -(-len(bytes_) // columns)
    scale = torch.tensor([*bytes_, *[bytes_[0]] * (N * columns - len(bytes_))], dtype=torch.uint8).view(N, columns)
    pairs = torch.arange(8, dtype=torch.uint8) * 34 + 16  # codes 0 1, 2 3, ... 14 15
    pairs = pairs.repeat(N, -(-K // 16))[:, : -(-K // 2)].contiguous()
    if name == "mxfp4":
        sizes = torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64)[scale.int()].float()
        return MXFP4Weight(pairs, scale, group, (), (N, K)), decoded(pairs, sizes, group, K)
    scale_map = torch.tensor([e4m3(byte) for byte in range(256)]) * torch.tensor(factor)
    weight = NVFP4Weight(pairs, scale.view(torch.float8_e4m3fn), group, (scale_map,), (N, K))
    return weight, decoded(pairs, scale_map[scale.int()], group, K)
