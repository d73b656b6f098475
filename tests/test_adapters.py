"""Several adapters on one weight in one autograd node: values, gradients, the operators, the compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import all_of, call_of, check_operators
from conftest import CPU_TARGETS, Case, Target, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.call import Pair
from peftkern.functional import run
from peftkern.ops import dispatch
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import DenseWeight

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclasses.dataclass
class Sum:
    """One call with several adapters: leaves by name, and what is not a leaf."""

    leaves: dict[str, Tensor]
    weight: Tensor
    settings: list[tuple[float, Tensor | None, float, Tensor | None]]  # scaling, scaling tensor, p, rng_state
    dy: Tensor
    precision: str = "base"

    @property
    def count(self) -> int:
        return len(self.settings)


def a_sum(case: Case, ranks=(4, 7, 16), ps=(0.0, 0.3, 0.5), device="cpu", tensor_scaling=False) -> Sum:
    """Adapters that differ in rank, scaling, mask and, the last, in having a bias."""
    t = make(case, device)
    leaves, settings = {"x": t.x, "bias": t.bias}, []
    for i, (R, p) in enumerate(zip(ranks, ps, strict=True)):
        one = make(dataclasses.replace(case, R=R, lora_bias=i == len(ranks) - 1), device, seed=10 + i)
        leaves |= {f"lora_A{i}": one.lora_A, f"lora_B{i}": one.lora_B, f"lora_bias{i}": one.lora_bias}
        c = 1.75 - i
        scaling = (1.0, torch.tensor(c, device=device)) if tensor_scaling else (c, None)
        settings.append((*scaling, p, one.rng_state if p else None))
    return Sum({n: v for n, v in leaves.items() if v is not None}, t.weight, settings, t.dy, case.precision)


def fresh(s: Sum, dtype: torch.dtype | None = None, needs=None) -> dict[str, Tensor]:
    def wanted(name: str) -> bool:
        return needs is None or name in needs

    return {n: v.detach().to(dtype or v.dtype).requires_grad_(wanted(n)) for n, v in s.leaves.items()}


def found(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    y.backward(dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def operands_of(s: Sum, leaves: dict[str, Tensor]) -> list[Pair]:
    return [
        Pair(
            DenseWeight(s.weight), leaves[f"lora_A{i}"], leaves[f"lora_B{i}"], None if i else leaves.get("bias"),
            leaves.get(f"lora_bias{i}"), *s.settings[i], s.precision,
        )
        for i in range(s.count)
    ]  # fmt: skip


def ours(s: Sum, leaves: dict[str, Tensor], backend: str) -> Tensor:
    return run(leaves["x"], call_of(operands_of(s, leaves), backend=backend))[0]


def plain(s: Sum, leaves: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The sum by PyTorch's own operators and autograd, in ``dtype``, or with the roundings of the base precision."""
    x, thin = leaves["x"], dtype or s.weight.dtype
    y = torch.nn.functional.linear(x, s.weight.to(dtype or x.dtype), leaves.get("bias"))
    for i, (c, tensor, p, rng_state) in enumerate(s.settings):
        dropped = x
        if p:
            keep = dropout_mask(*x.shape, p, rng_state)
            dropped = torch.where(keep, x, torch.zeros_like(x)) * (65536 / (65536 - round(65536 * p)))
        update = dropped @ leaves[f"lora_A{i}"].to(thin).T @ leaves[f"lora_B{i}"].to(thin).T
        if f"lora_bias{i}" in leaves:
            update = update + leaves[f"lora_bias{i}"].to(thin)
        y = y + (update * (c if tensor is None else tensor.to(thin))).to(y.dtype)
    return y


CASES = [
    Case(37, 40, 24, 0, F32, bias=True),
    Case(37, 40, 24, 0, BF16, F32, bias=True),
    Case(37, 40, 24, 0, BF16, BF16),
    Case(1, 33, 17, 0, F32),
    Case(19, 64, 48, 0, F16, F32, bias=True),
]


