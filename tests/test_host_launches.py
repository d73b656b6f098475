"""What a call launches: Triton's own launcher over a stand-in for the driver's library, so no result is looked at.

``launched`` gives two lists of ``stand_in.Launch``, which are equal where the launches are the same: binary, grid,
stream, attributes, and every argument, with addresses as tensors and offsets.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Case, leaves_of, make
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the process has loaded the driver of a real GPU", allow_module_level=True)

import stand_in
import triton
from stand_in import Descriptor, Gpu, Launch, Pointer

import peftkern
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.tiles import LIBRARY, RECOMPUTE, SHARED, SPLIT, Choice, Pass
from peftkern.call import Problem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = 24, 128, 192  # M, K, N


@dataclasses.dataclass(frozen=True)
class Call:
    """A case, by which schedule it runs, and how many elements x begins behind a multiple of 64 bytes."""

    case: Case
    schedule: str
    shift: int = 0

    def __str__(self) -> str:
        return f"{self.schedule}-{self.case}" + (f"-shift{self.shift}" if self.shift else "")

    def choice(self, backward: bool, arch: Arch) -> Choice:
        """The smallest tile of the schedule, with descriptors where it may have them beside dependent launches."""
        c = self.case
        problem = Problem("cpu", c.M, c.K, c.N, c.R, c.dtype, c.adapter_dtype or c.dtype, "dense", c.p > 0, c.bias,
                          c.lora_bias, c.precision)  # fmt: skip
        legal = tiles.choices(Pass(problem, backward), arch)
        return min(
            (choice for choice in legal if choice.schedule == self.schedule),
            key=lambda one: (self.schedule == SPLIT and not one.tile.tma, one.tile.BLOCK_M * one.tile.BLOCK_P,
                             str(one.tile)),
        )  # fmt: skip


ONE_PASS = Call(Case(*SIZES, 16, BF16, F32, p=0.1, bias=True), RECOMPUTE)
TOGETHER = Call(Case(*SIZES, 8, BF16, lora_bias=True), SHARED)
TWO = Call(Case(*SIZES, 40, BF16, F32, p=0.1), SPLIT)
VENDOR = Call(Case(*SIZES, 16, F16, F32, bias=True, lora_bias=True), LIBRARY)
UNALIGNED = Call(Case(24, 128, 100, 1, F32), RECOMPUTE, shift=1)
CALLS = [ONE_PASS, TOGETHER, TWO, VENDOR, UNALIGNED]


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with stand_in.gpu("sm_90") as found:
        yield found


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same values, that many elements behind a multiple of 64 bytes."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    assert room.data_ptr() % 64 == 0
    return room[elements:].view(tensor.shape).copy_(tensor)


def launched(gpu: Gpu, call: Call, seed: int = 0) -> tuple[list[Launch], list[Launch]]:
    """What forward and backward launch, on fresh tensors."""
    case, t = call.case, make(call.case, seed=seed)
    t.x = shifted(t.x, call.shift)
    leaf = {name: tensor for name, tensor in leaves_of(t).items() if tensor is not None}
    with gpu.recording() as recorded:
        before = gpu.count
        with select.forced(call.choice(False, gpu.arch)):
            y = peftkern.lora_linear(
                leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], case.scaling, bias=leaf.get("bias"),
                lora_bias=leaf.get("lora_bias"), dropout_p=case.p, rng_state=t.rng_state, precision=case.precision,
            )  # fmt: skip
        forward = gpu.count - before
        with select.forced(call.choice(True, gpu.arch)):
            gradients = torch.autograd.grad(y, list(leaf.values()), t.dy)
    named = {f"d{name}": gradient for name, gradient in zip(leaf, gradients, strict=True)}
    named |= leaf | {"y": y, "dy": t.dy, "weight": t.weight, "rng_state": t.rng_state}
    found = recorded.launches(**named, **gpu.named_counters)
    return found[:forward], found[forward:]


def names(value: Any) -> set[str]:
    """The tensors that an argument points into."""
    if isinstance(value, Descriptor):
        return {value.base.name}
    if isinstance(value, tuple):
        return {name for one in value for name in names(one)}
    return {value.name} if isinstance(value, Pointer) else set()


def outline(launches: list[Launch]) -> list[tuple[str, tuple[int, ...]]]:
    return [(one.kernel, one.grid) for one in launches]


# Rows and columns of tiles, by hand, of M, K, N = 24, 128, 192 (or 100), which are whole numbers of columns of 64.
@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        (ONE_PASS, [("fused", (2 * 3, 1, 1))], [("fused", (2 * 2, 1, 1)), ("grad", (3, 1, 1)), ("reduce", (8, 1, 1))]),
        (TOGETHER, [("fused", (3, 1, 1))], [("fused", (2, 1, 1)), ("grad", (3, 1, 1)), ("reduce", (5, 1, 1))]),
        (
            TWO,
            [("shrink", (1, 1, 1)), ("fused", (3, 1, 1))],
            [("shrink", (1, 1, 1)), ("fused", (2, 1, 1)), ("grad", (3, 1, 1)), ("reduce", (20, 1, 1))],
        ),
        (
            VENDOR,
            [("shrink", (1, 1, 1)), ("fused", (6, 1, 1)), ("vendor", ())],
            [
                ("shrink", (1, 1, 1)), ("fused", (4, 1, 1)), ("vendor", ()), ("grad", (3, 1, 1)),
                ("reduce", (8, 1, 1)),
            ],
        ),
        (UNALIGNED, [("fused", (8, 1, 1))], [("fused", (8, 1, 1)), ("grad", (4, 1, 1)), ("reduce", (2, 1, 1))]),
    ],
    ids=map(str, CALLS),
)  # fmt: skip
def test_launches_and_their_grids(gpu: Gpu, call: Call, forward: list, backward: list):
    found = launched(gpu, call)
    assert [outline(one) for one in found] == [forward, backward]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_tensor_is_where_it_belongs(gpu: Gpu, call: Call):
    """Operands by name, results in what the caller gets, and s and t from the launch that makes them."""
    forward, backward = launched(gpu, call)
    case, has = call.case, {name for name in ("bias", "lora_bias") if getattr(call.case, name)}
    for launches, (left, out, first, second) in (
        (forward, ("x", "y", "lora_A", "lora_B")), (backward, ("dy", "dx", "lora_B", "lora_A"))
    ):  # fmt: skip
        fused = next(one for one in launches if one.kernel == "fused").arguments
        assert names(fused["X"]) == {left} and names(fused["Z"]) == {out}
        assert (names(fused["F"]), names(fused["G"])) == ({first}, {second})
        assert names(fused["W"]) == {"weight"}
        assert fused["M"] == case.M and fused["R"] == case.R
        made = next(one for one in launches if one.kernel in ("shrink", "fused")).arguments
        assert made["T"] == fused["T"]
    grad, reduce = (one.arguments for one in backward[-2:])
    assert (grad["X"], grad["DY"]) == (Pointer("x", 0), Pointer("dy", 0))
    assert grad["THIN_DY"] == forward[0].arguments["T"] and grad["THIN_X"] == backward[0].arguments["T"]
    assert (reduce["DA"], reduce["DB"]) == (Pointer("dlora_A", 0), Pointer("dlora_B", 0))
    assert names((reduce["BIAS"], reduce["LORA_BIAS"])) == {f"d{name}" for name in has}
    columns = next(one for one in forward if one.kernel == "fused").arguments["column_operands"]
    assert names(columns) == has
    for one in (*forward, *backward):
        assert (names(one.arguments.get("drop_operands", ())) == {"rng_state"}) == (
            one.arguments.get("DROP") == "philox"
        )
    assert reduce["scaling"] == pytest.approx(case.scaling) and one.stream == 0


def test_arguments_that_are_descriptors(gpu: Gpu):
    """x and y of a tile by descriptors, W too: their boxes, strides and types; and what is no matrix is none."""
    _, fused = launched(gpu, TWO)[0]
    M, K, N = SIZES
    bf16, swizzle = 9, 3  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B
    assert fused.arguments["X"] == Descriptor(
        Pointer("x", 0), bf16, (M, K), (2 * K,), (64, 64), swizzle, 0, (M, K, K, 1)
    )
    assert fused.arguments["W"] == Descriptor(
        Pointer("weight", 0), bf16, (N, K), (2 * K,), (64, 64), swizzle, 0, (N, K, K, 1)
    )
    assert fused.arguments["Z"].base == Pointer("y", 0) and fused.arguments["z_strides"] == ()
    assert sum(isinstance(value, Descriptor) for value in fused.arguments.values()) == 3


def test_a_dependent_launch_says_so(gpu: Gpu):
    attributes = [[one.attributes for one in launches] for launches in launched(gpu, TWO)]
    assert attributes == [[{}, {"dependent": 1}], [{}, {"dependent": 1}, {}, {}]]


def test_counters_are_one_tensor_a_stream(gpu: Gpu):
    found = {}
    try:
        for stream in (0, 7, 0):
            gpu.stream = stream
            forward, backward = launched(gpu, TOGETHER)
            assert {one.stream for one in (*forward, *backward)} == {stream}
            assert {names(one.arguments["counters"]).pop() for one in (forward[0], backward[0])} == {
                f"counters {stream}"
            }
            found.setdefault(stream, []).append(forward[0].binary)
    finally:
        gpu.stream = 0
    assert found[0] == 2 * found[7]


def test_a_repeated_call_launches_the_same(gpu: Gpu):
    """On tensors that lie elsewhere, between calls of other kinds."""
    kept, found = [], []
    for seed in range(3):
        kept.append(make(ONE_PASS.case))  # what is made next lies elsewhere
        found.append([launched(gpu, call, seed) for call in CALLS])
    assert found[0] == found[1] == found[2]
    assert all(one not in found[0][:i] for i, one in enumerate(found[0]))


def test_only_16_bytes_make_another_binary(gpu: Gpu):
    """x at 2, 4, 8 and 16 bytes of alignment: a descriptor and another kernel where it has 16."""
    found = {shift: launched(gpu, dataclasses.replace(TWO, shift=shift))[0] for shift in (0, 1, 2, 4, 8, 16)}
    fused = {shift: launches[-1] for shift, launches in found.items()}
    binaries = {shift: tuple(one.binary for one in launches) for shift, launches in found.items()}
    assert binaries[0] == binaries[8] == binaries[16] and binaries[1] == binaries[2] == binaries[4]
    assert all(mine != other for mine, other in zip(binaries[0], binaries[1], strict=True))
    for shift, one in fused.items():
        assert isinstance(one.arguments["X"], Descriptor) == (shift % 8 == 0)
        assert names(one.arguments["X"]) == {"x"}


def test_what_a_number_is_makes_another_binary(gpu: Gpu):
    """A row's length is known to be a multiple of 16 where it is; a number of rows is none of the binary's business."""

    def binaries(**changed: int) -> tuple[str, ...]:
        call = dataclasses.replace(ONE_PASS, case=dataclasses.replace(ONE_PASS.case, **changed))
        return tuple(one.binary for launches in launched(gpu, call) for one in launches)

    assert binaries(M=1) == binaries(M=15) == binaries(M=16) == binaries(M=17) == binaries()
    assert binaries(K=128) == binaries(K=144)
    assert binaries(K=136) == binaries(K=152) and binaries(K=136)[0] != binaries()[0]


def test_a_descriptor_that_a_driver_refuses(gpu: Gpu):
    """What its manual asks of the address, the rows' distance, the box and what a swizzle spans."""

    def encode(address: int = 256, shape: tuple = (128, 24), stride: int = 256, box: tuple = (64, 64)) -> int:
        words, halves = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
        return gpu.library.cuTensorMapEncodeTiled(
            ctypes.create_string_buffer(128), 9, 2, ctypes.c_void_p(address), words(*shape), words(stride),
            halves(*box), halves(1, 1), 0, 3, 2, 0,
        )  # fmt: skip

    assert encode() == encode(address=272) == encode(shape=(8, 1)) == encode(box=(8, 256)) == 0
    for wrong in (
        dict(address=264), dict(shape=(0, 24)), dict(shape=(2**33, 24)), dict(shape=(136, 24)), dict(stride=264),
        dict(stride=2**40), dict(box=(60, 64)), dict(box=(128, 64)), dict(box=(64, 512)), dict(box=(64, 0)),
    ):  # fmt: skip
        assert encode(**wrong) == 1, wrong  # CUDA_ERROR_INVALID_VALUE


