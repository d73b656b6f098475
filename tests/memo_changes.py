"""A patched layer whose last call has left a memo, and every change that can come before the next.

A change is a block: within it the layer, or x, is in another state, and after it all is as before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy
import torch
from conftest import randomise
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import peftkern
from peftkern.integrations.peft import layer as integration
from peftkern.integrations.peft import tally

K, N, R = 16, 8, 4
CHILDREN = ("base", "A", "B", "drop")
HELD = (("base", "weight"), ("base", "bias"), ("A", "weight"), ("B", "weight"), ("B", "bias"))
Block = contextlib.AbstractContextManager
MISSING = object()


class Subject:
    """A patched layer with the adapters "default", which is active, and "other"."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True, p: float = 0.25) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=R, target_modules=["0"], lora_bias=bias, lora_dropout=p)
        self.model = get_peft_model(nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype), config)
        self.model.add_adapter("other", config)
        randomise(self.model)
        self.layer: Any = self.model.base_model.model[0]
        self.x: Tensor = torch.randn(3, K, dtype=dtype, requires_grad=True)
        peftkern.patch(self.model)
        self.layer(self.x)
        assert self.memo.holds(self.x)

    def call(self, x: Tensor) -> Any:
        return self.layer(x)

    @property
    def base(self) -> Any:
        return self.layer.base_layer

    @property
    def A(self) -> Any:
        return self.layer.lora_A["default"]

    @property
    def B(self) -> Any:
        return self.layer.lora_B["default"]

    @property
    def drop(self) -> Any:
        return self.layer.lora_dropout["default"]

    @property
    def memo(self) -> Any:
        return tally.of(self.layer).memo

    @contextlib.contextmanager
    def forgetful(self) -> Iterator[None]:
        """Calls within the block neither use nor make a memo."""
        with mock.patch.object(tally.of(self.layer), "memo", None), mock.patch.object(integration, "memo_of", _none):
            yield


def _none(*_: Any) -> None:
    return None


@contextlib.contextmanager
def put(where: Any, key: str, value: Any) -> Iterator[None]:
    """In a dictionary or a module's own, for the block."""
    where = where.__dict__ if isinstance(where, nn.Module) else where
    before = where.get(key, MISSING)
    where[key] = value
    yield
    where.pop(key) if before is MISSING else where.update({key: before})


@contextlib.contextmanager
def undone(do: Callable[[], Any], undo: Callable[[], Any]) -> Iterator[None]:
    do()
    yield
    undo()


def hooked(register: str, child: str | None = None) -> Callable[[Subject], Block]:
    """A hook of one kind on one child, or, without one, on every module."""

    @contextlib.contextmanager
    def change(s: Subject) -> Iterator[None]:
        module: Any = nn_module if child is None else getattr(s, child)
        handle = getattr(module, register)(_none)
        yield
        handle.remove()

    return change


def data(child: str, key: str, kind: Callable[[Tensor], Tensor]) -> Callable[[Subject], Block]:
    @contextlib.contextmanager
    def change(s: Subject) -> Iterator[None]:
        parameter = getattr(s, child)._parameters[key]
        before, parameter.data = parameter.data, kind(parameter.data)
        yield
        parameter.data = before

    return change


def parameter(child: str, key: str, make: Callable[[Tensor], Tensor | None]) -> Callable[[Subject], Block]:
    return lambda s: put(getattr(s, child)._parameters, key, make(getattr(s, child)._parameters[key]))


def of_class(find: Callable[[Subject], Any]) -> Callable[[Subject], Block]:
    """An object of another class, with the same contents."""

    def change(s: Subject) -> Block:
        it, kind = find(s), type(find(s))
        other = type(kind.__name__, (kind,), {})
        return undone(lambda: setattr(it, "__class__", other), lambda: setattr(it, "__class__", kind))

    return change


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def linear(kind: type = nn.Linear) -> nn.Module:
    return frozen(kind(K, N))


def active(names: Any) -> Callable[[Subject], Block]:
    return lambda s: put(s.layer, "_active_adapter", names)


def scaling(value: Any) -> Callable[[Subject], Block]:
    return lambda s: put(s.layer.scaling, "default", value)


def of_x(make: Callable[[Tensor], Tensor]) -> Callable[[Subject], Block]:
    return lambda s: put(s.__dict__, "x", make(s.x.detach()))


@contextlib.contextmanager
def together(*blocks: Block) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        yield


@contextlib.contextmanager
def parametrized(s: Subject) -> Iterator[None]:
    parametrize.register_parametrization(s.A, "weight", nn.Identity())
    yield
    parametrize.remove_parametrizations(s.A, "weight")


@contextlib.contextmanager
def rescaled(s: Subject) -> Iterator[None]:
    with rescale_adapter_scale(s.model, 0.5):
        yield


