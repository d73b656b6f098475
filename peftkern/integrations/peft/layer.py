"""The class that a patched layer has: PEFT's LoRA linear with another ``forward``."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from peftkern import dropout
from peftkern.functional import apply, apply_adapters, apply_dora, autocast, lora_linear, split_scaling
from peftkern.integrations.peft import quantised, tally
from peftkern.integrations.peft.mixed_batch import mixed_batch
from peftkern.integrations.peft.parts import Adapter, Parts, plain_parts, why_not_input
from peftkern.ops import dispatch
from peftkern.ops.problem import LoRAOperands
from peftkern.weights import DenseWeight, FrozenWeight

_disabled: contextvars.ContextVar[bool] = contextvars.ContextVar("peftkern_disabled", default=False)
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
        parts = plain_parts(self)
        if isinstance(parts, str):
            tally.fell_back(self, parts)
            return self.peft.forward(self, x)
        reason = why_not_input(parts, x)
        if reason is not None:
            tally.fell_back(self, reason, of_input=True)
            return self.peft.forward(self, x)
        tally.fused(self)
        adapters = parts.adapters
        if len(adapters) > 1:
            return _several(x, parts)
        if adapters[0].magnitude is not None:
            return _dora(x, parts, adapters[0].magnitude)
        return _one(x, parts)

    def _get_name(self) -> str:
        return "Linear"  # print(model) looks as PEFT's does


def _unusual(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A call in a block of ``disabled``, or with more arguments than x: a mixed batch, or PEFT's own."""
    if patched_forward_is_off():
        y: Tensor | str = tally.OFF
    elif args or kwargs.keys() != {"adapter_names"}:
        y = f"its call has the arguments {', '.join(kwargs) or 'x and ' + str(len(args))}"
    else:
        y = mixed_batch(layer, x, kwargs["adapter_names"])
    if isinstance(y, str):
        tally.fell_back(layer, y, of_input=y != tally.OFF)
        return layer.peft.forward(layer, x, *args, **kwargs)
    tally.fused(layer)
    return y


def _one(x: Tensor, parts: Parts) -> Tensor:
    """One vanilla adapter."""
    weight, bias, (adapter,), _, _ = parts
    if isinstance(weight, FrozenWeight):
        return _over_quantised(x, weight, parts)
    if dispatch.autocasting(x.device.type):
        A, B, lora_bias, p, scaling, _ = adapter
        return lora_linear(x, weight, A, B, scaling, bias=bias, lora_bias=lora_bias, dropout_p=p)
    return apply(x, operands_of(x, DenseWeight(weight), bias, adapter))


def _over_quantised(x: Tensor, weight: FrozenWeight, parts: Parts) -> Tensor:
    """One vanilla adapter beside a base that rounds x to a dtype of its own."""
    (adapter,), bias = parts.adapters, parts.bias
    dtype = quantised.dtype_of_products(x, parts.compute)
    if parts.follows_autocast:
        x = x.to(dtype)
    if x.dtype == dtype:
        return apply(x, operands_of(x, weight, None if bias is None else bias.to(dtype), adapter))
    y = apply(x, operands_of(x, weight, None, adapter), compute=dtype)
    return y if bias is None else y + bias.to(y.dtype)  # not rounded to the base's dtype, nor is its gradient


def _several(x: Tensor, parts: Parts) -> Tensor:
    """The sum of several adapters. PEFT casts x to each one's dtype in turn, which the dtype rule makes a widening."""
    assert isinstance(parts.weight, Tensor)  # the predicate has seen to it
    x, weight, bias = autocast(x, DenseWeight(parts.weight), parts.bias)
    return apply_adapters(x, [operands_of(x, weight, bias, adapter) for adapter in parts.adapters])


def operands_of(x: Tensor, weight: FrozenWeight, bias: Tensor | None, adapter: Adapter) -> LoRAOperands:
    """The operands of an adapter, but for its magnitude, beside a base in x's dtype; draws its RNG state."""
    A, B, lora_bias, p, scaling, _ = adapter
    rng_state = dropout.draw_rng_state(x.device) if p else None
    c, tensor = split_scaling(scaling, x)
    return LoRAOperands(weight, A, B, bias, lora_bias, c, tensor, p, rng_state, "base")


def _dora(x: Tensor, parts: Parts, magnitude: Tensor) -> Tensor:
    assert isinstance(parts.weight, Tensor)  # the predicate has seen to it
    x, weight, bias = autocast(x, DenseWeight(parts.weight), parts.bias)
    return apply_dora(x, operands_of(x, weight, bias, parts.adapters[0]), magnitude)
