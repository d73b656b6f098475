"""What the fast path reads of a PEFT layer, and the one predicate that says why it does not apply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from peftkern import dropout
from peftkern.functional import looked_through
from peftkern.integrations import quantised
from peftkern.integrations.peft import units, zero3
from peftkern.integrations.peft.tally import DISABLED, MERGED
from peftkern.ops import dispatch
from peftkern.weights import FrozenWeight

try:
    from peft.tuners.lora import variants as _variants
except ImportError:  # PEFT before 0.16
    _variants = None

NO_DATA = "its weights are on meta: they are offloaded, or not loaded yet"
_NARROW = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, *_NARROW, torch.float64)
_AS_VANILLA = tuple(
    getattr(_variants, name) for name in ("MiCALinearVariant",) if hasattr(_variants, name)
)  # variants that initialise and freeze differently, but whose forward is the vanilla one
_DORA = getattr(_variants, "DoraLinearVariant", None)


class Adapter(NamedTuple):
    """One active adapter: c (D(x) A^T B^T + lora_bias). ``dropout_p`` is 0 where dropout does nothing now.

    ``magnitude`` is DoRA's, None for a vanilla adapter.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    dropout_p: float
    scaling: float | Tensor
    magnitude: Tensor | None = None


class Parts(NamedTuple):
    """What the fast path reads of a layer: the frozen weight [N, K], its bias, and the adapters active on it.

    ``compute`` is the dtype the weight is multiplied in; None where that is x's own, or autocast's. y of a quantised
    base is in x's dtype, or, where it ``follows_autocast``, in autocast's. ``units`` are the children that are units of
    FSDP, the base first: where there are any the tensors are stand-ins, unless they were read ``within`` the units.
    """

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    adapters: list[Adapter]
    compute: torch.dtype | None
    follows_autocast: bool = False
    units: tuple[nn.Module, ...] = ()


def why_not(layer: lora.Linear) -> str | None:
    """Why this layer, in its present state, runs PEFT's own forward; None where it is fast."""
    parts = plain_parts(layer)
    return parts if isinstance(parts, str) else None


def plain_parts(layer: lora.Linear, mixed: Sequence[str] | None = None, seen: units.Seen = units.ahead) -> Parts | str:
    """The parts of a layer whose forward is base(x) + sum of B(A(dropout(x))) scaling and nothing else, or the reason
    why not. ``mixed`` are the adapters of a mixed batch, which the layer has; without it, those that are active.
    ``seen`` says what is read of a child whose weights FSDP keeps elsewhere.

    Runs at every call, so it reads the modules' dictionaries: nn.Module's attribute lookup costs ten times as much.
    """
    if layer.disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "global module hooks are registered"
    modules: Any = layer._modules
    state = layer.__dict__
    if not state.get("cast_input_dtype_enabled", True):
        return "casting of its input is disabled"
    base = seen(modules["base_layer"])
    found = _base_parts(base)
    if isinstance(found, str):
        return found
    weight, bias, compute = found
    active = layer.active_adapters if mixed is None else mixed
    present = modules["lora_A"]._modules
    adapters = []
    for name in active:
        if name in present:  # PEFT skips an active adapter that the layer does not have
            adapter = _adapter(modules, state, name, weight, seen)
            if isinstance(adapter, str):
                return adapter if len(active) == 1 else f"adapter {name!r}: {adapter}"
            adapters.append(adapter)
    follows = isinstance(weight, FrozenWeight) and quantised.follows_autocast(base)
    apart = units.of(modules, [name for name in active if name in present])
    if mixed is not None:
        return Parts(weight, bias, adapters, compute, follows, apart)
    if not adapters:
        names = ", ".join(map(repr, active))
        return f"the active adapter {names} is not on this layer" if active else "no adapter is active"
    if len(adapters) > 1 and any(adapter.magnitude is not None for adapter in adapters):
        return f"{len(adapters)} adapters are active, and one of them uses DoRA"
    if isinstance(weight, FrozenWeight) and adapters[0].magnitude is not None:
        return "DoRA on a quantised base"
    return Parts(weight, bias, adapters, compute, follows, apart)


