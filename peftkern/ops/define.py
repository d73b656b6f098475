"""How an operator becomes known to torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def define(library: torch.library.Library, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """``peftkern::name`` with its implementation for every device, and its fake one.

    The dispatcher takes None where a schema says ``Tensor``: here that is a TypeError, in both.
    """
    library.define(schema)
    name = schema.partition("(")[0]
    operator = getattr(torch.ops.peftkern, name).default
    positions = [
        (i, a.name) for i, a in enumerate(operator._schema.arguments) if str(a.type) in ("Tensor", "List[Tensor]")
    ]

    def complete(implementation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(implementation)
        def call(*arguments: Any, **tables: Any) -> Any:
            for i, argument in positions:
                value = arguments[i]
                if value is None or (value.__class__ is list and any(entry is None for entry in value)):
                    raise TypeError(f"{name}: {argument} is missing")
            return implementation(*arguments, **tables)

        return call

    library.impl(name, complete(real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{name}", complete(fake), lib=library)
    return operator
