"""Children of a LoRA layer that FSDP has made units of their own: their weights are there within their forward alone.

PEFT's wrap policy makes every lora_A and lora_B one, a policy by size the base layer too. A fused call reads all of a
layer's weights at once, so it runs ``within`` the forwards of its units, one in another: their own hooks gather the
weights before it and again in backward, and reduce the gradients after that. Only the modules are called for it.

The predicate looks at a layer before that, and ``report`` between two calls, when the weights are elsewhere. It is
shown a stand-in: a plain module with tensors of no memory, of the shape, dtype and device that is gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn

from peftkern.integrations import quantised

_FSDP1: tuple[type[Any], ...] = ()
_FSDP2: tuple[type[Any], ...] = ()
_DTENSOR: tuple[type[Any], ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    _FSDP1, _FSDP2, _DTENSOR = (FullyShardedDataParallel,), (FSDPModule,), (DTensor,)

Seen = Callable[[Any], Any]  # from a child of a layer to the plain module that is read in its place
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMES = ("weight", "bias")
_kin: dict[type, dict[type, type]] = {}  # a unit's class, and those that swaps put in its place, by what they are of
_MANAGED = "_is_fsdp_managed_module"  # FSDP's mark, for compilers, on every module whose parameters a unit may hold


def is_unit(child: Any) -> bool:
    """Whether a module is a unit of FSDP1 or FSDP2."""
    return isinstance(child, (*_FSDP1, *_FSDP2))


def is_managed(child: Any) -> bool:
    """Whether a module's parameters are a unit's, which shows them in a forward alone."""
    return child.__dict__.get(_MANAGED, False) or is_unit(child)


def class_of(module: Any) -> Any:
    """A module's class, of which FSDP2 has given a unit a subclass."""
    kind = type(module)
    unit, *rest = kind.__bases__
    return rest[0] if rest and issubclass(unit, _FSDP2) else kind


def set_class(module: Any, kind: type) -> None:
    """Swap a module's class; that of a unit for FSDP2's subclass of it."""
    had, bare = type(module), class_of(module)
    if bare is not had:
        kin = _kin.setdefault(had, {bare: had})
        if kind not in kin:
            refused = {"__deepcopy__": had.__dict__["__deepcopy__"]}
            made = type(f"FSDP{kind.__name__}", (had.__bases__[0], kind), refused)
            kin[kind], _kin[made] = made, kin
        kind = kin[kind]
    module.__class__ = kind


