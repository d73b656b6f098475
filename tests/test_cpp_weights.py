"""Packed weights in the C++ kernels: decoded bit for bit in both orientations, and what is computed with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import NAMES, Case, judge, make, run
from torch import Tensor

import peftkern
from peftkern.backends.cpp import call
from peftkern.backends.cpp.extension import extension
from peftkern.weights import FP8Weight, FrozenWeight, Int4Weight, Int8Weight, NF4Weight

C = extension()[0]
pytestmark = [
    pytest.mark.skipif(C is None, reason="pure Python install"),
    pytest.mark.usefixtures("poisoned"),
]
SETS = C.instruction_sets() if C is not None else []
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = [
    ("nf4", {}),
    ("nf4", {"blocksize": 32, "double_quant": False}),
    ("nf4", {"blocksize": 4096}),
    ("fp4", {}),
    ("int4", {}),
    ("int4", {"group_size": 16}),
    ("int8", {}),
    ("int8", {"group_size": 32}),
    ("fp8", {}),
    ("fp8", {"scaling": "tensor"}),
    ("fp8", {"scaling": "block"}),
]
# Blocks that cross rows, rows that begin in the middle of a byte, less than a vector, more than a chunk and a block.
SHAPES = [(1, 1), (2, 7), (3, 65), (33, 100), (131, 257), (20, 1030)]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of kernels that this processor runs, with the weight decoded in them."""
    before = C.instruction_set()
    C.use(request.param)
    monkeypatch.setattr(call, "one_pass", lambda *_: True)
    yield request.param
    C.use(before)


def normal(N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))


def read(weight: FrozenWeight, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    """(W^T, W) as y and dx have them for rows of the identity, a number of them at a time."""
    N, K = weight.shape
    A, B = torch.zeros(1, K, dtype=dtype), torch.zeros(N, 1, dtype=dtype)
    outputs: list[Tensor] = []
    for x in torch.eye(K, dtype=dtype).split(rows):
        outputs.append(peftkern.lora_linear(x, weight, A, B, backend="cpp"))
    gradients: list[Tensor] = []
    for dy in torch.eye(N, dtype=dtype).split(rows):
        x = torch.zeros(len(dy), K, dtype=dtype, requires_grad=True)
        peftkern.lora_linear(x, weight, A, B, backend="cpp").backward(dy)
        assert x.grad is not None
        gradients.append(x.grad)
    return torch.cat(outputs), torch.cat(gradients)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_decoded_as_materialised(instruction_set, name, options, dtype):
    """y and dx of unit rows are the weight itself: a handful of rows, which stream it, and many, which take panels."""
    for shape in SHAPES:
        weight = FrozenWeight.quantize(normal(*shape), name, **options)
        W = weight.materialize(dtype)
        for rows in (13, 500):
            if rows == 13 and shape[1] > 300:
                continue
            y, dx = read(weight, dtype, rows)
            assert torch.equal(y, W.T) and torch.equal(dx, W), shape


# Whole steps of 64, which AVX2 decodes in registers: one, an odd number, more than a chunk; blocks that cross rows.
STEP_SHAPES = [(5, 64), (35, 192), (66, 320), (3, 2240)]
STEP_OPTIONS = [
    ("nf4", {}),
    *(("nf4", {"blocksize": 2**n, "double_quant": n % 2 == 0}) for n in range(5, 13)),
    ("fp4", {"blocksize": 128}),
    ("int4", {}),
    ("int4", {"group_size": 64}),
    ("int8", {}),
    ("int8", {"group_size": 64}),
    ("int8", {"group_size": 32}),
    ("fp8", {}),
    ("fp8", {"scaling": "tensor"}),
    ("fp8", {"scaling": "block"}),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("name", "options"), STEP_OPTIONS, ids=str)
def test_decoded_in_steps_as_materialised(instruction_set, name, options, dtype):
    for shape in STEP_SHAPES:
        weight = FrozenWeight.quantize(normal(*shape), name, **options)
        W = weight.materialize(dtype)
        for rows in (1, 3, 500) if shape[1] == 64 else (2, 4, 13) if shape[1] == 192 else (13, 500):
            y, dx = read(weight, dtype, rows)
            assert torch.equal(y, W.T) and torch.equal(dx, W), (shape, rows)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [0.375, 3.1e-7, 0.0, 1e-33, 1e-36, 1e35], ids=str)
