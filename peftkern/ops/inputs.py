"""What the operands of a call must be: ``lora_linear`` asks by the pieces, the operators by ``check_forward`` and
``check_backward``, since kernels behind them take addresses and sizes on trust.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.problem import LoRAOperands, Needs
from peftkern.weights import FrozenWeight

_NARROW = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, *_NARROW, torch.float64)


def check_devices(tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all are on the first one's device, TypeError where one is no tensor."""
    first = next(iter(tensors.values()))
    device = first.device if isinstance(first, Tensor) else None
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor but {type(tensor).__name__}")
        if tensor is not None and tensor.device != device:
            listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
            raise ValueError(f"all tensors must be on one device, got {listing}")


def check_shapes(x, weight, lora_A, lora_B, bias, lora_bias) -> None:
    """Raise ValueError with both shapes unless they fit; x is [..., K]."""
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x is [..., {K}] for a weight of shape {(N, K)}, got {tuple(x.shape)}")
    if lora_A.ndim != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A is [R, {K}] for a weight of shape {(N, K)}, got {tuple(lora_A.shape)}")
    if lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(
            f"lora_B is [{N}, {lora_A.shape[0]}] for lora_A {tuple(lora_A.shape)} and a weight of shape {(N, K)}, "
            f"got {tuple(lora_B.shape)}"
        )
    for name, vector in (("bias", bias), ("lora_bias", lora_bias)):
        if vector is not None and vector.shape != (N,):
            raise ValueError(f"{name} is [{N}] for a weight of shape {(N, K)}, got {tuple(vector.shape)}")


def check_dtypes(x, weight, lora_A, lora_B, bias, lora_bias, name: str = "x") -> None:
    """Raise TypeError with all dtypes unless they fit; the rows are called ``name``."""
    wanted = weight.compute_dtype or x.dtype
    fits = (
        x.is_floating_point()
        and x.dtype == wanted
        and lora_A.dtype == lora_B.dtype
        and (lora_A.dtype == x.dtype or (lora_A.dtype == torch.float32 and x.dtype in _NARROW))
        and (bias is None or bias.dtype == x.dtype)
        and (lora_bias is None or lora_bias.dtype == lora_A.dtype)
    )
    if not fits:
        tensors = {name: x, "weight": weight.data, "lora_A": lora_A, "lora_B": lora_B}
        tensors |= {"bias": bias, "lora_bias": lora_bias}
        listing = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor is not None)
        raise TypeError(
            f"{name}, bias and a dense weight must share one floating dtype, lora_A, lora_B and lora_bias that dtype "
            f"or float32 (or use autocast): got {listing}"
        )


def check_rng_state(rng_state: Tensor, device: torch.device) -> None:
    """Raise ValueError unless it is int64 [2] on ``device``."""
    if rng_state.dtype != torch.int64 or rng_state.shape != (2,) or rng_state.device != device:
        found = f"{rng_state.dtype} {tuple(rng_state.shape)} on {rng_state.device}"
        raise ValueError(f"rng_state is int64 [2] on {device}, got {found}")


def check_forward(operands: LoRAOperands, x: Tensor) -> None:
    """Raise ValueError or TypeError, with names and values, unless the operands of a forward call fit x [M, K]."""
    operands.weight.check_layout("weight")
    if not _fit(operands, x, 1):
        _explain(operands, x)


def check_backward(operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs) -> None:
    """The same for dy [M, N]; x [M, K] is there where lora_A's gradient is needed, s [M, R] where lora_B's is."""
    if needs.x:  # else nothing reads the weight, and its tables may be missing
        operands.weight.check_layout("weight")
    if not _fit(operands, dy, 0):
        _explain(operands, dy, "dy")
    M, (_, K), R = dy.shape[0], operands.weight.shape, operands.lora_A.shape[0]
    dtype, device = dy.dtype, dy.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if x is None:
        x_fits = not needs.lora_A
    else:
        x_fits = x.dtype == dtype and x.shape == (M, K) and x.device == device
    if s is None:
        s_fits = not needs.lora_B
    else:
        s_fits = s.dtype == wide and s.shape == (M, R) and s.device == device
    if not x_fits:
        _explain_rows("x", x, (M, K), dtype, dy)
    if not s_fits:
        _explain_rows("s", s, (M, R), wide, dy)


