"""y and every gradient, on every backend, against fp64 by the error rule: err(ours) <= 2 err(torch) + 1e-6."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from conftest import NAMES, TRAINABLE, Case, Target, check, grads, judge, leaves_of, make, run, run_truth
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.backends.base import Backend
from peftkern.ops import dispatch
from peftkern.testing import problems
from peftkern.weights import FrozenWeight

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]  # of x and W; of the adapter
SMALL = [(1, 1), (7, 1), (8, 8), (65, 33), (129, 257), (576, 192)]
RANKS = [1, 2, 3, 7, 8, 16, 24, 64, 512]


def small_cases() -> list[Case]:
    """Every dtype pair x every small shape x M 1, 3, 17, 64; the other choices go round, each at its own pace."""
    wheels = [
        itertools.cycle(wheel)
        for wheel in (
            RANKS[:-1],
            (0.0, 0.1, 0.0, 0.5, 0.05),  # p
            (True, False, False),  # bias
            (False, False, True, True, False, False, True),  # lora_bias
            ("base", "base", "fp32", "fp32", "base", "fp32", "fp32", "base", "base", "base", "fp32"),
            (2.0, 1.0, 0.25, -1.5),  # scaling
            ("dense",) * 7 + ("int8",) * 2,
        )
    ]
    cases = []
    for (dtype, adapter), (K, N), M in itertools.product(DTYPES, SMALL, (1, 3, 17, 64)):
        R, p, bias, lora_bias, precision, scaling, weight_format = map(next, wheels)
        cases.append(Case(M, K, N, R, dtype, adapter, p, bias, lora_bias, precision, scaling, weight_format))
    return cases


def of(name: str, M: int, R: int, *options, **more) -> Case:
    _, K, N = problems.layer(name)
    assert M * K * N <= problems.CPU_LIMIT
    return Case(M, K, N, R, *options, **more)


LAYERS = [
    of("smollm2-135m.qo", 1024, 16, BF16, F32, 0.05),
    of("smollm2-135m.up", 256, 16, BF16, F32, 0.05, lora_bias=True),
    of("smollm2-135m.down", 256, 16, F32, F32, 0.05),
    of("smollm2-135m.kv", 256, 256, BF16, BF16, 0.1),
    of("odd", 256, 24, BF16, F32, 0.1, bias=True),
    of("odd", 64, 512, F32, F32, precision="fp32"),
    of("qwen2.5-7b.kv", 64, 32, BF16, F32, 0.05, bias=True),
    of("llama3-8b.kv", 16, 64, F16, F32, 0.05),
    of("llama3-8b.qo", 64, 16, BF16, F32, 0.05),
    of("llama3-70b.kv", 4, 128, BF16, F32, 0.05),
    of("llama3-8b.down", 4, 128, BF16, F32, precision="fp32"),
]


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_small_shapes(case: Case, target: Target):
    check(case, target)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_shapes(case: Case, target: Target):
    check(case, target)


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_ranks(dtype, adapter, R, target: Target):
    case = Case(37, 100, 90, R, dtype, adapter, 0.1, bias=True, lora_bias=True)
    check(case, target)


@pytest.mark.parametrize(
    "option", [{}, {"p": 0.3}, {"bias": True}, {"lora_bias": True}, {"precision": "fp32"}], ids=str
)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_each_option_alone(dtype, adapter, option, target: Target):
    case = Case(29, 120, 88, 8, dtype, adapter, **option)
    check(case, target)


def test_gradients_of_an_fp32_adapter_are_not_rounded_to_the_base(target: Target):
    """They leave an fp32 accumulator; of the reference, the factors alone come from products in the base's dtype."""
    case = Case(29, 120, 88, 8, BF16, F32, lora_bias=True)
    found = run(case, make(case, target.device), target.backend)
    for name in ("lora_bias",) if target.backend == "reference" else ("lora_A", "lora_B", "lora_bias"):
        assert not torch.equal(found[name], found[name].bfloat16().float()), name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp64_of_the_reference_is_fp64(p):
    case = Case(17, 65, 33, 7, F64, F64, p, bias=True, lora_bias=True)
    t = make(case)
    found, truth = run(case, t, "reference"), run_truth(case, t)
    for name in NAMES:
        torch.testing.assert_close(found[name], truth[name])  # fp64's own default tolerance


SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(TRAINABLE, size)]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(needs, p, target: Target):
    """What is not needed is None and is not computed; what is needed is right, whatever else is."""
    case = Case(19, 40, 24, 5, BF16, F32, p, bias=True, lora_bias=True)
    t = make(case, target.device)
    found = run(case, t, target.backend, needs)
    assert [name for name in TRAINABLE if found[name] is not None] == list(needs)
    everything = run(case, t, target.backend)
    complete = {name: everything[name] if found[name] is None else found[name] for name in NAMES}
    judge(case, target.backend, (t, complete))


