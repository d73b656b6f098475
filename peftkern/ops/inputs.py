"""What the operands of a call must be: ``lora_linear`` asks by the pieces, every operator, real and fake alike, for all
of its operands, since kernels behind them take addresses and sizes on trust.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.ops.bank_problem import BankBackward, BankOperands
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
        x.dtype in _FLOATING
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


def check_lists(least: int, **lists: Sequence[Any]) -> None:
    """Raise ValueError unless all are of one length, ``least`` or more."""
    lengths = set(map(len, lists.values()))
    if len(lengths) > 1 or min(lengths) < least:
        found = ", ".join(f"{name} {len(entries)}" for name, entries in lists.items())
        raise ValueError(f"lists of one call have one length, {least} or more, got {found}")


def naming(label: str, check: Callable[..., None], *arguments: Any) -> None:
    """Run a check; what it raises begins with ``label``."""
    try:
        check(*arguments)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{label}: {error}") from None


def check_forward(operands: LoRAOperands, x: Tensor) -> None:
    """Raise ValueError or TypeError, with names and values, unless the operands of a forward call fit x [M, K]."""
    _check_weight(operands.weight)
    if not _fit(operands, x, 1):
        _explain(operands, x)


def check_backward(operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs) -> None:
    """The same for dy [M, N]; x [M, K] is there where lora_A's gradient is needed, s [M, R] where lora_B's is."""
    _check_weight(operands.weight, needs.x)
    if not _fit(operands, dy, 0):
        _explain(operands, dy, "dy")
    M, (_, K), R = dy.shape[0], operands.weight.shape, operands.lora_A.shape[0]
    _check_saved("x", x, dy.dtype, (M, K), dy, needs.lora_A)
    _check_saved("s", s, _wide(dy.dtype), (M, R), dy, needs.lora_B)


def check_product(weight: FrozenWeight, rows: Tensor, dropout_p: float, rng_state: Tensor, backward: bool) -> None:
    """Raise ValueError or TypeError unless rows are [M, K], in ``backward`` [M, N], as the weight is."""
    _check_weight(weight)
    check_devices({"rows": rows, "weight": weight.data, "rng_state": rng_state})
    _check_rows("rows", rows, weight, 0 if backward else 1)
    dtype = weight.compute_dtype or rows.dtype
    if rows.dtype != dtype or rows.dtype not in _FLOATING:
        raise TypeError(f"rows are in the weight's floating dtype, {dtype}, got {rows.dtype}")
    _check_dropout(dropout_p, rng_state, rows.device)


def check_norm(weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor, scaling_tensor: Tensor | None) -> None:
    """Raise ValueError or TypeError unless the pair fits the weight, as it does beside an x of the weight's dtype."""
    _check_weight(weight)
    x = weight.data.new_empty(0, weight.shape[1], dtype=weight.compute_dtype or lora_A.dtype)
    operands = LoRAOperands(weight, lora_A, lora_B, None, None, 1.0, scaling_tensor, 0.0, None, "base")
    if not _fit(operands, x, 1):
        _explain(operands, x)


def check_bank(operands: BankOperands, rows: Tensor, side: int = 1) -> None:
    """Raise ValueError or TypeError unless the operands of a call of several adapters fit x [M, K], or (``side`` 0)
    dy [M, N]. The values of the index of rows are ``check_index``'s.
    """
    weight, bias, segments, index, precision, inside = operands
    frozen, device, m = FrozenWeight.from_operands("dense", weight, None, 0), rows.device, index.numel()
    _check_weight(frozen)
    if not _base_fits(frozen, bias, precision, rows, side):
        (N, K), name = weight.shape, "x" if side else "dy"
        nothing = weight.new_empty(0, K), weight.new_empty(N, 0)
        _explain(LoRAOperands(frozen, *nothing, bias, None, 1.0, None, 0.0, None, precision), rows, name)
    if not (_is(index, torch.int64, (m,), device) and index.is_contiguous()):
        raise ValueError(f"rows are int64 [m] on {device}, contiguous, got {_described(index)}")
    if inside is not None and not (_is(inside, torch.bool, (m,), device) and inside.is_contiguous()):
        raise ValueError(f"inside is bool {(m,)} on {device}, contiguous, as rows are, got {_described(inside)}")
    shape, dtype = frozen.shape, rows.dtype
    for i, (A, B, _, p, _, _, start, length) in enumerate(segments):
        if not (_pair_fits(A, B, shape, dtype, device) and 0.0 <= p <= 1.0):
            alone = LoRAOperands(frozen, A, B, bias, None, 1.0, None, p, rows.new_empty(2, dtype=torch.int64), "base")
            naming(f"segment {i}", _explain, alone, rows, "x" if side else "dy")
        if not 0 <= start <= start + length <= m:
            raise ValueError(f"segment {i}: starts {start} and counts {length} rows, of {m} in rows")


def check_bank_backward(operands: BankOperands, given: BankBackward) -> None:
    """The same for what backward takes; x [M, K] and s [thin_size] are there where a pair's gradients are needed."""
    dy, x, s, _, need_pairs = given
    check_bank(operands, dy, 0)
    check_lists(0, need_pairs=need_pairs, lora_A=operands.segments)
    K, need = operands.weight.shape[1], any(need_pairs)
    _check_saved("x", x, dy.dtype, (dy.shape[0], K), dy, need)
    _check_saved("s", s, _wide(dy.dtype), (operands.thin_size,), dy, need)
    if s is not None and not s.is_contiguous():
        raise ValueError(f"s is contiguous for the operator, got stride {s.stride()}")