def test_one_at_a_time(gpu: Gpu):
    with pytest.raises(RuntimeError, match="one at a time"), stand_in.gpu("sm_80"):
        pass
    assert gpu.arch.name == "sm_90" and len(launched(gpu, TWO)[0]) == 2


def test_all_is_as_before_afterwards():
    t = make(ONE_PASS.case)
    arguments = t.x, t.weight, t.lora_A, t.lora_B
    environment, active, expected = dict(os.environ), triton.runtime.driver._active, peftkern.lora_linear(*arguments)
    with stand_in.gpu() as found:
        before = found.count
        peftkern.lora_linear(*arguments)
        assert found.count == before + 1 and triton.runtime.driver.active is found
    assert dict(os.environ) == environment and triton.runtime.driver._active is active
    assert torch.equal(peftkern.lora_linear(*arguments), expected) and found.count == before + 1
    with pytest.raises(RuntimeError, match="no CUDA or ROCm device"):
        peftkern.lora_linear(*arguments, backend="triton")


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_chips(arch: str):
    """Neither descriptors nor dependent launches where there are none; the binaries are the chip's own."""
    with stand_in.gpu("sm_90") as gpu:
        hopper = launched(gpu, TWO)[0]
    with stand_in.gpu(arch) as gpu:
        found = launched(gpu, TWO)[0]
    assert [one.kernel for one in found] == [one.kernel for one in hopper] == ["shrink", "fused"]
    assert isinstance(found[1].arguments["X"], Descriptor) == ("dependent" in found[1].attributes) == (arch != "sm_80")
    assert not {one.binary for one in found} & {one.binary for one in hopper}
