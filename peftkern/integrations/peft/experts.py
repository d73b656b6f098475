"""LoRA on a parameter that a module reads itself: the stacks of a Mixture of Experts, or its router's weight.

PEFT wraps the module (``ParamWrapper``, one for each parameter, nested) and folds the update into the whole parameter
for the time of a forward. Here the module finds a ``LowRankStack`` in the parameter's place, which computes, for the
rows x_e of expert e,

    y_e = x_e W_e^T + c (x_e A_e^T) B_e^T
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.integrations.peft.layer import _disabled
from peftkern.integrations.peft.low_rank_stack import LowRankStack
from peftkern.integrations.peft.parts import Adapter, why_not_dtypes, why_not_scaling

try:
    from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
except ImportError:  # PEFT before 0.17

    class PeftParamWrapper(nn.Module):  # type: ignore[no-redef]
        """No layer is one."""


_BY_EXPERT = ("eager", "grouped_mm")  # transformers' implementations of experts whose products LowRankStack knows


class ParamWrapper(PeftParamWrapper):
    """PEFT's wrapper of a parameter, with peftkern's forward. Made by ``patch``, never constructed.

    PEFT, too, knows its wrappers by this class name.
    """

    peft = PeftParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _disabled.get() or torch.compiler.is_compiling() or "adapter_names" in kwargs:
            return PeftParamWrapper.forward(self, x, *args, **kwargs)
        parts = parameter_parts(self)
        if isinstance(parts, str):
            return PeftParamWrapper.forward(self, x, *args, **kwargs)
        attributes, name = self.get_base_layer().__dict__, self.parameter_name
        attributes[name] = _low_rank_stack(self, parts)  # found before nn.Module looks among the parameters
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            del attributes[name]


class ParameterParts(NamedTuple):
    """What the fast path reads of a wrapper: the frozen parameter and the one adapter active on it.

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
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapter is merged"
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
    if not parameter.device == A.device == B.device:
        return f"its weights are on {parameter.device}, {A.device} and {B.device}"
    if A.dtype != B.dtype:
        return f"lora_A is {A.dtype} and lora_B {B.dtype}"
    E = parameter.shape[0] if parameter.ndim == 3 else 1
    if {A.shape[1], B.shape[0]} != set(parameter.shape[-2:]) or A.shape[0] != B.shape[1] or A.shape[0] % E:
        return f"shapes {tuple(parameter.shape)}, {tuple(A.shape)}, {tuple(B.shape)} do not fit"
    return why_not_dtypes(parameter.dtype, parameter.dtype, [Adapter(A, B, None, 0.0, scaling)])


def _low_rank_stack(layer: Any, parts: ParameterParts) -> LowRankStack:
    """What the wrapped module finds in its parameter's place."""
    parameter, right, left, scaling, adapter = parts
    if parameter.ndim == 3:  # lora_A has expert after expert; in lora_B's columns the expert is the inner index
        E = parameter.shape[0]
        right = right.reshape(E, -1, right.shape[1])
        left = left.reshape(left.shape[0], -1, E).permute(2, 0, 1).contiguous()
        if not getattr(layer, "_did_swap_in_out_features", False):  # the parameter is [E, in, out]
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
    return LowRankStack(parameter, left, right, scaling, _Fold(layer, adapter))


class _Fold:
    """PEFT's own sum of a parameter and its update, formed when first asked for."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.folded: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.folded is None:
            base, name = self.layer.get_base_layer(), self.layer.parameter_name
            stack = base.__dict__.pop(name)
            try:
                with self.layer._activate_lora([self.adapter]):
                    self.folded = getattr(base, name)
            finally:
                base.__dict__[name] = stack
        return self.folded
