"""The operators and the node of layers that read one x: against fp64 and each layer alone, fakes, errors, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import all_of, call_of, check_operators
from conftest import CPU_TARGETS, NAMES, TRAINABLE, Case, Tensors, judge, make, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import functional
from peftkern.call import Call, Needs, Pair, arguments
from peftkern.ops import dispatch, schema
from peftkern.weights import DenseWeight

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BACKENDS = sorted({target.backend for target in CPU_TARGETS} & {"cpp", "reference"})
WIDTHS = ((20, 4, 0.0), (33, 7, 0.3), (8, 16, 0.0), (48, 1, 0.5))  # N, R, p


def members(dtype=F32, M=37, K=70, plain=False, **options) -> list[tuple[Case, Tensors]]:
    """Layers of one x that differ in width, rank and mask; every other one has biases."""
    found = []
    for i, (N, R, p) in enumerate(WIDTHS):
        case = Case(M, K, N, R, dtype, bias=i % 2 == 0, lora_bias=i % 2 == 0, p=0.0 if plain else p, **options)
        t = make(case, "cpu", seed=i)
        found.append((case, t if i == 0 else dataclasses.replace(t, x=found[0][1].x)))
    return found


def operands(case: Case, t: Tensors, leaf: dict[str, Tensor | None]) -> Pair:
    return Pair(
        DenseWeight(t.weight), leaf["lora_A"], leaf["lora_B"], leaf["bias"], leaf["lora_bias"],
        case.scaling, None, case.p, t.rng_state if case.p else None, case.precision,
    )  # fmt: skip


def together(layers, backend: str, unused=()) -> tuple[list[dict[str, Tensor | None]], Tensor]:
    """Every layer's y and gradients without x's, and dx."""
    x = layers[0][1].x.detach().requires_grad_()
    leaves = [
        {n: v if v is None else v.detach().requires_grad_() for n in TRAINABLE for v in [getattr(t, n)]}
        for _, t in layers
    ]
    pairs = [operands(*layer, leaf) for layer, leaf in zip(layers, leaves, strict=True)]
    ys = functional.run(x, call_of(pairs, True, backend))
    used = [i for i in range(len(layers)) if i not in unused]
    torch.autograd.backward([ys[i] for i in used], [layers[i][1].dy for i in used])
    gradients = [{n: v if v is None else v.grad for n, v in leaf.items()} for leaf in leaves]
    return [{"y": y.detach()} | found for y, found in zip(ys, gradients, strict=True)], x.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plain", [False, True], ids=["masks", "no masks"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_against_fp64(dtype, plain, backend):
    layers = members(dtype, plain=plain)
    results, dx = together(layers, backend)
    alone = [run(case, t, backend) for case, t in layers]
    for (case, t), found, one in zip(layers, results, alone, strict=True):
        judge(case, backend, (t, found | {"x": one["x"]}))
        if backend == "cpp":
            assert all(found[n] is None or torch.equal(found[n], one[n]) for n in NAMES if n != "x"), case
    total = sum(run(case, t, "reference")["x"].double() for case, t in layers)
    wide = sum(one["x"].double() for one in alone)
    truth = sum(exact_dx(case, t) for case, t in layers)
    peer = max((total - truth).norm(), (wide - truth).norm()) + torch.finfo(dtype).eps * truth.norm()
    assert (dx.double() - truth).norm() <= 2 * peer and dx.dtype == dtype


def exact_dx(case: Case, t: Tensors) -> Tensor:
    from conftest import run_truth

    return run_truth(case, t)["x"].double()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_row_and_a_transposed_weight(backend):
    """In bf16 the C++ backend adds to dx in its one pass over the weight where that is what it does alone."""
    for M in (1, 3, 50):
        layers = [
            (case, dataclasses.replace(t, weight=t.weight.t().contiguous().t() if i % 2 else t.weight))
            for i, (case, t) in enumerate(members(BF16, M=M, plain=True))
        ]
        _, dx = together(layers, backend)
        truth = sum(exact_dx(case, t) for case, t in layers)
        assert (dx.double() - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_without_a_use_has_no_gradient(backend):
    layers = members()
    results, dx = together(layers, backend, unused=(0, 2))
    others = [layers[1], layers[3]]
    expected, expected_dx = together(others, backend)
    torch.testing.assert_close(dx, expected_dx)
    for i, (_, t) in enumerate(layers):
        for name in TRAINABLE:
            gradient = results[i].get(name)
            assert (gradient is None) == (i in (0, 2) or name == "x" or getattr(t, name) is None)
    torch.testing.assert_close(results[1]["lora_A"], expected[0]["lora_A"])


def a_call(layers, backend: str) -> Call:
    return call_of([operands(*layer, vars(layer[1])) for layer in layers], True, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [0, 6])
def test_opcheck(M, backend):
    layers = members(M=M)
    x, dys = layers[0][1].x, [t.dy for _, t in layers]
    call = a_call(layers, backend)
    for need in ([True] * 4, [False, True, False, True]):
        check_operators(call, x, dys, all_of(call, need[0], updates=need))


def test_operands_that_do_not_fit_are_refused():
    layers = members(plain=True)
    x, dys, call = layers[0][1].x, [t.dy for _, t in layers], arguments(a_call(layers, ""))
    with pytest.raises(ValueError, match="x"):
        schema.forward(x[:, 1:], *call)
    no = [False] * 4
    with pytest.raises(ValueError, match="rows as x, got 37 and 36"):
        schema.backward([*dys[:3], dys[3][1:]], None, [None] * 4, *call, True, no, no, no, no)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dx_is_accumulated_in_one_buffer_and_x_is_saved_once(dtype, backend):
    layers, made = members(dtype, plain=True), set()
    x = layers[0][1].x

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == x.shape:
                made.add(result.data_ptr())
            return result

    call, yes, no = a_call(layers, backend), [True] * 4, [False] * 4
    _, thin = dispatch.forward(call, x)
    with Sizes():
        dispatch.backward(call, [t.dy for _, t in layers], None, thin, Needs(True, no, no, yes, no))
    assert len(made) == 1
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda t: t
    ):
        updates = [one._replace(lora_A=one.lora_A.detach().requires_grad_()) for one in call.updates]
        functional.run(x.detach().requires_grad_(), call._replace(updates=tuple(updates)))
    assert saved.count(x.data_ptr()) == 1
