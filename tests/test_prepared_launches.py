"""A call of a known key enters Triton's launcher with what it would have been given without: over the stand-in."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import TRAINABLE, Case, Tensors, leaves_of, make
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the process has loaded the driver of a real GPU", allow_module_level=True)

import stand_in
import triton
from stand_in import Gpu, Launch
from test_host_launches import CALLS, ONE_PASS, TOGETHER, TWO, VENDOR, Call, names, shifted

import peftkern
from peftkern import _env
from peftkern.backends.triton import backend, launch, select
from peftkern.backends.triton.launch import prepared

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Change = Callable[[Tensors], Any]


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with stand_in.gpu("sm_90") as found:
        yield found


@pytest.fixture
def runs() -> Iterator[list[prepared.Prepared]]:
    """Every run of what was prepared."""
    seen: list[prepared.Prepared] = []
    genuine = prepared.Prepared.run
    with mock.patch.object(prepared.Prepared, "run", lambda self, *given: seen.append(self) or genuine(self, *given)):
        yield seen


@dataclasses.dataclass(frozen=True)
class Given:
    """A call, what of it has a gradient, how its tensors differ from ``make``'s, and its scaling."""

    call: Call
    needs: tuple[str, ...] = TRAINABLE
    change: Change | None = None
    scaling: float | Tensor | None = None

    def tensors(self, seed: int) -> Tensors:
        t = make(self.call.case, seed=seed)
        t.x = shifted(t.x, self.call.shift)
        if self.change is not None:
            self.change(t)
        return t


def run(gpu: Gpu, given: Given, seed: int = 0, forced: bool = True) -> list[Launch]:
    """What forward and backward launch."""
    t, call, case = given.tensors(seed), given.call, given.call.case
    leaf = leaves_of(t, given.needs)
    block = [select.forced(call.choice(b, gpu.arch)) if forced else contextlib.nullcontext() for b in (False, True)]
    with gpu.recording() as forward:
        with block[0]:
            y = peftkern.lora_linear(
                leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"],
                case.scaling if given.scaling is None else given.scaling, bias=leaf["bias"],
                lora_bias=leaf["lora_bias"], dropout_p=case.p, rng_state=t.rng_state, precision=case.precision,
            )  # fmt: skip
    wanted = {name: one for name, one in leaf.items() if one is not None and one.requires_grad}
    named: dict[str, Any] = {"y": y, "dy": t.dy, "weight": t.weight, "rng_state": t.rng_state}
    named |= {name: one for name, one in leaf.items() if one is not None}
    if isinstance(given.scaling, Tensor):
        named["scaling"] = given.scaling
    launches = forward.launches(**named, **gpu.named_counters)  # before the memory of what is not saved is used again
    with gpu.recording() as backward, block[1]:
        found = torch.autograd.grad(y, list(wanted.values()), t.dy) if wanted else ()
    named |= {f"d{name}": one for name, one in zip(wanted, found, strict=True)}
    return [*launches, *backward.launches(**named, **gpu.named_counters)]


def check(gpu: Gpu, runs: list, given: Given, forced: bool = True, times: int = 2) -> list[Launch]:
    """The second call of a key is prepared, ``times`` directions of it, and launches what one that is not does."""
    launch.forget()
    runs.clear()
    first = run(gpu, given, 0, forced)
    assert not runs
    second = run(gpu, given, 1, forced)
    assert len(runs) == times, given
    launch.forget()
    assert run(gpu, given, 1, forced) == second == first
    assert len(runs) == times
    return second


def of(call: Call, **changed: Any) -> Call:
    return dataclasses.replace(call, case=dataclasses.replace(call.case, **changed))


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_second_call_of_a_kind_launches_the_same(gpu: Gpu, runs: list, call: Call):
    """Every schedule, dtype, mask, bias and alignment of test_host_launches."""
    check(gpu, runs, Given(call))


