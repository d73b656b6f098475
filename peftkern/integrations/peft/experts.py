"""LoRA on a parameter that a module reads itself: the stacks of a Mixture of Experts, or its router's weight.

PEFT wraps the module (``ParamWrapper``, one for each parameter, nested) and folds the update into the whole parameter
for the time of a forward. Here the module's forward runs on a stand-in for the module, which finds a ``LowRankStack``
in the parameter's place. That computes, for the rows x_e of expert e,

    y_e = x_e W_e^T + c (x_e A_e^T) B_e^T

The module itself is not touched, so threads may run through it at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.integrations.peft import tally
from peftkern.integrations.peft.layer import _disabled
from peftkern.integrations.peft.low_rank_stack import LowRankStack
from peftkern.integrations.peft.read import (
    NO_DATA,
    Adapter,
    why_not_dtypes,
    why_not_matrices,
    why_not_observed,
    why_not_scaling,
)

try:
    from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
except ImportError:  # PEFT before 0.17

    class PeftParamWrapper(nn.Module):  # type: ignore[no-redef]
        """A class that no layer has."""


_BY_EXPERT = ("eager", "grouped_mm")  # transformers' implementations of experts whose products LowRankStack knows


class ParamWrapper(PeftParamWrapper):
    """PEFT's wrapper of a parameter, with peftkern's forward. Made by ``patch``, never constructed.

    PEFT, too, knows its wrappers by this class name.
    """

    peft = PeftParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = _why_not_call(kwargs) or _parts_of_all(self)
        if isinstance(found, str):
            tally.fell_back(self, found)
            return PeftParamWrapper.forward(self, x, *args, **kwargs)
        stacks = {wrapper.parameter_name: _low_rank_stack(wrapper, parts) for wrapper, parts in found}
        y = _stand_in(self.get_base_layer(), stacks)(x, *args, **kwargs)
        for wrapper, _ in found:
            fold = stacks[wrapper.parameter_name].fold
            if isinstance(fold, _Fold) and fold.folded is not None:
                tally.fell_back(wrapper, f"its module does more with {wrapper.parameter_name} than products")
            else:
                tally.fused(wrapper)
        return y


def _stand_in(base: Any, attributes: dict[str, Any]) -> Any:
    """The module for one call: all that it has, and these attributes, found before it looks among the parameters."""
    module = object.__new__(type(base))
    module.__dict__.update(base.__dict__)
    module.__dict__.update(attributes)
    return module


def _why_not_call(kwargs: dict[str, Any]) -> str | None:
    if _disabled.get():
        return tally.OFF
    if torch.compiler.is_compiling():
        return "torch.compile traces"
    return "its call has adapter_names" if "adapter_names" in kwargs else None


def _parts_of_all(layer: Any) -> list[tuple[Any, ParameterParts]] | str:
    """Each wrapper with its parts, from this one inwards, or why PEFT's own forward runs."""
    found: list[tuple[Any, ParameterParts]] = []
    while isinstance(layer, PeftParamWrapper):
        if found and (type(layer) is not ParamWrapper or why_not_observed("the wrapper within", layer)):
            return "the wrapper within it is hooked, replaced or not patched"
        if not found or not _passes_through(layer):
            parts = parameter_parts(layer)
            if isinstance(parts, str):
                return parts if not found else f"of the wrapper within it: {parts}"
            found.append((layer, parts))
        layer = layer.base_layer
    return found


def _passes_through(layer: Any) -> bool:
    """True where PEFT's wrapper calls what it wraps and does nothing else."""
    if layer.disable_adapters or layer.merged_adapters:
        return not (layer.disable_adapters and layer.merged_adapters)
    return not any(adapter in layer.lora_A for adapter in layer.active_adapters)


class ParameterParts(NamedTuple):
    """The parts of a wrapper that the fast path reads: the frozen parameter and the one adapter active on it.

    parameter: [E, out, in], [E, in, out] or [out, in]; lora_A: [R E, in]; lora_B: [out, R E].
    """

    parameter: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    adapter: str


