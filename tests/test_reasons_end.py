"""A state that ends is fast again: every reason of docs/fallbacks.md, begun and ended between calls of a layer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import test_experts
import torch
from conftest import randomise
from memo_changes import REFUSED, Block, Subject, active, of_x, put, scaling, undone
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from quantised_models import quantised_linear
from test_peft_memo import assert_same, outcome
from test_peft_states import STATES
from test_readme import written
from torch import Tensor, nn

import peftkern

pytestmark = pytest.mark.filterwarnings("ignore")
BF16 = torch.bfloat16


class Adapted:
    """A patched model, the layer of it that is called, and its x: what ``outcome`` asks for."""

    def __init__(self, model: nn.Module, layer: nn.Module, x: Tensor, *others: Tensor) -> None:
        self.model, self.layer, self.x, self.others = randomise(model), layer, x, others
        assert peftkern.patch(model).fast

    def call(self, x: Tensor) -> Any:
        y = self.layer(x, *self.others)
        return y if isinstance(y, Tensor) else y[1]  # a router's weights


def of_one(base: nn.Module, others: dict[str, dict] | None = None, **options) -> Adapted:
    """One layer with the adapter "default" and others."""
    torch.manual_seed(0)
    settings = dict(r=4, target_modules=["0"])
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = type(base) is not nn.Linear
    model = get_peft_model(model, LoraConfig(**settings | options))
    for name, more in (others or {}).items():
        model.add_adapter(name, LoraConfig(**settings | more))
    return Adapted(model, model.base_model.model[0], torch.randn(3, 64, requires_grad=True))


def dense(others: dict[str, dict] | None = None, **options) -> Callable[[], Adapted]:
    return lambda: of_one(nn.Linear(64, 48), others, **options)


def nf4() -> Adapted:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return of_one(quantised_linear(nn.Linear(64, 48, bias=False), "nf4", BF16), {"DoRA": dict(use_dora=True)})


def mixture() -> nn.Module:
    """A Mixtral with the adapters "default", which is active, and "other"."""
    model = test_experts.adapted()
    test_experts.two(model)
    model.base_model.set_adapter("default")
    return model.base_model.model.model.layers[0].mlp


def experts() -> Adapted:
    """Of one layer, two parameters, each under its own wrapper; the routing is given."""
    generator = torch.Generator().manual_seed(3)
    x, weights, chosen = torch.randn(5, 32), torch.rand(5, 2), torch.rand(5, 4, generator=generator).topk(2).indices
    layer = mixture().experts
    return Adapted(layer, layer, x.requires_grad_(), chosen, weights)


def router() -> Adapted:
    layer = mixture().gate
    return Adapted(layer, layer, torch.randn(5, 32, requires_grad=True))


def of_state(name: str) -> Callable[[Any], Block]:
    """One of ``test_peft_states``, which are done and undone."""

    @contextlib.contextmanager
    def change(subject: Any) -> Iterator[None]:
        undo = STATES[name][0](subject.model)
        yield
        undo()

    return change


def calls(make: Callable[[Any], Callable[[Tensor], Any]]) -> Callable[[Any], Block]:
    """Calls of the layer in another way."""
    return lambda s: put(s.__dict__, "call", make(s))


def names(*adapters: str) -> Callable[[Any], Block]:
    return calls(lambda s: lambda x: s.layer(x, adapter_names=list(adapters)))


@contextlib.contextmanager
def adapters_in_fp16(subject: Any) -> Iterator[None]:
    factors = [part["default"].weight for part in (subject.layer.lora_A, subject.layer.lora_B)]
    before = [factor.data for factor in factors]
    for factor in factors:
        factor.data = factor.data.half()
    yield
    for factor, data in zip(factors, before, strict=True):
        factor.data = data


def wrapped_in(names: list[str]) -> Callable[[Any], None]:
    """The adapters that are active on a parameter and on the one whose wrapper is within it."""

    def change(subject: Any) -> None:
        for module in subject.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names)

    return change


def implementation(name: str) -> Callable[[Any], None]:
    return lambda s: setattr(s.layer.get_base_layer().config, "_experts_implementation", name)


def between(begin: Callable[[Any], Any], end: Callable[[Any], Any]) -> Callable[[Any], Block]:
    return lambda s: undone(lambda: begin(s), lambda: end(s))


@contextlib.contextmanager
def hooked_within(subject: Any) -> Iterator[None]:
    handle = subject.layer.base_layer.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


class State(NamedTuple):
    """What begins and ends, a part of the reason that it is named by, on what."""

    change: Callable[[Any], Block]
    reason: str
    build: Callable[[], Any] = Subject


def refused(reason: str, *of: str) -> dict[str, State]:
    """Those of ``memo_changes`` that begin so."""
    found = {name: State(change, reason) for name, change in REFUSED.items() if name.startswith(of)}
    assert found
    return found


TWO = ["default", "other"]
MIXED = dense({"other": {}, "DoRA": dict(use_dora=True)})
ROWS: dict[str, dict[str, State]] = {
    "the adapters are disabled or merged": {
        "disable_adapter": State(lambda s: s.model.disable_adapter(), "its adapters are disabled"),
        "merge_adapter": State(
            lambda s: undone(s.model.merge_adapter, s.model.unmerge_adapter), "its adapter is merged"
        ),
    },
    "a LoRA variant is used": {
        "DoRA beside another": State(active(["default", "DoRA"]), "one of them uses DoRA", MIXED),
        "DoRA on one dimension": State(of_x(lambda x: x[0]), "x is one row", dense(use_dora=True)),
        "aLoRA": State(
            active("aLoRA"), "it uses the LoRA variant ALoraLinearVariant",
            dense({"aLoRA": dict(alora_invocation_tokens=[1])}),
        ),
    },
    "the call has extra arguments": {
        "DoRA in a mixed batch": State(names("default", "DoRA", "other"), "with DoRA or a tensor as scaling", MIXED),
        "names that are too few": State(names("default"), "not one for each sequence"),
        "another argument": State(calls(lambda s: lambda x: s.layer(x, more=1)), "its call has the arguments more"),
    },
    "the base weight requires grad": refused("its base weight requires grad", "base trains"),
    "a child is more than a plain `nn.Linear`": {
        **refused("global module hooks", "global "),
        **refused("base_layer has hooks", "base's forward_", "base's full_"),
        **refused("lora_A has hooks", "A's forward_", "A's full_"),
        **refused("lora_B has hooks", "B's forward_", "B's full_"),
        **refused("lora_dropout has hooks", "drop's forward_", "drop's full_"),
        **refused("has a replaced forward", "base's forward r", "A's forward r", "B's forward r", "drop's forward r"),
        **refused("has a replaced forward", "base has a", "A has a", "B has a", "drop has a"),
        **refused("not a plain Linear", "parametrized"),
        **refused("not a plain", "base_layer of another class", "base's class", "A's class", "B's class"),
        **refused("has a weight of type", "base.weight of", "A.weight of", "B.weight of"),
    },
    "a quantised base carries DoRA, or an adapter that is neither in its compute dtype nor in fp32": {
        "DoRA": State(active("DoRA"), "DoRA on a quantised base", nf4),
        "an adapter in fp16 beside bf16": State(adapters_in_fp16, "the adapter torch.float16", nf4),
    },
    "the weights are not there": {
        name: State(of_state(name), STATES[name][1])
        for name in ("ZeRO-3, the base", "ZeRO-3, everything", "ZeRO-3, lora_A", "ZeRO-3, lora_B", "meta", "offloaded")
    },
    "a `torch.func` transform, forward-mode AD, `torch.export` or `torch.jit` tracing "
    "is active; x is sparse, nested or on `meta`": {
        **refused("a torch.func transform, forward-mode AD", "forward-mode AD"),
        **refused("x is sparse, nested or has no data", "x sparse", "x on meta"),
        **refused("", "x nested"),
        "vmap": State(
            calls(lambda s: lambda x: torch.func.vmap(s.layer, randomness="different")(x)), "a torch.func transform"
        ),
        "torch.jit": State(
            calls(lambda s: lambda x: torch.jit.trace(s.layer, (x,), check_trace=False)(x)), "tracing is active"
        ),
        "torch.export": State(
            calls(lambda s: lambda x: torch.export.export(s.layer, (x,)).module()(x)), "FakeTensor (traced)", dense()
        ),
    },
    "the scaling is infinite, trained, or no scalar": {
        **refused("its scaling is inf", "scaling inf"),
        **refused("its scaling is a tensor that is trained", "scaling trains"),
        "one of two": State(scaling(torch.tensor([0.5, 2.0]).mean(0, keepdim=True)), "its scaling is a tensor"),
    },
    "the dtypes do not fit F.linear's rule, or are none of fp64, fp32, bf16, fp16": {
        **refused("x is torch.bfloat16, the base torch.float32", "x of another dtype"),
        **refused("x is torch.float64, the base torch.float32", "x wider"),
        "an adapter in fp16 beside fp32": State(adapters_in_fp16, "the adapter torch.float16", dense()),
        "a base in fp8": State(of_state("fp8"), "float8_e4m3fn"),
        "a complex base": State(of_state("complex"), "complex64"),
    },
    "a wrapped parameter (MoE experts, routers) is not plain": {
        "several adapters": State(
            between(wrapped_in(TWO), wrapped_in(["default"])), "2 adapters are active on its parameter", experts
        ),
        "batched_mm": State(
            between(implementation("batched_mm"), implementation("eager")), "experts_implementation=", experts
        ),
        "a replaced forward": State(
            lambda s: put(s.layer.get_base_layer(), "forward", s.layer.get_base_layer().forward),
            "its module has a replaced forward", experts,
        ),
        "a wrapper within it": State(hooked_within, "the wrapper within it is hooked", experts),
        "while torch.compile traces": State(
            calls(lambda s: lambda x: torch.compile(s.layer, backend="eager")(x)[1]),
            "torch.compile traces (traced)", router,
        ),
    },
}  # fmt: skip
ENDLESS = "the layer is no linear"
EVERY = [pytest.param(state, id=f"{row[:30]}: {name}") for row, of in ROWS.items() for name, state in of.items()]


def counts(model: nn.Module) -> Counter[str]:
    """Calls so far, by what became of them."""
    return sum((Counter(of) for of in peftkern.report(model).calls.values()), Counter())


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() and "error" not in expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("state", EVERY)
def test_a_state_that_ends_is_fast_again(state: State, one_thread):
    """Within it PEFT's own result, bit for bit, or its error, and the reason; after it what was before it, fused."""
    torch._dynamo.reset()
    subject = state.build()
    outcome(subject)
    before = counts(subject.model)
    expected = outcome(subject)
    fused = counts(subject.model) - before
    assert fused.keys() == {"fused"}

    with state.change(subject):
        before = counts(subject.model)
        found = outcome(subject)
        ran = counts(subject.model) - before
        assert any(state.reason in reason for reason in ran), ran
        with peftkern.disabled():
            (assert_near if "fused" in ran else assert_same)(found, outcome(subject))  # the wrapper within it is fused

    before = counts(subject.model)
    again = outcome(subject)
    assert counts(subject.model) - before == fused and not peftkern.report(subject.model).skipped
    assert_near(again, expected)  # merging leaves a rounding


def test_a_layer_that_is_no_linear_leaves_the_others_fused():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.conv, self.linear = nn.Embedding(9, 16), nn.Conv2d(1, 1, 3), nn.Linear(14, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.conv(self.embedding(ids)[:, None]))

    model = get_peft_model(Words(), LoraConfig(r=4, target_modules=["embedding", "conv", "linear"]))
    randomise(model)
    ids = torch.arange(18).view(3, 6) % 9
    expected = model(ids)
    report = peftkern.patch(model)
    assert [reason.split(" is not ")[0] for reason in report.skipped.values()] == [
        f"peft.tuners.lora.layer.{kind}" for kind in ("Embedding", "Conv2d")
    ]
    torch.testing.assert_close(model(ids), expected)
    assert peftkern.report(model).calls == {"base_model.model.linear": {"fused": 1}}


def test_these_are_the_reasons_of_the_readme():
    table = written().split("| reason | example |\n|---|---|\n")[1].split("\n\n")[0]
    assert {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()} == {*ROWS, ENDLESS}
