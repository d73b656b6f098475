"""One LoRA layer of any configuration: how it is drawn, built, run and judged against PEFT's own."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peftkern
from benchmarks.training import with_published_dropout

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NARROW = (BF16, F16)
ENOUGH = 32  # roundings in a norm: that of fewer is mostly luck, so such cases are run again and pooled
Found = dict[str, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Adapter:
    r: int
    alpha: float
    rslora: bool
    p: float
    lora_bias: bool
    dora: bool
    scaling: float | str | None  # what replaces PEFT's: a number; "tensor", "fp64 tensor"; None: nothing
    trains: tuple[bool, bool, bool]  # A, B, lora_bias


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Everything that a case depends on; its repr is the reproduction."""

    K: int
    N: int
    conv1d: bool
    leading: tuple[int, ...]
    x_layout: str
    dy_layout: str
    x_needs_grad: bool
    base_dtype: torch.dtype
    adapter_dtype: torch.dtype
    x_dtype: torch.dtype
    autocast: torch.dtype | None
    bias: str
    base_trains: bool
    adapters: tuple[Adapter, ...]
    active: tuple[int, ...]  # beyond the last: an adapter that this layer has not got
    state: str
    training: bool
    use: str
    in_place: bool
    patch_first: bool
    seed: int

    @property
    def used(self) -> list[Adapter]:
        return [self.adapters[i] for i in self.active if i < len(self.adapters)]

    @property
    def mixed(self) -> bool:
        """fp32 factors beside a 16-bit base, which peftkern rounds as autocast would."""
        return self.autocast is None and self.adapter_dtype == F32 and self.base_dtype in NARROW

    @property
    def dtypes_fit(self) -> bool:
        x, W = (
            dtype if self.autocast is None or dtype == F64 else self.autocast
            for dtype in (self.x_dtype, self.base_dtype)
        )
        return x == W and (self.adapter_dtype == W or (self.adapter_dtype == F32 and W in NARROW))

    @property
    def vanilla(self) -> bool:
        """Whether the layer has to be on the fast path."""
        return (
            self.state in ("as built", "unmerged")
            and len(self.used) > 0
            and not (any(adapter.dora for adapter in self.used) and (len(self.used) > 1 or self.leading == ()))
            and not self.base_trains
            and self.dtypes_fit
        )

    @property
    def trials(self) -> int:
        """How often a case runs, so that s, t and what is made of them have enough elements in all runs together."""
        if 0 in self.leading:
            return 1
        repeated = "expanded" in (self.x_layout, self.dy_layout)
        rows = math.prod(self.leading[1:] if repeated else self.leading)  # that differ
        smallest = min(self.K, self.N, *(rows * adapter.r for adapter in self.used))
        return -(-ENOUGH // smallest)


# ------------------------------------------------------------------------------------------------------------- drawing

_DTYPES = [  # of the base, the adapter, x; autocast's. The last ones do not fit, or have another backend
    *[(F32, F32, F32, None), (BF16, F32, BF16, None), (BF16, BF16, BF16, None), (F16, F32, F16, None)] * 3,
    (F16, F16, F16, None), (F32, F32, F32, BF16), (F32, F32, F32, F16), (BF16, F32, F32, BF16), (BF16, F32, BF16, BF16),
    (BF16, BF16, F32, BF16), (F32, F32, BF16, BF16), (F16, F32, F32, BF16), (F64, F64, F64, None),
    (F64, F64, F64, BF16), (F32, F32, BF16, None), (BF16, BF16, F32, None), (BF16, F16, BF16, None),
    (F32, BF16, F32, None),
]  # fmt: skip
_ADAPTERS = st.builds(
    Adapter,
    r=st.sampled_from([1, 2, 3, 4, 8, 13, 16, 24]),
    alpha=st.sampled_from([1, 4, 8, 16, 0.5, -3]),
    rslora=st.booleans(),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.1, 0.5, 1.0, 1e-7]),
    lora_bias=st.sampled_from([False, False, True]),
    dora=st.sampled_from([False] * 4 + [True]),
    scaling=st.sampled_from([None, None, None, 0.0, -1.5, 0.3, "tensor", "fp64 tensor"]),
    trains=st.sampled_from([(True, True, True)] * 3 + [(True, False, True), (False, True, False), (False,) * 3]),
).filter(lambda adapter: not (adapter.dora and adapter.lora_bias))  # PEFT refuses
_LEADING = [(7,), (33,), (2, 5), (5, 1), (3, 1, 4), (8, 8), (64,), (100,)] * 2 + [(), (1,), (0,), (2, 0)]
_LAYOUTS = ["contiguous"] * 4 + ["transposed", "strided", "offset"] * 2 + ["expanded"]
_VIEWABLE = ["contiguous", "offset"]  # Conv1D takes a view of x, and PEFT's own forward raises for the others
_USES = ["once"] * 4 + ["accumulate", "retain", "checkpoint", "reentrant", "no_grad", "inference"]


