"""Which calls of a patched layer were fused, and which ran PEFT's own forward and why: what ``report`` shows.

``patch`` puts a ``Tally`` on the layer; a forward writes into it and leaves nothing else behind. A fused call costs one
addition. What a compiler traces is counted once, as a traced call: a graph runs without asking anybody.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from peftkern.saved_tensors import name_finders

logger = logging.getLogger("peftkern")

DISABLED, MERGED = "its adapters are disabled", "its adapter is merged"
OFF = "peftkern.disabled() is in force"
_ASKED_FOR = frozenset((DISABLED, MERGED, OFF))  # states that somebody has called for: counted, and not worth a line
_compiling = torch.compiler.is_compiling  # asked at every call
KEY = "_peftkern_tally"


class Tally:
    """The calls of one layer. A copy, and what is unpickled, begins anew.

    Attributes: fused: calls; fallbacks: calls by reason; traced: the same two of a compiler's, by reason, "" for fused;
    memo: what the predicate has found at the last of them, see ``memo``.
    """

    def __init__(self, name: str, reported: str | None) -> None:
        self.name, self.reported = name, reported  # the reason that ``patch`` gave, None for a layer that is fused
        self.fused = 0
        self.memo: Any = None
        self.fallbacks: dict[str, int] = {}
        self.traced: dict[str, int] = {}
        self._refused: tuple[int, str, bool] | None = None  # the last such call: ``fused`` then, why, whether for its x

    def __reduce__(self) -> tuple[Any, ...]:
        return Tally, (self.name, self.reported)

    def fell_back(self, reason: str, of_input: bool) -> None:
        """Count a call that PEFT runs, and say so where it is news."""
        before = self.fallbacks.get(reason, 0)
        self.fallbacks[reason] = before + 1
        self._refused = None if reason in _ASKED_FOR else (self.fused, reason, of_input)
        if not before:
            self._tell(reason)

    def was_traced(self, reason: str) -> None:
        """Count a call that a compiler has traced; ``reason`` is "" for one that is fused."""
        before = self.traced.get(reason, 0)
        self.traced[reason] = before + 1
        if reason and not before:
            self._tell(reason)

    def _tell(self, reason: str) -> None:
        if reason not in _ASKED_FOR and reason != self.reported:
            logger.warning("peftkern: layer %s runs PEFT's own forward: %s", self.name, reason)

    @property
    def of_last_call(self) -> str | None:
        """Why the last call was refused; None where it was fused, or PEFT's because somebody asked for that."""
        return self._refused[1] if self._refused is not None and self._refused[0] == self.fused else None

    @property
    def of_last_input(self) -> str | None:
        """The same, where it was for its x: None also where it was not for that."""
        return self.of_last_call if self._refused is not None and self._refused[2] else None


def attach(layer: Any, name: str, reason: str | None) -> None:
    """Give a layer its tally, or tell the one that it has what is now reported."""
    tally = of(layer)
    if tally is None:
        layer.__dict__[KEY] = Tally(name, reason)
    else:
        tally.name, tally.reported = name, reason


def _name_of(parameters: Collection[int]) -> str | None:
    """The name of the layer that has one of these parameters, by id. Looks everywhere: for the text of an error."""
    for layer in gc.get_objects():
        if issubclass(type(layer), nn.Module) and KEY in layer.__dict__:
            if any(id(parameter) in parameters for parameter in layer.parameters()):
                return layer.__dict__[KEY].name
    return None


name_finders.append(_name_of)


def detach(layer: Any) -> None:
    """Take it away."""
    layer.__dict__.pop(KEY, None)


def of(layer: Any) -> Tally | None:
    """The tally of a layer; None where it was not patched."""
    return layer.__dict__.get(KEY)


def fused(layer: Any) -> None:
    """Count a fused call. No lock: nothing between the load and the store gives another thread the interpreter."""
    if _compiling():
        _traced(layer, "")
        return
    tally = layer.__dict__.get(KEY)
    if tally is not None:
        tally.fused += 1


def fell_back(layer: Any, reason: str, of_input: bool = False) -> None:
    """Count a call that PEFT runs; ``of_input``: another x might have been fused."""
    if _compiling():
        _traced(layer, reason)
        return
    tally = layer.__dict__.get(KEY)
    if tally is not None:
        tally.fell_back(reason, of_input)


@torch.compiler.assume_constant_result
def _traced(layer: Any, reason: str) -> None:
    """Runs while the compiler traces, and is nothing in its graph."""
    tally = layer.__dict__.get(KEY)
    if tally is not None:
        tally.was_traced(reason)
