"""``serve``: one model, many adapters."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from peftkern.adapters.config import LoRAConfig
from peftkern.adapters.files import AdapterFile, check_complete, key_of, read_adapter
from peftkern.adapters.injection import refuse_adapted, replace
from peftkern.adapters.targets import find_targets
from peftkern.bank.bank import AdapterBank
from peftkern.bank.linear import MultiLoRALinear, why_not_served
from peftkern.bank.routes import Route
from peftkern.ops.check import naming


def serve(
    model: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str] | AdapterFile] | None = None,
    *,
    target_modules: Sequence[str] | str = (),
) -> AdapterBank:
    """Put a bank of adapters under the linear layers of a model, in place, and freeze the model.

    Args:
        model: a transformers model or any module without adapters, its linear layers plain or quantised by bitsandbytes
            (load it in 4 bits: many adapters over one packed base). Its forward then also takes ``adapters=ids``, which
            is ``with bank.route(ids)`` around the call (``generate`` needs the block).
        adapters: folders in PEFT's format, or what ``read_adapter`` returns, by name.
        target_modules: further layers, for adapters that come later: names or their ends, a regex, or "all-linear". The
            layers of ``adapters`` carry the bank in any case.
    Returns: the bank.
    Raises: those of ``read_adapter`` and ``AdapterBank.load``, naming the adapter; ValueError for a layer that the
        model lacks, or that an adapter's settings name and its tensors lack, or where there is no layer at all;
        TypeError for one that is no plain linear, nor bitsandbytes' or torchao's; RuntimeError for a model with
        adapters. The model is then as it was.
    """
    refuse_served(model)
    refuse_adapted(model)
    files = {
        name: given if isinstance(given, AdapterFile) else naming(f"adapter {name!r}", read_adapter, given)
        for name, given in (adapters or {}).items()
    }
    modules = {name: module for name, module in model.named_modules() if name}
    targets: dict[str, nn.Module] = {}
    if target_modules:
        targets |= find_targets(model, LoRAConfig(1, 1, target_modules), why_not_served)
    for name, file in files.items():
        for layer in file.layers:
            if layer not in modules:
                raise ValueError(f"adapter {name!r}: {key_of(layer, 'lora_A')}: the model has no such layer")
            targets[layer] = modules[layer]
        naming(f"adapter {name!r}", check_complete, modules, file)
    if not targets:
        raise ValueError("serve needs adapters or target_modules")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bank = AdapterBank()
    try:
        made: dict[nn.Module, nn.Module] = {}
        for layer in (layer for layer in modules if layer in targets):  # in the model's order
            if targets[layer] in made:
                raise ValueError(f"{layer} is a second name of a layer, which would have to carry two adapters")
            made[targets[layer]] = MultiLoRALinear(targets[layer], bank, layer)
        for name, file in files.items():
            naming(f"adapter {name!r}", bank.load, name, file)
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    replace(model, made)
    model.requires_grad_(False)
    originals = {new: old for old, new in made.items()}
    hooks = [
        model.register_forward_pre_hook(_enter(bank), with_kwargs=True, prepend=True),
        model.register_forward_hook(_leave, with_kwargs=True, always_call=True),
    ]
    bank.served = (model, originals, hooks)
    return bank


def unserve(bank: AdapterBank) -> None:
    """Put the layers back that ``serve`` replaced, as they were, frozen. Raises: ValueError where it has been done."""
    if bank.served is None:
        raise ValueError("the bank serves no model")
    model, originals, hooks = bank.served
    bank.served = None
    replace(model, originals)
    for hook in hooks:
        hook.remove()


def refuse_served(model: nn.Module) -> None:
    """Raises: RuntimeError where a bank is under the model already."""
    if any(isinstance(module, MultiLoRALinear) for module in model.modules()):
        raise RuntimeError("the model is served already: add adapters to its bank, or unserve it")


# Routes that calls of served models with ``adapters=`` have entered, innermost last; None for calls without it.
_entered: contextvars.ContextVar[tuple[Route | None, ...]] = contextvars.ContextVar("peftkern_entered", default=())


def _enter(bank: AdapterBank) -> Callable[..., tuple[Any, Any]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        ids = kwargs.pop("adapters", None)
        route = ids if ids is None or isinstance(ids, Route) else bank.route(ids)
        if route is not None:
            route.__enter__()
        _entered.set((*_entered.get(), route))
        return args, kwargs

    return hook


def _leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    *before, route = _entered.get() or (None,)
    _entered.set(tuple(before))
    if route is not None:
        route.__exit__()
