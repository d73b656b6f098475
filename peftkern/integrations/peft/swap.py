"""``patch`` and ``unpatch``: the class of each layer, swapped in place, and the report of it."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peftkern import _env
from peftkern.integrations.peft.experts import ParameterParts, ParamWrapper, PeftParamWrapper, parameter_parts
from peftkern.integrations.peft.layer import PeftkernLoraLinear
from peftkern.integrations.peft.parts import Parts, plain_parts, why_not_dtypes
from peftkern.integrations.peft.shared_input import SharedInputLoraLinear, forget
from peftkern.ops import dispatch
from peftkern.ops.problem import Problem
from peftkern.weights import FrozenWeight

logger = logging.getLogger("peftkern")


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` did. Prints as a table.

    ``fast``: names of the layers on the fast path; ``backends``: the backend of each of them;
    ``skipped``: name -> reason, for every other LoRA layer of the model (it runs PEFT's own forward).
    """

    fast: list[str] = field(default_factory=list)
    backends: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"peftkern: {len(self.fast)} of {len(self.fast) + len(self.skipped)} LoRA layers are fused"]
        for backend, count in sorted(Counter(self.backends.values()).items()):
            lines.append(f"  {count:5d}  backend {backend}")
        for reason, count in Counter(self.skipped.values()).most_common():
            names = [name for name, text in self.skipped.items() if text == reason]
            shown = ", ".join(names[:3]) + (f", ... ({count - 3} more)" if count > 3 else "")
            lines.append(f"  {count:5d}  PEFT's own forward: {reason}  [{shown}]")
        return "\n".join(lines)


def patch(model: nn.Module, fuse_shared_inputs: bool = False) -> PatchReport:
    """Run every vanilla PEFT LoRA linear of ``model`` through peftkern, in place.

    Parameters, state_dict keys, hooks on the layers, saving and loading stay PEFT's. Layers are judged again at every
    call: what changes later (merge, several adapters, an unfrozen base) runs PEFT's own forward while it lasts.

    So does PEFT's layer over a plain bitsandbytes ``Linear4bit`` or ``Linear8bitLt``, or over torchao's weight-only
    int8: y and the gradients are those of the dequantised weight. For 8 bits that is more exact than bitsandbytes' own
    forward, which rounds x to 8 bits too, and than torchao's, which rounds the scales to x's dtype.

    Args:
        model: any module that contains ``peft.tuners.lora.Linear`` (PeftModel, ``add_adapter`` models, wrapped ones).
        fuse_shared_inputs: layers that read the very same x one after the other (q, k and v; gate and up) run as one
            node, found by the first forward (``shared_inputs`` names them). A backward through some of them alone
            then frees what the others saved: pass retain_graph=True where a graph is run through in parts.
    Returns: a PatchReport. Calling it again changes nothing and reports anew.
    """
    _env.settings()  # a bad variable is an error before anything is changed
    report = PatchReport()
    done: list[nn.Module] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        before = type(layer)
        reason = _swap(layer, fuse_shared_inputs)
        if type(layer) is not before:
            done.append(layer)
        if reason is None:
            try:
                report.backends[name] = _expected_backend(layer)
            except RuntimeError as error:  # an explicitly requested backend that cannot: leave the model as it was
                for swapped in done:
                    unpatch(swapped)
                raise RuntimeError(f"layer {name}: {error}") from error
            report.fast.append(name)
        else:
            report.skipped[name] = reason
    if not report.fast:
        logger.warning("peftkern: no layer is fused: %s", report if report.skipped else "the model has no LoRA layer")
    return report


def _swap(layer: Any, fuse_shared_inputs: bool) -> str | None:
    """Swap the class where the fast path can ever apply; the reason why the layer is not fast now, or None."""
    kind = type(layer)
    fast = _fast_class(_class_before(layer) or kind, fuse_shared_inputs)
    if fast is None:
        return f"{kind.__module__}.{kind.__name__} is not peft.tuners.lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if kind is not fast:
        forget(layer)
        layer.__class__ = fast
    if isinstance(layer, ParamWrapper):
        stacked = parameter_parts(layer)
        return stacked if isinstance(stacked, str) else None
    parts = plain_parts(layer)
    if isinstance(parts, str):
        return parts
    return why_not_dtypes(_compute(parts), _compute(parts), parts.adapters)


def _fast_class(kind: type, fuse_shared_inputs: bool) -> type | None:
    """The class that a layer of exactly this class of PEFT's gets."""
    if kind is lora.Linear:
        return SharedInputLoraLinear if fuse_shared_inputs else PeftkernLoraLinear
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
    return None


def _class_before(layer: Any) -> type | None:
    """The class that a patched layer had; None for any other."""
    return type(layer).__dict__.get("peft") if isinstance(layer, LoraLayer) else None


def _compute(parts: Parts) -> torch.dtype:
    """The dtype of the products as far as it is known without x."""
    return parts.compute or parts.adapters[0].lora_A.dtype


def _rebind(layer: Any) -> None:
    """accelerate keeps a bound forward on the instance when it hooks a patched layer: make it PEFT's again."""
    ours = [kind.forward for kind in (PeftkernLoraLinear, SharedInputLoraLinear, ParamWrapper)]
    for name in ("forward", "_old_forward"):
        if getattr(layer.__dict__.get(name), "__func__", None) in ours:
            layer.__dict__[name] = type(layer).forward.__get__(layer)


def _expected_backend(layer: Any, M: int = 1024) -> str:
    """The backend that a call of M rows would take in training."""
    if isinstance(layer, ParamWrapper):
        stacked = parameter_parts(layer)
        assert isinstance(stacked, ParameterParts)  # the caller has just seen to it
        W, A, B, _, _ = stacked
        experts = W.shape[0] if W.ndim == 3 else 1
        K, N, R = A.shape[1], B.shape[0], A.shape[0] // experts
        return dispatch.select(Problem(W.device.type, M, K, N, R, W.dtype, A.dtype), "").name
    parts = plain_parts(layer)
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
            layer.__class__ = before
            _rebind(layer)
