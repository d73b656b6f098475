"""``patch``: make every vanilla ``peft.tuners.lora.Linear`` of a model fast, in place and reversibly.

The class of each such layer is swapped for a subclass that overrides ``forward`` alone. A call that the fast path does
not cover runs PEFT's own ``forward``, bit for bit; ``why_not`` is the single predicate that decides, at every call, and
its text is the reason that the report shows.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from peftkern.functional import lora_linear
from peftkern.ops import dispatch
from peftkern.ops.problem import Problem

logger = logging.getLogger("peftkern")

_disabled: contextvars.ContextVar[bool] = contextvars.ContextVar("peftkern_disabled", default=False)
_open_blocks = 0  # of disabled(), in any context: torch.compile can guard on a number, not on a context variable
_NARROW = (torch.float16, torch.bfloat16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


@torch.compiler.assume_constant_result
def _disabled_here() -> bool:
    return _disabled.get()


class PeftkernLoraLinear(lora.Linear):
    """PEFT's LoRA linear with peftkern's forward. Made by ``patch``, never constructed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or (_open_blocks and _disabled_here()):
            return super().forward(x, *args, **kwargs)
        if why_not(self) is not None or _why_not_input(self, x) is not None:
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base, A, B = self.base_layer, self.lora_A[name], self.lora_B[name]
        dropout = self.lora_dropout[name]
        return lora_linear(
            x,
            base.weight,
            A.weight,
            B.weight,
            self.scaling[name],
            bias=base.bias,
            lora_bias=B.bias,
            dropout_p=getattr(dropout, "p", 0.0),
            training=dropout.training,
        )

    def _get_name(self) -> str:
        return "Linear"  # print(model) looks as PEFT's does


def why_not(layer: lora.Linear) -> str | None:
    """Why this layer, in its present state, runs PEFT's own forward; None where it is fast."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapter is merged"
    active = layer.active_adapters
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    name = active[0]
    if name not in layer.lora_A:
        return f"the active adapter {name!r} is not on this layer"
    variant = getattr(layer, "lora_variant", None)
    if variant is not None and name in variant:
        return f"it uses the LoRA variant {type(variant[name]).__name__}"
    if getattr(layer, "use_dora", {}).get(name):
        return "it uses DoRA"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting of its input is disabled"
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    children = {"base_layer": layer.base_layer, "lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]}
    for label, child in children.items():
        reason = _why_not_plain(child)
        if reason is not None:
            return f"{label} {reason}"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "global module hooks are registered"
    return _why_not_parameters(children["base_layer"], children["lora_A"], children["lora_B"])


def _why_not_plain(child: Any) -> str | None:
    """A child whose forward does more than a product with its own weight must be called, not read."""
    if type(child) is not nn.Linear:
        return f"is a {type(child).__name__}, not a plain nn.Linear"
    state = child.__dict__
    if "forward" in state or "_hf_hook" in state:
        return "has a replaced forward"
    if any(state.get(hooks) for hooks in _HOOKS):
        return "has hooks"
    if type(child.weight) not in (nn.Parameter, Tensor):
        return f"has a weight of type {type(child.weight).__name__}"
    return None


def _why_not_parameters(base: Any, A: Any, B: Any) -> str | None:
    W, lora_A, lora_B = base.weight, A.weight, B.weight
    N, K = W.shape
    if W.requires_grad:
        return "its base weight requires grad"
    if A.bias is not None:
        return "lora_A has a bias"
    if lora_A.shape[1:] != (K,) or lora_B.shape != (N, lora_A.shape[0]):
        return f"shapes {tuple(W.shape)}, {tuple(lora_A.shape)}, {tuple(lora_B.shape)} do not fit"
    if not W.device == lora_A.device == lora_B.device:
        return f"its weights are on {W.device}, {lora_A.device} and {lora_B.device}"
    if lora_A.dtype != lora_B.dtype:
        return f"lora_A is {lora_A.dtype} and lora_B {lora_B.dtype}"
    return None


def _why_not_input(layer: lora.Linear, x: Tensor) -> str | None:
    """The part of the predicate that looks at x: type, device and the dtype rule."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is a {type(x).__name__}"
    W, lora_A = layer.base_layer.weight, layer.lora_A[layer.active_adapters[0]].weight
    if x.device != W.device:
        return f"x is on {x.device}"
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
    return _why_not_dtypes(x.dtype if compute is W.dtype else compute, compute, lora_A.dtype)


def _why_not_dtypes(x: torch.dtype, compute: torch.dtype, adapter: torch.dtype) -> str | None:
    if x != compute or not (adapter == compute or (adapter == torch.float32 and compute in _NARROW)):
        return f"x is {x}, the base {compute}, the adapter {adapter}"
    return None


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


def patch(model: nn.Module) -> PatchReport:
    """Run every vanilla PEFT LoRA linear of ``model`` through peftkern, in place.

    Parameters, state_dict keys, hooks on the layers, saving and loading stay PEFT's. Layers are judged again at every
    call: what changes later (merge, several adapters, an unfrozen base) runs PEFT's own forward while it lasts.

    Args: model: any module that contains ``peft.tuners.lora.Linear`` (PeftModel, ``add_adapter`` models, wrapped ones).
    Returns: a PatchReport. Calling it again changes nothing and reports anew.
    """
    report = PatchReport()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _swap(layer)
        if reason is None:
            report.fast.append(name)
            report.backends[name] = _expected_backend(layer)
        else:
            report.skipped[name] = reason
    if not report.fast:
        logger.warning("peftkern: no layer is fused: %s", report if report.skipped else "the model has no LoRA layer")
    return report


def _swap(layer: Any) -> str | None:
    """Swap the class where the fast path can ever apply; the reason why the layer is not fast now, or None."""
    if type(layer) not in (lora.Linear, PeftkernLoraLinear):
        kind = type(layer)
        return f"{kind.__module__}.{kind.__name__} is not peft.tuners.lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    layer.__class__ = PeftkernLoraLinear
    reason = why_not(layer)
    if reason is None:
        W, A = layer.base_layer.weight, layer.lora_A[layer.active_adapters[0]].weight
        reason = _why_not_dtypes(W.dtype, W.dtype, A.dtype)
    return reason


def _expected_backend(layer: lora.Linear, M: int = 1024) -> str:
    """The backend that a call of M rows would take in training."""
    name = layer.active_adapters[0]
    W, A = layer.base_layer.weight, layer.lora_A[name].weight
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) > 0
    N, K = W.shape
    problem = Problem(W.device.type, M, K, N, A.shape[0], W.dtype, A.dtype, dropout=dropout)
    return dispatch.select(problem, "").name


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``: every layer has its very class back."""
    for layer in model.modules():
        if type(layer) is PeftkernLoraLinear:
            layer.__class__ = lora.Linear