def check_index(index: Tensor, M: int) -> None:
    """Raise ValueError where an index of rows leaves x [M, K]. On a GPU nothing waits for its values."""
    if index.device.type == "cpu" and index.numel():
        low, high = map(int, index.aminmax())
        if low < 0 or high >= M:
            raise ValueError(f"rows are numbers of x's {M} rows, from 0 on, got {low} to {high}")


def _check_weight(weight: FrozenWeight, read: bool = True) -> None:
    """``read``: else nothing reads the weight, and its tables may be missing."""
    if len(weight.shape) != 2:  # of a packed one: what lora_B and lora_A say
        raise ValueError(f"weight is 2-D [N, K], as lora_B and lora_A are, got shape {tuple(weight.shape)}")
    if read:
        weight.check_layout("weight")


def _check_rows(name: str, rows: Tensor, weight: FrozenWeight, side: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != weight.shape[side]:
        raise ValueError(
            f"{name} is [M, {weight.shape[side]}] for a weight of shape {weight.shape}, got {tuple(rows.shape)}"
        )


def _check_saved(
    name: str, found: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], dy: Tensor, needed: bool
) -> None:
    """Raise what is wrong with x or s in backward, which may be missing unless ``needed``."""
    if not needed if found is None else _is(found, dtype, shape, dy.device):
        return
    wanted = f"{name} is {dtype} {shape} on {dy.device} for dy {tuple(dy.shape)}"
    if found is None:
        raise ValueError(f"{wanted}, and it is missing though a gradient needs it")
    error = ValueError if found.dtype == dtype else TypeError
    raise error(f"{wanted}, got {_described(found)}")


def _check_dropout(dropout_p: float, rng_state: Tensor | None, device: torch.device) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p} is not a probability")
    if rng_state is not None:
        check_rng_state(rng_state, device)
        if rng_state.stride(0) != 1:
            raise ValueError(f"rng_state is contiguous for the operator, got stride {rng_state.stride()}")
    elif dropout_p:
        raise ValueError(f"dropout_p={dropout_p} needs an rng_state")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> bool:
    return tensor.dtype == dtype and tensor.shape == shape and tensor.device == device


def _described(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" of stride {tensor.stride()}"
    return f"{tensor.dtype} {tuple(tensor.shape)}{strides} on {tensor.device}"


# Whether nothing is wrong, in one expression each: this is asked at every call.


def _base_fits(weight: FrozenWeight, bias: Tensor | None, precision: str, rows: Tensor, side: int) -> bool:
    """``rows`` is [M, weight.shape[side]]."""
    dtype, device, shape = rows.dtype, rows.device, weight.shape
    return (
        rows.ndim == 2
        and rows.shape[1] == shape[side]
        and (weight.compute_dtype or dtype) == dtype
        and dtype in _FLOATING
        and weight.data.device == device
        and (bias is None or _is(bias, dtype, (shape[0],), device))
        and (precision == "base" or precision == "fp32")
    )


def _pair_fits(A: Tensor, B: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    N, K = shape
    thin = A.dtype
    return (
        A.ndim == 2
        and A.shape[1] == K
        and B.shape == (N, A.shape[0])
        and B.dtype == thin
        and (thin == dtype or (thin == torch.float32 and dtype in _NARROW))
        and A.device == device
        and B.device == device
    )


def _fit(operands: LoRAOperands, rows: Tensor, side: int) -> bool:
    weight, A, B, bias, lora_bias, _, scaling_tensor, dropout_p, state, precision = operands
    dtype, device = rows.dtype, rows.device
    return (
        _base_fits(weight, bias, precision, rows, side)
        and _pair_fits(A, B, weight.shape, dtype, device)
        and (lora_bias is None or _is(lora_bias, A.dtype, B.shape[:1], device))
        and (
            scaling_tensor is None
            or (scaling_tensor.ndim == 0 and scaling_tensor.dtype in _FLOATING and scaling_tensor.device == device)
        )
        and (
            dropout_p == 0.0
            if state is None
            else _is(state, torch.int64, (2,), device) and state.stride(0) == 1 and 0.0 <= dropout_p <= 1.0
        )
    )


def _explain(operands: LoRAOperands, rows: Tensor, name: str = "x") -> None:
    """Raise what ``_fit`` found."""
    weight, A, B, bias, lora_bias, _, scaling_tensor, dropout_p, state, precision = operands
    named = {name: rows, "weight": weight.data, "weight.scale": weight.scale, "lora_A": A, "lora_B": B}
    named |= {"bias": bias, "lora_bias": lora_bias, "scaling_tensor": scaling_tensor, "rng_state": state}
    check_devices(named)
    _check_rows(name, rows, weight, 1 if name == "x" else 0)
    check_shapes(rows.new_empty(weight.shape[1]), weight, A, B, bias, lora_bias)
    check_dtypes(rows, weight, A, B, bias, lora_bias, name)
    if scaling_tensor is not None and (scaling_tensor.ndim != 0 or scaling_tensor.dtype not in _FLOATING):
        raise ValueError(f"scaling_tensor is 0-d and floating, got {_described(scaling_tensor)}")
    if precision not in ("base", "fp32"):
        raise ValueError(f"precision={precision!r} is not one of 'base', 'fp32'")
    _check_dropout(dropout_p, state, rows.device)
