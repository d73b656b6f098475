"""Which products run and what is saved; no mathematics.

Saved for backward: x, every s, the parameters, two RNG integers an update and a snapshot of a scaling tensor. Never a
dropout mask, a dropped or widened copy of x, or a product with the frozen weight. Only what backward reads is saved, so
that an in-place update of anything else is not held against the caller; of the rest backward wants shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.backends.base import Backend, no_gradients
from peftkern.call import Base, Call, Gradients, Layout, Needs, Pair, PairNeeds, join, others, split
from peftkern.ops import dispatch, eager
from peftkern.saved_tensors import saved_tensors

_BEFORE = 3  # arguments of LoRAFunction before the call's tensors


class Bound(NamedTuple):
    """A pair whose tensors outlive the graph, and the backend that runs it: what ``run_pair`` has decided before."""

    pair: Pair
    backend: Backend


class LoRAFunction(torch.autograd.Function):
    """Every y [..., N_b] of a call on x [..., K], as one node; once differentiable in x, every A, B and bias.

    The arguments are x; whether the products are in fp16 of an x in another dtype, which y and dx have; and the call as
    ``call.split`` leaves it, or a ``Bound`` pair and its bias, lora_A, lora_B and lora_bias. In fp16, dy may lie where
    there are few digits or none: it is brought to about 2^-4 by a power of two, which is taken out of every gradient
    again. A NaN or an infinity in dy leaves it as it is.
    """

    @staticmethod
    def forward(ctx: Any, x, half: bool, held: Layout | Bound, *tensors) -> Any:
        if held.__class__ is Bound:
            return _pair_forward(ctx, x, held)
        return _call_forward(ctx, x, half, held, tensors)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable costs 7 us, and says something where a graph of backward is made, alone.
        return _graphed_backward(ctx, *dys) if torch.is_grad_enabled() else _backward(ctx, *dys)


def _backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
    return _pair_backward(ctx, *dys) if ctx.held.__class__ is Bound else _call_backward(ctx, *dys)


def _pair_forward(ctx: Any, x: Tensor, held: Bound) -> Tensor:
    pair, shape = held.pair, x.shape
    y, s = dispatch.pair(held.backend, pair, flattened(x))
    need_x, _, _, _, need_A, need_B, _ = ctx.needs_input_grad
    # In the order of _call_forward: a checkpoint compares what forward and recomputation save.
    ctx.save_for_backward(
        x if need_A else None, s if need_B else None, pair.lora_A if need_x else None,
        pair.lora_B if need_x or need_A else None, pair.rng_state, *(pair.weight.tensors if need_x else ()),
    )  # fmt: skip
    ctx.held, ctx.shape = held, shape
    return unflattened(y, shape)


def _pair_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (pair, backend), shape = ctx.held, ctx.shape
    x, s, A, B, state, *weight = saved_tensors(ctx)
    need_x, _, _, need_bias, need_A, need_B, need_lora_bias = ctx.needs_input_grad
    if need_x and any(one is not other for one, other in zip(weight, pair.weight.tensors, strict=True)):
        pair = pair._replace(weight=pair.weight.holding(weight))  # hooks have put others in their place
    if state is not pair.rng_state or A is not pair.lora_A or B is not pair.lora_B:
        A, B = pair.lora_A if A is None else A, pair.lora_B if B is None else B
        pair = pair._replace(lora_A=A, lora_B=B, rng_state=state)
    x, dy = None if x is None else flattened(x), flattened(dy)
    if eager.watched(dy):
        call = Call((Base(pair.weight, pair.bias),), (pair.update(),), pair.precision)
        wanted = Needs(need_x, [need_bias], [need_A], [need_B], [need_lora_bias])
        dx, (dbias,), (dA,), (dB,), (dlora_bias,) = eager.backward(call, [dy], x, [s], wanted)
    else:
        needs = PairNeeds(need_x, need_A, need_B, need_bias, need_lora_bias)
        dx, dA, dB, dbias, dlora_bias = dispatch.pair_backward(backend, pair, dy, x, s, needs)
    return (dx if len(shape) == 2 or dx is None else dx.view(shape)), None, None, dbias, dA, dB, dlora_bias


def _call_forward(ctx: Any, x: Tensor, half: bool, layout: Layout, tensors: Sequence[Any]) -> Any:
    call = join(layout, tensors)
    if any(update.scaling_tensor is not None for update in call.updates):
        updates = tuple(u._replace(scaling_tensor=snapshot(u.scaling_tensor)) for u in call.updates)
        call = call._replace(updates=updates)
    rows = x.to(torch.float16) if half else x
    ys, thin = eager.forward(call, flattened(rows))
    needs = _needs(call, ctx.needs_input_grad)
    keep_s = [any(needs.lora_B)] if call.rows is not None else needs.lora_B
    tensors, read = (*call.flat_parameters(), *others(call)), _read(call, needs)
    ctx.save_for_backward(
        rows if True in needs.lora_A else None, *(s if keep else None for s, keep in zip(thin, keep_s, strict=True)),
        *(tensor if reads else None for tensor, reads in zip(tensors, read, strict=True)),
    )  # fmt: skip
    ctx.unread = [None if reads or t is None else t.detach() for t, reads in zip(tensors, read, strict=True)]
    ctx.held, ctx.facts = layout, (needs, half, len(thin), x.shape)
    ys = [y.to(x.dtype) for y in ys] if half else ys
    ys = [unflattened(y, x.shape) for y in ys]
    if len(ys) == 1:
        return ys[0]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(y for b, y in enumerate(ys) if not _any(needs, call, b)))
    return tuple(ys)


def _call_backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    needs, half, count, shape = ctx.facts
    x, *saved = saved_tensors(ctx)
    thin, saved = saved[:count], saved[count:]
    call = join(ctx.held, [other if one is None else one for one, other in zip(saved, ctx.unread, strict=True)])
    wanted = ctx.needs_input_grad
    used = [b for b, dy in enumerate(dys) if dy is not None and _any(needs, call, b)]
    if not used:
        return (None,) * len(wanted)
    given: list[Any] = [dys[b] for b in used]
    x, given = None if x is None else flattened(x), list(map(flattened, given))
    if half:
        power, dtype = _power_of(given[0]), given[0].dtype
        given = [(given[0] * power).to(torch.float16)]
    if len(used) < len(dys):
        mine = [i for i, update in enumerate(call.updates) if update.base in used]
        part, asked = _part(call, used, mine), _part_of_needs(needs, used, mine)
        some = eager.backward(part, given, x if True in asked.lora_A else None, [thin[i] for i in mine], asked)
        found = _spread(some, call, used, mine)
    else:
        found = eager.backward(call, given, x, thin, needs)
    dx, *columns = found
    if half:
        dx = None if dx is None else (dx.float() / power).to(dtype)
        columns = [[g if g is None else g / power for g in column] for column in columns]
    gradients = [None if dx is None else dx.view(shape), None, None, *(g for column in columns for g in column)]
    if call.rows is not None:  # a pair's gradients come together
        gradients = [g if need else None for g, need in zip(gradients, wanted, strict=False)]
    return (*gradients, *[None] * (len(wanted) - len(gradients)))


_graphed_backward = once_differentiable(_backward)


def lora(x: Tensor, call: Call, half: bool = False) -> Any:
    """``LoRAFunction`` of a call: y, or, of several bases, a tuple of them.

    It goes past ``apply``'s search for torch.func's wrappers, which the caller has ruled out.
    """
    layout, tensors = split(call)
    if torch.compiler.is_compiling():
        return LoRAFunction.apply(x, half, layout, *tensors)
    return super(torch.autograd.Function, LoRAFunction).apply(x, half, layout, *tensors)


def lora_pair(x: Tensor, pair: Pair, backend: Backend) -> Tensor:
    """The same of a pair whose tensors outlive the graph. Not for a compiler."""
    parameters = (pair.bias, pair.lora_A, pair.lora_B, pair.lora_bias)
    return super(torch.autograd.Function, LoRAFunction).apply(x, False, Bound(pair, backend), *parameters)


def flattened(rows: Tensor) -> Tensor:
    """Rows [..., C] as [M, C]."""
    return rows if rows.ndim == 2 else rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])


def unflattened(y: Tensor, shape: torch.Size) -> Tensor:
    """y [M, N] with the leading dimensions of an x of this shape.

    No view: autograd lets none be modified in place behind a reentrant checkpoint.
    """
    return y if len(shape) == 2 else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[-1]))


def snapshot(scaling_tensor: Tensor | None) -> Tensor | None:
    """A copy: backward uses the value that forward saw."""
    return None if scaling_tensor is None else scaling_tensor.detach().clone()


def _needs(call: Call, wanted: Sequence[bool]) -> Needs:
    """Which gradients autograd wants, of the arguments of ``LoRAFunction``; with rows a pair's come together."""
    b, E = len(call.bases), len(call.updates)
    at = _BEFORE + b
    A, B = list(wanted[at : at + E]), list(wanted[at + E : at + 2 * E])
    if call.rows is not None:
        A = B = [one or other for one, other in zip(A, B, strict=True)]
    return Needs(wanted[0], list(wanted[_BEFORE:at]), A, B, list(wanted[at + 2 * E : at + 3 * E]))


