"""What the fast path reads of a PEFT layer, and the one predicate that says why it does not apply."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from peftkern import dropout
from peftkern.ops import dispatch

_NARROW = (torch.float16, torch.bfloat16)


class Parts(NamedTuple):
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
    parts = plain_parts(layer)
    return parts if isinstance(parts, str) else None


def plain_parts(layer: lora.Linear) -> Parts | str:
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
    parts = Parts(
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


def _why_not_parameters(parts: Parts) -> str | None:
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


def why_not_input(parts: Parts, x: Tensor) -> str | None:
    """The part of the predicate that looks at x: type, shape, device and the dtype rule."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return "x is sparse, nested or has no data"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return "a torch.func transform, forward-mode AD or tracing is active"
    if x.ndim == 0 or x.shape[-1] != parts.weight.shape[1]:
        return f"x has shape {tuple(x.shape)}"
    if x.device != parts.weight.device:
        return f"x is on {x.device}"
    device = x.device.type
    W, cast = parts.weight.dtype, dispatch.autocasting(device)
    autocast = torch.get_autocast_dtype(device) if cast else None
    return why_not_dtypes(
        x.dtype if autocast is None or x.dtype == torch.float64 else autocast,
        W if autocast is None or W == torch.float64 else autocast,
        parts.lora_A.dtype,
    )


def why_not_dtypes(x: torch.dtype, compute: torch.dtype, adapter: torch.dtype) -> str | None:
    if x != compute or not (adapter == compute or (adapter == torch.float32 and compute in _NARROW)):
        return f"x is {x}, the base {compute}, the adapter {adapter}"
    return None
