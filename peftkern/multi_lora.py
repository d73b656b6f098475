"""``multi_lora_linear``: one frozen linear, a batch whose rows belong to several adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import dropout, functional
from peftkern.call import Base, Call, Rows, Span, Update
from peftkern.ops import check
from peftkern.segments import Routing, on_device, plan_on_device, plan_rows
from peftkern.weights import FrozenWeight

_Factors = Tensor | Sequence[Tensor]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: _Factors,
    lora_B: _Factors,
    scaling: Tensor | Sequence[float],
    ids: Tensor | Routing,
    *,
    ranks: Sequence[int] | None = None,
    bias: Tensor | None = None,
    lora_bias: Sequence[Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    rng_states: Sequence[tuple[int, int]] | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with E low-rank updates, of which each row of x takes one or none.

    Formula:
        y[m] = x[m] W^T + bias + c_e ((D_e(x_e) A_e^T)[i] B_e^T + lora_bias_e) for row m, which is row i of those of
        adapter e = ids[m]; the base alone where ids[m] = -1.

    Args:
        x: [M, K] or [..., K] with M rows in all.
        weight: [N, K], frozen: a tensor of x's dtype, or a FrozenWeight of any format.
        lora_A, lora_B: stacked [E, R, K] and [E, N, R], or E tensors [R_e, K] and E tensors [N, R_e] of own ranks; in
            x's dtype or float32. A rank of 0 is the base alone.
        scaling: E finite numbers, or a tensor float [E] on the CPU.
        ids: int64 or int32 [M], from -1 (the base) to E - 1; or their plan (``segments.plan_rows``), which layers can
            share. On the CPU they are checked; on x's device they are not read by the host, but bounded there
            (``segments.plan_on_device``), and every adapter costs as if all rows were its own, except by Triton, where
            it costs its own rows, and an s and a t of all.
        ranks: the true ranks of stacked factors, E integers; what lies beyond is not read, and its gradient is zero.
        bias: [N]; lora_bias: E tensors [N] in their factors' dtype, or None where an adapter has none.
        dropout_p: one probability, or E of them; training: dropout is off when False.
        rng_states: E pairs (seed, offset) that key each adapter's mask; drawn from torch's generator when None.
            They are the host's numbers: a captured graph drops the same elements at every replay.
        precision, backend: as in ``lora_linear``.

    Returns: y [..., N].

    Raises: ValueError, TypeError as ``lora_linear``, naming the adapter; ValueError for an id that is no adapter's.

    Numerics: as ``lora_linear``. A row with id -1 has the bits of the same batch without adapters.
    Deterministic: yes, bitwise, for a fixed backend and thread count; gradients of an adapter without rows are zero.
    """
    base = functional.frozen(weight)
    A, B = _split(lora_A, lora_B, ranks)
    E = len(A)
    biases = [None] * E if lora_bias is None else list(lora_bias)
    if len(biases) != E:
        raise ValueError(f"lora_bias has {len(biases)} entries for {E} adapters")
    for e in range(E):
        named = {"x": x, "weight": base.data, "lora_A": A[e], "lora_B": B[e], "bias": bias, "lora_bias": biases[e]}
        check.naming(f"adapter {e}", check.devices, named)
        check.naming(f"adapter {e}", check.shapes, x, base, A[e], B[e], bias, biases[e])
    scaling = [_finite(e, value) for e, value in enumerate(_listed("scaling", scaling, E))]
    p = [float(value) if training else 0.0 for value in _listed("dropout_p", dropout_p, E)]
    for e, value in enumerate(p):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"adapter {e}: dropout_p={value} is not a probability")
    if precision not in (None, "base", "fp32"):
        raise ValueError(f"precision={precision!r} is not one of None, 'base', 'fp32'")
    plan = ids if isinstance(ids, Routing) else _plan(ids.reshape(-1), x, E)
    M = x.shape[:-1].numel()
    if not isinstance(ids, Routing) and ids.numel() != M:
        raise ValueError(f"there are {ids.numel()} adapter ids for the {M} rows of x {tuple(x.shape)}")
    if isinstance(ids, Routing) and not torch.compiler.is_compiling():  # then the operator looks
        check.numbers(plan.rows, M)  # of a batch of another size, or made by hand
    spans = {span.id: span for span in plan.spans}
    if spans and max(spans) >= E:
        raise ValueError(f"adapter id {max(spans)} is out of range for {E} adapters")
    if rng_states is not None and len(rng_states) != E:
        raise ValueError(f"rng_states has {len(rng_states)} entries for {E} adapters")
    states = rng_states or draw_states(p)
    updates = []
    for e in range(E):
        _, start, length = spans.get(e, (e, 0, 0))
        kept = p[e] if dropout.threshold(p[e]) else 0.0
        span = Span(start, length, *map(int, states[e]))
        updates.append(Update(A[e], B[e], biases[e], None, None, scaling[e], kept, 0, span))
    return run_rows(x, base, bias, updates, Rows(plan.rows, plan.inside), precision or "base", backend or "")