@pytest.mark.parametrize("tensor_scaling", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_every_gradient_against_fp64(case, tensor_scaling, target: Target, poisoned):
    s = a_sum(case, device=target.device, tensor_scaling=tensor_scaling)
    mine, peer, wide = fresh(s), fresh(s), fresh(s, F64)
    results = found(ours(s, mine, target.backend), mine, s.dy)
    truth = found(plain(s, wide, F64), wide, s.dy.double())
    peers = found(plain(s, peer), peer, s.dy)
    assert results.keys() == truth.keys()
    for name, value in results.items():
        assert value.dtype == (s.dy if name == "y" else s.leaves[name]).dtype
    thin = [name for name in truth if name not in ("y", "x")]
    for names in (["y"], ["x"], thin):  # what is small is pooled by its size: one tiny tensor is mostly luck
        pool = [
            torch.cat([(r[n].double() / truth[n].norm()).flatten() for n in names]) for r in (results, peers, truth)
        ]
        assert_as_good_as(*pool, f"{names} of {case}")


@pytest.mark.parametrize("needs", [("x",), ("lora_A1",), ("lora_B0", "lora_B2"), ("bias", "lora_bias2")], ids="+".join)
def test_only_what_needs_a_gradient_gets_one_and_keeps_its_operands(needs, target: Target):
    s = a_sum(CASES[0], device=target.device)
    every, some = fresh(s), fresh(s, needs=needs)
    full = found(ours(s, every, target.backend), every, s.dy)
    y = ours(s, some, target.backend)
    held = {tensor.data_ptr() for tensor in y.grad_fn.saved_tensors if tensor is not None}
    assert (some["x"].data_ptr() in held) == any("lora_A" in name for name in needs)
    partial = found(y, some, s.dy)
    assert partial.keys() == {"y", *needs}
    for name in partial:
        torch.testing.assert_close(partial[name], full[name])


def test_gradcheck():
    s = a_sum(Case(5, 7, 4, 0, F64, F64, bias=True), ranks=(2, 3), ps=(0.4, 0.0))
    leaves = fresh(s)
    assert torch.autograd.gradcheck(lambda *v: ours(s, dict(zip(leaves, v, strict=True)), ""), tuple(leaves.values()))


def test_one_adapter_or_the_same_twice_and_no_rows(target: Target):
    s = a_sum(CASES[0], ranks=(5, 5), ps=(0.0, 0.0), device=target.device)
    leaves = fresh(s)
    for name in ("lora_A", "lora_B"):
        leaves[f"{name}1"] = leaves[f"{name}0"]
    twice = found(ours(s, leaves, target.backend), leaves, s.dy)
    other = fresh(s)
    s.settings[0] = (1.75 + 0.75, None, 0.0, None)
    del other["lora_bias1"]
    single = dataclasses.replace(s, settings=s.settings[:1])
    once = found(ours(single, other, target.backend), other, s.dy)
    bias = 0.75 * s.leaves["lora_bias1"]
    torch.testing.assert_close(twice["y"], once["y"] + bias)
    torch.testing.assert_close(twice["lora_A0"], once["lora_A0"])
    torch.testing.assert_close(twice["x"], once["x"])
    empty = {**fresh(s), "x": s.leaves["x"].new_empty(0, 40).requires_grad_()}
    results = found(ours(s, empty, target.backend), empty, s.dy[:0])
    assert results["x"].shape == (0, 40) and not any(v.any() for v in results.values())


@pytest.mark.parametrize("tensor_scaling", [False, True])
@pytest.mark.parametrize("M", [0, 6])
def test_opcheck_and_fakes(M, tensor_scaling, target: Target):
    s = a_sum(Case(M, 24, 16, 0, F32, bias=True), device=target.device, tensor_scaling=tensor_scaling)
    call = call_of(operands_of(s, s.leaves), backend=target.backend)
    for need in ([True] * 3, [False, True, False]):
        check_operators(call, s.leaves["x"], [s.dy], all_of(call, bias=need[0], updates=need))


def test_compiled_in_one_graph_equals_eager(target: Target):
    torch._dynamo.reset()
    s = a_sum(CASES[0], device=target.device)
    eager, traced = fresh(s), fresh(s)
    expected = found(ours(s, eager, target.backend), eager, s.dy)
    compiled = torch.compile(lambda leaves: ours(s, leaves, target.backend), fullgraph=True, backend="aot_eager")
    results = found(compiled(traced), traced, s.dy)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_further_adapters_take_no_temporary_of_the_size_of_y():
    """They are added to y in place."""
    s, made = a_sum(CASES[0], ps=(0.0, 0.0, 0.0)), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == s.dy.shape:
                made.append(result.data_ptr())
            return result

    for target in CPU_TARGETS:
        with Sizes():
            dispatch.forward(call_of(operands_of(s, s.leaves), backend=target.backend), s.leaves["x"])
        assert len(set(made)) == 1
        made.clear()
