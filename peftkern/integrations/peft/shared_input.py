"""Layers that read the very same x one after the other (q, k and v; gate and up) run as one call.

``patch(model, share=...)`` names them. The first one's call computes all of them, and the others hand their result out
when they are called with that tensor object, unchanged, in the state in which it was computed. Whatever differs
(another x, an adapter that is missing, disabled or merged, a changed factor, another grad mode, autocast or stream)
runs the layer alone, as without a group.

What is not handed out lies in one place per thread: the next call of a first layer drops it, and so does the end of x.
A group whose results are left over twice in a row is dissolved for good, but not in backward or under a checkpoint,
which compares what forward and recomputation save.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from peftkern.call import Base, Call, Update
from peftkern.functional import autocast, looked_through, run
from peftkern.integrations.peft import tally, units, zero3
from peftkern.integrations.peft.layer import PeftkernLoraLinear, patched_forward_is_off, updates_of
from peftkern.integrations.peft.read import Parts, plain_parts, why_not_input
from peftkern.ops import dispatch
from peftkern.weights import DenseWeight, FrozenWeight

USUAL = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
_TOLERATED = 2  # forwards in a row that leave results over: one may be an exception
logger = logging.getLogger("peftkern")


class _Group:
    """Layers, by weak reference, in the order of their calls; ``dissolved`` where they turned out to share no x."""

    def __init__(self, names: Sequence[str], layers: Sequence[Any]) -> None:
        self.names = tuple(names)
        self.members = [weakref.ref(layer) for layer in layers]
        self.dissolved = False
        self.wasted = 0

    def judge(self, left_over: bool) -> None:
        """Dissolve the group where its results are left over again."""
        self.wasted = self.wasted + 1 if left_over else 0
        if self.wasted >= _TOLERATED:
            self.dissolved = True
            logger.warning("peftkern: %s do not share their x, and run one by one", ", ".join(self.names))


class _Result(NamedTuple):
    """A y that waits, what it was computed from, and the state that it is right for."""

    y: Tensor
    parts: Parts  # held, so that no address in the state is anything else's
    state: tuple


class _Waiting(threading.local):
    """One thread's results that are not handed out yet, and the x that they belong to."""

    key: tuple[int, int] | None = None  # of x: its id and version
    end: Any = None  # a weak reference that drops the results when x ends: its id may then be another tensor's
    group: _Group | None = None
    results: dict[int, _Result | None] = {}  # by a member's id; None for one that has ended with x

    def turn_to(self, x: Tensor, group: _Group) -> None:
        """Leave the x before, and take this one."""
        in_backward = torch._C._current_graph_task_id() != -1
        if self.group is not None and not in_backward and _observer() is None:
            self.group.judge(bool(self.results))
        self.key, self.group, self.results = (id(x), x._version), group, {}
        self.end = weakref.ref(x, self._drop)

    def _drop(self, end: Any) -> None:
        if end is self.end:
            self.key, self.results = None, dict.fromkeys(self.results)


_waiting = _Waiting()
_groups: weakref.WeakKeyDictionary[nn.Module, _Group] = weakref.WeakKeyDictionary()