def run_rows(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, updates: Sequence[Update], rows: Rows,
    precision: str = "base", backend: str = "",
) -> Tensor:  # fmt: skip
    """``multi_lora_linear`` behind its checks of shapes; every update has a span. Applies autocast's rule."""
    if weight.data.requires_grad:
        raise ValueError("weight requires grad, but only adapters are trained: call weight.requires_grad_(False)")
    x, weight, bias = functional.autocast(x, weight, bias)
    call = Call((Base(weight, bias),), tuple(updates), precision, backend, rows)
    check.forward(call, functional.flattened(x))
    return functional.run(x, call)[0]


def _plan(ids: Tensor, x: Tensor, E: int) -> Routing:
    if not on_device(ids):
        return plan_rows(ids, x.device)
    if ids.device != x.device:
        raise ValueError(f"adapter ids are on the CPU or where x is, got ids on {ids.device}, x on {x.device}")
    return plan_on_device(ids, range(E))


def _split(lora_A: _Factors, lora_B: _Factors, ranks: Sequence[int] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Factors by adapter, each of its true rank: views of stacked ones."""
    if len(lora_A) != len(lora_B):
        raise ValueError(f"lora_A has {len(lora_A)} adapters and lora_B {len(lora_B)}")
    if ranks is None:
        return list(lora_A), list(lora_B)
    if not isinstance(lora_A, Tensor) or not isinstance(lora_B, Tensor):
        raise TypeError("ranks are given where lora_A [E, R, K] and lora_B [E, N, R] are stacked")
    if len(ranks) != len(lora_A) or not all(0 <= r <= lora_A.shape[1] for r in ranks):
        raise ValueError(f"ranks are {len(lora_A)} integers from 0 to R = {lora_A.shape[1]}, got {list(ranks)}")
    A = [factor[:r] for factor, r in zip(lora_A.unbind(), ranks, strict=True)]
    return A, [factor[:, :r] for factor, r in zip(lora_B.unbind(), ranks, strict=True)]


def _listed(name: str, values: float | Tensor | Sequence[float], E: int) -> list[float]:
    if isinstance(values, (int, float)):
        return [values] * E
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    if not isinstance(listed, list) or len(listed) != E:
        raise ValueError(f"{name} is one number for each of the {E} adapters, got {values!r}")
    return listed


def _finite(e: int, value: float) -> float:
    if not -math.inf < value < math.inf:
        raise ValueError(f"adapter {e}: scaling={value} is not finite")
    return float(value)


def draw_states(p: Sequence[float]) -> Sequence[tuple[int, int]]:
    """Seeds and offsets from torch's generator on the CPU, where anything is dropped."""
    if not any(map(dropout.threshold, p)):
        return [(0, 0)] * len(p)
    return [tuple(dropout.draw_rng_state(torch.device("cpu")).tolist()) for _ in p]
