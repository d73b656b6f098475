"""Which products run and what is saved; no mathematics.

Saved for backward: x, every s, the parameters, two RNG integers an update and a snapshot of a scaling tensor. Never a
dropout mask, a dropped or widened copy of x, or a product with the frozen weight. Only what backward reads is saved, so
that an in-place update of anything else is not held against the caller; of the rest backward wants shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern.call import UPDATE, Base, Call, Gradients, Layout, Needs, join, split
from peftkern.ops import eager
from peftkern.saved_tensors import saved_tensors

_BEFORE = 3  # arguments of LoRAFunction before the call's tensors


class LoRAFunction(torch.autograd.Function):
    """Every y of a call on 2-D x, as one node; once differentiable in x, every A, B and bias.

    The arguments are x, whether the products are in fp16 of an x in another dtype, which y and dx have, and the call as
    ``call.split`` leaves it. In fp16, dy may lie where there are few digits or none: it is brought to about 2^-4 by a
    power of two, which is taken out of every gradient again. A NaN or an infinity in dy leaves it as it is.
    """

    @staticmethod
    def forward(ctx: Any, x, half: bool, layout: Layout, *tensors) -> Any:
        call = join(layout, tensors)
        updates = tuple(update._replace(scaling_tensor=snapshot(update.scaling_tensor)) for update in call.updates)
        call = call._replace(updates=updates)
        rows = x.to(torch.float16) if half else x
        ys, thin = eager.forward(call, rows)
        needs = _needs(layout, ctx.needs_input_grad)
        some = [A or B for A, B in zip(needs.lora_A, needs.lora_B, strict=True)]
        if layout.rows:  # the pair's gradients are one launch's
            needs = needs._replace(lora_A=some, lora_B=some)
        keep_x = any(needs.lora_A)
        keep_s = [any(some)] if layout.rows else needs.lora_B
        read, ctx.unread = _sorted(call, needs)
        ctx.save_for_backward(
            rows if keep_x else None, *(s if keep else None for s, keep in zip(thin, keep_s, strict=True)), *read
        )
        ctx.facts = layout, needs, half, len(thin)
        if len(ys) == 1:
            return ys[0].to(x.dtype) if half else ys[0]
        ctx.set_materialize_grads(False)
        useful = [_any(needs, call, b) for b in range(len(ys))]
        ctx.mark_non_differentiable(*(y for y, use in zip(ys, useful, strict=True) if not use))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable costs 7 us, and says something where a graph of backward is made, alone.
        return _graphed_backward(ctx, *dys) if torch.is_grad_enabled() else _backward(ctx, *dys)


def _backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    layout, needs, half, count = ctx.facts
    x, *saved = saved_tensors(ctx)
    thin, read = saved[:count], saved[count:]
    tensors = [other if one is None else one for one, other in zip(read, ctx.unread, strict=True)]
    call = join(layout, tensors)
    result: list[Tensor | None] = [None] * (_BEFORE + len(tensors))
    used = [b for b, dy in enumerate(dys) if dy is not None and _any(needs, call, b)]
    if not used:
        return tuple(result)
    mine = [i for i, update in enumerate(call.updates) if update.base in used]
    given: list[Any] = [dys[b] for b in used]
    power = None
    if half:
        power = _power_of(given[0])
        dtype, given = given[0].dtype, [(given[0] * power).to(torch.float16)]
    if len(used) < len(dys):
        call, needs, thin = _part(call, used, mine), _part_of_needs(needs, used, mine), [thin[i] for i in mine]
        x = x if any(needs.lora_A) else None
    gradients = eager.backward(call, given, x, thin, needs)
    if power is not None:
        dx = None if gradients.x is None else (gradients.x.float() / power).to(dtype)
        _, *columns = gradients
        gradients = Gradients(dx, *([one if one is None else one / power for one in column] for column in columns))
    result[0] = gradients.x
    at = layout.bases_at
    for b, dbias in zip(used, gradients.bias, strict=True):
        result[_BEFORE + at[b] + 2] = dbias
    for i, *found in zip(mine, *gradients[2:], strict=True):
        first = _BEFORE + at[-1] + UPDATE * i
        for j, gradient in enumerate(found, first):
            result[j] = gradient if ctx.needs_input_grad[j] else None
    return tuple(result)


_graphed_backward = once_differentiable(_backward)


def lora(x: Tensor, call: Call, half: bool = False) -> Any:
    """``LoRAFunction`` of a call: y, or, of several bases, a tuple of them.

    It goes past ``apply``'s search for torch.func's wrappers, which the caller has ruled out.
    """
    layout, tensors = split(call)
    if torch.compiler.is_compiling():
        return LoRAFunction.apply(x, half, layout, *tensors)
    return super(torch.autograd.Function, LoRAFunction).apply(x, half, layout, *tensors)


def snapshot(scaling_tensor: Tensor | None) -> Tensor | None:
    """A copy: backward uses the value that forward saw."""
    return None if scaling_tensor is None else scaling_tensor.detach().clone()


def _needs(layout: Layout, wanted: Sequence[bool]) -> Needs:
    """Which gradients autograd wants, of the arguments of ``LoRAFunction``."""
    at = layout.bases_at
    first = _BEFORE + at[-1]
    bias = [wanted[_BEFORE + begin + 2] for begin in at[:-1]]
    end = first + UPDATE * len(layout.updates)
    return Needs(wanted[0], bias, *(list(wanted[first + i : end : UPDATE]) for i in range(3)))


def _sorted(call: Call, needs: Needs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """``call.split``'s tensors twice: those that backward reads, and the others without their history."""
    read: list[bool] = []
    for weight, _ in call.bases:
        read += [needs.x, needs.x, False, *[needs.x] * len(weight.tables)]
    for need_A in needs.lora_A:
        read += [needs.x, needs.x or need_A, False, True, True]
    _, tensors = split(call)
    read += [False] * (len(tensors) - len(read))  # the numbers of rows, which inference mode may have made
    kept = [tensor if reads else None for tensor, reads in zip(tensors, read, strict=True)]
    others = [None if reads or one is None else one.detach() for one, reads in zip(tensors, read, strict=True)]
    return kept, others


def _any(needs: Needs, call: Call, base: int) -> bool:
    """Whether any gradient comes from a base's y."""
    mine = [i for i, update in enumerate(call.updates) if update.base == base]
    return needs.x or needs.bias[base] or any(column[i] for column in needs[2:] for i in mine)


def _part(call: Call, bases: list[int], updates: list[int]) -> Call:
    """Some bases of a call with their updates."""
    places = {b: i for i, b in enumerate(bases)}
    kept: tuple[Base, ...] = tuple(call.bases[b] for b in bases)
    return call._replace(
        bases=kept, updates=tuple(call.updates[i]._replace(base=places[call.updates[i].base]) for i in updates)
    )


def _part_of_needs(needs: Needs, bases: list[int], updates: list[int]) -> Needs:
    return Needs(needs.x, [needs.bias[b] for b in bases], *([column[i] for i in updates] for column in needs[2:]))


def _power_of(dy: Tensor) -> Tensor:
    """The power of two that takes the largest |dy| to between 2^-5 and 2^-4, fp32; 1 where there is none."""
    size = dy.abs().amax().float() if dy.numel() else dy.new_zeros((), dtype=torch.float32)
    usable = (size > 0) & (size < torch.inf)
    exponent = torch.frexp(torch.where(usable, size, 2.0**-4)).exponent
    return torch.ldexp(torch.ones_like(size), (-4 - exponent).clamp(-100, 100))