def check_product(weight: FrozenWeight, rows: Tensor, rng_state: Tensor, backward: bool) -> None:
    """Raise ValueError or TypeError unless rows are [M, K], in ``backward`` [M, N], as the weight is."""
    weight.check_layout("weight")
    width, dtype = weight.shape[0 if backward else 1], weight.compute_dtype or rows.dtype
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"rows are [M, {width}] for a weight of shape {weight.shape}, got {tuple(rows.shape)}")
    if rows.dtype != dtype or rows.dtype not in _FLOATING:
        raise TypeError(f"rows are in the weight's floating dtype, {dtype}, got {rows.dtype}")
    check_devices({"rows": rows, "weight": weight.data, "rng_state": rng_state})
    check_rng_state(rng_state, rows.device)
    if rng_state.stride(0) != 1:
        raise ValueError(f"rng_state is contiguous for the operator, got stride {rng_state.stride()}")


def _explain_rows(name: str, found: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, dy: Tensor) -> None:
    """Raise what is wrong with x or s in backward."""
    wanted = f"{name} is {dtype} {shape} on {dy.device} for dy {tuple(dy.shape)}"
    if found is None:
        raise ValueError(f"{wanted}, and it is missing though a gradient needs it")
    error = ValueError if found.dtype == dtype else TypeError
    raise error(f"{wanted}, got {found.dtype} {tuple(found.shape)} on {found.device}")


def _fit(operands: LoRAOperands, rows: Tensor, side: int) -> bool:
    """Whether nothing is wrong, in one expression: it is asked at every call. ``rows`` is [M, weight.shape[side]]."""
    weight, A, B, bias, lora_bias, _, scaling_tensor, dropout_p, state, _ = operands
    N, K = shape = weight.shape
    dtype, thin, device = rows.dtype, A.dtype, rows.device
    return (
        rows.ndim == 2
        and rows.shape[1] == shape[side]
        and A.ndim == 2
        and A.shape[1] == K
        and B.shape == (N, A.shape[0])
        and (weight.compute_dtype or dtype) == dtype
        and B.dtype == thin
        and (thin == dtype or (thin == torch.float32 and dtype in _NARROW))
        and dtype in _FLOATING
        and A.device == device
        and B.device == device
        and weight.data.device == device
        and (bias is None or (bias.shape == (N,) and bias.dtype == dtype and bias.device == device))
        and (lora_bias is None or (lora_bias.shape == (N,) and lora_bias.dtype == thin and lora_bias.device == device))
        and (scaling_tensor is None or (scaling_tensor.ndim == 0 and scaling_tensor.device == device))
        and (
            dropout_p == 0.0
            if state is None
            else state.dtype == torch.int64 and state.shape == (2,) and state.device == device and state.stride(0) == 1
        )
    )


def _explain(operands: LoRAOperands, rows: Tensor, name: str = "x") -> None:
    """Raise what ``_fit`` found."""
    weight, A, B, bias, lora_bias, _, scaling_tensor, dropout_p, state, _ = operands
    named = {name: rows, "weight": weight.data, "weight.scale": weight.scale, "lora_A": A, "lora_B": B}
    named |= {"bias": bias, "lora_bias": lora_bias, "scaling_tensor": scaling_tensor, "rng_state": state}
    check_devices(named)
    width = weight.shape[1] if name == "x" else weight.shape[0]
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{name} is [M, {width}] for a weight of shape {weight.shape}, got {tuple(rows.shape)}")
    check_shapes(rows.new_empty(weight.shape[1]), weight, A, B, bias, lora_bias)
    check_dtypes(rows, weight, A, B, bias, lora_bias, name)
    if scaling_tensor is not None and scaling_tensor.ndim != 0:
        raise ValueError(f"scaling_tensor is 0-d, got {tuple(scaling_tensor.shape)}")
    if state is None:
        raise ValueError(f"dropout_p={dropout_p} needs an rng_state")
    check_rng_state(state, rows.device)
    raise ValueError(f"rng_state is contiguous for the operator, got stride {state.stride()}")
