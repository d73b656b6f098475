"""Which backend runs a problem, and why the others do not."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import _env
from peftkern.backends.base import Backend
from peftkern.ops.bank_problem import BankBackward, BankOperands
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem
from peftkern.weights import FrozenWeight

logger = logging.getLogger("peftkern")

# Lazy registration: a backend is imported when a call first asks for it.
_LOCATIONS = {
    "triton": ("peftkern.backends.triton.backend", "TritonBackend"),
    "cpp": ("peftkern.backends.cpp.backend", "CppBackend"),
    "reference": ("peftkern.backends.reference.library", "ReferenceBackend"),
}
# In order of preference; a device that is not named here has the reference alone.
_ORDER = {"cuda": ("triton", "reference"), "cpu": ("cpp", "reference")}


@functools.cache
def backend_named(name: str) -> Backend:
    """The one instance of a backend. Raises: ValueError for an unknown name."""
    if name not in _LOCATIONS:
        raise ValueError(f"backend={name!r} is not one of auto, {', '.join(_LOCATIONS)}")
    module, attribute = _LOCATIONS[name]
    return getattr(importlib.import_module(module), attribute)()


def refusal(backend: Backend, problem: Problem) -> str | None:
    """Why ``backend`` cannot run ``problem``, or None."""
    return backend.unavailable() or backend.supports(problem)


def select(problem: Problem, requested: str) -> Backend:
    """The backend for a problem.

    Args:
        problem: the key.
        requested: "auto", a backend's name, or "" for what PEFTKERN_BACKEND says.
    Raises: RuntimeError with the reason when an explicitly requested backend cannot run the problem.
    """
    return _select(requested or _env.settings().backend, *(getattr(problem, field) for field in Problem.__slots__))


def _backend_for(operands: LoRAOperands, M: int, dtype: torch.dtype, requested: str) -> Backend:
    """``select`` for a call with M rows."""
    return _select(requested or _env.settings().backend, *operands.key(M, dtype))


@functools.lru_cache(maxsize=4096)
def _select(requested: str, *key: Any) -> Backend:
    problem = Problem(*key)
    if requested != "auto":
        backend = backend_named(requested)
        reason = refusal(backend, problem)
        if reason is not None:
            raise RuntimeError(f"backend {requested!r} was requested and cannot run this call: {reason}")
        return backend
    for backend in candidates(problem.device_type):
        if refusal(backend, problem) is None:
            return backend
        _warn_if_better_was_expected(backend, problem.device_type)
    raise AssertionError("the reference backend refuses nothing")


def candidates(device_type: str) -> Iterator[Backend]:
    """The backends for a device, best first."""
    return map(backend_named, _ORDER.get(device_type, ("reference",)))


@functools.cache
def _warn_if_better_was_expected(backend: Backend, device_type: str) -> None:
    """One log line where a user would expect better: a GPU without Triton, an extension that does not load."""
    reason = backend.unavailable()
    if reason is not None and (device_type == "cuda" or backend.broken):
        logger.warning("peftkern: backend %s is not used on %s: %s", backend.name, device_type, reason)


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device; it is unknown to some, such as meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def forward(operands: LoRAOperands, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Run the forward products: y [M, N] and s [M, R]."""
    M, N, R = x.shape[0], operands.weight.shape[0], operands.lora_A.shape[0]
    if M == 0:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(0, N), x.new_empty(0, R, dtype=wide)
    chosen = _backend_for(operands, M, x.dtype, backend)
    if autocasting(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return chosen.forward(operands, x)
    return chosen.forward(operands, x)


def backward(
    operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs, backend: str
) -> Gradients:
    """Run the backward products that are needed."""
    if dy.shape[0] == 0:
        return _zero_gradients(operands, dy, needs)
    chosen = _backend_for(operands, dy.shape[0], dy.dtype, backend)
    if autocasting(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return chosen.backward(operands, dy, x, s, needs)
    return chosen.backward(operands, dy, x, s, needs)


def forward_adapters(adapters: Sequence[LoRAOperands], x: Tensor, backend: str) -> list[Tensor]:
    """y [M, N] of several adapters on one weight, and each one's s [M, R]."""
    y, s = forward(adapters[0], x, backend)
    thin = [s]
    for operands in adapters[1:]:
        if x.shape[0] == 0:
            thin.append(s.new_empty(0, operands.lora_A.shape[0]))
            continue
        chosen = _backend_for(operands, x.shape[0], x.dtype, backend)
        with without_autocast(x.device.type):
            thin.append(chosen.accumulate(operands, x, y))
    return [y, *thin]


def backward_adapters(
    adapters: Sequence[LoRAOperands],
    dy: Tensor,
    x: Tensor | None,
    thin: Sequence[Tensor | None],
    needs: Sequence[Needs],
    backend: str,
) -> list[Gradients]:
    """Every adapter's gradients; dx, the sum over them, is in the first's alone."""
    found = [backward(adapters[0], dy, x if needs[0].lora_A else None, thin[0], needs[0], backend)]
    for operands, s, need in zip(adapters[1:], thin[1:], needs[1:], strict=True):
        if dy.shape[0] == 0:
            found.append(_zero_gradients(operands, dy, need)._replace(x=None))
            continue
        chosen = _backend_for(operands, dy.shape[0], dy.dtype, backend)
        with without_autocast(dy.device.type):
            one = chosen.accumulate_backward(operands, dy, x if need.lora_A else None, s, found[0].x, need)
        found.append(one._replace(x=None))
    return found


def forward_shared(members: Sequence[LoRAOperands], x: Tensor, backend: str) -> list[tuple[Tensor, Tensor]]:
    """y [M, N_i] and s [M, R_i] of several layers that read one x."""
    if x.shape[0] == 0:
        return [forward(operands, x, backend) for operands in members]
    chosen = [select(operands.problem(x.shape[0], x.dtype), backend) for operands in members]
    with without_autocast(x.device.type):
        if all(one is chosen[0] for one in chosen):
            return chosen[0].forward_shared(members, x)
        return [one.forward(operands, x) for one, operands in zip(chosen, members, strict=True)]


def backward_shared(
    members: Sequence[LoRAOperands],
    dys: Sequence[Tensor],
    x: Tensor | None,
    thin: Sequence[Tensor | None],
    needs: Sequence[Needs],
    backend: str,
) -> list[Gradients]:
    """Every layer's gradients; dx, the sum over them, is in the first's alone and made in one buffer."""
    found: list[Gradients] = []
    for operands, dy, s, need in zip(members, dys, thin, needs, strict=True):
        x_read = x if need.lora_A else None
        dx = found[0].x if found else None
        if dx is None or dy.shape[0] == 0:
            one = backward(operands, dy, x_read, s, need, backend)
        else:
            chosen = select(operands.problem(dy.shape[0], dy.dtype), backend)
            with without_autocast(dy.device.type):
                one = chosen.backward_onto(operands, dy, x_read, s, dx, need)
        found.append(one._replace(x=None) if found else one)
    return found


def dropped_product(
    weight: FrozenWeight, rows: Tensor, dropout_p: float, rng_state: Tensor, backward: bool, backend: str
) -> Tensor:
    """K(x) W^T [M, N], or K(dy W) [M, K]; K keeps what dropout keeps, unscaled."""
    if rows.shape[0] == 0:
        return rows.new_empty(0, weight.shape[1 if backward else 0])
    chosen = _available(rows.device.type, backend or _env.settings().backend)
    with without_autocast(rows.device.type):
        if backward:
            return chosen.kept(chosen.product(weight, rows, True), dropout_p, rng_state)
        return chosen.product(weight, chosen.kept(rows, dropout_p, rng_state), False)


def _available(device_type: str, requested: str) -> Backend:
    """A backend for what every backend can do."""
    if requested == "auto":
        return next(backend for backend in candidates(device_type) if backend.unavailable() is None)
    backend = backend_named(requested)
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} was requested and cannot run this call: {reason}")
    return backend


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A region in which operators take their operands as they are."""
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else contextlib.nullcontext()


def _zero_gradients(operands: LoRAOperands, dy: Tensor, needs: Needs) -> Gradients:
    """No tokens: an empty dx and exact zeros for the parameters, without a launch."""
    parameters = (operands.lora_A, operands.lora_B, operands.bias, operands.lora_bias)
    zeros = [
        torch.zeros_like(parameter, memory_format=torch.contiguous_format) if need and parameter is not None else None
        for need, parameter in zip(needs[1:], parameters, strict=True)
    ]
    return Gradients(dy.new_empty(0, operands.weight.shape[1]) if needs.x else None, *zeros)


def bank_forward(operands: BankOperands, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``forward`` where rows belong to several adapters; s holds the segments' [length, R], one behind the other."""
    M = x.shape[0]
    if M == 0:
        return x.new_empty(0, operands.weight.shape[0]), x.new_empty(
            0, dtype=torch.promote_types(x.dtype, torch.float32)
        )
    chosen = select(operands.problem(M, x.dtype), backend)
    with without_autocast(x.device.type):
        return chosen.bank_forward(operands, x)


def bank_backward(operands: BankOperands, given: BankBackward, need_bias: bool, backend: str) -> list[Tensor]:
    """dx, then dA and dB of each segment whose pair is needed, then dbias: those that are asked for."""
    dy, found = given.dy, []
    if dy.shape[0] == 0:
        found += [dy.new_empty(0, operands.weight.shape[1])] if given.need_x else []
        for segment, need in zip(operands.segments, given.need_pairs, strict=True):
            found += [factor.new_zeros(factor.shape) for factor in segment[:2]] if need else []
    else:
        chosen = select(operands.problem(dy.shape[0], dy.dtype), backend)
        with without_autocast(dy.device.type):
            dx, pairs = chosen.bank_backward(operands, given)
        found += [] if dx is None else [dx]
        found += [factor for pair in pairs if pair is not None for factor in pair]
    if need_bias and operands.bias is not None:
        found.append(dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(operands.bias.dtype))
    return found
