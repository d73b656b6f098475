"""Packed weights in Triton's interpreter: every loader, both orientations, decoded once or in the tile."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import Case, make, run

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from peftkern.backends.triton import launch, select
from peftkern.backends.triton.tiles import Choice, TileConfig
from peftkern.ops.problem import LoRAOperands
from peftkern.weights import FrozenWeight

pytestmark = pytest.mark.interpreter

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PACKED = [
    ("int8", {}), ("int8", {"group_size": 16}), ("int4", {}), ("int4", {"group_size": 16}),
    ("nf4", {}), ("nf4", {"double_quant": False}), ("nf4", {"blocksize": 32}), ("nf4", {"blocksize": 4096}),
    ("fp4", {}),
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
    A, B = torch.zeros(2, shape[1]), torch.zeros(shape[0], 2)
    operands = LoRAOperands(weight, A, B, None, None, 1.0, None, 0.0, None, "base")
    for dtype in (F32, BF16, F16):
        made, decoded = launch.decode(operands, dtype)
        decoded.weight.data.fill_(float("nan"))
        made.run()
        assert torch.equal(decoded.weight.data, weight.materialize(dtype))
        assert set(map(id, made.reads)) == set(map(id, weight.tensors))


def test_every_byte_of_fp8():
    """Subnormals, both zeros and both NaNs."""
    weight = FrozenWeight.quantize(torch.ones(16, 16), "fp8")
    weight.data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    operands = LoRAOperands(weight, torch.zeros(2, 16), torch.zeros(16, 2), None, None, 1.0, None, 0.0, None, "base")
    made, decoded = launch.decode(operands, F32)
    made.run()
    assert torch.equal(decoded.weight.data.nan_to_num(7e9), weight.materialize(F32).nan_to_num(7e9))


@pytest.mark.parametrize("decoded", [False, True], ids=["in the tile", "once"])
@pytest.mark.parametrize("schedule", ["one_pass/recompute", "one_pass/shared", "split", "library"])
@pytest.mark.parametrize(("name", "options"), [PACKED[i] for i in (1, 3, 4, 11)], ids=str)
def test_products_are_those_of_the_materialised_weight(name, options, schedule, decoded):
    """y, dx and the gradients, bit for bit, by every schedule: the loader gives both orientations the same tile."""
    if schedule == "library" and decoded:
        pytest.skip("library always decodes once")
    for K, N in [(80, 70), (65, 90)][: 2 if name == "nf4" else 1]:
        case = Case(33, K, N, 8, BF16, F32, 0.2, bias=True)
        t = make(case)
        t.weight = FrozenWeight.quantize(t.weight, name, **options)
        tile = TileConfig(32, 32, 64, 8, 1, resident=int(schedule == "one_pass/shared"))
        with select.forced(Choice(schedule, tile, decoded)):
            packed = run(case, t, "triton")
        t.weight = t.weight.materialize(BF16)
        with select.forced(Choice(schedule, tile)):
            dense = run(case, t, "triton")
        for name_of in ("y", "x", "lora_A", "lora_B", "bias"):
            assert torch.equal(packed[name_of], dense[name_of]), name_of
