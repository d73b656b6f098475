"""Packed weights in Triton's interpreter: every loader, both orientations, decoded once or in the tile."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, make, run
from e2m1 import every_e2m1

pytest.importorskip("triton")

import triton
import triton.language as tl

from peftkern.backends.triton import launch, select
from peftkern.backends.triton.kernels.matrix import store_block
from peftkern.backends.triton.launch.operands import quantised
from peftkern.backends.triton.tiles import FAR, LIBRARY, RECOMPUTE, SHARED, SPLIT, Choice, TileConfig
from peftkern.weights import FrozenWeight

pytestmark = pytest.mark.interpreter

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PACKED = [
    ("int8", {}), ("int8", {"group_size": 16}), ("int4", {}), ("int4", {"group_size": 16}),
    ("nf4", {}), ("nf4", {"double_quant": False}), ("nf4", {"blocksize": 32}), ("nf4", {"blocksize": 4096}),
    ("fp4", {}), ("mxfp4", {}), ("nvfp4", {}),
    ("fp8", {}), ("fp8", {"scaling": "tensor"}), ("fp8", {"scaling": "block"}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 65), (40, 144), (130, 257), (33, 430)], ids=str)
@pytest.mark.parametrize(("name", "options"), PACKED, ids=str)
def test_a_loader_is_the_formats_definition(name, options, shape):
    """Bit for bit, in every dtype; rows that begin within a byte and blocks that end within a row included."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    W[1] = 0
    weight = FrozenWeight.quantize(W, name, **options)
    for dtype in (F32, BF16, F16):
        made, decoded = launch.decode(weight, dtype)
        decoded.data.fill_(float("nan"))
        made.run()
        assert torch.equal(decoded.data, weight.materialize(dtype))
        assert set(map(id, made.reads)) == set(map(id, weight.tensors))


