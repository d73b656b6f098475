"""Whose product with the frozen weight the C++ backend takes, torch's or its own, by rows, dtype and processor."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import Case, make, run
from instruction_sets import SETS, C, kernels

import peftkern
from peftkern.__main__ import main
from peftkern.backends.cpp import call, products, tune
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
        assert call.one_pass(BF16, 17, "nf4") and call.one_pass(F16, 17, "nf4")
        assert not call.one_pass(BF16, 17, "nf4", True, True, "fp32") and call.one_pass(F16, 16, "nf4")
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


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The user's table in a folder of the test's."""
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "new"))
    products.tuned.cache_clear()
    yield products.table_file()
    products.tuned.cache_clear()


def test_tune_cpu_writes_what_calls_then_take(monkeypatch, table, capsys):
    """From the first row, from 128 on and never, over what we have measured; other classes of the table stay."""
    measured = {F32: [0.5, 0.9, 1.0, 1.03], BF16: [0.9, 1.2, 1.0, 0.8], F16: [0.5, 0.5, 0.5, 1.04]}
    monkeypatch.setattr(products, "processor", lambda: "some-1")
    monkeypatch.setattr(tune, "_ratio_of_rows", lambda dtype, M, _: measured[dtype][tune.ROWS.index(M)])
    products.write("another-2-avx2", {F32: (None, 3)})
    with kernels(SETS[0]):
        assert main(["tune", "--cpu"]) == 0
        assert str(table) in capsys.readouterr().out
        assert [products.own_rows(SETS[0], dtype, way) for dtype in measured for way in (True, False)] == [
            1, 1, 128, 128, None, None,
        ]  # fmt: skip
    monkeypatch.setattr(products, "processor", lambda: "another-2")
    assert products.own_rows("avx2", F32, True) is None and products.own_rows("avx2", F32, False) == 3


def test_both_products_of_a_cell_are_measured_and_a_wrong_one_is_an_error(monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 3)
    for forward in (True, False):
        assert tune._ratio(F32, 20, 96, 64, forward) > 0
    monkeypatch.setattr(tune.CppBackend, "own_product", lambda *_: torch.zeros(20, 96))
    with pytest.raises(ValueError, match="is wrong: 1.0e"):
        tune._ratio(F32, 20, 96, 64, True)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"version": 2, "rows_from": {}}', '{"version": 1, "rows_from": {"a": {"float32": [0, 1]}}}',
     '{"version": 1, "rows_from": {"a": {"float8": [1, 1]}}}', '{"version": 1, "rows_from": {"a": {"float32": [1]}}}'],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_ignored_with_one_warning(table, content, caplog):
    table.parent.mkdir()
    table.write_text(content)
    assert products.tuned() == {} and products.tuned() == {}
    assert len(caplog.records) == 1 and str(table) in caplog.text


def test_a_user_without_a_home_has_no_table(monkeypatch, caplog):
    """As in a container whose user is in no list: calls run all the same."""
    for name in ("PEFTKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(products.Path, "home", homeless)
    products.tuned.cache_clear()
    assert products.tuned() == {} and "home directory" in caplog.text
    products.tuned.cache_clear()
