"""Frozen weights of gptqmodel's plain layers, GPTQ's and AWQ's, in the order of int4. gptqmodel is not imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkern.weights import Int4Weight

GPTQ = "gptqmodel.nn_modules.qlinear.torch.TorchLinear"
AWQ = "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BESIDE = ("adapter", "online_full_had", "online_partial_had")  # what such a layer may do to x or y beside the product


def from_gptqmodel(module: Any) -> Int4Weight:
    """The frozen weight of a ``TorchLinear`` or ``AwqTorchLinear``, whose buffers are as in its checkpoint.

    Formula: W[n, k] = (q[n, k] - z[n, g]) · scales[g, n], g = k // group.
    Args: module: the layer, of 4 bits and without ``desc_act``. Its codes are copied, N K / 2 bytes.
    Returns: a FrozenWeight of format "int4".
    Raises: TypeError for another module; ValueError for a layout that is not read, by its name, or for a layer that
        turns x, or has an adapter of gptqmodel's.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in (GPTQ, AWQ):
        raise TypeError(f"gptqmodel's TorchLinear and AwqTorchLinear have a frozen weight to take, not {kind}")
    beside = [name for name in BESIDE if getattr(module, name, None)]
    if beside:
        raise ValueError(f"its layer has {', '.join(beside)}")
    given = dict(zip(PARTS, buffers(module), strict=True))
    missing = [name for name in PARTS[:3] if given[name] is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not there")
    order = given["g_idx"]
    if order is not None and not order.is_meta:  # gptqmodel may keep it on the host
        given["g_idx"] = order.to(module.qweight.device)
    held = {name: tensor for name, tensor in given.items() if tensor is not None}
    less_one = kind == GPTQ and module.qzero_format() == 1
    return Int4Weight.from_int32(list(held), list(held.values()), stored_less_one=less_one)


def buffers(module: Any) -> tuple[Tensor | None, ...]:
    """The layer's tensors by ``PARTS``; AWQ has no g_idx."""
    return tuple(map(module._buffers.get, PARTS))
