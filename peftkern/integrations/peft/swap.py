"""``patch`` and ``unpatch``: the class of each layer, swapped in place, and the report of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peftkern import _env
from peftkern.call import Problem
from peftkern.integrations import quantised
from peftkern.integrations.peft import units, zero3
from peftkern.integrations.peft.experts import ParameterParts, ParamWrapper, PeftParamWrapper, parameter_parts
from peftkern.integrations.peft.layer import PeftkernLoraLinear
from peftkern.integrations.peft.read import Parts, is_replaced, plain_parts, why_not_dtypes
from peftkern.integrations.peft.shared_input import USUAL, SharedInputLoraLinear, forget, group
from peftkern.integrations.peft.tally import Tally, attach, detach
from peftkern.integrations.peft.tally import of as tally_of
from peftkern.ops import dispatch
from peftkern.weights import FrozenWeight

_PEFTS = "PEFT's own forward: "
_REPLACED = "its forward was replaced on the instance"
logger = logging.getLogger("peftkern")


@dataclass(frozen=True)
class PatchReport:
    """The outcome of ``patch``; it prints as a table.

    ``fast``: names of the layers on the fast path; ``backends``: the backend of each of them;
    ``skipped``: name -> reason, for every other LoRA layer of the model (it runs PEFT's own forward).
    """

    fast: list[str] = field(default_factory=list)
    backends: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tallies: list[Tally] = field(default_factory=list, repr=False, compare=False)

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        """The calls of each layer so far, and not only until the report was made: "fused", and by reason the others.

        A layer that was not called is not named. What is compiled is counted when it is traced, as "... (traced)".
        """
        found = {}
        for tally in self.tallies:
            counts = ({"fused": tally.fused} if tally.fused else {}) | tally.fallbacks
            counts |= {f"{reason or 'fused'} (traced)": count for reason, count in tally.traced.items()}
            if counts:
                found[tally.name] = counts
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON; with ``calls`` where there were any."""
        found = {"fast": list(self.fast), "backends": dict(self.backends), "skipped": dict(self.skipped)}
        calls = self.calls
        return found | ({"calls": calls} if calls else {})

    def __str__(self) -> str:
        lines = [f"peftkern: {len(self.fast)} of {len(self.fast) + len(self.skipped)} LoRA layers are fused"]
        for backend, count in sorted(Counter(self.backends.values()).items()):
            lines.append(f"  {count:5d}  backend {backend}")
        for reason, count in Counter(self.skipped.values()).most_common():
            names = [name for name, text in self.skipped.items() if text == reason]
            shown = ", ".join(names[:3]) + (f", ... ({count - 3} more)" if count > 3 else "")
            lines.append(f"  {count:5d}  {_PEFTS}{reason}  [{shown}]")
        total: Counter[str] = Counter()
        for counts in self.calls.values():
            total.update(counts)
        for what, count in total.most_common():
            lines.append(f"  {count:5d}  calls: {'' if what.startswith('fused') else _PEFTS}{what}")
        return "\n".join(lines)


def patch(model: nn.Module, share: bool | Sequence[Sequence[str]] = False) -> PatchReport:
    """Run every vanilla PEFT LoRA linear of ``model`` through peftkern, in place.

    Parameters, state_dict keys, hooks on the layers, saving and loading stay PEFT's. Layers are judged again at every
    call: what changes later (merge, several adapters, an unfrozen base) runs PEFT's own forward while it lasts.

    So does PEFT's layer over a plain bitsandbytes ``Linear4bit`` or ``Linear8bitLt``, over torchao's weight-only int8
    or fp8, over transformers' ``FP8Linear``, or over gptqmodel's ``TorchLinear`` or ``AwqTorchLinear``, whose codes are
    copied in another order: y and the gradients are those of the dequantised weight. For 8 bits that is more exact than
    bitsandbytes' and transformers' own forward, which rounds x to 8 bits too, and than torchao's of int8, which rounds
    the scales to x's dtype.

    Args:
        model: any module that contains ``peft.tuners.lora.Linear`` (PeftModel, ``add_adapter`` models, wrapped ones).
        share: names of layers that read the very same x one after the other, in that order, such as
            ``[("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]``, which True stands for (with
            ``("query", "key", "value")``): those of one parent run as one node. A layer of them that is called with
            another x runs alone (``shared_inputs`` names the groups). A backward through some of them alone then
            frees what the others saved: pass retain_graph=True where a graph is run through in parts.
    Returns: a PatchReport. Calling it again changes nothing and reports anew. A layer that is reported fused and then
        cannot be, for a state that it gets into or for the x of a call, says so once, in one log line a reason.
    Raises: ValueError for a bad environment variable or a bad ``share``, RuntimeError where the former asks for a
        backend that cannot; nothing for the state that the model is in.
    """
    _env.settings()  # a bad variable is an error before anything is changed
    groups = _checked(share)
    found = PatchReport()
    done: list[nn.Module] = []
    seen = units.between(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        before = type(layer)
        reason = _swap(layer, bool(groups), seen)
        if type(layer) is not before:
            done.append(layer)
        if _class_before(layer) is not None:
            attach(layer, name, reason)
        try:
            _enter(found, name, layer, reason, seen)
        except RuntimeError as error:  # an explicitly requested backend that cannot: leave the model as it was
            for swapped in done:
                unpatch(swapped)
            raise RuntimeError(f"layer {name}: {error}") from error
        quantised.forget(layer.base_layer)
    group(layers, groups)
    if not found.fast:
        logger.warning("peftkern: no layer is fused: %s", found if found.skipped else "the model has no LoRA layer")
    return found


def _checked(share: bool | Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """The groups of names. Raises: ValueError unless each is two names or more, of which none is in two."""
    if isinstance(share, bool):
        return USUAL if share else ()
    names = [name for entry in share for name in entry]
    if any(isinstance(entry, str) or len(entry) < 2 for entry in share) or len(set(names)) < len(names):
        raise ValueError(f"share is True, or groups of two names or more, of which none is in two, got {share!r}")
    return share


def report(model: nn.Module) -> PatchReport:
    """The report of ``patch`` on a model as it is now, and on its calls so far, with nothing changed.

    Args: model: patched or not. A layer whose last call was refused for its x is among the skipped, with that reason.
    Returns: a PatchReport; ``calls`` has the calls by layer and reason, and printing it shows their sums.
    """
    found, seen = PatchReport(), units.between(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            reason = "it is not patched" if _class_before(layer) is None else _why_not(layer, seen)
            _enter(found, name, layer, reason, seen)
    return found


def _enter(report: PatchReport, name: str, layer: Any, reason: str | None, seen: units.Seen) -> None:
    """Write a layer into a report; ``reason`` is that of its state."""
    tally = tally_of(layer)
    if tally is not None:
        report.tallies.append(tally)
        reason = reason or (tally.of_last_call if units.is_managed(layer) else tally.of_last_input)
    if reason is not None:
        report.skipped[name] = reason
        return
    with zero3.as_gathered(layer):
        report.backends[name] = _expected_backend(layer, seen)
    report.fast.append(name)


def _swap(layer: Any, share: bool, seen: units.Seen) -> str | None:
    """Swap the class where the fast path can ever apply; the reason why the layer is not fast now, or None."""
    kind = units.class_of(layer)
    fast = _fast_class(_class_before(layer) or kind, share)
    if fast is None:
        return f"{kind.__module__}.{kind.__name__} is not peft.tuners.lora.Linear"
    if is_replaced(layer):
        return _REPLACED
    forget(layer)
    if kind is not fast:
        layer.__dict__.pop("forward", None)
        units.set_class(layer, fast)
    return _why_not(layer, seen)


def _why_not(layer: Any, seen: units.Seen) -> str | None:
    """The reason why a patched layer is not fast in its present state, as far as it is known without x."""
    if is_replaced(layer):
        return _REPLACED
    if isinstance(layer, ParamWrapper):
        stacked = parameter_parts(layer)
        return stacked if isinstance(stacked, str) else None
    with zero3.as_gathered(layer):
        parts = plain_parts(layer, seen=seen)
        return parts if isinstance(parts, str) else why_not_dtypes(_compute(parts), _compute(parts), parts.adapters)


def _fast_class(kind: type, share: bool) -> type | None:
    """The class that a layer of exactly this class of PEFT's gets."""
    if kind is lora.Linear:
        return SharedInputLoraLinear if share else PeftkernLoraLinear
    if kind is PeftParamWrapper:
        return ParamWrapper
    if kind.__module__ == "peft.tuners.lora.bnb":
        from peftkern.integrations.peft import quantised_layers as layers  # bitsandbytes is there, since the layer is

        return next(
            (fast for fast in (layers.PeftkernLinear4bit, layers.PeftkernLinear8bitLt) if fast.peft is kind), None
        )
    if kind.__module__ == "peft.tuners.lora.torchao":
        from peftkern.integrations.peft.torchao_layer import PeftkernTorchaoLinear

        return PeftkernTorchaoLinear if PeftkernTorchaoLinear.peft is kind else None
    if (kind.__module__, kind.__name__) == ("peft.tuners.lora.gptq", "GPTQLoraLinear"):
        from peftkern.integrations.peft.gptq_layer import PeftkernGPTQLinear

        return PeftkernGPTQLinear
    if (kind.__module__, kind.__name__) == ("peft.tuners.lora.awq", "AwqLoraLinear"):
        from peftkern.integrations.peft.awq_layer import PeftkernAwqLinear

        return PeftkernAwqLinear
    return None


def _class_before(layer: Any) -> type | None:
    """The class that a patched layer had; None for any other."""
    return units.class_of(layer).__dict__.get("peft") if isinstance(layer, LoraLayer) else None


def _compute(parts: Parts) -> torch.dtype:
    """The dtype of the products as far as it is known without x."""
    return parts.compute or parts.adapters[0].lora_A.dtype


def _rebind(layer: Any) -> None:
    """accelerate keeps a bound forward on the instance when it hooks a patched layer: make it PEFT's again."""
    ours = [kind.forward for kind in (PeftkernLoraLinear, SharedInputLoraLinear, ParamWrapper)]
    for name in ("forward", "_old_forward"):
        if getattr(layer.__dict__.get(name), "__func__", None) in ours:
            layer.__dict__[name] = type(layer).forward.__get__(layer)


def _expected_backend(layer: Any, seen: units.Seen, M: int = 1024) -> str:
    """The backend that a call of M rows would take in training."""
    if isinstance(layer, ParamWrapper):
        stacked = parameter_parts(layer)
        assert isinstance(stacked, ParameterParts)  # the caller has just seen to it
        W, A, B, _, _ = stacked
        experts = W.shape[0] if W.ndim == 3 else 1
        K, N, R = A.shape[1], B.shape[0], A.shape[0] // experts
        return dispatch.select(Problem(W.device.type, M, K, N, R, W.dtype, A.dtype), "").name
    parts = plain_parts(layer, seen=seen)
    assert isinstance(parts, Parts)  # the caller has just seen to it
    N, K = parts.weight.shape
    first, weight = parts.adapters[0], parts.weight
    R, adapter_dtype = first.lora_A.shape[0], first.lora_A.dtype
    form = weight.format if isinstance(weight, FrozenWeight) else "dense"
    problem = Problem(weight.device.type, M, K, N, R, _compute(parts), adapter_dtype, form, dropout=first.dropout_p > 0)
    return dispatch.select(problem, "").name


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``: every layer has its very class back."""
    for layer in model.modules():
        before = _class_before(layer)
        if before is not None:
            forget(layer)
            detach(layer)
            units.set_class(layer, before)
            _rebind(layer)