def test_nothing_requires_grad(target: Target):
    case = Case(19, 40, 24, 5, BF16, F32, 0.25, bias=True, lora_bias=True)
    t = make(case, target.device)
    options = dict(bias=t.bias, lora_bias=t.lora_bias, dropout_p=case.p, rng_state=t.rng_state, backend=target.backend)
    y = peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, case.scaling, **options)
    assert y.grad_fn is None and not y.requires_grad
    assert torch.equal(y, run(case, t, target.backend)["y"])
    t.lora_A.requires_grad_()
    with torch.no_grad():
        assert not peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, case.scaling, **options).requires_grad


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_backends_are_asked_for_what_is_needed_only(needs, target: Target, monkeypatch):
    """No dx for a first layer, no dA for a frozen A; and x and s reach backward only where dA and dB need them."""
    backend = dispatch.backend_named(target.backend)
    asked = []

    def spy(self: Backend, pair, dy, x, s, dx, needed, **how):
        asked.append((tuple(needed), x is not None, s is not None))
        return genuine(self, pair, dy, x, s, dx, needed, **how)

    genuine = type(backend).pair_backward
    monkeypatch.setattr(type(backend), "pair_backward", spy)
    case = Case(5, 16, 8, 4, bias=True, lora_bias=True)
    run(case, make(case, target.device), target.backend, needs)
    assert asked == [(tuple(name in needs for name in TRAINABLE), "lora_A" in needs, "lora_B" in needs)]


def test_saved_for_backward_is_x_and_s_alone(target: Target):
    """Beside parameters: x, s, two RNG integers, a 0-d scaling. No mask, no dropped or widened x."""
    case = Case(64, 128, 96, 8, BF16, F32, 0.1, bias=True, lora_bias=True)
    t = make(case, target.device)
    leaf = leaves_of(t)
    given = {tensor.untyped_storage().data_ptr() for tensor in (t.weight, t.lora_A, t.lora_B, t.bias, t.lora_bias)}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        peftkern.lora_linear(
            leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], torch.tensor(2.0, device=target.device),
            bias=leaf["bias"], lora_bias=leaf["lora_bias"], dropout_p=case.p, backend=target.backend,
        )  # fmt: skip
    x, s, rng_state, scaling = case.M * case.K * 2, case.M * case.R * 4, 16, 4
    assert sorted(saved.values()) == sorted([x, s, rng_state, scaling])


@pytest.mark.parametrize("value", [2.5, -0.5, 1.0])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES[:3])
def test_scaling_as_a_tensor(dtype, adapter, value, target: Target):
    case = Case(23, 72, 40, 8, dtype, adapter, 0.1, lora_bias=True, scaling=value)
    check(case, target, scaling=torch.tensor(value, device=target.device))


def test_scaling_tensor_may_live_on_the_host_and_in_fp64(target: Target):
    case = Case(23, 72, 40, 8, F32, F32, scaling=0.3)
    check(case, target, scaling=torch.tensor(0.3, dtype=F64))


def test_backward_uses_the_scaling_that_forward_saw(target: Target):
    case = Case(23, 72, 40, 8, F32, F32, 0.1, lora_bias=True, scaling=0.75)
    t = make(case, target.device)
    leaf = leaves_of(t)
    scaling = torch.tensor(0.75, device=target.device)
    options = dict(lora_bias=leaf["lora_bias"], dropout_p=case.p, rng_state=t.rng_state, backend=target.backend)
    first = peftkern.lora_linear(leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], scaling, **options)
    scaling.fill_(100.0)
    judge(case, target.backend, (t, grads(first, leaf, t.dy)))
    with torch.no_grad():  # and the next call reads the new value
        second = peftkern.lora_linear(leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], scaling, **options)
    assert (second - first).norm() > 50 * first.norm() / 2


def test_int8_round_trip_is_within_half_a_step():
    W = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    W[3] = 0
    packed = FrozenWeight.quantize(W, "int8")
    error = (packed.materialize(F64) - W.double()).abs()
    assert (error <= packed.scale.double().unsqueeze(1) * 0.5 * (1 + 1e-6)).all()
    assert packed.shape == (40, 64) and not packed.materialize(F32)[3].any()