@st.composite
def configurations(draw: Callable[..., Any], vanilla: bool = False) -> Configuration:
    """Any configuration, weighted towards what people use; ``vanilla``: only such as must be fast, without autocast."""
    dtypes = [row for row in _DTYPES if row[0] == row[2] and not row[3] and row[1] in (F32, row[0])]
    base_dtype, adapter_dtype, x_dtype, autocast = draw(st.sampled_from(dtypes if vanilla else _DTYPES))
    adapters = draw(st.lists(_ADAPTERS, min_size=1, max_size=1 if draw(st.booleans()) else 3))
    active = draw(st.permutations(range(len(adapters))))[: draw(st.integers(1, len(adapters)))]
    if vanilla and len(active) > 1:
        adapters = [dataclasses.replace(adapter, dora=False) for adapter in adapters]
    if draw(st.integers(0, 19)) == 19:
        active = [*active, len(adapters)]
    conv1d = draw(st.integers(0, 7)) == 7
    bias = draw(st.sampled_from(["frozen", "trains"] if conv1d else ["none", "frozen", "trains"]))
    states = ["as built"] * 6 + ["unmerged", "merged", "disabled"]
    if vanilla or (bias == "none" and any(adapter.lora_bias for adapter in adapters)):  # PEFT refuses to merge these
        states = ["as built"]
    leading = draw(st.sampled_from(_LEADING))
    if vanilla and leading == () and adapters[active[0]].dora:  # PEFT's y has a dimension more
        leading = (1,)
    use = draw(st.sampled_from(_USES))
    features = st.sampled_from([8, 17, 32, 33, 40, 64, 65, 96])
    return Configuration(
        K=draw(features), N=draw(features), conv1d=conv1d,
        leading=leading, x_layout=draw(st.sampled_from(_VIEWABLE if conv1d else _LAYOUTS)),
        dy_layout=draw(st.sampled_from(_LAYOUTS)), x_needs_grad=use == "reentrant" or draw(st.booleans()),
        base_dtype=base_dtype, adapter_dtype=adapter_dtype, x_dtype=x_dtype, autocast=autocast,
        bias=bias, base_trains=not vanilla and draw(st.integers(0, 15)) == 15,
        adapters=tuple(adapters), active=tuple(active),
        state=draw(st.sampled_from(states)), training=draw(st.sampled_from([True, True, True, False])), use=use,
        in_place=draw(st.booleans()), patch_first=draw(st.booleans()), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ building


def build(case: Configuration) -> nn.Module:
    """The patched layer in the state that ``case`` asks for; ``peft_twin`` makes PEFT's own of it."""
    # torch.manual_seed formats a traceback for each device that is not there: 2 ms, as long as the rest of a run
    torch.default_generator.manual_seed(case.seed)
    base = Conv1D(case.N, case.K) if case.conv1d else nn.Linear(case.K, case.N, bias=case.bias != "none")
    holder = nn.ModuleDict({"layer": base})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on what cannot be merged, and on a second adapter
        for i, adapter in enumerate(case.adapters):
            config = LoraConfig(
                r=adapter.r, lora_alpha=adapter.alpha, use_rslora=adapter.rslora, lora_dropout=adapter.p,
                lora_bias=adapter.lora_bias, use_dora=adapter.dora, target_modules=["layer"],
                fan_in_fan_out=case.conv1d,
            )  # fmt: skip
            inject_adapter_in_model(config, holder, adapter_name=f"adapter{i}")
    layer: Any = holder["layer"]
    _fill(layer, case)
    if case.patch_first:
        peftkern.patch(layer)
    _set_state(layer, case)
    if not case.patch_first:
        peftkern.patch(layer)
    return layer


@torch.no_grad()
def _fill(layer: Any, case: Configuration) -> None:
    """Values that bring y to about 1, in the dtypes that ``case`` asks for."""
    for name, parameter in layer.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            continue
        fan_in = parameter.shape[0 if case.conv1d and "lora_" not in name else -1] if parameter.ndim == 2 else 1
        parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5)
    layer.base_layer.to(case.base_dtype)
    for child in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        child.to(case.adapter_dtype)