def parameter_parts(layer: Any) -> ParameterParts | str:
    """The parts of a wrapper in its present state, or the reason why PEFT's own forward runs."""
    if layer.disable_adapters:
        return tally.DISABLED
    if layer.merged_adapters:
        return tally.MERGED
    base, name = layer.get_base_layer(), layer.parameter_name
    parameter = base._parameters.get(name)
    reason = _why_not_module(base, name, parameter)
    if reason is not None:
        return reason
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active on its parameter"
    A, B, scaling = (getattr(layer, field)[active[0]] for field in ("lora_A", "lora_B", "scaling"))
    parts = ParameterParts(parameter, A.weight, B.weight, scaling, active[0])
    return _why_not_factors(parts) or parts


def _why_not_module(base: Any, name: str, parameter: Any) -> str | None:
    """The part of the predicate that looks at the wrapped module and its parameter."""
    if name in base.__dict__ or type(parameter) is not nn.Parameter:
        return f"its parameter {name} is a {type(parameter).__name__}, parametrized or in use"
    if parameter.requires_grad:
        return "its base parameter requires grad"
    if parameter.ndim not in (2, 3):
        return f"its parameter {name} has shape {tuple(parameter.shape)}: partitioned, or no stack of matrices"
    if "forward" in base.__dict__ or "_hf_hook" in base.__dict__:
        return "its module has a replaced forward"
    author = type(base).forward.__module__
    if not author.startswith("transformers.") and type(base) is not nn.Linear:
        return f"its module's forward is {author}'s, which may do more with {name} than products"
    if parameter.ndim == 3:
        implementation = getattr(getattr(base, "config", None), "_experts_implementation", None)
        if implementation not in (None, *_BY_EXPERT):
            return f"experts_implementation={implementation!r} is not one of {', '.join(_BY_EXPERT)}"
        if parameter.shape[0] == 1:
            return "it has a single expert"
    return None


def _why_not_factors(parts: ParameterParts) -> str | None:
    """The part of the predicate that looks at the adapter."""
    parameter, A, B, scaling, _ = parts
    reason = why_not_scaling(scaling)
    if reason is not None:
        return reason
    if type(A) not in (nn.Parameter, Tensor) or type(B) not in (nn.Parameter, Tensor):
        return f"lora_A has a weight of type {type(A).__name__}, lora_B of {type(B).__name__}"
    if A.ndim != 2 or B.ndim != 2:
        return why_not_matrices(lora_A=A.shape, lora_B=B.shape)
    if not parameter.device == A.device == B.device:
        return f"its weights are on {parameter.device}, {A.device} and {B.device}"
    if parameter.is_meta:
        return NO_DATA
    if A.dtype != B.dtype:
        return f"lora_A is {A.dtype} and lora_B {B.dtype}"
    E = parameter.shape[0] if parameter.ndim == 3 else 1
    if {A.shape[1], B.shape[0]} != set(parameter.shape[-2:]) or A.shape[0] != B.shape[1] or A.shape[0] % E:
        return f"shapes {tuple(parameter.shape)}, {tuple(A.shape)}, {tuple(B.shape)} do not fit"
    return why_not_dtypes(parameter.dtype, parameter.dtype, [Adapter(A, B, None, 0.0, scaling)])


def _low_rank_stack(layer: Any, parts: ParameterParts) -> LowRankStack:
    """The stack that the wrapped module finds in its parameter's place."""
    parameter, right, left, scaling, adapter = parts
    if parameter.ndim == 3:  # lora_A has expert after expert; in lora_B's columns the expert is the inner index
        E = parameter.shape[0]
        right = right.reshape(E, -1, right.shape[1])
        left = left.reshape(left.shape[0], -1, E).permute(2, 0, 1).contiguous()
        if not getattr(layer, "_did_swap_in_out_features", False):  # the parameter is [E, in, out]
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
    return LowRankStack(parameter, left, right, scaling, _Fold(layer, adapter))


class _Fold:
    """PEFT's own sum of a parameter and its update, formed when first asked for; PEFT forms it in the module."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.folded: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.folded is None:
            layer, weight = self.layer, self.layer.get_param()
            if layer.num_experts > 1 and hasattr(layer, "get_delta_factors"):  # PEFT from 0.19 on
                left, right, scaling = layer.get_delta_factors(self.adapter)
                with torch.autocast(weight.device.type, enabled=False):
                    self.folded = torch.baddbmm(weight, left, right, alpha=scaling)
            else:
                self.folded = weight + layer.get_delta_weight(self.adapter)
        return self.folded
