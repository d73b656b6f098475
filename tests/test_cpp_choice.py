"""Whose product with the frozen weight the C++ backend takes, torch's or its own, by rows, dtype and processor."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import Case, make, run
from instruction_sets import SETS, C, kernels

import peftkern
from peftkern.backends.cpp import call, products
from peftkern.weights import DenseWeight

pytestmark = pytest.mark.skipif(C is None, reason="pure Python install")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.skipif("avx2" not in SETS, reason="rows stream with AVX2 and more alone")
def test_dx_of_one_row_in_fp32_over_a_large_weight_is_torchs_product():
    """By measurement: a single row is a gemv, which is memory's time; of more rows, and in 16 bits, ours is ahead."""

    def takes(M: int, N: int, dtype: torch.dtype = F32) -> bool:
        return call.takes(DenseWeight(torch.empty(N, 2048, dtype=dtype)), torch.empty(M, N, dtype=dtype), False)

    with kernels("avx2"):
        assert takes(1, 2048) and not takes(1, 2049) and takes(2, 2049) and takes(1, 2049, BF16)


@pytest.mark.skipif("avx2" not in SETS, reason="the kernels multiply by a dense weight with AVX2 alone")
def test_dx_of_few_rows_in_fp32_is_torchs_product():
    """Its bits, with nothing on top where B is zero; in 16 bits, for more rows and for y the kernels compute."""
    with kernels("avx2"):
        few = products.MEASURED["avx2"][F32][1]
        assert not call.one_pass(F32, few - 1, "dense", False) and call.one_pass(F32, few, "dense", False)
        assert call.one_pass(BF16, 1, "dense", False) and call.one_pass(F32, 1, "dense")
        x, W, dy = torch.randn(16, 96, requires_grad=True), torch.randn(80, 96), torch.randn(16, 80)
        y = peftkern.lora_linear(x, W, torch.randn(4, 96), torch.zeros(80, 4), backend="cpp")
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ W)


@pytest.mark.skipif("avx512" not in SETS, reason="what is measured for AVX-512")
@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("avx512")])
def test_a_handful_of_rows_is_not_torchs_product(monkeypatch, name):
    """On a processor that nobody has measured: one row in every dtype, both ways; more rows, and a weight whose columns
    are contiguous, are torch's.
    """
    monkeypatch.setattr(products, "processor", lambda: "another")
    with kernels(name):
        for dtype in (F32, BF16, F16):
            W, by_columns = (DenseWeight(weight.to(dtype)) for weight in (torch.ones(8, 8), torch.ones(8, 8).T))
            one, many = torch.ones(1, 8, dtype=dtype), torch.ones(call.FEW_ROWS + 1, 8, dtype=dtype)
            for way in (True, False):
                assert call.takes(W, one, way) and not call.takes(W, many, way) and not call.takes(by_columns, one, way)


@pytest.mark.skipif("avx512bf16" not in SETS, reason="what is measured for AVX-512")
def test_a_measured_processor_takes_its_own_products(monkeypatch):
    """As the table says for its class and dtype; not where factors stay in fp32, which pairs of bf16 cannot hold."""
    measured = {BF16: (20, 30), F32: (17, 1)}
    monkeypatch.setattr(products, "processor", lambda: "some-1")
    monkeypatch.setitem(products.MEASURED, "some-1-avx512bf16", measured)
    with kernels("avx512bf16"):
        for dtype, (y, dx) in measured.items():
            for M in (17, 19, 20, 29, 30, 1000):
                assert call.one_pass(dtype, M) == (M >= y) and call.one_pass(dtype, M, "dense", False) == (M >= dx)
        assert not call.one_pass(F16, 1000) and not call.one_pass(BF16, 1000, "dense", True, True, "fp32")
        assert call.one_pass(BF16, 17, "nf4") and not call.one_pass(F16, 17, "nf4") and call.one_pass(F16, 16, "nf4")
        x, W, A, B = torch.ones(40, 8, dtype=BF16), torch.ones(8, 8, dtype=BF16), torch.ones(2, 8), torch.ones(8, 2)
        assert "read the frozen weight in place" in str(peftkern.explain(x, W, A, B, backend="cpp"))


def test_the_processor_has_a_class():
    assert re.fullmatch(r"amd-\d+|intel-\d+-\d+|x86|other", products.processor())


def test_pairs_without_the_instruction_have_its_bits():
    """y and dx of the emulated products on a machine that has the real ones, in sums whose order is the same."""
    if "avx512bf16" not in SETS:
        pytest.skip("the instruction is not there to compare with")
    case = Case(30, 4, 3, 2, BF16, BF16)  # more rows than stream
    tensors, found = make(case), []
    for name in ("baseline", "avx512bf16"):
        with kernels(name, True):
            found.append(run(case, tensors, "cpp"))
    assert torch.equal(found[0]["y"], found[1]["y"]) and torch.equal(found[0]["x"], found[1]["x"])