@triton.jit
def one_tile(
    W, w_operands, OUT, n0, k0, N, K, LOAD_W: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT [BLOCK_N, BLOCK_K] = the tile at n0, k0."""
    if BACKWARD:
        value = LOAD_W(W, w_operands, n0, k0, N, K, BLOCK_N, BLOCK_K, True, tl.float32)
    else:
        value = tl.trans(LOAD_W(W, w_operands, k0, n0, K, N, BLOCK_K, BLOCK_N, False, tl.float32))
    store_block(OUT, (BLOCK_K, 1), value, 0, 0, BLOCK_N, BLOCK_K, BLOCK_N, BLOCK_K)


def at_the_end(corner: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix that ends with ``corner``, after so many rows and columns of anything."""
    whole = torch.empty(rows + corner.shape[0], columns + corner.shape[1], dtype=corner.dtype)
    whole[rows:, columns:] = corner
    return whole


def flat_weight(N: int, K: int, n0: int, k0: int) -> tuple[FrozenWeight, torch.Tensor]:
    """An nf4 weight and its values from n0 and k0 on, by the format's definition in 64 bits."""
    code, _, nested_code, offset = FrozenWeight.quantize(torch.ones(1, 64), "nf4").tables
    place = (torch.arange(n0, N) * K).unsqueeze(1) + torch.arange(k0, K)
    block = place // 64
    data, scale = torch.empty(-(-N * K // 2), dtype=torch.uint8), torch.empty(-(-N * K // 64), dtype=torch.uint8)
    nested_absmax = torch.empty(-(-len(scale) // 256))
    data[place // 2] = torch.randint(256, place.shape, dtype=torch.uint8)
    scale[block] = torch.randint(256, place.shape, dtype=torch.uint8)
    nested_absmax[block // 256] = torch.rand(place.shape)
    codes = torch.where(place % 2 == 0, data[place // 2] >> 4, data[place // 2] & 15).int()
    values = code[codes] * (nested_code[scale[block].int()] * nested_absmax[block // 256] + offset)
    tables = (code, nested_absmax, nested_code, offset)
    return FrozenWeight.from_operands("nf4", data, scale, 64, tables, (N, K)), values


@pytest.mark.parametrize("K", [FAR - 16, FAR - 3], ids=["whole bytes", "any"])
@pytest.mark.parametrize("name", ["nf4", "int8", "int4", "mxfp4", "nvfp4", "fp8"])
def test_offsets_beyond_2_31(name, K):
    """The last tile of a weight of 2^32 elements, in the longest rows; only the pages that are written take memory."""
    N, BLOCK_N, BLOCK_K = 512, 256, 128
    n0, k0 = N - BLOCK_N, K // BLOCK_K * BLOCK_K
    torch.manual_seed(0)
    if name == "nf4":
        weight, values = flat_weight(N, K, n0, k0)
    else:
        options = {"fp8": {"scaling": "block"}, "mxfp4": {}, "nvfp4": {}}.get(name, {"group_size": 16})
        small = FrozenWeight.quantize(torch.randn(N - n0, K - k0), name, **options)
        group, block = small.group_size, 128 if name == "fp8" else 1
        data = at_the_end(small.data.view(torch.uint8), n0, k0 // 2 if "4" in name else k0).view(small.data.dtype)
        scale, *tables = (
            at_the_end(part, n0 // block, k0 // group) if part.ndim == 2 else part for part in small.tensors[1:]
        )
        weight = FrozenWeight.from_operands(name, data, scale, group, tuple(tables), (N, K))
        values = small.materialize(F32)
    for backward in (False, True):
        out = torch.full((BLOCK_N, BLOCK_K), float("nan"))
        loaded = quantised(weight, backward)
        one_tile[(1,)](
            **loaded, OUT=out, n0=n0, k0=k0, N=N, K=K, BACKWARD=backward, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K
        )  # fmt: skip
        assert torch.equal(out[:, : K - k0], values) and (out[:, K - k0 :] == 0).all()


def test_every_byte_of_fp8():
    """Subnormals, both zeros and both NaNs."""
    weight = FrozenWeight.quantize(torch.ones(16, 16), "fp8")
    weight.data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    made, decoded = launch.decode(weight, F32)
    made.run()
    assert torch.equal(decoded.data.nan_to_num(7e9), weight.materialize(F32).nan_to_num(7e9))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("K", [512, 511], ids=["even", "odd"])
def test_every_code_with_every_scale(name, K):
    """Subnormal ones too, and where a row ends within a byte with something behind it.

    In bf16 only of what is normal there: the interpreter (3.6 to 3.9) makes zeros of bf16's subnormals.
    """
    weight, expected = every_e2m1(name, K)
    for dtype in (F32, BF16, F16):
        made, decoded = launch.decode(weight, dtype)
        decoded.data.fill_(float("nan"))
        made.run()
        right = (decoded.data == expected.to(dtype)) & (decoded.data.signbit() == expected.signbit())
        assert (right | (expected.abs() < torch.finfo(BF16).tiny) if dtype == BF16 else right).all()
    for backward in (False, True):
        out = torch.full((16, 128), float("nan"))
        loaded = quantised(weight, backward)
        one_tile[(1,)](
            **loaded, OUT=out, n0=0, k0=384, N=len(expected), K=K, BACKWARD=backward, BLOCK_N=16, BLOCK_K=128
        )  # fmt: skip
        assert torch.equal(out[: len(expected), : K - 384], expected[:, 384:]) and (out[:, K - 384 :] == 0).all()


@pytest.mark.parametrize(
    ("schedule", "decoded"),
    [(RECOMPUTE, False), (SHARED, False), (SPLIT, False), (SPLIT, True), (LIBRARY, False)],
    ids=["recompute", "shared", "split", "split, decoded once", "library"],
)
@pytest.mark.parametrize(
    ("name", "options", "K"),
    [(*PACKED[i], K) for i, K in ((1, 80), (3, 80), (4, 80), (4, 65), (9, 80), (10, 65), (13, 80))],
    ids=str,
)
def test_products_are_those_of_the_materialised_weight(name, options, K, schedule, decoded):
    """y, dx and the gradients, bit for bit, by every schedule: the loader gives both orientations the same tile."""
    case = Case(20, K, 40, 8, BF16, F32, 0.2, bias=True)
    t = make(case)
    t.weight = FrozenWeight.quantize(t.weight, name, **options)
    tile = TileConfig(32, 32, 64, 8, 1, resident=int(schedule == SHARED))
    with select.forced(Choice(schedule, tile, decoded)):
        packed = run(case, t, "triton")
    t.weight = t.weight.materialize(BF16)
    with select.forced(Choice(schedule, tile)):
        dense = run(case, t, "triton")
    for found in ("y", "x", "lora_A", "lora_B", "bias"):
        assert torch.equal(packed[found], dense[found]), found