def _base_parts(base: Any) -> tuple[Tensor | FrozenWeight, Tensor | None, torch.dtype | None] | str:
    """The frozen weight, its bias and its compute dtype as ``Parts`` has them, or why the base layer must be called."""
    if quantised.is_quantised(base):
        weight = base._parameters.get("weight")
        if weight is not None and zero3.is_partitioned(weight):
            return "its quantised base is ZeRO-3's"  # what is taken of one is kept, and would keep all that is gathered
        found = why_not_observed("base_layer", base) or units.why_not_whole(weight) or quantised.frozen(base)
        bias = base._parameters.get("bias", base._buffers.get("bias"))  # gptqmodel's are buffers
        return found if isinstance(found, str) else (found[0], bias, found[1])
    reason = _why_not_plain("base_layer", base, (nn.Linear, Conv1D))
    if reason is not None:
        return reason
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if weight.requires_grad:
        return "its base weight requires grad"
    if type(base) is Conv1D and zero3.hooked(base):
        return "its Conv1D is ZeRO-3's"  # a view of its weight, saved for backward, would keep what is gathered
    if bias is not None and bias.dtype != weight.dtype:
        return f"its base weight is {weight.dtype} and its base bias {bias.dtype}"
    if bias is not None and not bias.numel():
        return "its base bias is partitioned or not loaded yet"
    return weight.t() if type(base) is Conv1D else weight, bias, weight.dtype


def _adapter(
    modules: Mapping[str, Any], state: Mapping[str, Any], name: str, weight: Tensor | FrozenWeight, seen: units.Seen
) -> Adapter | str:
    """One adapter of a layer, given the layer's dictionaries, or why the fast path cannot run it."""
    variant = state.get("lora_variant", {}).get(name)
    dora = variant is not None and type(variant) is _DORA
    if variant is not None and not dora and not isinstance(variant, _AS_VANILLA):
        return f"it uses the LoRA variant {type(variant).__name__}"
    if variant is None and state.get("use_dora", {}).get(name):  # PEFT before 0.16
        return "it uses DoRA"
    scaling = state["scaling"][name]
    reason = why_not_scaling(scaling)
    if reason is not None:
        return reason
    drop, p = modules["lora_dropout"]._modules[name], 0.0
    if type(drop) is nn.Dropout:
        if drop.training and dropout.threshold(drop.p):
            p = drop.p
    elif type(drop) is not nn.Identity:
        return f"its dropout is a {type(drop).__name__}"
    module_A, module_B = seen(modules["lora_A"]._modules[name]), seen(modules["lora_B"]._modules[name])
    reason = (
        _why_not_plain("lora_A", module_A)
        or _why_not_plain("lora_B", module_B)
        or why_not_observed("lora_dropout", drop, zero3.hooked(drop))
    )
    if reason is not None:
        return reason
    if module_A._parameters["bias"] is not None:
        return "lora_A has a bias"
    A, B, lora_bias = module_A._parameters["weight"], module_B._parameters["weight"], module_B._parameters["bias"]
    shape, shape_A, shape_B = weight.shape, A.shape, B.shape
    if not len(shape) == len(shape_A) == len(shape_B) == 2:
        return why_not_matrices(base=shape, lora_A=shape_A, lora_B=shape_B)
    (N, K), (R, A_K) = shape, shape_A
    if A_K != K or shape_B != (N, R):
        return f"shapes {tuple(weight.shape)}, {tuple(A.shape)}, {tuple(B.shape)} do not fit"
    if not weight.device == A.device == B.device:
        return f"its weights are on {weight.device}, {A.device} and {B.device}"
    if A.is_meta:
        return NO_DATA
    if dora and lora_bias is not None:
        return "it uses DoRA with lora_bias"
    if A.dtype != B.dtype or (lora_bias is not None and lora_bias.dtype != A.dtype):
        return f"lora_A is {A.dtype} and lora_B {B.dtype}, or its bias is of another dtype"
    if lora_bias is not None and len(lora_bias) != N:
        return f"lora_B's bias has {len(lora_bias)} of {N} elements: it is partitioned or not loaded yet"
    if not dora:
        return Adapter(A, B, lora_bias, p, scaling)
    magnitude = _magnitude(seen(modules["lora_magnitude_vector"]._modules[name]), A, B)
    p = p if state["training"] else 0.0  # DoRA asks the layer whether it trains, then dropout
    return magnitude if isinstance(magnitude, str) else Adapter(A, B, None, p, scaling, magnitude)


def _magnitude(child: Any, A: Tensor, B: Tensor) -> Tensor | str:
    if type(child) is not DoraLinearLayer:
        return f"its magnitude is a {type(child).__name__}"
    magnitude = child._parameters["weight"]
    if type(magnitude) not in (nn.Parameter, Tensor) or magnitude.shape != B.shape[:1] or magnitude.device != A.device:
        return f"its magnitude is a {type(magnitude).__name__} {tuple(magnitude.shape)} on {magnitude.device}"
    if magnitude.dtype != A.dtype:
        return f"lora_A is {A.dtype} and the magnitude {magnitude.dtype}"
    return why_not_observed("lora_magnitude_vector", child) or magnitude


