"""``patch``: make every vanilla ``peft.tuners.lora.Linear`` of a model fast, in place and reversibly.

The class of each such layer is swapped for a subclass that overrides ``forward`` alone. A call that the fast path does
not cover runs PEFT's own ``forward``, bit for bit; ``why_not`` is the single predicate that decides, at every call, and
its text is the reason that the report shows.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from peftkern import _env, dropout
from peftkern.functional import apply, looked_through, lora_linear, split_scaling
from peftkern.ops import dispatch
from peftkern.ops.problem import LoRAOperands, Problem
from peftkern.weights import DenseWeight

logger = logging.getLogger("peftkern")

_disabled: contextvars.ContextVar[bool] = contextvars.ContextVar("peftkern_disabled", default=False)
_open_blocks = 0  # of disabled(), in any context: torch.compile can guard on a number, not on a context variable
_NARROW = (torch.float16, torch.bfloat16)


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
            return lora.Linear.forward(self, x, *args, **kwargs)
        parts = _plain_parts(self)
        if isinstance(parts, str) or _why_not_input(parts, x) is not None:
            return lora.Linear.forward(self, x)
        W, A, B, scaling = parts.weight, parts.lora_A, parts.lora_B, parts.scaling
        if dispatch.autocasting(x.device.type):
            return lora_linear(
                x, W, A, B, scaling, bias=parts.bias, lora_bias=parts.lora_bias, dropout_p=parts.dropout_p
            )
        p = parts.dropout_p
        c, scaling_tensor = split_scaling(scaling, x)
        rng_state = dropout.draw_rng_state(x.device) if p else None
        operands = LoRAOperands(
            DenseWeight(W), A, B, parts.bias, parts.lora_bias, c, scaling_tensor, p, rng_state, "base"
        )
        return apply(x, operands)

    def _get_name(self) -> str:
        return "Linear"  # print(model) looks as PEFT's does


class _Parts(NamedTuple):
    """What the fast path reads of a layer; ``dropout_p`` is 0 where dropout does nothing now."""

    name: str
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    dropout_p: float
    scaling: float | Tensor


def why_not(layer: lora.Linear) -> str | None:
    """Why this layer, in its present state, runs PEFT's own forward; None where it is fast."""
    parts = _plain_parts(layer)
    return parts if isinstance(parts, str) else None


def _plain_parts(layer: lora.Linear) -> _Parts | str:
    """The parts of a layer whose forward is base(x) + B(A(dropout(x))) scaling and nothing else, or the reason why not.

    Runs at every call, so it reads the modules' dictionaries: nn.Module's attribute lookup costs ten times as much.
    """
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapter is merged"
    active = layer.active_adapters
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    name = active[0]
    modules: Any = layer._modules
    if name not in modules["lora_A"]._modules:
        return f"the active adapter {name!r} is not on this layer"
    state = layer.__dict__
    if name in state.get("lora_variant", ()):
        return f"it uses the LoRA variant {type(state['lora_variant'][name]).__name__}"
    if state.get("use_dora", {}).get(name):  # PEFT before 0.16
        return "it uses DoRA"
    if not state.get("cast_input_dtype_enabled", True):
        return "casting of its input is disabled"
    drop = modules["lora_dropout"]._modules[name]
    if type(drop) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(drop).__name__}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or not scaling.is_floating_point() or scaling.requires_grad:
            return "its scaling is a tensor that is trained, not floating or not 0-d"
    elif not -math.inf < scaling < math.inf:
        return f"its scaling is {scaling}"
    p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
    base, A, B = modules["base_layer"], modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    reason = (
        _why_not_plain("base_layer", base)
        or _why_not_plain("lora_A", A)
        or _why_not_plain("lora_B", B)
        or _why_not_observed("lora_dropout", drop)
    )
    if reason is not None:
        return reason
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "global module hooks are registered"
    base, A, B = base._parameters, A._parameters, B._parameters
    if A["bias"] is not None:
        return "lora_A has a bias"
    parts = _Parts(
        name,
        base["weight"],
        base["bias"],
        A["weight"],
        B["weight"],
        B["bias"],
        p if dropout.threshold(p) else 0.0,
        scaling,
    )
    return _why_not_parameters(parts) or parts