def _set_state(layer: Any, case: Configuration) -> None:
    layer.set_adapter([f"adapter{i}" for i in case.active])
    for i, adapter in enumerate(case.adapters):
        name = f"adapter{i}"
        A, B = layer.lora_A[name].weight, layer.lora_B[name]
        for parameter, trains in zip((A, B.weight, B.bias), adapter.trains, strict=True):
            if parameter is not None:
                parameter.requires_grad_(trains)
        if isinstance(adapter.scaling, str):
            layer.scaling[name] = torch.tensor(layer.scaling[name], dtype=F64 if "fp64" in adapter.scaling else F32)
        elif adapter.scaling is not None:
            layer.scaling[name] = adapter.scaling
    layer.base_layer.weight.requires_grad_(case.base_trains)
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.requires_grad_(case.bias == "trains")
    layer.train(case.training)
    if case.state in ("merged", "unmerged"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge()
            if case.state == "unmerged":
                layer.unmerge()
    elif case.state == "disabled":
        layer._disable_adapters = True  # enable_adapters(False) would freeze the adapter too


def peft_twin(layer: Any) -> Any:
    """The same layer run by PEFT."""
    holder = nn.ModuleList([copy.deepcopy(layer)])
    peftkern.unpatch(holder)
    assert type(holder[0]) is lora.Linear
    return holder[0]


def dropping_as_peftkern(layer: Any) -> Any:
    """PEFT's layer with dropout by the published mask."""
    return with_published_dropout(nn.ModuleList([layer]))[0]


# ------------------------------------------------------------------------------------------------- running and judging


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same shape in other strides, by views that gradients flow through; ``expanded`` repeats the first row."""
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.ndim:
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    if layout == "expanded" and tensor.ndim >= 2 and tensor.shape[0]:
        return tensor[:1].expand_as(tensor)
    if layout == "offset":
        return torch.cat([tensor.new_zeros(3), tensor.reshape(-1)])[3:].view(tensor.shape)
    return tensor


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def run(
    layer: Any, case: Configuration, trial: int = 0, wide: bool = False, autocast: torch.dtype | None = None
) -> Found:
    """y and every gradient of a few calls under one seed; ``wide``: in fp64, without autocast."""
    torch.default_generator.manual_seed(case.seed + 7919 * trial)
    generator = torch.Generator().manual_seed(case.seed + 104729 * (trial + 1))
    layer.zero_grad(set_to_none=True)
    found: Found = {}
    for call in range(2 if case.use == "accumulate" else 1):
        data = torch.randn(*case.leading, case.K, generator=generator).to(case.x_dtype)
        dy = torch.randn(*case.leading, case.N, generator=generator).to(BF16)  # a value that every dtype can hold
        leaf = (data.double() if wide else data.clone()).requires_grad_(case.x_needs_grad)
        x = _laid_out(leaf, case.x_layout)
        with _autocast(None if wide else autocast or case.autocast):
            y = _forward(layer, case, x)
        if case.in_place:
            y.mul_(0.5)
        found[f"y{call}"] = y.detach().clone()
        if y.requires_grad:
            dy = _laid_out(dy.to(y.dtype), case.dy_layout)
            y.backward(dy, retain_graph=case.use == "retain")
            if case.use == "retain":
                y.backward(dy)
        found[f"x{call}"] = leaf.grad
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


def _forward(layer: Any, case: Configuration, x: Tensor) -> Tensor:
    if case.use in ("checkpoint", "reentrant"):
        return checkpoint(layer, x, use_reentrant=case.use == "reentrant")
    if case.use == "no_grad":
        with torch.no_grad():
            return layer(x)
    if case.use == "inference":
        with torch.inference_mode():
            y = layer(x)
        return y.clone()
    return layer(x)


def run_and_count(layer: Any, case: Configuration, trial: int = 0) -> tuple[Found, bool]:
    """``run`` of a patched layer, and whether it was fast: PEFT's own forward never ran."""
    genuine, calls = lora.Linear.forward, []

    def spy(self: Any, *arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        return genuine(self, *arguments, **options)

    with mock.patch.object(lora.Linear, "forward", spy):
        found = run(layer, case, trial)
    forwards = 2 if case.use == "accumulate" else 1
    assert len(calls) in (0, forwards) or case.use in ("checkpoint", "reentrant"), "some calls of one layer were fast"
    return found, not calls


class Pool:
    """Squared errors of one tensor, over the trials."""

    def __init__(self) -> None:
        self.own = self.peer = self.size = 0.0

    def add(self, own: Tensor, peer: Tensor, truth: Tensor) -> None:
        for name, value in (("own", own), ("peer", peer)):
            error = (value.double() - truth).norm().item() if value.isfinite().all() else math.inf
            setattr(self, name, getattr(self, name) + error**2)
        self.size += truth.norm().item() ** 2

    def verdict(self) -> str | None:
        """The error rule: err(ours) <= 2 err(PEFT) + 1e-6."""
        size = math.sqrt(self.size) or 1.0
        own, peer = math.sqrt(self.own) / size, math.sqrt(self.peer) / size
        return None if own <= 2 * peer + 1e-6 else f"error {own:.3e}, allowed 2 x {peer:.3e} + 1e-6"


def hunt(case: Configuration) -> bool:
    """Build, run and judge a case; whether it was fast. Raises: AssertionError where it is not PEFT's result."""
    layer = build(case)
    plain = peft_twin(layer)
    try:
        expected = run(plain, case)
    except RuntimeError as error:
        try:
            run(layer, case)
        except type(error):
            return False
        raise AssertionError(f"PEFT raises {error!r}, peftkern does not") from error
    found, fast = run_and_count(layer, case)
    if not fast:
        for name, value in expected.items():
            same = (
                found[name] is value if value is None else found[name] is not None and torch.equal(found[name], value)
            )
            assert same, f"{name} is not PEFT's, bit for bit, although PEFT's forward ran"
    for name, value in expected.items():
        own = found[name]
        assert (own is None) == (value is None), (
            f"{name}: {'no gradient' if own is None else 'a gradient'}, unlike PEFT"
        )
        if own is not None and value is not None:
            assert (own.shape, own.dtype) == (value.shape, value.dtype), f"{name}: {own.dtype} {tuple(own.shape)}"
    if fast:
        judge(case, layer, plain, found)
    return fast


def judge(case: Configuration, layer: Any, plain: Any, found: Found) -> None:
    """The rule, for y and each gradient, against PEFT with the same mask and the same roundings, and PEFT in fp64."""
    twin = dropping_as_peftkern(plain)
    exact = copy.deepcopy(twin).double()
    pools: dict[str, Pool] = {name: Pool() for name, value in found.items() if value is not None}
    for trial in range(case.trials):
        own = found if trial == 0 else run(layer, case, trial)
        peer = run(twin, case, trial, autocast=case.base_dtype if case.mixed else None)
        truth = run(exact, case, trial, wide=True)
        for name, pool in pools.items():
            pool.add(own[name], peer[name], truth[name])
    failures = {name: verdict for name, pool in pools.items() if (verdict := pool.verdict()) is not None}
    assert not failures, failures
