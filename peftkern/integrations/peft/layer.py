"""The class that a patched layer has: PEFT's LoRA linear with another ``forward``."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from peftkern import dropout
from peftkern.call import Base, Call, Update
from peftkern.functional import autocast, run, run_dora, run_in, split_scaling
from peftkern.integrations import quantised
from peftkern.integrations.peft import tally, units, zero3
from peftkern.integrations.peft.memo import memo_of
from peftkern.integrations.peft.mixed_batch import mixed_batch
from peftkern.integrations.peft.read import Adapter, Parts, plain_parts, why_not_input
from peftkern.weights import DenseWeight, FrozenWeight

_disabled: contextvars.ContextVar[bool] = contextvars.ContextVar("peftkern_disabled", default=False)
_compiling = torch.compiler.is_compiling  # asked at every call
_open_blocks = 0  # of disabled(), in any context: torch.compile can guard on a number, not on a context variable


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within the block, in this context (thread, task), patched layers run PEFT's own forward."""
    global _open_blocks
    token = _disabled.set(True)
    _open_blocks += 1
    try:
        yield
    finally:
        _open_blocks -= 1
        _disabled.reset(token)


def patched_forward_is_off() -> bool:
    """Whether this context is in a block of ``disabled``."""
    return bool(_open_blocks) and _disabled_here()


@torch.compiler.assume_constant_result
def _disabled_here() -> bool:
    return _disabled.get()


class PeftkernLoraLinear(lora.Linear):
    """PEFT's LoRA linear with peftkern's forward. Made by ``patch``, never constructed."""

    peft: type[nn.Module] = lora.Linear  # the class it had, whose forward runs where the fast path does not

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or patched_forward_is_off():
            return _unusual(self, x, args, kwargs)
        own = None if _compiling() else self.__dict__.get(tally.KEY)
        memo = None if own is None else own.memo  # read once: another thread may put its own there
        if own is not None and memo is not None and memo.holds(x):
            own.fused += 1
            return memo.run(x)
        parts = (zero3.gather(self) if zero3.hooked(self) else None) or plain_parts(self)
        if not isinstance(parts, str) and parts.units and _compiling():
            parts = "a compiler traces it, and children of it are units of FSDP"
        if isinstance(parts, str):
            tally.fell_back(self, parts)
            return _pefts(self).forward(self, x)
        reason = why_not_input(parts, units.as_cast(parts.units, x) if parts.units else x)
        if reason is not None:
            tally.fell_back(self, reason, of_input=True)
            return _pefts(self).forward(self, x)
        tally.fused(self)
        if parts.units:
            return _within_units(self, x, parts)
        if own is not None:
            own.memo = memo = memo_of(self, parts, x)
            if memo is not None and memo.holds(x):
                return memo.run(x)
        return fused(x, parts)

    def _get_name(self) -> str:
        return "Linear"  # print(model) looks as PEFT's does


def _pefts(layer: Any) -> Any:
    """The class whose forward is PEFT's: what a patched layer had; its own, where only the forward was put on it."""
    kind = type(layer)
    return getattr(kind, "peft", kind)


def _unusual(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A call in a block of ``disabled``, or with more arguments than x: a mixed batch, or PEFT's own."""
    if patched_forward_is_off():
        y: Tensor | str = tally.OFF
    elif args or kwargs.keys() != {"adapter_names"}:
        y = f"its call has the arguments {', '.join(kwargs) or 'x and ' + str(len(args))}"
    elif zero3.hooked(layer):
        y = "a mixed batch under ZeRO-3"
    else:
        y = mixed_batch(layer, x, kwargs["adapter_names"])
    if isinstance(y, str):
        tally.fell_back(layer, y, of_input=y != tally.OFF)
        return _pefts(layer).forward(layer, x, *args, **kwargs)
    tally.fused(layer)
    return y


def _within_units(layer: Any, x: Tensor, parts: Parts) -> Tensor:
    """y of a layer some of whose children are units of FSDP."""

    def gathered(x: Tensor) -> Tensor:
        found = plain_parts(layer, seen=units.gathered)
        if isinstance(found, str):
            raise RuntimeError(f"FSDP has gathered what the fast path does not take: {found}")
        return fused(x, found)

    return units.within(parts.units, layer._modules["base_layer"], x, gathered)


def fused(x: Tensor, parts: Parts) -> Tensor:
    """y of a layer that the predicate has let through."""
    weight, bias, adapters = parts.weight, parts.bias, parts.adapters
    if isinstance(weight, FrozenWeight):
        return _over_quantised(x, weight, parts)
    x, frozen, bias = autocast(x, DenseWeight(weight), bias)
    call = Call((Base(frozen, bias),), updates_of(x, adapters))
    magnitude = adapters[0].magnitude
    return run(x, call)[0] if magnitude is None else run_dora(x, call, magnitude)


def _over_quantised(x: Tensor, weight: FrozenWeight, parts: Parts) -> Tensor:
    """Adapters beside a base that rounds x to a dtype of its own."""
    bias, dtype = parts.bias, quantised.dtype_of_products(x, parts.compute)
    if parts.follows_autocast:
        x = x.to(dtype)
    updates = updates_of(x, parts.adapters)
    if x.dtype == dtype:
        return run(x, Call((Base(weight, None if bias is None else bias.to(dtype)),), updates))[0]
    y = run_in(x, Call((Base(weight, None),), updates), dtype)
    return y if bias is None else y + bias.to(y.dtype)  # not rounded to the base's dtype, nor is its gradient


def updates_of(x: Tensor, adapters: Sequence[Adapter], base: int = 0) -> tuple[Update, ...]:
    """The updates that adapters are, but for a magnitude; draws their RNG states.

    PEFT casts x to each one's dtype in turn, which the dtype rule makes a widening.
    """
    updates = []
    for A, B, lora_bias, p, scaling, _ in adapters:
        rng_state = dropout.draw_rng_state(x.device) if p else None
        c, tensor = split_scaling(scaling, x)
        updates.append(Update(A, B, lora_bias, tensor, rng_state, c, p, base))
    return tuple(updates)
