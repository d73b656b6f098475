"""What the predicate has found of a layer, and whether it still holds: all that it looks at, compared by identity.

The predicate (``parts``) costs 8 us a call. Where it has let a layer through with one vanilla adapter,
its answer is kept, on the layer's tally, and holds while nothing has changed that the answer depends on: a state that
changes in any of these respects is judged anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from peftkern import dropout
from peftkern.backends.base import Backend
from peftkern.call import Pair
from peftkern.functional import looked_through, run_pair
from peftkern.integrations import quantised
from peftkern.integrations.peft.read import Parts, why_not_dtypes
from peftkern.weights import DenseWeight, FrozenWeight

_PLAIN = (nn.Parameter, Tensor, type(None))  # a tensor of any other class may have operators of its own
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # what autocast and quantised bases take
_NONE: dict[str, bool] = {}


class Memo:
    """The pair of a layer's base and its one active adapter, and the state that it is right for."""

    __slots__ = (
        "_backends", "_children", "_compute", "_device", "_dtype", "_facts", "_kinds", "_name", "_packed", "_pair",
        "_scaling",
    )  # fmt: skip

    def __init__(self, layer: Any, name: str, pair: Pair, dtype: torch.dtype, parts: Parts) -> None:
        self._name, self._scaling = name, layer.scaling[name]
        self._children = _children(layer, name)
        self._kinds = tuple(child.__class__ for child in self._children)
        self._pair, self._dtype, self._device = pair, dtype, pair.lora_A.device
        self._packed, self._compute = isinstance(parts.weight, FrozenWeight), parts.compute
        base, A, B, _ = self._children
        held = ((base, "weight"), (base, "bias"), (A, "weight"), (A, "bias"), (B, "weight"), (B, "bias"))
        self._facts = tuple((child._parameters, key, *_fact(child._parameters[key])) for child, key in held)
        self._backends: dict[Any, Backend] = {}

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the predicate would say of the layer, and of x, what it said before."""
        state = layer.__dict__
        modules, name = state["_modules"], self._name
        base, A, B, drop = children = self._children
        active = layer._active_adapter
        if not (
            (active == name or (active.__class__ is list and len(active) == 1 and active[0] == name))
            and modules["base_layer"] is base
            and modules["lora_A"]._modules.get(name) is A
            and modules["lora_B"]._modules.get(name) is B
            and modules["lora_dropout"]._modules.get(name) is drop
            and state["scaling"].get(name) is self._scaling
            and not layer._disable_adapters
            and not layer.merged_adapters
            and not state.get("lora_variant")
            and not state.get("use_dora", _NONE).get(name)
            and state.get("cast_input_dtype_enabled", True)
        ):
            return False
        for child, kind in zip(children, self._kinds, strict=True):
            d = child.__dict__
            if (
                d["_forward_hooks"]
                or d["_forward_pre_hooks"]
                or d["_backward_hooks"]
                or d["_backward_pre_hooks"]
                or "forward" in d
                or "_hf_hook" in d
                or child.__class__ is not kind
            ):
                return False
        for parameters, key, tensor, shape, dtype, kind in self._facts:
            found = parameters.get(key)
            if found is not tensor or (
                found is not None and (found.shape != shape or found.dtype is not dtype or found.__class__ is not kind)
            ):
                return False
        if (
            nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks
            or nn_module._global_backward_pre_hooks
        ):
            return False
        pair, device = self._pair, self._device
        W = pair.weight.data
        return (
            x.__class__ is Tensor
            and x.layout is torch.strided
            and x.device == device == pair.lora_A.device == pair.lora_B.device == W.device
            and not x.is_nested
            and x.ndim > 0
            and x.shape[-1] == pair.weight.shape[1]
            and not looked_through()
            and (self._takes_packed(base, x) if self._packed else not W.requires_grad and self._takes(x))
        )

    def _takes(self, x: Tensor) -> bool:
        """Whether a dense base multiplies x in the pair's dtype: F.linear's rule."""
        device, dtype = self._device.type, x.dtype
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device) is self._dtype and dtype in _ROUNDED
        return dtype is self._dtype

    def _takes_packed(self, base: Any, x: Tensor) -> bool:
        """The same of a quantised base, whose weight is still what it was; not in fp16 of another x, see ``run_in``."""
        dtype, found = x.dtype, quantised.frozen(base)
        return (
            not isinstance(found, str)
            and found[0] is self._pair.weight
            and found[1] is self._compute
            and quantised.dtype_of_products(x, self._compute) is self._dtype
            and (dtype is self._dtype or (dtype in _ROUNDED and self._dtype is not torch.float16))
        )

    def run(self, x: Tensor) -> Tensor:
        """y of the layer; draws the RNG state of a mask."""
        base, _, _, drop = self._children
        pair, given = self._pair, x.dtype
        if drop.__class__ is nn.Dropout and drop.training and dropout.threshold(drop.p):
            pair = pair._replace(dropout_p=drop.p, rng_state=dropout.draw_rng_state(x.device))
        if given is self._dtype:
            return run_pair(x, pair, self._backends)
        x = x.to(self._dtype)
        if not self._packed or quantised.follows_autocast(base):
            return run_pair(x, pair, self._backends)
        y = run_pair(x, pair._replace(bias=None), self._backends).to(given)
        return y if pair.bias is None else y + pair.bias.to(given)  # not rounded to the base's dtype


def memo_of(layer: Any, parts: Parts, x: Tensor) -> Memo | None:
    """What is kept of the predicate's answer, where it can be."""
    active, base, weight = layer.active_adapters, layer._modules["base_layer"], parts.weight
    if len(parts.adapters) != 1 or len(active) != 1 or layer.__dict__.get("lora_variant"):
        return None
    A, B, lora_bias, _, scaling, magnitude = parts.adapters[0]
    if magnitude is not None or isinstance(scaling, Tensor):
        return None
    if any("weight" not in child._parameters for child in _children(layer, active[0])[:3]):
        return None  # FSDP1 without use_orig_params puts another view there for each call
    if isinstance(weight, FrozenWeight):
        frozen, dtype = weight, quantised.dtype_of_products(x, parts.compute)
        plain = all(tensor.__class__ is Tensor for tensor in weight.tensors)
    else:
        frozen, dtype = DenseWeight(weight), weight.dtype
        plain = type(base) is nn.Linear and dtype is parts.compute
    if not plain or parts.bias.__class__ not in _PLAIN or lora_bias.__class__ not in _PLAIN:
        return None
    if parts.bias is not None and parts.bias.dtype is not dtype:
        return None
    if why_not_dtypes(dtype, dtype, parts.adapters) is not None:  # autocast alone has let it through
        return None
    pair = Pair(frozen, A, B, parts.bias, lora_bias, float(scaling), None, 0.0, None, "base")
    return Memo(layer, active[0], pair, dtype, parts)


def _children(layer: Any, name: str) -> tuple[Any, ...]:
    modules = layer._modules
    return (modules["base_layer"], *(modules[of]._modules[name] for of in ("lora_A", "lora_B", "lora_dropout")))


def _fact(tensor: Tensor | None) -> tuple[Any, ...]:
    return (None,) * 4 if tensor is None else (tensor, tensor.shape, tensor.dtype, tensor.__class__)
