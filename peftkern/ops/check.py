"""The checks of a call's operands: ``lora_linear`` asks by the pieces, every operator, real and fake alike, for all of
its operands, since kernels behind them take addresses and sizes on trust.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.call import Base, Call, Needs, Pair, Update, check_lists
from peftkern.weights import FrozenWeight

_NARROW = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, *_NARROW, torch.float64)


def devices(tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all are on the first one's device, TypeError where one is no tensor."""
    first = next(iter(tensors.values()))
    device = first.device if isinstance(first, Tensor) else None
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor but {type(tensor).__name__}")
        if tensor is not None and tensor.device != device:
            listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
            raise ValueError(f"all tensors must be on one device, got {listing}")


def shapes(x, weight, lora_A, lora_B, bias, lora_bias) -> None:
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


def dtypes(x, weight, lora_A, lora_B, bias, lora_bias, name: str = "x") -> None:
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


def rng_state(state: Tensor, device: torch.device) -> None:
    """Raise ValueError unless it is int64 [2] on ``device``."""
    if not _is(state, torch.int64, (2,), device):
        raise ValueError(f"rng_state is int64 [2] on {device}, got {_described(state)}")


def naming(label: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; what it raises begins with ``label``, where there is one."""
    try:
        return function(*arguments)
    except (ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        raise type(error)(f"{label}: {error}" if label else str(error)) from None


def forward(call: Call, x: Tensor) -> None:
    """Raise ValueError or TypeError, with names and values, unless the operands of a forward call fit x [M, K]."""
    _operands(call, [x] * len(call.bases), 1)


def backward(call: Call, dys: Sequence[Tensor], x: Tensor | None, thin: Sequence[Tensor | None], needs: Needs) -> None:
    """Raise as ``forward`` does, of dy [M, N_b] of each base; x [M, K] is there where a lora_A's gradient is needed,
    each s where its lora_B's is.
    """
    check_lists(1, bases=call.bases, dy=dys, need_bias=needs.bias)
    check_lists(0, updates=call.updates, need_A=needs.lora_A, need_B=needs.lora_B, need_lora_bias=needs.lora_bias)
    _operands(call, dys, 0, needs.x)
    dy, K = dys[0], call.bases[0].weight.shape[1]
    for other, (weight, _) in zip(dys, call.bases, strict=True):
        if other.shape[0] != dy.shape[0]:
            raise ValueError(f"each dy has as many rows as x, got {dy.shape[0]} and {other.shape[0]}")
        if weight.shape[1] != K:
            raise ValueError(f"weights of shapes {call.bases[0].weight.shape} and {weight.shape} share no x")
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if call.rows is not None:
        need = any(needs.lora_A) or any(needs.lora_B)
        _saved("x", x, dy.dtype, (dy.shape[0], K), dy, need)
        check_lists(1, s=thin, bases=call.bases)
        _saved("s", thin[0], wide, (call.thin_size,), dy, need)
        if thin[0] is not None and not thin[0].is_contiguous():
            raise ValueError(f"s is contiguous for the operator, got stride {thin[0].stride()}")
        return
    check_lists(0, updates=call.updates, s=thin)
    for i, update in enumerate(call.updates):
        label = f"update {i}" if len(call.updates) > 1 else ""
        naming(label, _saved, "x", x, dy.dtype, (dy.shape[0], K), dy, needs.lora_A[i])
        naming(label, _saved, "s", thin[i], wide, (dy.shape[0], update.R), dy, needs.lora_B[i])


def product(weight: FrozenWeight, rows: Tensor, dropout_p: float, state: Tensor, backward: bool) -> None:
    """Raise ValueError or TypeError unless rows are [M, K], in ``backward`` [M, N], as the weight is."""
    _weight(weight)
    devices({"rows": rows, "weight": weight.data, "rng_state": state})
    _rows("rows", rows, weight, 0 if backward else 1)
    dtype = weight.compute_dtype or rows.dtype
    if rows.dtype != dtype or rows.dtype not in _FLOATING:
        raise TypeError(f"rows are in the weight's floating dtype, {dtype}, got {rows.dtype}")
    _dropout(dropout_p, state, rows.device)


def norm(weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor, scaling_tensor: Tensor | None) -> None:
    """Raise ValueError or TypeError unless the pair fits the weight, as it does beside an x of the weight's dtype."""
    x = weight.data.new_empty(0, weight.shape[-1], dtype=weight.compute_dtype or lora_A.dtype)
    forward(Call((Base(weight, None),), (Update(lora_A, lora_B, None, scaling_tensor, None, 1.0, 0.0),)), x)


def values_of_rows(call: Call, M: int) -> None:
    """Raise ValueError where the numbers of rows leave x [M, K]. On a GPU nothing waits for its values."""
    if call.rows is not None:
        numbers(call.rows.numbers, M)


def numbers(found: Tensor, M: int) -> None:
    """Raise ValueError where numbers of rows leave M rows."""
    if found.device.type == "cpu" and found.numel():
        low, high = map(int, found.aminmax())
        if low < 0 or high >= M:
            raise ValueError(f"rows are numbers of x's {M} rows, from 0 on, got {low} to {high}")


def _operands(call: Call, rows: Sequence[Tensor], side: int, read: bool = True) -> None:
    """``rows`` is x, or (``side`` 0) dy, of each base; ``read``: the weights are."""
    if call.precision not in ("base", "fp32"):
        raise ValueError(f"precision={call.precision!r} is not one of 'base', 'fp32'")
    name = "x" if side else "dy"
    for i, (base, own) in enumerate(zip(call.bases, rows, strict=True)):
        naming(f"base {i}" if len(call.bases) > 1 else "", _base, base, own, side, read)
    last = 0
    for i, update in enumerate(call.updates):
        label = f"update {i}" if len(call.updates) > 1 else ""
        if not last <= update.base < len(call.bases):
            raise ValueError(f"{label}: base {update.base} is none of {len(call.bases)}, in ascending order")
        last = update.base
        base, own = call.bases[last], rows[last]
        if not _fits(update, base.weight.shape, own, call.rows is not None):
            naming(label, _explain, base, update, own, name, call.rows is not None)
    if call.rows is not None:
        _index(call, rows[0].device)


def _index(call: Call, device: torch.device) -> None:
    assert call.rows is not None
    rows, inside = call.rows
    if len(call.bases) > 1:
        raise NotImplementedError(f"updates of some rows have one base, got {len(call.bases)}")
    m = rows.numel()
    if not (_is(rows, torch.int64, (m,), device) and rows.is_contiguous()):
        raise ValueError(f"rows are int64 [m] on {device}, contiguous, got {_described(rows)}")
    if inside is not None and not (_is(inside, torch.bool, (m,), device) and inside.is_contiguous()):
        raise ValueError(f"inside is bool {(m,)} on {device}, contiguous, as rows are, got {_described(inside)}")
    for i, update in enumerate(call.updates):
        if update.span is None or not 0 <= update.span.start <= update.span.start + update.span.length <= m:
            raise ValueError(f"update {i}: {update.span} is not within the {m} entries of rows")


def _weight(weight: FrozenWeight, read: bool = True) -> None:
    """``read``: else nothing reads the weight, and its tables may be missing."""
    if len(weight.shape) != 2:
        raise ValueError(f"weight is 2-D [N, K], got shape {tuple(weight.shape)}")
    if read:
        weight.check_layout("weight")


def _base(base: Base, rows: Tensor, side: int, read: bool) -> None:
    weight, bias = base
    _weight(weight, read)
    shape = weight.shape
    if rows.ndim == 2 and _base_fits(base, rows, side):
        return
    nothing = Update(rows.new_empty(0, shape[1]), rows.new_empty(shape[0], 0), None, None, None, 1.0, 0.0)
    _explain(base, nothing, rows, "x" if side else "dy", False)


def fits(pair: Pair, x: Tensor) -> bool:
    """True where the tensors of a pair with a dense weight fit each other and x [..., K], as in a forward call."""
    base, update = Base(pair.weight, pair.bias), pair.update()
    shape = pair.weight.shape
    return x.ndim > 0 and len(shape) == 2 and _base_fits(base, x, 1) and _fits(update, shape, x, False)


def _base_fits(base: Base, rows: Tensor, side: int) -> bool:
    weight, bias = base
    dtype, device, shape = rows.dtype, rows.device, weight.shape
    return (
        rows.shape[-1] == shape[side]
        and (weight.compute_dtype or dtype) == dtype
        and dtype in _FLOATING
        and weight.data.device == device
        and (bias is None or _is(bias, dtype, (shape[0],), device))
    )


def _rows(name: str, rows: Tensor, weight: FrozenWeight, side: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != weight.shape[side]:
        raise ValueError(
            f"{name} is [M, {weight.shape[side]}] for a weight of shape {weight.shape}, got {tuple(rows.shape)}"
        )


def _saved(
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


def _dropout(dropout_p: float, state: Tensor | None, device: torch.device, keyed: bool = False) -> None:
    """``keyed``: a span has the numbers."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p} is not a probability")
    if state is not None:
        if keyed:
            raise ValueError("rng_state is that of an update of all rows: a span has its own numbers")
        rng_state(state, device)
        if state.stride(0) != 1:
            raise ValueError(f"rng_state is contiguous for the operator, got stride {state.stride()}")
    elif dropout_p and not keyed:
        raise ValueError(f"dropout_p={dropout_p} needs an rng_state")


def _is(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> bool:
    return tensor.dtype == dtype and tensor.shape == shape and tensor.device == device


def _is_scaling(tensor: Tensor, device: torch.device) -> bool:
    return tensor.ndim == 0 and tensor.dtype in _FLOATING and tensor.device == device


def _described(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" of stride {tensor.stride()}"
    return f"{tensor.dtype} {tuple(tensor.shape)}{strides} on {tensor.device}"


def _fits(update: Update, shape: tuple[int, int], rows: Tensor, by_rows: bool) -> bool:
    """True where nothing is wrong with an update of a weight [N, K], in one expression."""
    A, B, lora_bias, scaling_tensor, state, _, dropout_p, _, _ = update
    dtype, device, thin, (N, K) = rows.dtype, rows.device, A.dtype, shape
    return (
        A.ndim == 2
        and A.shape[1] == K
        and _is(B, thin, (N, A.shape[0]), device)
        and (thin == dtype or (thin == torch.float32 and dtype in _NARROW))
        and A.device == device
        and (lora_bias is None or _is(lora_bias, thin, (N,), device))
        and (scaling_tensor is None or (not by_rows and _is_scaling(scaling_tensor, device)))
        and 0.0 <= dropout_p <= 1.0
        and (
            (dropout_p == 0.0 or by_rows)
            if state is None
            else _is(state, torch.int64, (2,), device) and state.stride(0) == 1 and not by_rows
        )
    )


def _explain(base: Base, update: Update, rows: Tensor, name: str, by_rows: bool) -> None:
    """Raise what was found wrong."""
    (weight, bias), (A, B, lora_bias, scaling_tensor, state, _, dropout_p, _, _) = base, update
    named = {name: rows, "weight": weight.data, "weight.scale": weight.scale, "lora_A": A, "lora_B": B}
    named |= {"bias": bias, "lora_bias": lora_bias, "scaling_tensor": scaling_tensor, "rng_state": state}
    devices(named)
    _rows(name, rows, weight, 1 if name == "x" else 0)
    shapes(rows.new_empty(weight.shape[1]), weight, A, B, bias, lora_bias)
    dtypes(rows, weight, A, B, bias, lora_bias, name)
    if scaling_tensor is not None and by_rows:
        raise NotImplementedError("the scaling of an update of some rows is a number, not a tensor")
    if scaling_tensor is not None and not _is_scaling(scaling_tensor, rows.device):
        raise ValueError(f"scaling_tensor is 0-d and floating, got {_described(scaling_tensor)}")
    _dropout(dropout_p, state, rows.device, by_rows)