def test_fp8_in_steps_with_any_scale(instruction_set, scale, dtype):
    """Every code, and scales with which a number's exponent does not fit into the steps' arithmetic."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 5
    codes = torch.cat((codes, codes.flip(0), codes.roll(77))).view(6, 128)
    weight = FP8Weight(codes.view(torch.float8_e4m3fn), torch.tensor([scale]))
    W = weight.materialize(dtype)
    for rows in (3, 7, 500):
        y, dx = read(weight, dtype, rows)
        assert torch.equal(y, W.T) and torch.equal(dx, W), rows
    nan = torch.full((3, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert all(found.isnan().all() for found in read(FP8Weight(nan, torch.tensor([scale])), dtype, 4))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_extreme_scales_in_steps(instruction_set, dtype):
    """int8 and int4: zero, huge and tiny scales, every code and zero point."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.3, 1e-36, 0.7, 2e-38, 3e30])
    data = torch.arange(-128, 128).to(torch.int8).repeat(6, 1)
    weights = [Int8Weight(data, scale)]
    packed = torch.randint(0, 256, (6, 128), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, 16, (6, 4), generator=generator, dtype=torch.uint8)
    weights.append(Int4Weight(packed, scale.unsqueeze(1).repeat(1, 4), 64, (zero_point,), (6, 256)))
    for weight in weights:
        W = weight.materialize(dtype)
        for rows in (3, 7, 500):
            y, dx = read(weight, dtype, rows)
            assert torch.equal(y, W.T) and torch.equal(dx, W), rows


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_fp8_number(instruction_set, dtype):
    """Subnormals too, also where the processor is told to take those of fp32 for zeros; and NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(2, 127)
    weight = FP8Weight(codes.view(torch.float8_e4m3fn), torch.tensor([0.375]))
    expected = weight.materialize(dtype)
    flushes = torch.set_flush_denormal(True)
    try:
        y, dx = read(weight, dtype, 500)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected.T) and torch.equal(dx, expected)
    assert flushes or instruction_set == "baseline"
    for code in (0x7F, 0xFF):
        nan = torch.full((3, 40), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert all(found.isnan().all() for found in read(FP8Weight(nan, torch.ones(1)), dtype, 500))


def test_every_code_of_a_second_quantisation(instruction_set):
    """Blocks whose scales take all 256 codes, over several blocks of those: product and sum are rounded one by one."""
    blocks = 600
    generator = torch.Generator().manual_seed(0)
    tables = (
        torch.tensor(NF4Weight.code),
        torch.rand(3, generator=generator) + 0.1,
        torch.randn(256, generator=generator).sort().values,
        torch.tensor([5.4321]),
    )
    data = torch.randint(0, 256, (blocks * 16,), generator=generator, dtype=torch.uint8)
    scale = torch.arange(blocks, dtype=torch.int32).to(torch.uint8)
    weight = NF4Weight(data, scale, 32, tables, (100, blocks * 32 // 100))
    W = weight.materialize(F32)
    y, dx = read(weight, F32, 500)
    assert torch.equal(y, W.T) and torch.equal(dx, W)


# A handful of rows and many, with ranks, columns and depths that fill no tile; dropout takes the handful elsewhere.
EDGES = [(1, 257, 35, 17), (16, 1030, 13, 3), (7, 64, 514, 5), (130, 513, 77, 33)]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8", "fp8"])
def test_edges(instruction_set, name, dtype, p):
    for edge in EDGES:
        for precision in ("base", "fp32"):
            case = Case(*edge, dtype, F32, p, bias=True, lora_bias=True, precision=precision, weight_format=name)
            tensors = make(case)
            judge(case, "cpp", (tensors, run(case, tensors, "cpp")))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8", "fp8"])
def test_rows_in_steps(instruction_set, name, dtype, adapter_dtype):
    """Every handful, and numbers of rows and columns that fill no group of panels."""
    for edge in [*((M, 704, 35, 17) for M in range(1, 17)), (130, 512, 77, 33), (300, 192, 130, 5)]:
        case = Case(*edge, dtype, adapter_dtype, 0.1 if edge[0] == 300 else 0.0, bias=True, weight_format=name)
        tensors = make(case)
        judge(case, "cpp", (tensors, run(case, tensors, "cpp")))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8", "fp8"])
def test_threads_do_not_change_a_bit(instruction_set, name):
    before = torch.get_num_threads()
    try:
        for M, K in ((5, 257), (200, 257), (3, 320), (5, 320), (200, 320)):
            case = Case(M, K, 131, 16, BF16, F32, bias=True, weight_format=name)
            tensors, found = make(case), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found += [run(case, tensors, "cpp"), run(case, tensors, "cpp")]
            for pair in (found[:2], found[2:4], found[4:]):
                assert all(torch.equal(*(one[key] for one in pair)) for key in NAMES if pair[0][key] is not None)
            assert all(torch.equal(found[0][key], other[key]) for key in ("y", "x") for other in found)
    finally:
        torch.set_num_threads(before)


def test_no_dense_copy_is_made(monkeypatch: pytest.MonkeyPatch):
    """By the rule as it is: for a handful of rows anywhere, with AVX2 for any number."""
    case = Case(16, 96, 80, 16, BF16, F32, weight_format="nf4")
    tensors = make(case)

    def refuse(*_) -> None:
        raise AssertionError("materialised")

    monkeypatch.setattr(NF4Weight, "materialize", refuse)
    run(case, tensors, "cpp")
    explanation = peftkern.explain(tensors.x, tensors.weight, tensors.lora_A, tensors.lora_B, backend="cpp")
    assert "decode the frozen nf4 weight" in str(explanation)
    if C.instruction_set() == "avx2":
        case = Case(200, 96, 80, 16, BF16, F32, 0.1, weight_format="nf4")
        run(case, make(case), "cpp")