def group(layers: Mapping[str, nn.Module], share: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Put patched layers of one parent whose last names are those of an entry of ``share`` into a group.

    Returns: the group of each layer by the layer's name; layers of which a parent has one alone are in none.
    """
    found: dict[str, tuple[str, ...]] = {}
    for entry in share:
        for name in list(layers):
            parent, dot, last = name.rpartition(".")
            members = [parent + dot + other for other in entry]
            members = [member for member in members if units.class_of(layers.get(member)) is SharedInputLoraLinear]
            if last == entry[0] and name in members and len(members) > 1:
                made = _Group(members, [layers[member] for member in members])
                for member in members:
                    _groups[layers[member]] = made
                    found[member] = tuple(members)
    return found


def forget(layer: nn.Module) -> None:
    """Dissolve the group of a layer."""
    made = _groups.pop(layer, None)
    if made is not None:
        made.dissolved = True


def shared_inputs(model: nn.Module) -> list[list[str]]:
    """Which layers of a model run together, by name, in the order of their calls.

    Args: model: patched with ``share``.
    Returns: a list of groups; a layer that is in none runs alone. A group whose layers cannot run together at the
        moment (an adapter is missing on one of them) is listed.
    """
    names = {module: name for name, module in model.named_modules()}
    groups = {id(found): found for module in names if (found := _groups.get(module)) is not None}
    members = [[member() for member in found.members] for found in groups.values() if not found.dissolved]
    return [[names[layer] for layer in layers] for layers in members if all(layer in names for layer in layers)]


class SharedInputLoraLinear(PeftkernLoraLinear):
    """A patched layer that may run together with others. Made by ``patch``, never constructed."""

    peft = lora.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = None if args or kwargs else _groups.get(self)
        if made is None or made.dissolved or zero3.hooked(self) or patched_forward_is_off() or not _traceable(x):
            return super().forward(x, *args, **kwargs)
        y = None
        if made.members[0]() is self:
            _waiting.turn_to(x, made)
            y = None if made.dissolved else _together(made, x)
        elif _waiting.key == (id(x), x._version) and id(self) in _waiting.results:
            result = _waiting.results.pop(id(self))
            if result is not None and result.state == _state(_simple_parts(self, x), x):
                y = result.y
        else:
            _waiting.results.pop(id(self), None)  # it ended with its x: used, or not, as the layer says now
        if y is None:
            return super().forward(x)
        tally.fused(self)
        return y


def _together(made: _Group, x: Tensor) -> Tensor | None:
    """The first member's y, with the others' left waiting; None where one of them cannot take part."""
    layers = [member() for member in made.members]
    parts = [found for layer in layers if layer is not None and (found := _simple_parts(layer, x)) is not None]
    if len(parts) < len(layers):
        return None
    states = [_state(found, x) for found in parts]
    bases: list[Base] = []
    updates: list[Update] = []
    rows = x
    for i, one in enumerate(parts):
        assert isinstance(one.weight, Tensor)  # _simple_parts has seen to it
        rows, weight, bias = autocast(rows, DenseWeight(one.weight), one.bias)
        bases.append(Base(weight, bias))
        updates += updates_of(rows, one.adapters, i)
    y, *others = run(rows, Call(tuple(bases), tuple(updates)))
    _waiting.results = {
        id(layer): _Result(other, found, state)
        for layer, other, found, state in zip(layers[1:], others, parts[1:], states[1:], strict=True)
    }
    return y


def _simple_parts(layer: Any, x: Tensor) -> Parts | None:
    """The parts of a layer that can run together with others: a dense weight, one adapter without a magnitude."""
    parts = plain_parts(layer)
    if isinstance(parts, str) or parts.units or why_not_input(parts, x) is not None:
        return None
    alone = len(parts.adapters) > 1 or parts.adapters[0].magnitude is not None or isinstance(parts.weight, FrozenWeight)
    return None if alone else parts


def _state(parts: Parts | None, x: Tensor) -> tuple:
    """What a result depends on, beside x: comparable, and equal only where it would be computed again as it was."""
    if parts is None:
        return ()
    (adapter,) = parts.adapters
    tensors = (parts.weight, parts.bias, adapter.lora_A, adapter.lora_B, adapter.lora_bias, adapter.scaling)
    device = x.device.type
    return (
        tuple((one.data_ptr(), one._version, one.requires_grad) if isinstance(one, Tensor) else one for one in tensors),
        adapter.dropout_p,
        x.requires_grad,
        torch.is_grad_enabled(),
        _observer(),
        dispatch.autocasting(device) and torch.get_autocast_dtype(device),
        torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
    )


def _traceable(x: Any) -> bool:
    """Whether x has an identity and a version to go by."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_inference_mode_enabled()
        and not x.is_inference()
        and not looked_through()
    )


def _observer() -> Any:
    """The hooks on saved tensors that are in force, such as a non-reentrant checkpoint's, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
