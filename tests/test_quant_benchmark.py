"""``python -m benchmarks.quant``: what it checks, counts and writes. Nothing here looks at a time."""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest
import torch

from benchmarks import linear, quant
from benchmarks.harness import WrongResult
from peftkern.weights import FrozenWeight

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def cell(M: int, dtype: torch.dtype = torch.float32, K: int = 128, N: int = 33) -> linear.Cell:
    return linear.Cell("small", M, K, N, 4, 0.0, dtype, torch.float32, "cpu")


@pytest.mark.parametrize("M", [3, 24], ids=["decode", "training"])
@DTYPES
def test_every_contender_is_right_and_counted(dtype, M):
    rows, absent = quant.measure_cell(cell(M, dtype), quant.FORMATS, rounds=2)
    found = {row["name"]: row for row in rows}
    assert [row["name"] for row in rows[:2]] == ["frozen", "peftkern"] and rows[0]["ratio"] == 1.0
    for name in quant.FORMATS:
        for who in ("peftkern", "materialise"):
            row = found[f"{who} {name}"]
            assert 0.001 < row["error"] < 0.2
            assert row["held_bytes"] < found["frozen"]["held_bytes"] and row["bits_per_weight"] < 8 * dtype.itemsize
        assert found[f"peftkern {name}"]["held_bytes"] == found[f"materialise {name}"]["held_bytes"]
    computed = found["peftkern fp8, base_compute"]
    assert 0.01 < found["peftkern fp8"]["error"] < computed["error"] < 0.06
    assert computed["held_bytes"] == found["peftkern fp8"]["held_bytes"]
    assert found["peftkern"]["error"] < (1e-6 if dtype == torch.float32 else 1e-2)
    others = {"bitsandbytes nf4": "bitsandbytes", "torchao int8": "torchao"}
    for name, module in others.items():
        installed = importlib.util.find_spec(module) is not None
        assert (name in found) == installed and absent.get(name) == (None if installed else "not installed")
    assert {row["phase"] for row in rows} == {"decode" if M == 3 else "forward+backward"}
    assert all(name in quant.text(rows, absent) for name in [*found, *absent])


def test_bytes_moved_are_those_of_the_products():
    """fp32, K=128, N=32, M=2, r=4: x 1024 bytes, y 256, factors 2560, the dense weight 16384."""
    one = cell(2, N=32)
    o = linear.operands(one)
    weight = FrozenWeight.quantize(o.W, "int8")
    assert weight.nbytes == 128 * 32 + 4 * 32
    made = quant.materialised(weight, o.W)
    assert made.moved(one) == weight.nbytes + 2 * 16384 + 1024 + 256 + 2560
    in_place = quant.Contender("in place", o.W, weight.nbytes, made.forward)
    assert in_place.moved(one) == weight.nbytes + 1024 + 256 + 2560
    many = cell(200, N=32)
    x, y = 100 * 1024, 100 * 256
    assert in_place.moved(many) == 2 * (weight.nbytes + x + y + 2560) + x + y + 2560


def test_a_decoded_copy_is_counted_where_a_backend_makes_one(dispatch_env):
    from peftkern.backends.cpp.extension import extension

    o = linear.operands(cell(3))
    weight = FrozenWeight.quantize(o.W, "nf4")
    built = extension()[0] is not None
    assert quant.own(weight, o.W, "nf4", o).dense_copies == int(not built)  # a handful of rows is decoded in place
    dispatch_env(PEFTKERN_BACKEND="reference")
    assert quant.own(weight, o.W, "nf4", o).dense_copies == 1


def test_a_wrong_product_is_not_timed(monkeypatch):
    exact = quant.peftkern.lora_linear

    def off(x, weight, *rest):
        return exact(x, weight, *rest) * (1 if isinstance(weight, FrozenWeight) and weight.format == "dense" else 1.001)

    monkeypatch.setattr(quant.peftkern, "lora_linear", off)
    with pytest.raises(WrongResult, match="peftkern int8 is wrong"):
        quant.measure_cell(cell(3), ["int8"], rounds=1)
    usual = lambda x, weight, *rest: exact(x, weight.with_base_compute(None), *rest)  # noqa: E731
    monkeypatch.setattr(quant.peftkern, "lora_linear", usual)
    with pytest.raises(WrongResult, match="base_compute is wrong"):
        quant.measure_cell(cell(3), ["fp8"], rounds=1)


def test_what_is_not_installed_or_wrong_is_named(monkeypatch):
    exact = importlib.util.find_spec
    monkeypatch.setattr(quant.importlib.util, "find_spec", lambda name: None if name == "torchao" else exact(name))
    _, absent = quant.contenders(linear.operands(cell(3, K=100)), ["int8"])
    assert absent["torchao int8"] == "not installed"
    assert "not installed" in absent["bitsandbytes nf4"] or "no multiple" in absent["bitsandbytes nf4"]


def test_the_command_writes_its_record(tmp_path, capsys):
    quant.main(["--quick", "--rows", "2", "--rounds", "1", "--format", "nf4", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "quant.json").read_text())
    assert {"machine", "absent", "rows"} <= written.keys() and written["machine"]["versions"]["torch"]
    with (tmp_path / "quant.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in written["rows"]]
    assert "smollm2-135m.up 576->1536, M=2" in capsys.readouterr().out


def test_the_default_and_the_whole_sweep():
    def chosen(*arguments: str) -> list[linear.Cell]:
        return quant.cells(quant.parser().parse_args(arguments), "cpu")

    assert [c.M for c in chosen()] == [1, 16, 256] and {c.layer for c in chosen()} == {"llama3-8b.qo"}
    assert chosen("--rows", "512") == [] and len(chosen("--rows", "512", "--max-flops", "0")) == 1
    assert max(c.M for c in chosen("--full")) == 8192 and len({c.layer for c in chosen("--full")}) == 4
    assert [c.adapter_dtype for c in chosen("--dtype", "bf16", "--adapter", "base", "--rows", "1")] == [torch.bfloat16]


@pytest.mark.parametrize("shape", [(2048, 2048), (1024, 4096), (1100, 4000)], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_hold_at_most_4_13_bit_a_weight(name, shape):
    """Double quantised, with every scale and table, from 2^22 weights on."""
    N, K = shape
    assert N * K >= 2**22
    weight = FrozenWeight.quantize(torch.randn(shape), name)
    assert 8 * weight.nbytes <= 4.13 * N * K