def why_not_matrices(**shapes: Sequence[int]) -> str:
    """Which weight is none, for want of its data: somebody else holds that, and puts it there for its own calls."""
    wrong = [f"{name} {tuple(shape)}" for name, shape in shapes.items() if len(shape) != 2]
    return f"its weights are partitioned (ZeRO-3, FSDP) or not loaded yet: no matrix is {', '.join(wrong)}"


def why_not_scaling(scaling: float | Tensor) -> str | None:
    """A scaling is a finite number, or a 0-d tensor that nobody trains (its value is not read here)."""
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or not scaling.is_floating_point() or scaling.requires_grad:
            return "its scaling is a tensor that is trained, not floating or not 0-d"
    elif not isinstance(scaling, int | float):
        return f"its scaling is a {type(scaling).__name__}"
    elif not -math.inf < scaling < math.inf:
        return f"its scaling is {scaling}"
    return None


def _why_not_plain(label: str, child: Any, kinds: tuple[type, ...] = (nn.Linear,)) -> str | None:
    """A child whose forward does more than a product with its own weight must be called, not read."""
    if type(child) not in kinds:
        found, known = type(child).__name__, [kind.__name__ for kind in kinds]
        if found in known:  # somebody else's of the same name
            found, known = _full_name(type(child)), [_full_name(kind) for kind in kinds]
        return f"{label} is a {found}, not a plain {' or '.join(known)}"
    weight = child._parameters.get("weight")
    if type(weight) not in (nn.Parameter, Tensor):
        return f"{label} has a weight of type {type(weight).__name__}"
    return why_not_observed(label, child, zero3.hooked(child))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def why_not_observed(label: str, child: Any, but_zero3: bool = False) -> str | None:
    """A child that somebody watches or has replaced must be called; ``but_zero3``: other than to gather it."""
    state = child.__dict__
    if ("forward" in state and is_replaced(child)) or "_hf_hook" in state:
        return f"{label} has a replaced forward"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        hooks = [h for of in ("_forward_hooks", "_forward_pre_hooks") for h in state[of].values()]
        backward = state["_backward_hooks"] or state["_backward_pre_hooks"]
        if backward or not but_zero3 or not all(map(zero3.is_own, hooks)):
            return f"{label} has hooks"
    return None


def is_replaced(module: Any) -> bool:
    """Whether a module's forward is another than its class's, which accelerate binds to it when it takes a hook off."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return forward is not None and not own


def why_not_input(parts: Parts, x: Tensor) -> str | None:
    """The part of the predicate that looks at x: type, shape, device and the dtype rule."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return "x is sparse, nested or has no data"
    if looked_through():
        return "a torch.func transform, forward-mode AD, torch.export or tracing is active"
    weight = parts.weight
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return f"x has shape {tuple(x.shape)}"
    if x.ndim == 1 and parts.adapters[0].magnitude is not None:
        return "x is one row without dimensions before it, and PEFT's DoRA adds one"
    if x.device != weight.device:
        return f"x is on {x.device}"
    device, compute = x.device.type, parts.compute
    if isinstance(weight, FrozenWeight):
        taken = quantised.dtype_of_products(x, compute)
        return quantised.why_not_dtype(x, taken) or why_not_dtypes(taken, taken, parts.adapters)
    dtype = torch.get_autocast_dtype(device) if dispatch.autocasting(device) else None
    if dtype is None:
        return why_not_dtypes(x.dtype, compute, parts.adapters)
    return why_not_dtypes(
        x.dtype if x.dtype == torch.float64 else dtype,
        compute if compute == torch.float64 else dtype,
        parts.adapters,
    )


def why_not_dtypes(x: torch.dtype, compute: torch.dtype | None, adapters: list[Adapter]) -> str | None:
    """The dtype rule: x in the base's dtype, each adapter in it too, or in fp32 beside a 16-bit base."""
    if compute not in _FLOATING:
        return f"the base computes in {compute}, and the kernels in fp64, fp32, bf16 or fp16"
    dtypes: set[torch.dtype | None] = {adapter.lora_A.dtype for adapter in adapters} or {compute}
    for dtype in dtypes:
        if x != compute or not (dtype == compute or (dtype == torch.float32 and compute in _NARROW)):
            return f"x is {x}, the base {compute}, the adapter {dtype}"
    return None