class OfX(Tensor):
    pass


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def doubled(t: Tensor) -> Tensor:
    return nn.Parameter(2 * t.detach(), requires_grad=t.requires_grad)


def of_two(t: Tensor) -> Tensor:
    return nn.Parameter(TwoTensor(t.detach(), t.detach()), requires_grad=False)


def elsewhere(t: Tensor) -> Tensor:
    """Other values, at another address and with other strides where a tensor has two dimensions."""
    return (2 * t).t().contiguous().t() if t.ndim == 2 else -t


def negated(x: Tensor) -> Tensor:
    """A view whose memory holds the opposite of its values."""
    return torch.complex(x, x).conj().imag


# What the kernels run, on other tensors or in another way.
TAKEN: dict[str, Callable[[Subject], Block]] = {
    "nothing": lambda s: contextlib.nullcontext(),
    "base_layer replaced": lambda s: put(s.layer._modules, "base_layer", linear()),
    "lora_A replaced": lambda s: put(s.layer.lora_A._modules, "default", nn.Linear(K, R, bias=False)),
    "lora_B replaced": lambda s: put(s.layer.lora_B._modules, "default", nn.Linear(R, N)),
    "lora_A and its dict replaced": lambda s: put(s.layer._modules, "lora_A", copy.deepcopy(s.layer.lora_A)),
    "lora_B's dict replaced": lambda s: put(s.layer._modules, "lora_B", copy.deepcopy(s.layer.lora_B)),
    "rank changed": lambda s: together(
        put(s.layer.lora_A._modules, "default", nn.Linear(K, 2, bias=False)),
        put(s.layer.lora_B._modules, "default", nn.Linear(2, N)),
    ),
    "dropout replaced": lambda s: put(s.layer.lora_dropout._modules, "default", nn.Dropout(0.75)),
    "dropout is Identity": lambda s: put(s.layer.lora_dropout._modules, "default", nn.Identity()),
    "dropout's dict replaced": lambda s: put(
        s.layer._modules, "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.75)})
    ),
    "dropout p": lambda s: put(s.drop, "p", 0.75),
    "dropout p 0": lambda s: put(s.drop, "p", 0.0),
    "dropout p 1": lambda s: put(s.drop, "p", 1.0),
    "dropout p too small": lambda s: put(s.drop, "p", 1e-9),
    "dropout in eval": lambda s: put(s.drop, "training", False),
    "eval": lambda s: undone(s.model.eval, s.model.train),
    "base bias removed": parameter("base", "bias", _none),
    "lora_bias removed": parameter("B", "bias", _none),
    "base bias of a class with its own operators": parameter("base", "bias", of_two),
    "lora_bias of a class with its own operators": parameter("B", "bias", of_two),
    "base bias trains": lambda s: undone(s.base.bias.requires_grad_, lambda: s.base.bias.requires_grad_(False)),
    "lora_A frozen": lambda s: undone(lambda: s.A.weight.requires_grad_(False), s.A.weight.requires_grad_),
    "lora_B frozen": lambda s: undone(lambda: s.B.requires_grad_(False), s.B.requires_grad_),
    "lora_A a tensor": parameter("A", "weight", Tensor.detach),
    "scaling": scaling(-3.5),
    "scaling 0": scaling(0),
    "scaling, equal": lambda s: put(s.layer.scaling, "default", float(str(s.layer.scaling["default"]))),
    "scaling, a tensor": scaling(torch.tensor(0.5)),
    "set_scale": lambda s: undone(lambda: s.layer.set_scale("default", 3), lambda: s.layer.set_scale("default", 1)),
    "scale_layer": lambda s: undone(lambda: s.layer.scale_layer(3), s.layer.unscale_layer),
    "rescale_adapter_scale": rescaled,
    "another active": active(["other"]),
    "another active by its name": active("other"),
    "the same by its name": active("default"),
    "one active, and one that is not there": active(["third", "default"]),
    "two active": active(["default", "other"]),
    "one active twice": active(["default", "default"]),
    "set_adapter": lambda s: undone(lambda: s.model.set_adapter("other"), lambda: s.model.set_adapter("default")),
    "merged and unmerged": lambda s: undone(lambda: (s.layer.merge(), s.layer.unmerge()), int),
    "x in one dimension": of_x(lambda x: x[0]),
    "x in three": of_x(lambda x: x.view(1, 3, K)),
    "x without rows": of_x(lambda x: x[:0]),
    "x transposed": of_x(lambda x: x.t().contiguous().t()),
    "x expanded": of_x(lambda x: x[:1].expand(5, K)),
    "x negated": of_x(negated),
    "x a Parameter": of_x(nn.Parameter),
    "no_grad": lambda s: torch.no_grad(),
    "inference mode": lambda s: torch.inference_mode(),
    "autocast off": lambda s: torch.autocast("cpu", enabled=False),
    "autocast": lambda s: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": lambda s: Watch(),
    "function mode": lambda s: WatchFunctions(),
    "profiler": lambda s: torch.profiler.profile(),
    "saved tensors' hooks": lambda s: torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone),
}
for _child, _key in HELD:
    TAKEN[f"{_child}.{_key} replaced"] = parameter(_child, _key, doubled)
    TAKEN[f"{_child}.{_key}.data elsewhere"] = data(_child, _key, elsewhere)