@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_determinism_is_bitwise(dtype, adapter, target: Target):
    for case in (
        Case(300, 200, 136, 16, dtype, adapter, 0.1, bias=True, lora_bias=True),
        Case(1000, 65, 33, 7, dtype, adapter, bias=True, lora_bias=True, precision="fp32"),
    ):
        t = make(case, target.device)
        first = run(case, t, target.backend)
        for _ in range(3):
            again = run(case, t, target.backend)
            for name in NAMES:
                assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_recomputes_the_same_mask(use_reentrant, target: Target):
    case = Case(40, 64, 48, 8, F32, F32, 0.3, bias=True, lora_bias=True)
    t = make(case, target.device)

    def gradients(wrap):
        torch.manual_seed(5)
        leaf = leaves_of(t)

        def layer(x):
            y = peftkern.lora_linear(
                x, t.weight, leaf["lora_A"], leaf["lora_B"], case.scaling, bias=leaf["bias"],
                lora_bias=leaf["lora_bias"], dropout_p=case.p, backend=target.backend,
            )  # fmt: skip
            return torch.tanh(y)

        y = wrap(layer, leaf["x"])
        torch.rand(3, device=target.device)  # others draw from the generator before backward does
        return grads(y, leaf, t.dy)

    plain = gradients(lambda layer, x: layer(x))
    recomputed = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for name in NAMES:
        assert torch.equal(plain[name], recomputed[name]), name


def test_outputs_are_fresh_and_contiguous(target: Target):
    case = Case(6, 40, 24, 8, F32, F32, bias=True, lora_bias=True)
    t = make(case, target.device)
    t.dy = t.dy.T.contiguous().T
    found = run(case, t, target.backend)
    storages = [found[name].untyped_storage().data_ptr() for name in NAMES]
    assert all(found[name].is_contiguous() for name in NAMES) and len(set(storages)) == len(storages)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 4)], ids=str)
def test_any_leading_dimensions(shape, target: Target):
    case = Case(max(1, torch.Size(shape).numel()), 24, 16, 4, F32, F32, 0.2, bias=True)
    t = make(case, target.device)
    flat = run(case, t, target.backend)
    t.x, t.dy = t.x.reshape(*shape, 24), t.dy.reshape(*shape, 16)
    found = run(case, t, target.backend)
    assert found["y"].shape == t.dy.shape and found["x"].shape == t.x.shape
    for name in NAMES[:-1]:
        assert torch.equal(found[name].reshape(flat[name].shape), flat[name]), name


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_y_of_a_checkpoint_may_be_modified_in_place(use_reentrant):
    """As F.linear's: autograd refuses this for a view that was made inside."""
    x, W = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2)
    y = checkpoint(peftkern.lora_linear, x, W, A, B, use_reentrant=use_reentrant)
    y.mul_(2).sum().backward()
    torch.testing.assert_close(A.grad, 2 * B.sum(0).outer(x.detach().sum((0, 1))))


@pytest.mark.parametrize(("K", "N"), [(0, 5), (5, 0), (0, 0)])
def test_no_features(K, N, target: Target):
    """As F.linear: a sum over nothing is zero, and nothing is an empty tensor."""
    case = Case(6, K, N, 2, p=0.1)
    t = make(dataclasses.replace(case, K=max(K, 1)), target.device)
    x, A = t.x[:, :K].reshape(2, 3, K).requires_grad_(), t.lora_A[:, :K].requires_grad_()
    B = t.lora_B.requires_grad_()
    y = peftkern.lora_linear(x, t.weight[:, :K], A, B, dropout_p=case.p, backend=target.backend)
    y.sum().backward()
    assert y.shape == (2, 3, N) and not y.any()
    assert (
        x.grad.shape == x.shape
        and A.grad.shape == A.shape
        and not A.grad.any()
        and not B.grad.any()
        and not x.grad.any()
    )


@pytest.mark.parametrize(
    ("needs", "unread"),
    [("lora_B", ("x", "weight", "lora_A", "lora_B", "bias")), ("lora_A", ("weight", "lora_A", "bias"))],
)
def test_what_backward_does_not_read_may_change(needs, unread, target: Target):
    case = Case(19, 40, 24, 5, p=0.3, bias=True)
    t = make(case, target.device)
    expected = run(case, t, target.backend, (needs,))[needs]
    leaf = getattr(t, needs).requires_grad_()
    y = peftkern.lora_linear(
        t.x, t.weight, t.lora_A, t.lora_B, case.scaling, bias=t.bias, dropout_p=0.3, rng_state=t.rng_state,
        backend=target.backend,
    )  # fmt: skip
    with torch.no_grad():
        for name in unread:
            getattr(t, name).add_(1)
    y.backward(t.dy)
    assert torch.equal(leaf.grad, expected)
