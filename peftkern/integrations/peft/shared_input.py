"""Layers that read the very same x one after the other (q, k and v; gate and up) run as one autograd node.

They are found by tracing: layers that were called in turn with one tensor object form a group. From then on the first
one's call computes all of them, and the others hand their result out when they are called with that object, unchanged,
in the state in which it was computed. Whatever differs (another x, an adapter that is missing, disabled or merged, a
changed factor, another grad mode, autocast or stream) runs the layer alone, as without a group.

What is not handed out lies in one place per thread: the next call of any such layer with another x drops it, and so
does the end of x. A group whose results are left over twice in a row is dissolved for good.

Non-reentrant checkpointing compares what forward and recomputation save, so between the two a group may not begin or
end: in backward nothing changes, and a group waits for the recomputation of forwards that ran without it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from peftkern.functional import apply_shared, autocast, looked_through
from peftkern.integrations.peft import tally
from peftkern.integrations.peft.layer import PeftkernLoraLinear, operands_of, patched_forward_is_off
from peftkern.integrations.peft.parts import Parts, plain_parts, why_not_input
from peftkern.ops import dispatch
from peftkern.weights import DenseWeight, FrozenWeight

_TOLERATED = 2  # forwards in a row that leave results over: one may be an exception


class _Group:
    """Layers, by weak reference, in the order of their calls."""

    def __init__(self, layers: list[Any], unrecomputed: int) -> None:
        self.members = [weakref.ref(layer) for layer in layers]
        self.active = self.dissolved = False
        self.unrecomputed = unrecomputed  # checkpointed forwards that ran without the group
        self.wasted = 0

    def layers(self) -> list[Any] | None:
        """The layers, or None where one is gone."""
        found = [member() for member in self.members]
        return None if any(layer is None for layer in found) else found

    def runs(self, trace: _Trace) -> bool:
        """Whether the first member's call, which asks, computes all of them."""
        if not (self.active or self.dissolved):
            if trace.in_backward:
                self.unrecomputed -= trace.observed
            elif self.unrecomputed <= 0:
                self.active = True
            else:
                self.unrecomputed += trace.observed
        return self.active

    def judge(self, left_over: bool) -> None:
        """Dissolve the group where its results are left over again."""
        self.wasted = self.wasted + 1 if left_over else 0
        if self.wasted >= _TOLERATED:
            self.active, self.dissolved = False, True


class _Result(NamedTuple):
    """A y that waits, what it was computed from, and the state that it is right for."""

    y: Tensor
    parts: Parts  # held, so that no address in the state is anything else's
    state: tuple


class _Trace:
    """One thread's x of the moment: which layers were called with it, and what is not handed out yet."""

    def __init__(self) -> None:
        self.key: tuple[int, int] | None = None  # of x: its id and version
        self.end: Any = None  # a weak reference that forgets x when it ends: its id may then be another tensor's
        self.called: set[int] = set()  # ids of layers
        self.ungrouped: list[weakref.ref] = []
        self.group: _Group | None = None
        self.results: dict[int, _Result | None] = {}  # by a member's id; None for what has ended with x
        self.in_backward = self.observed = False

    def turn_to(self, x: Tensor, key: tuple[int, int]) -> None:
        """Leave the x before, and take this one."""
        self.find()
        if self.group is not None and not (self.in_backward or self.observed):
            self.group.judge(bool(self.results))
        self.called, self.ungrouped, self.group, self.results = set(), [], None, {}
        self.in_backward = torch._C._current_graph_task_id() != -1
        self.observed = _observer() is not None
        self.key, self.end = key, weakref.ref(x, self._forget)

    def find(self) -> None:
        """Form a group of the layers called with this x, where they are two or more and in none yet."""
        layers = [layer for ref in self.ungrouped if (layer := ref()) is not None]
        if len(layers) < 2 or self.in_backward or len(layers) < len(self.ungrouped):
            return
        with _lock:
            if not any(layer in _groups for layer in layers):
                group = _Group(layers, int(self.observed))
                for layer in layers:
                    _groups[layer] = group

    def _forget(self, end: Any) -> None:
        if end is self.end:
            self.key, self.results = None, dict.fromkeys(self.results)


