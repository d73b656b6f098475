"""The layers of a model that an adapter goes to: PEFT's rules on names, with errors that say what was not found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkern.adapters.config import LoRAConfig, compiled, matches, some
from peftkern.nn.lora_linear import LoRALinear, why_not_linear


def linear_names(model: nn.Module) -> list[str]:
    """Every nn.Linear and Conv1D below the model, without the output head of a transformers model."""
    output_head: Any = getattr(model, "get_output_embeddings", None)
    head = output_head() if callable(output_head) else None
    return [
        name
        for name, module in model.named_modules()
        if name
        and module is not head
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def find_targets(
    model: nn.Module, config: LoRAConfig, why_not: Callable[[nn.Module], str | None] = why_not_linear
) -> dict[str, nn.Module]:
    """The layers by name; ``why_not`` says why a module cannot be one.

    Raises: ValueError naming each entry of the config that matched nothing; TypeError naming each match that is no
        plain linear layer, and why.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = tuple(linear_names(model))
        found = list(targets)
    else:
        found = [name for name in modules if matches(targets, name)]
        _check_used("target_modules", targets, modules, linear_names(model))
    chosen = [name for name in found if not matches(config.exclude_modules, name)]
    _check_used("exclude_modules", config.exclude_modules, found, found)
    if not chosen:
        raise ValueError(f"no layer is left: target_modules={targets!r}, exclude_modules={config.exclude_modules!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(map(compiled(field, pattern).match, chosen)):
                raise ValueError(f"{field}: {pattern!r} matches no adapted layer; they are {some(chosen)}")
    wrong = {name: why_not(modules[name]) for name in chosen}
    reasons = [f"{name}: {why}" for name, why in wrong.items() if why]
    if reasons:
        raise TypeError(f"{len(reasons)} target(s) cannot be adapted: {some(reasons)}")
    return {name: modules[name] for name in chosen}


def _check_used(field: str, rule: Sequence[str] | str, names: Iterable[str], known: Sequence[str]) -> None:
    entries = [rule] if isinstance(rule, str) else [[entry] for entry in rule]
    unused = [
        entry if isinstance(entry, str) else entry[0] for entry in entries if not any(matches(entry, n) for n in names)
    ]
    if rule and unused:
        ends = sorted({name.rpartition(".")[2] for name in known})
        raise ValueError(f"{field}: nothing is named {unused!r}; linear layers are named {some(ends)}")


def short_targets(model: nn.Module, adapted: Sequence[str]) -> tuple[str, ...] | str:
    """target_modules that name exactly these layers: the ends of their names, else the names, else a regex."""
    others = {name for name, module in model.named_modules() if name and not isinstance(module, LoRALinear)}
    ends = tuple(sorted({name.rpartition(".")[2] for name in adapted}))
    for rule in (ends, tuple(adapted)):
        if not any(matches(rule, name) for name in others):
            return rule
    return "|".join(re.escape(name) for name in adapted)