def _read(call: Call, needs: Needs) -> list[bool]:
    """Which of ``call.split``'s tensors backward reads; not the numbers of rows, which inference mode may have made."""
    b, E, need_x = len(call.bases), len(call.updates), needs.x
    read = [False] * b + [need_x] * E + [need_x or need for need in needs.lora_A] + [False] * E
    for weight, _ in call.bases:
        read += [need_x] * (2 + len(weight.tables))
    return read + [True] * (2 * E) + [False] * (0 if call.rows is None else 2)


def _any(needs: Needs, call: Call, base: int) -> bool:
    """Whether any gradient comes from a base's y."""
    if needs.x or needs.bias[base]:
        return True
    mine = [i for i, update in enumerate(call.updates) if update.base == base]
    return any(needs.lora_A[i] or needs.lora_B[i] or needs.lora_bias[i] for i in mine)


def _part(call: Call, bases: list[int], updates: list[int]) -> Call:
    """Some bases of a call with their updates."""
    places = {b: i for i, b in enumerate(bases)}
    kept: tuple[Base, ...] = tuple(call.bases[b] for b in bases)
    return call._replace(
        bases=kept, updates=tuple(call.updates[i]._replace(base=places[call.updates[i].base]) for i in updates)
    )


def _part_of_needs(needs: Needs, bases: list[int], updates: list[int]) -> Needs:
    columns = ([column[i] for i in updates] for column in (needs.lora_A, needs.lora_B, needs.lora_bias))
    return Needs(needs.x, [needs.bias[b] for b in bases], *columns)


def _spread(part: Gradients, call: Call, bases: list[int], updates: list[int]) -> Gradients:
    """The gradients of a part of a call in their places."""
    whole = no_gradients(call)._replace(x=part.x)
    for i, b in enumerate(bases):
        whole.bias[b] = part.bias[i]
    for i, u in enumerate(updates):
        whole.lora_A[u], whole.lora_B[u], whole.lora_bias[u] = part.lora_A[i], part.lora_B[i], part.lora_bias[i]
    return whole


def _power_of(dy: Tensor) -> Tensor:
    """The power of two that takes the largest |dy| to between 2^-5 and 2^-4, fp32; 1 where there is none."""
    size = dy.abs().amax().float() if dy.numel() else dy.new_zeros((), dtype=torch.float32)
    usable = (size > 0) & (size < torch.inf)
    exponent = torch.frexp(torch.where(usable, size, 2.0**-4)).exponent
    return torch.ldexp(torch.ones_like(size), (-4 - exponent).clamp(-100, 100))
