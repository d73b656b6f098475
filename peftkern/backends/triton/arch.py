"""The facts of a chip: the figures of the cost model, and what its binaries can and cannot do, without Triton."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Arch:
    """One chip.

    Args:
        name: of the shipped table and of the compile target.
        units: compute units (SMs, CUs).
        shared_memory: bytes a block may have.
        flops, bandwidth, clock: 16-bit FLOP/s, bytes/s, Hz; for the cost model.
        warp: threads a warp.
        protocols: whether a program's stores are complete before its flag is released. On gfx942 the binary does not
            wait for the other waves' stores.
        tma: whether tensor descriptors become bulk copies.
        fp8: whether its matrix instructions take e4m3 and the kernels are compiled for that.
        wgmma: whether a warpgroup multiplies asynchronously, from shared memory into its registers.
        dependent_launch: whether a launch may begin before the one it depends on ends.
        product: what the vendor calls it; the user's own measurements hold for one product.
    """

    name: str
    units: int
    shared_memory: int
    flops: float
    bandwidth: float
    clock: float
    warp: int = 32
    protocols: bool = True
    tma: bool = False
    wgmma: bool = False
    dependent_launch: bool = False
    fp8: bool = False
    product: str = ""


ARCHES = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 108, 163 * 1024, 280e12, 1.7e12, 1.4e9),
        Arch("sm_90", 132, 227 * 1024, 790e12, 4.3e12, 1.7e9, tma=True, wgmma=True, dependent_launch=True, fp8=True),
        Arch("sm_100", 148, 227 * 1024, 1600e12, 7.0e12, 1.8e9, tma=True, dependent_launch=True, fp8=True),
        Arch("gfx942", 304, 64 * 1024, 900e12, 4.5e12, 2.1e9, warp=64, protocols=False),
        Arch("interpreter", 4, 163 * 1024, 1e9, 1e9, 1e9, tma=True, wgmma=True, fp8=True),
    )
}


# Bytes/s that a copy reaches, by a part of the product's name, the first that it has: of one generation's chips the
# memories differ by a factor of three.
_BANDWIDTHS = {
    "GH200": 3.6e12, "H200": 4.3e12, "H100 PCIe": 1.8e12, "H100 NVL": 3.5e12, "H100": 3.0e12, "H20": 3.6e12,
    "B200": 7.0e12, "B300": 7.0e12, "A100-SXM4-80GB": 1.8e12, "A100 80GB": 1.7e12, "A100": 1.4e12, "A10G": 0.53e12,
    "A10": 0.53e12, "L40": 0.76e12, "L4": 0.26e12, "RTX 5090": 1.6e12, "RTX 4090": 0.9e12, "RTX 3090": 0.83e12,
}  # fmt: skip


@functools.cache
def arch_of(device: torch.device) -> Arch:
    """The chip behind a device: its nearest known relative, with the device's own units and shared memory."""
    if device.type != "cuda":
        return ARCHES["interpreter"]
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = dataclasses.replace(ARCHES["gfx942"], units=properties.multi_processor_count)
    else:
        arch = nvidia((properties.major, properties.minor), properties.multi_processor_count,
                      properties.shared_memory_per_block_optin)  # fmt: skip
    return named(arch, properties.name)


def named(arch: Arch, product: str) -> Arch:
    """The chip as this product, with its memory's bandwidth where that is known."""
    known = (bandwidth for part, bandwidth in _BANDWIDTHS.items() if part in product)
    return dataclasses.replace(arch, product=product, bandwidth=next(known, arch.bandwidth))


def nvidia(capability: tuple[int, int], units: int, shared_memory: int) -> Arch:
    """The nearest known relative of an NVIDIA chip. Consumer Blackwell (12.x) multiplies as sm_80 does."""
    relative = ARCHES["sm_90" if capability[0] == 9 else "sm_100" if capability[0] == 10 else "sm_80"]
    scale = units / relative.units
    return dataclasses.replace(
        relative, units=units, shared_memory=shared_memory, flops=relative.flops * scale,
        bandwidth=relative.bandwidth * min(1.0, scale),
    )  # fmt: skip