@pytest.mark.parametrize(
    "call",
    [
        of(ONE_PASS, p=0.0, lora_bias=True), of(ONE_PASS, R=1), of(VENDOR, p=0.5), of(TWO, dtype=F16, precision="fp32"),
        of(TWO, dtype=F32), of(TOGETHER, M=1), of(VENDOR, M=17), of(VENDOR, M=15, K=17, N=15),
        of(VENDOR, M=16, K=16, N=1), of(VENDOR, M=1, K=1, N=17),
    ],
    ids=str,
)  # fmt: skip
def test_other_sizes_and_dtypes(gpu: Gpu, runs: list, call: Call):
    check(gpu, runs, Given(call))


@pytest.mark.parametrize(
    "needs",
    [(), ("x",), ("lora_A", "lora_B"), ("lora_A",), ("lora_B", "bias"), ("lora_bias",), ("x", "bias", "lora_bias")],
    ids=str,
)
def test_what_is_needed_is_of_the_key(gpu: Gpu, runs: list, needs: tuple[str, ...]):
    check(gpu, runs, Given(VENDOR, needs), times=2 if needs else 1)
    launch.forget()
    run(gpu, Given(VENDOR))
    runs.clear()
    run(gpu, Given(VENDOR, needs))
    assert len(runs) == 1  # forward alone


