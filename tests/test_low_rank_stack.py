"""The stand-in for a parameter with a low-rank update: products by the factors, all else by the folded tensor."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_equal
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("peft")

from peftkern.integrations.peft.low_rank_stack import LowRankStack  # noqa: E402

F64 = torch.float64


def stack_of(*shape: int) -> tuple[LowRankStack, Tensor, list[int], dict[str, Tensor]]:
    """A stand-in, the tensor that it stands for, how often it was folded, and its factors."""
    generator = torch.Generator().manual_seed(4)
    *E, N, K = shape
    weight = torch.randn(*shape, generator=generator, dtype=F64)
    left = torch.randn(*E, N, 3, generator=generator, dtype=F64).requires_grad_()
    right = torch.randn(*E, 3, K, generator=generator, dtype=F64).requires_grad_()
    folded, count = weight + 0.5 * left @ right, []
    stack = LowRankStack(weight, left, right, 0.5, lambda: count.append(1) or folded)
    return stack, folded, count, {"left": left, "right": right}


X = torch.randn(6, 5, dtype=F64)
GROUPS = torch.tensor([2, 2, 6], dtype=torch.int32)
KNOWN = {
    "linear": ((4, 5), lambda w: F.linear(X, w)),
    "linear with a bias": ((4, 5), lambda w: F.linear(X, w, torch.ones(4, dtype=F64))),
    "3-d rows": ((4, 5), lambda w: F.linear(X.view(2, 3, 5), w)),
    "@": ((5, 4), lambda w: X @ w),
    "mm": ((5, 4), lambda w: torch.mm(X, w) + X.mm(w)),
    "matmul": ((5, 4), lambda w: torch.matmul(X, w) + X.matmul(w)),
    "T": ((4, 5), lambda w: X @ w.T + X @ w.t() + X @ w.mT),
    "expert": ((3, 4, 5), lambda w: F.linear(X, w[1]) + F.linear(X, w[torch.tensor(2)]) + F.linear(X, w[-1])),
    "expert of a transpose": ((3, 4, 5), lambda w: X @ w.transpose(-2, -1)[1] + X @ torch.transpose(w, 1, 2)[0]),
    "metadata": ((3, 4, 5), lambda w: F.linear(X, w[0]).to(w.dtype) * w.shape[0] * w.size(1) * w.dim() * w.ndim),
}
FOLDED = {
    "sum": ((3, 4, 5), lambda w: w.sum()),
    "several experts": ((3, 4, 5), lambda w: w[torch.tensor([0, 2, 2])].sum(0)),
    "a slice": ((3, 4, 5), lambda w: w[:2].sum(0)),
    "batched": ((3, 5, 4), lambda w: torch.bmm(X.expand(3, 6, 5), w)),
    "on the left": ((4, 6), lambda w: w @ X),
    "into a buffer": ((5, 4), lambda w: torch.mm(X, w.detach(), out=torch.empty(6, 4, dtype=F64))),
    "another transpose": ((3, 4, 5), lambda w: w.transpose(0, 1).sum(0)),
    "a permutation": ((3, 4, 5), lambda w: F.linear(X, w.permute(1, 0, 2)[0])),
    "rows of another dtype": ((4, 5), lambda w: F.linear(X.float(), w.float())),
    "a slice of an expert": ((3, 4, 5), lambda w: F.linear(X, w[1][:2])),
}


def gradients_of(product, w, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    for factor in factors.values():
        factor.grad = None
    y = product(w)
    if y.requires_grad:
        y.square().sum().backward(retain_graph=True)
    return {"y": y.detach()} | {n: f.grad for n, f in factors.items() if f.grad is not None}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_product_never_folds(name):
    shape, product = KNOWN[name]
    stack, folded, count, factors = stack_of(*shape)
    expected = gradients_of(product, folded, factors)
    found = gradients_of(product, stack, factors)
    assert not count and len(found) == 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FOLDED)
def test_whatever_else_folds_and_is_the_same(name):
    shape, product = FOLDED[name]
    stack, folded, count, factors = stack_of(*shape)
    found = gradients_of(product, stack, factors)
    assert count
    assert_equal(found, gradients_of(product, folded, factors))


@pytest.mark.parametrize("ends", [[2, 2, 6], [0, 0, 6], [1, 2, 4], [0, 0, 0]], ids=str)
def test_grouped_products(ends):
    """The last two leave rows to nobody; torch's own result is undefined there, ours is 0."""
    stack, folded, count, factors = stack_of(3, 5, 4)
    offs = torch.tensor(ends, dtype=torch.int32)

    def by_hand(w: Tensor) -> Tensor:
        starts = [0, *ends]
        pieces = [X[start:end] @ w[e] for e, (start, end) in enumerate(zip(starts, ends, strict=False))]
        return torch.cat([*pieces, X.new_zeros(6 - ends[-1], 4)])

    expected = gradients_of(by_hand, folded, factors)
    found = gradients_of(lambda w: F.grouped_mm(X, w, offs=offs), stack, factors)
    assert not count
    torch.testing.assert_close(found["y"], expected["y"])
    for n in factors if ends[-1] else ():
        torch.testing.assert_close(found[n], expected[n])


def test_grouped_products_of_no_rows_give_zero_gradients():
    stack, _, count, factors = stack_of(3, 5, 4)
    y = F.grouped_mm(X[:0], stack, offs=torch.zeros(3, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, 4) and not count
    assert all(factor.grad is not None and not factor.grad.any() for factor in factors.values())


def test_what_passes_by_torch_functions_is_an_error():
    stack, *_ = stack_of(4, 5)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NotImplementedError, match="not folded in"):
        stack + 1
