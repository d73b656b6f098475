"""Who sees the operators, and that nobody else goes through torch's dispatcher."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Case, leaves_of, make
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.call import Base, Call, Update
from peftkern.ops import eager
from peftkern.weights import DenseWeight


def taken(first: torch.Tensor, *tensors: torch.Tensor | None, call: Call | None = None) -> str:
    return "operator" if eager.taken(first, (first, *tensors), call) else "implementation"


def a_call(**changed: torch.Tensor) -> Call:
    update = Update(torch.ones(3, 4), torch.ones(2, 3), None, torch.ones(()), None, 1.0, 0.0)
    return Call((Base(DenseWeight(torch.ones(2, 4)), torch.ones(2)),), (update._replace(**changed),))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*arguments, **(options or {}))


class Overridden(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Wrapped(torch.Tensor):
    """An operand with operators of its own."""


def test_nobody_watches():
    x, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    assert taken(x, parameter, None, call=a_call(lora_A=nn.Parameter(torch.ones(3, 4)))) == "implementation"


@pytest.mark.parametrize("watch", [Dispatched, Overridden, torch.profiler.profile], ids=lambda watch: watch.__name__)
def test_a_mode_or_the_profiler_watches(watch):
    with watch():
        assert taken(torch.ones(2)) == "operator"
    assert taken(torch.ones(2)) == "implementation"


def test_an_operand_watches():
    x, wrapped = torch.ones(2), torch.ones(2).as_subclass(Wrapped)
    assert taken(wrapped) == taken(x, wrapped) == "operator"
    call = a_call()
    weight, bias = call.bases[0]
    for base in (Base(weight, wrapped), Base(weight.mapped(lambda t: t.as_subclass(Wrapped)), bias)):
        assert taken(x, call=call._replace(bases=(base,))) == "operator"
    for name in ("lora_A", "lora_B", "lora_bias", "scaling_tensor", "rng_state"):
        assert taken(x, call=a_call(**{name: wrapped})) == "operator"
    assert taken(torch.ones(2, device="meta")) == "operator"


def test_a_compiler_watches():
    compiled = torch.compile(lambda x: 1 if taken(x) == "operator" else 0, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)) == 1


def step(t) -> tuple:
    leaf = leaves_of(t)
    options = dict(bias=leaf["bias"], lora_bias=leaf["lora_bias"], dropout_p=0.3, rng_state=t.rng_state)
    y = peftkern.lora_linear(leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], 2.0, **options)
    y.backward(t.dy)
    return y.detach(), *(leaf[name].grad for name in leaf)


def test_the_operators_are_seen_and_change_no_bit():
    t = make(Case(5, 16, 24, 3, bias=True, lora_bias=True))
    expected = step(copy.copy(t))
    mode = Dispatched()
    with mode:
        found = step(t)
    with torch.profiler.profile() as profile:
        step(t)
    profiled = {event.key for event in profile.key_averages()}
    for name in ("forward", "backward"):
        assert f"peftkern.{name}.default" in mode.seen and f"peftkern::{name}" in profiled
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