_local = threading.local()
_groups: weakref.WeakKeyDictionary[nn.Module, _Group] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forget(layer: nn.Module) -> None:
    """Dissolve the group of a layer, and let its members be found anew."""
    with _lock:
        group = _groups.pop(layer, None)
        if group is not None:
            group.active, group.dissolved = False, True
            for member in group.layers() or ():
                _groups.pop(member, None)


def shared_inputs(model: nn.Module) -> list[list[str]]:
    """Which layers of a model run together, by name, in the order of their calls.

    Args: model: patched with ``fuse_shared_inputs=True``. Before its first forward there are none.
    Returns: a list of groups; a layer that is in none runs alone. A group whose layers cannot run together at the
        moment (an adapter is missing on one of them) is listed.
    """
    names = {module: name for name, module in model.named_modules()}
    _trace().find()
    groups = {id(group): group for module in names if (group := _groups.get(module)) is not None}
    return [
        [names[layer] for layer in layers]
        for group in groups.values()
        if not group.dissolved and (layers := group.layers()) is not None and all(layer in names for layer in layers)
    ]


class SharedInputLoraLinear(PeftkernLoraLinear):
    """A patched layer that looks for others with the same x. Made by ``patch``, never constructed."""

    peft = lora.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or args or kwargs or patched_forward_is_off() or not _traceable(x):
            return super().forward(x, *args, **kwargs)
        trace, key = _trace(), (id(x), x._version)
        if trace.key != key or id(self) in trace.called:
            trace.turn_to(x, key)
        trace.called.add(id(self))
        if id(self) in trace.results:
            result = trace.results.pop(id(self))
            if result is not None and result.state == _state(_simple_parts(self, x), x):
                tally.fused(self)
                return result.y
            return super().forward(x)
        group = _groups.get(self)
        if group is None:
            trace.ungrouped.append(weakref.ref(self))
        elif group.members[0]() is self and group.runs(trace):
            y = _together(group, x, trace)
            if y is not None:
                tally.fused(self)
                return y
        return super().forward(x)


def _together(group: _Group, x: Tensor, trace: _Trace) -> Tensor | None:
    """The first member's y, with the others' left in the trace; None where one of them cannot take part."""
    layers = group.layers()
    if layers is None:
        return None
    parts = [found for layer in layers if (found := _simple_parts(layer, x)) is not None]
    if len(parts) < len(layers):
        return None
    states = [_state(found, x) for found in parts]
    rows = _autocast(x, parts[0])[0]
    members = []
    for one in parts:
        _, weight, bias = _autocast(rows, one)
        members.append(operands_of(rows, weight, bias, one.adapters[0]))
    y, *others = apply_shared(rows, members)
    trace.group = group
    trace.results = {
        id(layer): _Result(other, found, state)
        for layer, other, found, state in zip(layers[1:], others, parts[1:], states[1:], strict=True)
    }
    return y


def _autocast(x: Tensor, parts: Parts) -> tuple[Tensor, FrozenWeight, Tensor | None]:
    assert isinstance(parts.weight, Tensor)  # the predicate has seen to it
    return autocast(x, DenseWeight(parts.weight), parts.bias)


def _simple_parts(layer: Any, x: Tensor) -> Parts | None:
    """The parts of a layer that can run together with others: a dense weight, one adapter without a magnitude."""
    parts = plain_parts(layer)
    if isinstance(parts, str) or why_not_input(parts, x) is not None:
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
    return type(x) is Tensor and not torch.is_inference_mode_enabled() and not x.is_inference() and not looked_through()


def _observer() -> Any:
    """The hooks on saved tensors that are in force, such as a non-reentrant checkpoint's, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _trace() -> _Trace:
    try:
        return _local.trace
    except AttributeError:
        _local.trace = _Trace()
        return _local.trace
