"""The entries of a state_dict, read and written: facts as JSON in bytes, and checks that name the key.

Nothing here unpickles or looks a name up in a module: dtypes come from a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LONGEST = 64 * 1024  # bytes of facts


def dtype_name(dtype: torch.dtype) -> str:
    """The name that ``DTYPES`` has for a dtype."""
    return str(dtype).removeprefix("torch.")


def pack_facts(facts: dict[str, Any]) -> Tensor:
    """JSON as a uint8 tensor."""
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


def unpack_facts(tensor: Any, key: str) -> dict[str, Any]:
    """The facts of ``pack_facts``. Raises: ValueError naming the key."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > _LONGEST:
        raise ValueError(f"{key} is a uint8 vector of JSON, not {_describe(tensor)}")
    try:
        facts = json.loads(bytes(tensor.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{key} is a JSON object, not {type(facts).__name__}")
    return facts


@dataclass
class Saved:
    """The entries of a weight, by what follows its name and a dot; the payload is "". ``key`` is that of the facts."""

    name: str
    entries: dict[str, Tensor]
    facts: dict[str, Any]
    key: str

    def take(self, part: str) -> Tensor:
        """Remove and return an entry. Raises: ValueError naming the key that is missing or no tensor."""
        key = f"{self.name}.{part}" if part else self.name
        value = self.entries.pop(part, None)
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is missing" if value is None else f"{key} is not a tensor, but {_describe(value)}")
        return value

    def finish(self) -> None:
        """Raise ValueError for what nobody has taken."""
        if self.entries:
            raise ValueError(f"unexpected: {', '.join(f'{self.name}.{part}' for part in sorted(self.entries))}")

    def integer(self, fact: str) -> int:
        """A fact that is a whole number, zero or more."""
        return self._fact(fact, "a whole number", lambda v: type(v) is int and 0 <= v < 2**63)

    def number(self, fact: str) -> float:
        """A fact that is a finite number."""
        return float(self._fact(fact, "a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)))

    def shape(self) -> tuple[int, int]:
        """The fact that is the weight's shape."""
        sizes = self._fact("shape", "[N, K]", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_size, v)))
        return sizes[0], sizes[1]

    def dtype(self, fact: str = "dtype") -> torch.dtype:
        """A fact that is the name of a floating dtype."""
        return DTYPES[self._fact(fact, f"one of {', '.join(DTYPES)}", lambda v: isinstance(v, str) and v in DTYPES)]

    def _fact(self, fact: str, what: str, fits: Callable[[Any], bool]) -> Any:
        value = self.facts.get(fact)
        if not fits(value):
            raise ValueError(f"{self.key}: {fact} is {what}, not {value!r}")
        return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


def require(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """The tensor, if it has this dtype, shape and device. Raises: ValueError."""
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {dtype_name(dtype)} {list(shape)}, got {_describe(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the weight's data on {device}")
    return tensor


def require_finite(name: str, tensor: Tensor, negative: bool = False) -> None:
    """Raise ValueError for NaN or Inf, and for anything negative unless it is allowed."""
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has NaN or Inf")
    if not negative and (tensor < 0).any():
        raise ValueError(f"{name} has negative scales")


def require_group(name: str, what: str, size: int, smallest: int = 16, largest: int = 2**30) -> None:
    """Raise ValueError unless a group's size is a power of two in range."""
    if size & (size - 1) or not smallest <= size <= largest:
        raise ValueError(f"{name}: {what} is a power of two from {smallest} to {largest}, not {size}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return "nothing" if value is None else type(value).__name__
