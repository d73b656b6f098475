"""What the predicate has found of a layer, and whether it still holds: all that it looks at, compared by identity.

The predicate (``read``) costs 8 us a call. Where it has let a layer through with one vanilla adapter,
its answer is kept, on the layer's tally, and holds while nothing has changed that the answer depends on: a state that
changes in any of these respects is judged anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from peftkern import dropout
from peftkern.backends.base import Backend
from peftkern.backends.cpp.extension import extension
from peftkern.call import Pair
from peftkern.functional import looked_through, run_pair
from peftkern.integrations import quantised
from peftkern.integrations.peft.read import Parts, why_not_dtypes
from peftkern.weights import DenseWeight, FrozenWeight

_PLAIN = (nn.Parameter, Tensor, type(None))  # a tensor of any other class may have operators of its own
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # what autocast and quantised bases take
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in _HOOKS)


class Facts(NamedTuple):
    """A state of Python's objects, column by column; each column is flat, to be gone through quickly.

    same: a dict, a key and what it has there (None also where there is no such key); absent: a dict and a key that it
    lacks; empty: a dict and a key where it has nothing, or what is false; kinds: an object and its class; singles: a
    list and its one entry; equal: an object, an attribute's name and what it equals.
    """

    same: tuple[Any, ...]
    absent: tuple[Any, ...]
    empty: tuple[Any, ...]
    kinds: tuple[Any, ...]
    singles: tuple[Any, ...]
    equal: tuple[Any, ...]


def holds_in_python(facts: Facts) -> bool:
    """Whether all of it is still so: the extension's ``holds``, where that is not built."""
    same, absent, empty, kinds, singles, equal = facts
    return (
        all(d.get(key) is value for d, key, value in zip(same[::3], same[1::3], same[2::3], strict=True))
        and not any(key in d for d, key in zip(absent[::2], absent[1::2], strict=True))
        and not any(d.get(key) for d, key in zip(empty[::2], empty[1::2], strict=True))
        and all(type(one) is kind for one, kind in zip(kinds[::2], kinds[1::2], strict=True))
        and all(len(given) == 1 and given[0] is one for given, one in zip(singles[::2], singles[1::2], strict=True))
        and all(getattr(one, name) == v for one, name, v in zip(equal[::3], equal[1::3], equal[2::3], strict=True))
    )


@functools.cache
def _holds() -> Callable[[Facts], bool]:
    module = extension()[0]
    return holds_in_python if module is None else module.holds


class Memo:
    """The pair of a layer's base and its one active adapter, and the state that it is right for."""

    __slots__ = (
        "_backends",
        "_base",
        "_compute",
        "_device",
        "_drop",
        "_dtype",
        "_facts",
        "_holds",
        "_pair",
        "_quantised",
    )

    def __init__(self, layer: Any, name: str, pair: Pair, dtype: torch.dtype, parts: Parts) -> None:
        self._facts, self._holds = _facts_of(layer, name), _holds()
        self._base, _, _, self._drop = _children(layer, name)
        self._pair, self._dtype, self._device = pair, dtype, pair.lora_A.device
        self._quantised, self._compute = isinstance(parts.weight, FrozenWeight), parts.compute
        self._backends: dict[Any, Backend] = {}

    def holds(self, x: Tensor) -> bool:
        """Whether the predicate would say of the layer, and of x, what it said before."""
        pair = self._pair
        return (
            self._holds(self._facts)
            and x.__class__ is Tensor
            and x.layout is torch.strided
            and x.device == self._device == pair.weight.data.device
            and not x.is_nested
            and x.ndim > 0
            and x.shape[-1] == pair.weight.shape[1]
            and not looked_through()
            and (self._takes_quantised(x) if self._quantised else not pair.weight.data.requires_grad and self._takes(x))
        )

    def _takes(self, x: Tensor) -> bool:
        """Whether a dense base multiplies x in the pair's dtype: F.linear's rule."""
        device, dtype = self._device.type, x.dtype
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device) is self._dtype and dtype in _ROUNDED
        return dtype is self._dtype

    def _takes_quantised(self, x: Tensor) -> bool:
        """The same of a quantised base, whose weight is still what it was; not in fp16 of another x, see ``run_in``."""
        dtype, found = x.dtype, quantised.frozen(self._base)
        return (
            not isinstance(found, str)
            and found[0] is self._pair.weight
            and found[1] is self._compute
            and quantised.dtype_of_products(x, self._compute) is self._dtype
            and (dtype is self._dtype or (dtype in _ROUNDED and self._dtype is not torch.float16))
        )

    def run(self, x: Tensor) -> Tensor:
        """y of the layer; draws the RNG state of a mask."""
        pair, given, drop = self._pair, x.dtype, self._drop
        if drop.__class__ is nn.Dropout and drop.training and dropout.threshold(drop.p):
            pair = pair._replace(dropout_p=drop.p, rng_state=dropout.draw_rng_state(x.device))
        if given is self._dtype:
            return run_pair(x, pair, self._backends)
        x = x.to(self._dtype)
        if not self._quantised or quantised.follows_autocast(self._base):
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


def _facts_of(layer: Any, name: str) -> Facts:
    """The state of a layer with one active adapter of that name, as far as the predicate looks at it."""
    state, children = layer.__dict__, _children(layer, name)
    same: list[Any] = [state, "scaling", state["scaling"], state["scaling"], name, layer.scaling[name]]
    absent: list[Any] = []
    empty: list[Any] = [state, "_disable_adapters", state, "merged_adapters", state, "lora_variant"]
    kinds: list[Any] = [layer, layer.__class__]
    equal: list[Any] = []
    for key in ("_active_adapter", "cast_input_dtype_enabled", "use_dora"):
        if key in state:
            same += (state, key, state[key])
        else:
            absent += (state, key)
    active, dora = state.get("_active_adapter"), state.get("use_dora")
    singles = (active, active[0]) if isinstance(active, list) else ()
    empty += (dora, name) if isinstance(dora, dict) else ()
    modules = state["_modules"]
    same += (state, "_modules", modules, modules, "base_layer", children[0])
    for of, child in zip(("lora_A", "lora_B", "lora_dropout"), children[1:], strict=True):
        container = modules[of]
        inside = container._modules
        same += (modules, of, container, container.__dict__, "_modules", inside, inside, name, child)
    for child in children:
        own = child.__dict__
        for key in _HOOKS:
            empty += (own, key)
        absent += (own, "forward", own, "_hf_hook")
        kinds += (child, child.__class__)
        equal += (child, "__dict__", own)
    for child in children[:3]:
        same += (child.__dict__, "_parameters", child._parameters)
        for key in ("weight", "bias"):
            tensor = child._parameters.get(key)
            same += (child._parameters, key, tensor)
            if tensor is not None:
                kinds += (tensor, tensor.__class__)
                equal += (tensor, "shape", tensor.shape, tensor, "dtype", tensor.dtype, tensor, "device", tensor.device)
    for key in _GLOBAL_HOOKS:
        empty += (vars(nn_module), key)
    return Facts(tuple(same), tuple(absent), tuple(empty), tuple(kinds), singles, tuple(equal))
