"""What is kept of the predicate's answer holds only where the predicate would give it again, of the same tensors."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from memo_changes import HELD, REFUSED, TAKEN, K, N, R, Subject, parameter
from peft import LoraConfig
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.peft import memo as memos
from peftkern.integrations.peft import tally
from peftkern.integrations.peft.read import Parts, plain_parts, why_not_input

pytestmark = pytest.mark.filterwarnings("ignore")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUND = {"merged", "merged and unmerged", "everything in bf16", "everything in fp16"}  # the weights, and leave them so


def outcome(subject: Subject) -> dict[str, Any]:
    """y and every gradient, under a seed, and what has been drawn; or the error."""
    x, parameters = subject.x, dict(subject.layer.named_parameters())
    leaves = {name: p for name, p in (parameters | {"x": x}).items() if p.requires_grad}
    torch.manual_seed(1)
    try:
        y = subject.call(x)
        wanted = list(leaves.values()) if y.requires_grad and torch.is_grad_enabled() else []
        found = torch.autograd.grad(y.sum(), wanted, allow_unused=True) if wanted else ()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return {"error": f"{type(error).__name__}: {error}"}
    return {"y": y.detach(), "drawn": torch.get_rng_state(), **dict(zip(leaves, found, strict=False))}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Errors, Nones, and tensors of any kind to their last bit."""
    assert found.keys() == expected.keys(), (found, expected)
    for name, other in expected.items():
        one = found[name]
        assert type(one) is type(other), name
        if isinstance(one, Tensor):
            torch.testing.assert_close(*map(_plain, (one, other)), rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def _plain(tensor: Tensor) -> Any:
    if tensor.is_nested:
        return list(tensor.unbind())
    return getattr(tensor, "a", tensor) if type(tensor).__name__ == "TwoTensor" else tensor


def holds(subject: Subject, taken: bool) -> None:
    """That the memo made before a change says of the state now what the predicate says, which is ``taken``."""
    parts = plain_parts(subject.layer)
    assert (isinstance(parts, Parts) and why_not_input(parts, subject.x) is None) == taken, parts
    memo = subject.memo
    if memo is not None:
        assert memos.holds_in_python(memo._facts) == memo._holds(memo._facts)  # the extension's twin
    if memo is not None and memo.holds(subject.x):
        assert taken and isinstance(parts, Parts)
        (one,), pair = parts.adapters, memo._pair
        assert parts.weight is pair.weight.data and parts.bias is pair.bias and one.scaling == pair.scaling
        assert one.lora_A is pair.lora_A and one.lora_B is pair.lora_B and one.lora_bias is pair.lora_bias


def judge(subject: Subject, taken: bool) -> None:
    """The same, and that the result is that of a call without a memo, and PEFT's where it is not taken."""
    holds(subject, taken)
    found = outcome(subject)
    with subject.forgetful():
        assert_same(found, outcome(subject))
    if not taken:
        with peftkern.disabled():
            assert_same(found, outcome(subject))


def assert_remembered(subject: Subject) -> None:
    """From the second call on, the layer is fused by one memo."""
    outcome(subject)
    before, memo = tally.of(subject.layer).fused, subject.memo
    with mock.patch.object(memos.Memo, "run", autospec=True, side_effect=memos.Memo.run) as run:
        outcome(subject)
    assert run.call_count == 1 and subject.memo is memo and tally.of(subject.layer).fused == before + 1


@pytest.mark.parametrize("state", [*TAKEN, *REFUSED])
def test_a_change_is_judged_as_without_a_memo_and_is_over_when_it_ends(state: str):
    subject = Subject()
    expected, taken = outcome(subject), state in TAKEN
    with TAKEN[state](subject) if taken else REFUSED[state](subject):
        judge(subject, taken)
    if state not in ROUND:
        assert_same(outcome(subject), expected)
    assert_remembered(subject)


@pytest.mark.parametrize("state", ["Conv1D", "scaling"])
def test_what_can_change_in_place_is_not_remembered(state: str):
    """A weight that is read through a view of it, and a scaling that is a tensor."""
    subject = Subject()
    if state == "Conv1D":
        subject.layer.base_layer = Conv1D(N, K).requires_grad_(False)
    else:
        subject.layer.scaling["default"] = torch.tensor(2.0)
    outcome(subject)
    if state == "Conv1D":
        subject.base.weight.data = -subject.base.weight.data
    else:
        subject.layer.scaling["default"].neg_()
    judge(subject, True)


@pytest.mark.parametrize(("child", "key"), [("base", "bias"), ("B", "bias"), ("A", "bias")])
def test_a_bias_that_is_added(child: str, key: str):
    subject = Subject(bias=False)
    with parameter(child, key, lambda _: nn.Parameter(torch.randn(R if child == "A" else N)))(subject):
        judge(subject, child != "A")
    assert_remembered(subject)


@pytest.mark.parametrize(("child", "key"), [held for held in HELD if held[1] == "weight"])
def test_a_weight_that_is_offloaded(child: str, key: str):
    """Judged, and not run: torch multiplies what has no data into anything."""
    subject = Subject()
    with parameter(child, key, lambda p: nn.Parameter(p.detach().to("meta"), requires_grad=False))(subject):
        holds(subject, False)
    assert_remembered(subject)


@pytest.mark.parametrize("then", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("first", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("adapter", [F32, BF16], ids=str)
@pytest.mark.parametrize("base", [F32, BF16], ids=str)
def test_autocast_and_what_was_kept_outside_of_it(base, adapter, first, then):
    """A memo of a call under one autocast, or none, is not used under another that refuses the dtypes."""
    subject = Subject()
    subject.base.to(base)
    for factors in (subject.layer.lora_A, subject.layer.lora_B):
        factors.to(adapter)
    for dtype in (F32, BF16):
        with autocast(first):
            subject.x = torch.randn(3, K).to(dtype).requires_grad_()
            outcome(subject)
        for dtype in (F32, BF16):
            subject.x = torch.randn(3, K).to(dtype).requires_grad_()
            with autocast(then):
                parts = plain_parts(subject.layer)
                judge(subject, isinstance(parts, Parts) and why_not_input(parts, subject.x) is None)


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


TRANSFORMS = {
    "vmap": lambda layer, x: torch.func.vmap(layer, randomness="same")(x.unsqueeze(0)),
    "vmap, others": lambda layer, x: torch.func.vmap(layer, randomness="different")(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
    "jacrev": lambda layer, x: torch.func.jacrev(layer, chunk_size=1)(x),
    "functional_call": lambda layer, x: torch.func.functional_call(
        layer, {n: 2 * p.detach() for n, p in layer.named_parameters() if "lora_" in n}, (x,)
    ),
    "trace": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_looks_through_a_layer_gets_pefts_own(name: str):
    subject = Subject(p=0.0 if name == "export" else 0.25)

    def run() -> Tensor:
        torch.manual_seed(1)
        return TRANSFORMS[name](subject.layer, subject.x.detach())

    found = run()
    with subject.forgetful() if name == "functional_call" else peftkern.disabled():
        torch.testing.assert_close(found, run(), rtol=0, atol=0)
    assert_remembered(subject)


def test_a_backward_that_is_watched_runs_the_operator():
    """Whoever watches backward alone sees what he sees of a call without a memo."""
    subject, seen = Subject(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    y = subject.layer(subject.x)
    with Watch():
        y.sum().backward()
    assert "peftkern.backward.default" in seen
    with pytest.raises(RuntimeError, match="Batching rule not implemented for peftkern::backward"):
        torch.autograd.grad(subject.layer(subject.x), subject.x, torch.randn(2, 3, N), is_grads_batched=True)


def _unpickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


def _loaded(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _unpickled, _loaded])
def test_a_copy_remembers_nothing_and_is_its_own(copied):
    subject = Subject()
    expected, other = outcome(subject), copy.copy(subject)
    other.layer = copied(subject.layer)
    assert other.memo is None
    assert_same(outcome(other), expected)
    assert_remembered(other)
    with torch.no_grad():
        other.A.weight.mul_(2)
    judge(other, True)
    assert_same(outcome(subject), expected)


def test_an_adapter_that_is_deleted_and_comes_again():
    subject = Subject()
    before = subject.memo
    subject.model.set_adapter("other")
    subject.model.delete_adapter("default")
    judge(subject, True)
    subject.model.add_adapter("default", LoraConfig(r=2 * R, target_modules=["0"]))
    subject.model.set_adapter("default")
    nn.init.normal_(subject.B.weight)
    assert not before.holds(subject.x)
    judge(subject, True)
    assert_remembered(subject)


def test_unpatch_and_patch_again():
    subject = Subject(p=0.0)
    expected = outcome(subject)
    peftkern.unpatch(subject.model)
    with parameter("A", "weight", lambda p: nn.Parameter(2 * p.detach()))(subject):
        plain = outcome(subject)
        peftkern.patch(subject.model)
        assert subject.memo is None
        torch.testing.assert_close(outcome(subject)["y"], plain["y"])
    assert_same(outcome(subject), expected)
    assert_remembered(subject)


def test_what_has_been_replaced_is_let_go_of_by_the_next_call():
    subject = Subject()
    old = [weakref.ref(p) for p in (subject.base.weight, subject.A.weight, subject.B.bias)]
    for child, key in HELD:
        module = getattr(subject, child)
        module._parameters[key] = nn.Parameter(module._parameters[key].detach().clone(), key == "bias")
    outcome(subject)
    gc.collect()
    assert [ref() for ref in old] == [None] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_whose_recomputation_is_remembered(reentrant: bool):
    """The first call makes the memo, and runs it; the recomputation runs it under the same mask."""
    subject = Subject()
    expected = outcome(subject)
    tally.of(subject.layer).memo = None
    torch.manual_seed(1)
    with mock.patch.object(memos.Memo, "run", autospec=True, side_effect=memos.Memo.run) as run:
        y = checkpoint(subject.layer, subject.x, use_reentrant=reentrant)
        y.sum().backward()
    found = {"y": y.detach(), "drawn": torch.get_rng_state(), "x": subject.x.grad} | {
        n: p.grad for n, p in subject.layer.named_parameters()
    }
    assert_same({name: found[name] for name in expected}, expected)
    assert run.call_count == 2 and all(call.args[0] is subject.memo for call in run.call_args_list)


def test_threads_that_call_one_layer_at_once():
    """Each with its x, while others make the layer forget, and give it a memo of another state."""
    subject = Subject(p=0.0)
    xs = [torch.randn(rows, K) for rows in range(1, 9)]
    expected = [subject.layer(x).detach() for x in xs]
    wrong: list[Any] = []

    def call(i: int) -> None:
        try:
            for j in range(200):
                if j % 3 == i % 3:
                    tally.of(subject.layer).memo = None
                with autocast(None if i % 2 else BF16), torch.autocast("cpu", enabled=False):
                    if not torch.equal(subject.layer(xs[i]), expected[i]):
                        wrong.append(i)
        except Exception as error:  # noqa: BLE001 - it would end with the thread
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("after", ["holds", "memo_of"])
def test_another_thread_forgets_between_the_question_and_the_run(after: str):
    subject = Subject(p=0.0)
    expected, own, genuine = subject.layer(subject.x), tally.of(subject.layer), memos.Memo.holds
    own.memo = own.memo if after == "holds" else None

    def interrupted(memo: Any, x: Tensor) -> bool:
        found = genuine(memo, x)
        own.memo = None
        return found

    with mock.patch.object(memos.Memo, "holds", interrupted):
        assert torch.equal(subject.layer(subject.x), expected)