def moved(name: str, size: int) -> Change:
    """A tensor that begins ``size`` bytes behind a multiple of 64."""

    def change(t: Tensors) -> None:
        tensor = getattr(t, name)
        setattr(t, name, shifted(tensor, size // tensor.itemsize))

    return change


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias", "dy"])
def test_an_alignment_is_of_the_key(gpu: Gpu, runs: list, name: str):
    """Those that Triton and descriptors tell apart; and a multiple of 16 is the same call."""
    call = VENDOR if name == "bias" else TWO
    run(gpu, Given(call))
    for size in (16, 2, 4, 8):
        if getattr(make(call.case), name).itemsize > size:
            continue
        given = Given(call, change=moved(name, size))
        runs.clear()
        found = run(gpu, given)
        assert len(runs) == (2 if size == 16 else 1 if name == "dy" else 0), size
        launch.forget()
        assert run(gpu, given) == found
        launch.forget()
        run(gpu, Given(call))


def transposed(name: str) -> Change:
    return lambda t: setattr(t, name, getattr(t, name).t().contiguous().t())


def spread(name: str) -> Change:
    """Every other element of a tensor twice as wide."""
    return lambda t: setattr(t, name, torch.stack([getattr(t, name)] * 2, dim=-1)[..., 0])


@pytest.mark.parametrize(
    ("name", "change"), [("x", transposed), ("weight", transposed), ("lora_A", spread), ("dy", transposed)]
)
def test_strides_are_of_the_key(gpu: Gpu, runs: list, name: str, change: Callable[[str], Change]):
    given = Given(ONE_PASS, change=change(name))
    launch.forget()
    run(gpu, Given(ONE_PASS))
    found = run(gpu, given)
    launch.forget()
    assert run(gpu, given) == found
    runs.clear()
    assert run(gpu, given) == found and len(runs) == 2


OTHERS: dict[str, tuple[Given, dict[str, str]]] = {
    "scaling": (Given(ONE_PASS, scaling=-2.0), {}),
    "scaling, a tensor": (Given(ONE_PASS, scaling=torch.tensor(3.0)), {}),
    "p": (Given(of(ONE_PASS, p=0.5)), {}),
    "precision": (Given(of(ONE_PASS, precision="fp32")), {}),
    "M": (Given(of(ONE_PASS, M=25)), {}),
    "adapters' dtype": (Given(of(ONE_PASS, adapter_dtype=BF16)), {}),
    "schedule": (Given(ONE_PASS), {"PEFTKERN_SCHEDULE": "library"}),
    "batch invariant": (Given(ONE_PASS), {"PEFTKERN_BATCH_INVARIANT": "1"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_has_another_plan(gpu: Gpu, runs: list, name: str, monkeypatch: pytest.MonkeyPatch):
    """Built anew, and what it would be without the first; as the first is after it."""
    other, variables = OTHERS[name]
    launch.forget()
    first = run(gpu, Given(ONE_PASS), forced=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    _env.settings.cache_clear()
    found = run(gpu, other, forced=False)
    assert not runs and (found != first or variables)
    launch.forget()
    assert run(gpu, other, forced=False) == found
    for variable in variables:
        monkeypatch.delenv(variable)
    _env.settings.cache_clear()
    assert run(gpu, Given(ONE_PASS), forced=False) == first


def test_what_chooses_a_tile_is_of_the_key(gpu: Gpu, runs: list):
    """A choice that is forced, tables that are read again, and torch's switch for TF32."""
    given = Given(CALLS[-1])
    first = run(gpu, given)
    run(gpu, given, forced=False)
    assert not runs
    select.forget()
    run(gpu, given, forced=False)
    assert not runs
    launch.forget()
    assert run(gpu, given) == first
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        found = run(gpu, given)
    finally:
        products.fp32_precision = before
    assert not runs and "tf32" in {one.arguments.get("PRECISION") for one in found}
    assert run(gpu, given) == first and len(runs) == 2


def test_one_tensor_in_two_places(gpu: Gpu):
    """It says nothing of a call of two tensors of that kind: x is dy, lora_B is lora_A^T, one bias is the other."""
    square = Call(Case(16, 16, 16, 16, F32, bias=True, lora_bias=True), ONE_PASS.schedule)

    expected = run(gpu, Given(square))
    launch.forget()
    leaf = make(square.case)
    with select.forced(square.choice(False, gpu.arch)):
        for needs_grad in (False, True):
            x, A, bias = (one.detach().requires_grad_(needs_grad) for one in (leaf.x, leaf.lora_A, leaf.bias))
            y = peftkern.lora_linear(x, leaf.weight, A, A, square.case.scaling, bias=bias, lora_bias=bias)
            if needs_grad:
                with select.forced(square.choice(True, gpu.arch)):
                    torch.autograd.grad(y, (x, A, bias), x)
    assert run(gpu, Given(square)) == expected
    assert run(gpu, Given(square)) == expected


def test_no_tensor_is_kept_alive(gpu: Gpu, runs: list):
    """Of the call that prepares, and of one that is prepared."""
    for call in [call for call in CALLS for _ in range(2)]:
        t = make(call.case)
        leaf = leaves_of(t)
        with select.forced(call.choice(False, gpu.arch)):
            y = peftkern.lora_linear(
                leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], bias=leaf["bias"], lora_bias=leaf["lora_bias"],
                dropout_p=call.case.p, rng_state=t.rng_state,
            )  # fmt: skip
        with select.forced(call.choice(True, gpu.arch)):
            dx, dA = torch.autograd.grad(y, (leaf["x"], leaf["lora_A"]), t.dy)
        alive = [weakref.ref(one) for one in (t.x, t.weight, t.dy, leaf["x"], leaf["lora_B"], y, dx, dA, t.rng_state)]
        storages = [weakref.ref(one.untyped_storage()) for one in (t.x, y, dx)]
        assert len(prepared._known) == 2
        del t, leaf, y, dx, dA
        gc.collect()
        assert not [ref() for ref in (*alive, *storages) if ref() is not None], call
        if runs:
            launch.forget()
            runs.clear()


def test_what_cannot_be_made_again_is_not_prepared():
    """Views of what was given, but for the whole weight's transpose, and results that are no fresh matrix."""
    x, room, out = torch.empty(4, 8), torch.empty(9, 8), torch.empty(4, 8)
    W = room[:8]

    def prepare(*product: Tensor) -> Any:
        return launch.prepare((x, W), [launch.VendorProduct(*product)], [None], product[2:])

    assert prepare(x, W.T, out) and prepare(x, W, out)
    for product in (
        (x[:2], W.T, out), (x, room[1:].T, out), (x, W[:4].T, out), (x, torch.empty(8, 8), out),
        (x, W.T, torch.empty(8, 4).T),
    ):  # fmt: skip
        assert prepare(*product) is None


def test_ten_thousand_kinds_leave_what_a_thousand_do():
    first = torch.empty(0)
    prepared.keep((-1,), first)
    held = weakref.ref(first)
    del first
    for M in range(10_000):
        prepared.keep(launch.key((torch.empty(0, M),), M), torch.tensor(M))
        assert len(prepared._known) <= prepared._KEPT
    assert held() is None and launch.known(launch.key((torch.empty(0, M),), M)) == M
    launch.forget()
    assert not prepared._known


def test_tritons_hooks_see_every_launch(gpu: Gpu, runs: list):
    seen: list[str] = []
    runtime = triton.knobs.runtime
    run(gpu, Given(TWO))

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    def leave(metadata: Any) -> None:
        seen.append("end")

    runtime.launch_enter_hook.add(enter)
    runtime.launch_exit_hook.add(leave)
    try:
        found = run(gpu, Given(TWO))
        assert len(runs) == 2
        launch.forget()
        mine, seen[:] = list(seen), []
        assert run(gpu, Given(TWO)) == found
    finally:
        runtime.launch_enter_hook.remove(enter)
        runtime.launch_exit_hook.remove(leave)
    assert mine == seen and len(seen) == 2 * len(found)


def test_another_stream_gets_its_own_counters(gpu: Gpu, runs: list):
    check(gpu, runs, Given(TOGETHER))
    found = {}
    try:
        for gpu.stream in (0, 7, 0):
            runs.clear()
            launches = found[gpu.stream] = run(gpu, Given(TOGETHER))
            assert len(runs) == 2 and {one.stream for one in launches} == {gpu.stream}
            used = {name for one in launches for name in names(one.arguments.get("counters", ())) if name}
            assert used == {f"counters {gpu.stream}"}
    finally:
        gpu.stream = 0
    assert found[0] != found[7]


def test_threads_that_run_one_plan_at_once(gpu: Gpu, runs: list):
    expected = run(gpu, Given(ONE_PASS))[:1]
    t = [Given(ONE_PASS).tensors(seed) for seed in range(4)]
    ys: list[dict[int, Tensor]] = [{} for _ in t]

    def call(i: int) -> None:
        for j in range(25):
            ys[i][j] = peftkern.lora_linear(
                t[i].x, t[i].weight, t[i].lora_A, t[i].lora_B, ONE_PASS.case.scaling, bias=t[i].bias,
                dropout_p=ONE_PASS.case.p, rng_state=t[i].rng_state,
            )  # fmt: skip

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(t))]
    with gpu.recording() as recorded, select.forced(ONE_PASS.choice(False, gpu.arch)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    named = {f"y {i} {j}": y for i, each in enumerate(ys) for j, y in each.items()}
    named |= {f"x {i}": one.x for i, one in enumerate(t)} | {f"A {i}": one.lora_A for i, one in enumerate(t)}
    launches = recorded.launches(**named)
    assert len(launches) == len(runs) == 100 and {one.binary for one in launches} == {expected[0].binary}
    met = [tuple(names(one.arguments[name]).pop().split()[:2] for name in ("X", "F", "Z")) for one in launches]
    assert all(x[1] == factor[1] == z[1] for x, factor, z in met)
    assert len({names(one.arguments["Z"]).pop() for one in launches}) == 100


def test_nothing_prepared_runs_while_a_graph_is_captured(gpu: Gpu, runs: list):
    found = run(gpu, Given(TOGETHER))
    with mock.patch.object(backend, "_capturing", lambda like: True):
        assert run(gpu, Given(TOGETHER)) == found and not runs
    assert run(gpu, Given(TOGETHER)) == found and len(runs) == 2


def test_nothing_is_prepared_without_a_binary(gpu: Gpu, runs: list):
    """Triton's interpreter compiles none."""
    with mock.patch.object(launch.Launch, "run", lambda self: None):
        run(gpu, Given(VENDOR))
        run(gpu, Given(VENDOR))
    assert not runs and not prepared._known