def of(modules: Mapping[str, Any], adapters: Sequence[str]) -> tuple[nn.Module, ...]:
    """The units among a layer's children, given its modules: the base first, then those of these adapters."""
    held = [modules.get(name) for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
    children = [part._modules.get(name) for name in adapters for part in held if part is not None]
    return tuple(child for child in (modules["base_layer"], *children) if is_unit(child))


def ahead(child: Any) -> Any:
    """What a call of the layer will read of a child: of a unit what its hooks will have gathered."""
    if child.__class__ is nn.Linear and "weight" in child._parameters:
        return child
    if is_unit(child):
        return _stand_in(child, _promised)
    apart = "weight" in child.__dict__ and "weight" not in child._parameters
    return _stand_in(child, _held) if apart else child  # FSDP1 without use_orig_params: views of the unit around it


def gathered(child: Any) -> Any:
    """What a call reads of a child ``within`` the forwards of the layer's units."""
    return _stand_in(child, _held) if is_unit(child) else ahead(child)


def between(model: nn.Module) -> Seen:
    """What the next call will read of a child in the model, whose weights may be those of a unit around its layer."""
    around: dict[nn.Module, nn.Module] = {model: model}
    for module in model.modules():
        for child in module.children():
            around[child] = child if is_unit(child) else around[module]

    def seen(child: Any) -> Any:
        read = functools.partial(_promised, unit=around.get(child, child))
        return _stand_in(child, read) if is_managed(child) else child

    return seen


def why_not_whole(weight: Any) -> str | None:
    """Why a weight is not there: this is a shard."""
    return "base_layer has a weight of type DTensor" if isinstance(weight, _DTENSOR) else None


def within(units: Sequence[nn.Module], base: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x) within the forward of every unit, the first one's outermost; x is as their hooks cast it.

    y is as the hooks of ``base`` cast it; what those of an adapter widen PEFT casts back.
    """
    for unit in reversed(units):
        run = functools.partial(_inside, unit, unit is base, run)
    return run(x)


def _inside(unit: nn.Module, casts: bool, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A call of a unit, whose hooks are its own, and whose forward is ``run``."""
    state = _inner(unit).__dict__
    own = {"forward": state["forward"]} if "forward" in state else {}
    inside: list[Tensor] = []

    def put_back() -> None:
        state.pop("forward", None)
        state.update(own)

    def forward(x: Tensor) -> Tensor:
        put_back()
        inside.append(run(x))
        return inside[0]

    state["forward"] = forward
    try:
        y = unit(x)
    finally:
        put_back()
    return y if casts else y.to(inside[0].dtype)


def as_cast(units: Sequence[nn.Module], x: Tensor) -> Tensor:
    """A tensor like the x that ``within`` gives to ``run``, of no memory where that is another one."""
    dtype = x.dtype
    for policy in map(_policy, units):
        if policy.cast_forward_inputs and policy.param_dtype is not None and dtype.is_floating_point:
            dtype = policy.param_dtype
    return x if dtype == x.dtype else torch.empty((), dtype=dtype, device=x.device).expand(x.shape)


def _stand_in(child: Any, read: Callable[[Any, str], Tensor | None]) -> Any:
    """A plain module of the child's kind that has the parameters which ``read`` finds, and no hook of FSDP's; the child
    where it is none of a plain module.
    """
    inner = _inner(child)
    kind = class_of(inner)
    if kind not in (nn.Linear, Conv1D, DoraLinearLayer) and not quantised.is_bitsandbytes(kind):
        return child
    made = kind.__new__(kind)
    made.__dict__.update(inner.__dict__)
    made.__dict__["_parameters"] = {name: read(child, name) for name in _NAMES}
    for name in _HOOKS:
        found = {**getattr(child, name), **getattr(inner, name)}
        made.__dict__[name] = {key: hook for key, hook in found.items() if not _is_fsdps(hook)}
    for name in _NAMES:  # FSDP leaves its parameters there too
        made.__dict__.pop(name, None)
    made.__dict__.update({name: child.__dict__[name] for name in ("forward", "_hf_hook") if name in child.__dict__})
    return made


def _inner(child: Any) -> Any:
    """The module whose forward is called between a unit's hooks."""
    return next(child.children()) if isinstance(child, _FSDP1) else child


def _is_fsdps(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.")


def _held(child: Any, name: str) -> Tensor | None:
    """A parameter as the child has it; FSDP1 without use_orig_params has made a plain attribute of it."""
    inner = _inner(child)
    return inner._parameters.get(name, inner.__dict__.get(name))


def _promised(child: Any, name: str, unit: Any = None) -> Tensor | None:
    """A tensor of no memory like the one that a unit gathers, the child itself by default. What no unit gathers as a
    plain tensor is itself.
    """
    unit = child if unit is None else unit
    inner, held = _inner(child), _held(child, name)
    if held is None:
        return None
    shape, dtype, device = _whole_shape(unit, inner, name, held), held.dtype, held.device
    if isinstance(held, _DTENSOR):
        *others, last = held.placements
        if not last.is_shard() or not all(other.is_replicate() for other in others):
            return held  # of tensor parallelism: a DTensor where it is gathered, too
    if is_unit(unit):
        dtype = (held.is_floating_point() and _policy(unit).param_dtype) or dtype
        device = unit.compute_device if isinstance(unit, _FSDP1) else unit._get_fsdp_state()._device
    like = torch.empty((), dtype=dtype, device="meta" if held.is_meta else device).expand(shape)
    return like.requires_grad_(held.requires_grad)


def _whole_shape(unit: Any, inner: Any, name: str, held: Tensor) -> torch.Size:
    """A parameter's shape where FSDP1 shows the part of it that this rank has, flat."""
    flat = unit._handle.flat_param if isinstance(unit, _FSDP1) and unit._handle is not None else None
    known = () if flat is None else zip(flat._param_infos, flat._shapes, strict=True)
    return next((shape for info, shape in known if info.module is inner and info.param_name == name), held.shape)


def _policy(unit: Any) -> Any:
    """A unit's mixed precision: param_dtype, cast_forward_inputs."""
    return unit.mixed_precision if isinstance(unit, _FSDP1) else unit._get_fsdp_state()._mp_policy
