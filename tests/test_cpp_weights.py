"""Packed weights in the C++ kernels: decoded bit for bit in both orientations, and what is computed with them."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import NAMES, Case, expect, judge, make, run
from e2m1 import every_e2m1
from instruction_sets import SETS, C, kernels, settings
from pairwise import pairwise
from torch import Tensor

import peftkern
from peftkern.weights import FP8Weight, FrozenWeight, Int4Weight, Int8Weight, NF4Weight

pytestmark = [
    pytest.mark.skipif(C is None, reason="pure Python install"),
    pytest.mark.usefixtures("poisoned"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = [
    ("nf4", {}),
    ("nf4", {"blocksize": 32, "double_quant": False}),
    ("nf4", {"blocksize": 4096}),
    ("fp4", {}),
    ("int4", {}),
    ("int4", {"group_size": 16}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("int8", {}),
    ("int8", {"group_size": 32}),
    ("fp8", {}),
    ("fp8", {"scaling": "tensor"}),
    ("fp8", {"scaling": "block"}),
]
# Blocks that cross rows, rows that begin in the middle of a byte, less than a vector, more than a chunk and a block.
SHAPES = [(1, 1), (2, 7), (3, 65), (33, 100), (131, 257), (20, 1030)]


@functools.cache
def quantised(shape: tuple[int, int], name: str, options: tuple = ()) -> FrozenWeight:
    N, K = shape
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    return FrozenWeight.quantize(W, name, **dict(options))


def in_kernels(sets: list[str] = SETS) -> list:
    """Sets with the weight decoded in the kernels, whatever the rule says."""
    return [kernels(name, True) for name in sets]


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


def as_multiplied(tensor: Tensor, isa: str) -> Tensor:
    """What is left of a tensor: AVX512-BF16's products take subnormal numbers for zero, as torch's do there."""
    flushes = isa == "avx512bf16" and tensor.dtype == BF16
    return torch.where(tensor.abs() < torch.finfo(BF16).tiny, 0, tensor) if flushes else tensor


def assert_decoded(weight: FrozenWeight, dtype: torch.dtype, counts: tuple[int, ...], sets: list[str] = SETS) -> None:
    """y and dx of unit rows are the weight itself, a number of rows at a time: a few stream it, many take panels."""
    for setting in in_kernels(sets):
        with setting as name:
            W = weight.materialize(dtype)
            for rows in counts:
                y, dx = read(weight, dtype, rows)
                W, y, dx = (as_multiplied(t, name) for t in (W, y, dx))
                assert torch.equal(y, W.T) and torch.equal(dx, W), (tuple(weight.shape), rows)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_decoded_as_materialised(name, options, dtype):
    for shape in SHAPES:
        assert_decoded(quantised(shape, name, tuple(options.items())), dtype, (13, 500) if shape[1] < 300 else (500,))


# Whole steps of 64, which AVX2 decodes in registers: one, an odd number, more than a chunk; blocks that cross rows.
STEP_SHAPES = {(5, 64): (1, 3, 500), (35, 192): (2, 4, 13), (66, 320): (13, 500), (3, 2240): (500,)}
STEP_OPTIONS = [
    ("nf4", {}),
    *(("nf4", {"blocksize": 2**n, "double_quant": n % 2 == 0}) for n in range(5, 13)),
    ("fp4", {"blocksize": 128}),
    ("int4", {}),
    ("int4", {"group_size": 64}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("int8", {}),
    ("int8", {"group_size": 64}),
    ("int8", {"group_size": 32}),
    ("fp8", {}),
    ("fp8", {"scaling": "tensor"}),
    ("fp8", {"scaling": "block"}),
]


@pytest.mark.skipif("avx2" not in SETS, reason="no other set decodes in steps")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("name", "options"), STEP_OPTIONS, ids=str)
def test_decoded_in_steps_as_materialised(name, options, dtype):
    for shape, counts in STEP_SHAPES.items():
        assert_decoded(quantised(shape, name, tuple(options.items())), dtype, counts, ["avx2"])


@pytest.mark.skipif("avx2" not in SETS, reason="no other set decodes in steps")
@pytest.mark.parametrize(("name", "options"), STEP_OPTIONS, ids=str)
def test_a_handful_reads_the_first_middle_and_last_step_of_a_long_row(name, options):
    """Thirteen unit rows of 2240 columns: some on each step that is special."""
    weight = quantised((3, 2240), name, tuple(options.items()))
    columns = torch.tensor([0, 1, 63, 64, 1023, 1024, 1087, 1088, 2111, 2112, 2175, 2176, 2239])
    for dtype in (F32, BF16):
        x, A, B = (
            torch.eye(2240, dtype=dtype)[columns],
            torch.zeros(1, 2240, dtype=dtype),
            torch.zeros(3, 1, dtype=dtype),
        )
        with kernels("avx2", True):
            y = peftkern.lora_linear(x, weight, A, B, backend="cpp")
            assert torch.equal(y, weight.materialize(dtype)[:, columns].T)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [0.375, 3.1e-7, 0.0, 1e-33, 1e-36, 1e35], ids=str)
def test_fp8_in_steps_with_any_scale(scale, dtype):
    """Every code, and scales with which a number's exponent does not fit into the steps' arithmetic."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 5
    codes = torch.cat((codes, codes.flip(0), codes.roll(77))).view(6, 128)
    assert_decoded(FP8Weight(codes.view(torch.float8_e4m3fn), torch.tensor([scale])), dtype, (3, 7, 500))
    nan = torch.full((3, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for setting in in_kernels():
        with setting:
            assert all(found.isnan().all() for found in read(FP8Weight(nan, torch.tensor([scale])), dtype, 4))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_extreme_scales_in_steps(dtype):
    """int8 and int4: zero, huge and tiny scales, every code and zero point."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.3, 1e-36, 0.7, 2e-38, 3e30])
    data = torch.arange(-128, 128).to(torch.int8).repeat(6, 1)
    weights = [Int8Weight(data, scale)]
    packed = torch.randint(0, 256, (6, 128), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, 16, (6, 4), generator=generator, dtype=torch.uint8)
    weights.append(Int4Weight(packed, scale.unsqueeze(1).repeat(1, 4), 64, (zero_point,), (6, 256)))
    for weight in weights:
        assert_decoded(weight, dtype, (3, 7, 500))


@pytest.mark.parametrize(("name", "factor"), [("mxfp4", 1.0), ("nvfp4", 1 / 3), ("nvfp4", 2.0**-120)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_code_of_e2m1_with_every_scale(name, factor, dtype):
    """In steps and elsewhere, subnormal products too, but for rows of W that overflow: 0 times an infinity is none."""
    for K in (512, 511):
        weight, expected = every_e2m1(name, K, factor)
        W = expected.to(dtype)
        assert torch.equal(weight.materialize(dtype), W)
        finite = W.isfinite().all(dim=1)
        for setting in in_kernels():
            with setting as isa:
                for rows in (3, 7, 500):
                    y, product = as_multiplied(read(weight, dtype, rows)[0], isa), as_multiplied(W.T, isa)
                    assert torch.equal(y[:, finite], product[:, finite]), (isa, rows)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_fp8_number(dtype):
    """Subnormals too, also where the processor is told to take those of fp32 for zeros; and NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(2, 127)
    weight = FP8Weight(codes.view(torch.float8_e4m3fn), torch.tensor([0.375]))
    expected = weight.materialize(dtype)
    for setting in in_kernels():
        with setting as name:
            flushes = torch.set_flush_denormal(True)
            try:
                y, dx = read(weight, dtype, 500)
            finally:
                torch.set_flush_denormal(False)
            assert torch.equal(y, expected.T) and torch.equal(dx, expected)
            assert flushes or name == "baseline"
            for code in (0x7F, 0xFF):
                nan = torch.full((3, 40), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
                assert all(found.isnan().all() for found in read(FP8Weight(nan, torch.ones(1)), dtype, 500))


def test_every_code_of_a_second_quantisation():
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
    assert_decoded(NF4Weight(data, scale, 32, tables, (100, blocks * 32 // 100)), F32, (500,))


# A handful of rows and many, with ranks, columns and depths that fill no tile; dropout takes the handful elsewhere.
EDGES = [(1, 257, 35, 17), (16, 1030, 13, 3), (7, 64, 514, 5), (130, 513, 77, 33)]


PACKED = ["nf4", "fp4", "mxfp4", "nvfp4", "int4", "int8", "fp8"]


def judge_in_kernels(case: Case) -> None:
    """A case in every set, with the weight decoded in the kernels, against one truth."""
    tensors = make(case)
    expected = expect(case, tensors)
    for setting in in_kernels():
        with setting:
            judge(case, "cpp", (tensors, run(case, tensors, "cpp")), expected=expected)


@pytest.mark.parametrize("edge", EDGES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype", "p", "precision"), pairwise(PACKED, (F32, BF16), (0.0, 0.1), ("base", "fp32")), ids=str
)
def test_edges(edge, name, dtype, p, precision):
    judge_in_kernels(Case(*edge, dtype, F32, p, bias=True, lora_bias=True, precision=precision, weight_format=name))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_rows_in_steps(name, dtype, adapter_dtype):
    """Every handful, and numbers of rows and columns that fill no group of panels."""
    for edge in [*((M, 704, 35, 17) for M in range(1, 17)), (130, 512, 77, 33), (300, 192, 130, 5)]:
        p = 0.1 if edge[0] == 300 else 0.0
        judge_in_kernels(Case(*edge, dtype, adapter_dtype, p, bias=True, weight_format=name))


@pytest.mark.parametrize("name", PACKED)
def test_threads_do_not_change_a_bit(name):
    before = torch.get_num_threads()
    try:
        for M, K in ((5, 257), (200, 257), (3, 320), (5, 320), (200, 320)):
            case = Case(M, K, 131, 16, BF16, F32, bias=True, weight_format=name)
            tensors = make(case)
            for setting in in_kernels():
                found = []
                with setting:
                    for threads in (1, 2, 3):
                        torch.set_num_threads(threads)
                        found += [run(case, tensors, "cpp"), run(case, tensors, "cpp")]
                    for pair in (found[:2], found[2:4], found[4:]):
                        assert all(
                            torch.equal(*(one[key] for one in pair)) for key in NAMES if pair[0][key] is not None
                        )
                    assert all(torch.equal(found[0][key], other[key]) for key in ("y", "x") for other in found)
    finally:
        torch.set_num_threads(before)


def test_no_dense_copy_is_made(monkeypatch: pytest.MonkeyPatch):
    """By the rule as it is: for a handful of rows anywhere, with AVX2 for any number."""
    few, many = (
        Case(16, 96, 80, 16, BF16, F32, weight_format="nf4"),
        Case(200, 96, 80, 16, BF16, F32, 0.1, weight_format="nf4"),
    )
    tensors = {case: make(case) for case in (few, many)}

    def refuse(*_) -> None:
        raise AssertionError("materialised")

    monkeypatch.setattr(NF4Weight, "materialize", refuse)
    for setting in settings(one_pass=(None,)):
        with setting as name:
            run(few, tensors[few], "cpp")
            t = tensors[few]
            explanation = peftkern.explain(t.x, t.weight, t.lora_A, t.lora_B, backend="cpp")
            assert "decode the frozen nf4 weight" in str(explanation)
            if name == "avx2":
                run(many, tensors[many], "cpp")
