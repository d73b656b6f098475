"""The choice of the backend that runs a problem, and the reasons why others do not."""

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
from peftkern.call import Call, Gradients, Needs, Pair, PairGradients, PairNeeds, Problem
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
    """The reason why ``backend`` cannot run ``problem``, or None."""
    return backend.unavailable() or backend.supports(problem)


def select(problem: Problem, requested: str) -> Backend:
    """The backend for a problem.

    Args:
        problem: the key.
        requested: "auto", a backend's name, or "" for what PEFTKERN_BACKEND says.
    Raises: RuntimeError with the reason when an explicitly requested backend cannot run the problem.
    """
    return _select(
        requested or _env.settings().backend, (tuple(getattr(problem, field) for field in Problem.__slots__),)
    )


def backend_of(call: Call, M: int, device_type: str, dtype: torch.dtype) -> Backend:
    """``select`` for a call of M rows: the first backend that can run all of its pairs."""
    keys, requested = call.keys(M, dtype), call.backend or _env.settings().backend
    return _select(requested, keys) if keys else _available(device_type, requested)


def backend_of_pair(pair: Pair, M: int, dtype: torch.dtype) -> Backend:
    """``select`` for a pair and M rows, by PEFTKERN_BACKEND."""
    return _select(_env.settings().backend, (pair.key(M, dtype),))


@functools.lru_cache(maxsize=4096)
def _select(requested: str, keys: tuple[tuple, ...]) -> Backend:
    problems = [Problem(*key) for key in keys]
    if requested != "auto":
        backend = backend_named(requested)
        for problem in problems:
            _require(backend, refusal(backend, problem))
        return backend
    for backend in candidates(problems[0].device_type):
        if all(refusal(backend, problem) is None for problem in problems):
            return backend
        _warn_if_better_was_expected(backend, problems[0].device_type)
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
    """True where autocast is on for a device; it is unknown to some, such as meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


_NOTHING = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A region in which operators take their operands as they are."""
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else _NOTHING


def forward(call: Call, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Every y [M, N_b] and s [M, R_u]; with rows one s, the spans' [count, R] one behind the other."""
    M = x.shape[0]
    if M == 0:
        return empty_results(call, x)
    device_type = x.device.type
    backend = backend_of(call, M, device_type, x.dtype)
    with without_autocast(device_type):
        return backend.forward(call, x)


def backward(
    call: Call, dys: Sequence[Tensor], x: Tensor | None, thin: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """The gradients that are needed."""
    M, device_type, dtype = dys[0].shape[0], dys[0].device.type, dys[0].dtype
    if M == 0:
        return zero_gradients(call, dys[0], needs)
    backend = backend_of(call, M, device_type, dtype)
    with without_autocast(device_type):
        return backend.backward(call, dys, x, thin, needs)


def pair(backend: Backend, pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and s of a pair by a backend that can run it. M >= 1."""
    if autocasting(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return backend.pair(pair, x)
    return backend.pair(pair, x)


def pair_backward(
    backend: Backend, pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: PairNeeds
) -> PairGradients:
    """The gradients of a pair that are needed, by the backend that has run its forward. M >= 1."""
    if autocasting(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return backend.pair_backward(pair, dy, x, s, None, needs)
    return backend.pair_backward(pair, dy, x, s, None, needs)


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
    _require(backend, backend.unavailable())
    return backend


def _require(backend: Backend, refused: str | None) -> None:
    if refused is not None:
        raise RuntimeError(f"backend {backend.name!r} was requested and cannot run this call: {refused}")


def empty_results(call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What ``forward`` returns, without its values: all of it where there are no tokens."""
    wide, M = torch.promote_types(x.dtype, torch.float32), x.shape[0]
    ys = [x.new_empty(M, weight.shape[0]) for weight, _ in call.bases]
    if call.rows is not None:
        return ys, [x.new_empty(call.thin_size, dtype=wide)]
    return ys, [x.new_empty(M, update.R, dtype=wide) for update in call.updates]


def zero_gradients(call: Call, dy: Tensor, needs: Needs) -> Gradients:
    """What ``backward`` returns where there are no tokens: exact zeros for the parameters; dx without its values."""

    def zeros(parameter: Tensor | None, need: bool) -> Tensor | None:
        if parameter is None or not need:
            return None
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)

    dx = dy.new_empty(dy.shape[0], call.bases[0].weight.shape[1]) if needs.x else None
    _, *each = needs
    return Gradients(
        dx, *(list(map(zeros, column, needed)) for column, needed in zip(call.parameters(), each, strict=True))
    )