# What PEFT runs.
REFUSED: dict[str, Callable[[Subject], Block]] = {
    "base_layer of another class": lambda s: put(s.layer._modules, "base_layer", linear(type("Own", (nn.Linear,), {}))),
    "dropout of another class": lambda s: put(s.layer.lora_dropout._modules, "default", nn.AlphaDropout(0.5)),
    "lora_A has a bias": parameter("A", "bias", lambda _: nn.Parameter(torch.randn(R))),
    "base trains": lambda s: undone(s.base.weight.requires_grad_, lambda: s.base.weight.requires_grad_(False)),
    "base.weight.data of another shape": data("base", "weight", lambda t: t[:, :-1]),
    "base.weight.data flat": data("base", "weight", Tensor.flatten),
    "A.weight.data of another shape": data("A", "weight", lambda t: t[:, :-1]),
    "A.weight.data of another rank": data("A", "weight", lambda t: t[:2]),
    "B.weight.data of another shape": data("B", "weight", lambda t: t[:1]),
    "base.bias.data empty": data("base", "bias", lambda t: t[:0]),
    "B.bias.data empty": data("B", "bias", lambda t: t[:0]),
    "parametrized": parametrized,
    "pruned": lambda s: undone(
        lambda: prune.identity(s.base, "weight"),
        lambda: (prune.remove(s.base, "weight"), s.base.weight.requires_grad_(False)),
    ),
    "scaling of numpy's": scaling(numpy.float32(0.5)),
    "scaling inf": scaling(float("inf")),
    "scaling nan": scaling(float("nan")),
    "scaling trains": scaling(torch.tensor(0.5, requires_grad=True)),
    "none active": active([]),
    "one active that is not there": active(["third"]),
    "disabled": lambda s: undone(lambda: s.layer.enable_adapters(False), lambda: s.layer.enable_adapters(True)),
    "merged": lambda s: undone(s.layer.merge, s.layer.unmerge),
    "not cast": lambda s: put(s.layer, "cast_input_dtype_enabled", False),
    "a variant": lambda s: put(s.layer, "lora_variant", {"default": object()}),
    "use_dora": lambda s: put(s.layer.use_dora, "default", True),
    "x of another dtype": of_x(Tensor.bfloat16),
    "x wider": of_x(Tensor.double),
    "x of integers": of_x(Tensor.long),
    "x on meta": of_x(lambda x: x.to("meta")),
    "x a number": of_x(lambda x: x[0, 0]),
    "x too short": of_x(lambda x: x[:, :-1]),
    "x of a subclass": of_x(lambda x: x.as_subclass(OfX)),
    "x sparse": of_x(Tensor.to_sparse),
    "x nested": of_x(lambda x: torch.nested.nested_tensor([x, x[:1]])),
    "x nested and jagged": of_x(lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)),
    "everything in bf16": lambda s: undone(s.model.bfloat16, s.model.float),
    "everything in fp16": lambda s: undone(s.model.half, s.model.float),
    "FLOP counter": lambda s: FlopCounterMode(display=False),  # it hooks every module
    "forward-mode AD": lambda s: torch.autograd.forward_ad.dual_level(),
}
for _child, _key in HELD:
    REFUSED[f"{_child}.{_key}.data in bf16"] = data(_child, _key, Tensor.bfloat16)
    if _key == "weight":
        REFUSED[f"{_child}.{_key} of another class"] = of_class(lambda s, c=_child: getattr(s, c).weight)
for _child in CHILDREN:
    REFUSED[f"{_child}'s class swapped"] = of_class(lambda s, c=_child: getattr(s, c))
    REFUSED[f"{_child}'s forward replaced"] = lambda s, c=_child: put(getattr(s, c), "forward", lambda x: x[..., :1])
    REFUSED[f"{_child} has accelerate's hook"] = lambda s, c=_child: put(getattr(s, c), "_hf_hook", object())
    for _kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        REFUSED[f"{_child}'s {_kind}"] = hooked(f"register_{_kind}", _child)
for _kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
    REFUSED[f"global {_kind}"] = hooked(f"register_module_{_kind}")