def _why_not_plain(label: str, child: Any) -> str | None:
    """A child whose forward does more than a product with its own weight must be called, not read."""
    if type(child) is not nn.Linear:
        return f"{label} is a {type(child).__name__}, not a plain nn.Linear"
    weight = child._parameters.get("weight")
    if type(weight) not in (nn.Parameter, Tensor):
        return f"{label} has a weight of type {type(weight).__name__}"
    return _why_not_observed(label, child)


def _why_not_observed(label: str, child: Any) -> str | None:
    """A child that somebody watches or has replaced must be called."""
    state = child.__dict__
    if "forward" in state or "_hf_hook" in state:
        return f"{label} has a replaced forward"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{label} has hooks"
    return None


def _why_not_parameters(parts: _Parts) -> str | None:
    W, A, B = parts.weight, parts.lora_A, parts.lora_B
    (N, K), (R, A_K), B_shape = W.shape, A.shape, B.shape
    if W.requires_grad:
        return "its base weight requires grad"
    if A_K != K or B_shape != (N, R):
        return f"shapes {tuple(W.shape)}, {tuple(A.shape)}, {tuple(B.shape)} do not fit"
    if not W.device == A.device == B.device:
        return f"its weights are on {W.device}, {A.device} and {B.device}"
    if A.dtype != B.dtype or (parts.lora_bias is not None and parts.lora_bias.dtype != A.dtype):
        return f"lora_A is {A.dtype} and lora_B {B.dtype}, or its bias is of another dtype"
    if parts.bias is not None and parts.bias.dtype != W.dtype:
        return f"its base weight is {W.dtype} and its base bias {parts.bias.dtype}"
    return None


def _why_not_input(parts: _Parts, x: Tensor) -> str | None:
    """The part of the predicate that looks at x: type, shape, device and the dtype rule."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return "x is sparse, nested or has no data"
    if looked_through():
        return "a torch.func transform, forward-mode AD, torch.export or tracing is active"
    if x.ndim == 0 or x.shape[-1] != parts.weight.shape[1]:
        return f"x has shape {tuple(x.shape)}"
    if x.device != parts.weight.device:
        return f"x is on {x.device}"
    device = x.device.type
    W, cast = parts.weight.dtype, dispatch.autocasting(device)
    autocast = torch.get_autocast_dtype(device) if cast else None
    return _why_not_dtypes(
        x.dtype if autocast is None or x.dtype == torch.float64 else autocast,
        W if autocast is None or W == torch.float64 else autocast,
        parts.lora_A.dtype,
    )


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
    _env.settings()  # a bad variable is an error before anything is changed
    report = PatchReport()
    done: list[nn.Module] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        fresh = type(layer) is lora.Linear
        reason = _swap(layer)
        if fresh and type(layer) is PeftkernLoraLinear:
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


def _swap(layer: Any) -> str | None:
    """Swap the class where the fast path can ever apply; the reason why the layer is not fast now, or None."""
    if type(layer) not in (lora.Linear, PeftkernLoraLinear):
        kind = type(layer)
        return f"{kind.__module__}.{kind.__name__} is not peft.tuners.lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    layer.__class__ = PeftkernLoraLinear
    parts = _plain_parts(layer)
    if isinstance(parts, str):
        return parts
    return _why_not_dtypes(parts.weight.dtype, parts.weight.dtype, parts.lora_A.dtype)


def _rebind(layer: Any) -> None:
    """accelerate keeps a bound forward on the instance when it hooks a patched layer: make it PEFT's again."""
    for name in ("forward", "_old_forward"):
        if getattr(layer.__dict__.get(name), "__func__", None) is PeftkernLoraLinear.forward:
            layer.__dict__[name] = lora.Linear.forward.__get__(layer)


def _expected_backend(layer: lora.Linear, M: int = 1024) -> str:
    """The backend that a call of M rows would take in training."""
    parts = _plain_parts(layer)
    assert isinstance(parts, _Parts)  # the caller has just seen to it
    N, K = parts.weight.shape
    R, dtype = parts.lora_A.shape[0], parts.weight.dtype
    problem = Problem(parts.weight.device.type, M, K, N, R, dtype, parts.lora_A.dtype, dropout=parts.dropout_p > 0)
    return dispatch.select(problem, "").name


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``: every layer has its very class back."""
    for layer in model.modules():
        if type(layer) is PeftkernLoraLinear:
            layer.__class__ = lora.Linear
            _rebind(layer)
