"""Binaries of packed weights' loaders for GPUs that are not here, and when they are decoded once."""

import dataclasses
import itertools
import re

import pytest
import torch
from pairwise import covering

pytest.importorskip("triton")

from peftkern.backends.triton import select, shipped, tiles
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import Choice, Pass, TileConfig
from peftkern.call import Problem
from peftkern.weights import formats

BF16, F32 = torch.bfloat16, torch.float32
PACKED = [name for name in formats() if name != "dense"]


@pytest.mark.compile_lane
@pytest.mark.parametrize("backward", [False, True], ids=["y", "dx"])
def test_nf4_128x128x64_on_hopper_has_at_most_90_kb_of_shared_memory(backward):
    """In three stages, every operand by pointers; as it is shipped, the bulk copies' barriers come on top."""
    from binaries.inspect_kernels import Variant, failure, inspect

    usual = Variant("split", adapter_dtype=F32, weight_format="nf4", dropout=True, backward=backward)
    shipped = TileConfig(128, 128, 64, 8, 3, SUBTILES=2, tma=True)
    assert shipped in {c.tile for c in tiles.choices(usual.launch, ARCHES["sm_90"]) if not c.decoded}
    for tile, barriers in ((dataclasses.replace(shipped, tma=False), 0), (shipped, 3 * 8)):
        variant = dataclasses.replace(usual, tile=tile)
        row = inspect(variant, "sm_90")
        assert row.shared_memory <= 90 * 1024 + barriers and failure(row, variant) is None, row


@pytest.mark.compile_lane
@pytest.mark.parametrize("name", ["nf4", "int4", "mxfp4", "nvfp4", "fp8"])
@pytest.mark.parametrize("backward", [False, True], ids=["y", "dx"])
def test_packed_bytes_are_copied_while_a_tile_before_is_decoded(name, backward):
    """A mask that the compiler cannot see through makes them loads of one byte each, waited for in every step."""
    from binaries import inspect_kernels

    tile = TileConfig(16, 64, 64, 8, 3)
    variant = inspect_kernels.Variant("split", weight_format=name, backward=backward, M=16, tile=tile)
    made, _ = inspect_kernels._launch(variant, ARCHES["sm_90"])
    text = inspect_kernels._compile(made, inspect_kernels.TARGETS["sm_90"]).asm["ttgir"]
    tile_of_bytes = r"tensor<64x(32|64)x!tt.ptr<i8>"
    assert re.search(rf"async_copy_global_to_local .*{tile_of_bytes}", text)
    assert not re.search(rf"tt.load .*{tile_of_bytes}", text)


@pytest.mark.compile_lane
@pytest.mark.parametrize("BLOCK_M", [16, 32])
def test_warps_of_few_rows_share_the_columns(BLOCK_M):
    """Both of recompute's products: with the rows shared out, every warp but the first would repeat the whole tile."""
    from binaries import inspect_kernels

    tile = TileConfig(BLOCK_M, 64, 64, 8, 3)
    variant = inspect_kernels.Variant("one_pass/recompute", weight_format="nf4", M=BLOCK_M, tile=tile)
    made, _ = inspect_kernels._launch(variant, ARCHES["sm_90"])
    text = inspect_kernels._compile(made, inspect_kernels.TARGETS["sm_90"]).asm["ttgir"]
    warps = re.findall(r"nvidia_mma<.*warpsPerCTA = \[(\d+), (\d+)\]", text)
    assert warps and all(16 * int(rows) <= BLOCK_M for rows, _ in warps), warps


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_many_rows_decode_once(name, arch):
    """In the tile W is decoded by every row of tiles anew; how many rows that pays for is the estimate's to say."""
    for backward in (False, True):
        few = Pass(Problem("cuda", 16, 4096, 4096, 16, BF16, F32, name), backward)

        def decoded(M: int, few: Pass = few, backward: bool = backward) -> bool:
            launch = Pass(dataclasses.replace(few.problem, M=M), backward)
            choice = select.choose(launch, ARCHES[arch])
            assert tiles.supports(launch, choice, ARCHES[arch]) is None
            return tiles.decodes(name, choice)

        assert decoded(8192)
        found = [decoded(M) for M in (16, 64, 256, 1024, 4096)]
        assert found == sorted(found)
        if name in shipped.PACKED and arch not in shipped.SHIPPED["packed"]:
            assert all(found) and f"on {arch}" in tiles.packed_refusal(few.problem, ARCHES[arch])
        else:
            assert not found[0]


def test_what_cannot_be_decoded():
    problem = Problem("cuda", 64, 4096, 4096, 16, BF16, F32, "dense")
    tile = TileConfig(64, 64, 64, 4, 3)
    assert "no decoding" in tiles.supports(Pass(problem, False), Choice("split", tile, True), ARCHES["sm_90"])
    nf4 = Pass(dataclasses.replace(problem, weight_format="nf4"), False)
    assert tiles.supports(nf4, Choice("split", tile, True), ARCHES["sm_90"]) is None
    assert "no decoding" in tiles.supports(nf4, Choice("library", tile, True), ARCHES["sm_90"])
    for K in (4097, 4104):
        ragged = Pass(dataclasses.replace(nf4.problem, K=K), False)
        assert "begin within" in tiles.supports(ragged, Choice("split", tile), ARCHES["sm_90"])
        assert tiles.supports(ragged, Choice("split", tile), ARCHES["interpreter"]) is None
        assert tiles.decodes("nf4", select.choose(ragged, ARCHES["sm_90"]))


@pytest.mark.parametrize("name", shipped.PACKED)
def test_every_tile_of_a_packed_format_is_among_the_choices(name):
    """By one schedule at least; fp32 rows have tiles of their own."""
    for arch, dtype, backward in itertools.product(shipped.SHIPPED["packed"], (BF16, F32), (False, True)):
        problem = Problem("cuda", 8192, 4096, 4096, 16, dtype, F32, name)
        found = [c for c in tiles.choices(Pass(problem, backward), ARCHES[arch]) if not tiles.decodes(name, c)]
        shapes = {(t.BLOCK_M, t.BLOCK_P, t.BLOCK_Q, t.num_warps, t.num_stages) for t in (c.tile for c in found)}
        assert shapes == set(shipped.shapes(problem, ARCHES[arch]))


@pytest.mark.compile_lane
@pytest.mark.parametrize(
    ("target", "backward", "scaling"), covering(["sm_90", "sm_100"], [False, True], ["tensor", "row", "block"])
)
def test_base_compute_fp8_multiplies_e4m3(target, backward, scaling):
    """By the tile that 4096 rows get: FP8 matrix instructions, whatever the weight's scales share."""
    instruction = {"sm_90": "wgmma fp8", "sm_100": "tcgen05 fp8"}[target]
    from binaries.inspect_kernels import Variant, failure, inspect

    options = (("scaling", scaling),)
    chosen = Variant("split", weight_format="fp8xfp8", backward=backward, M=4096, options=options)
    choice = select.choose(chosen.launch, ARCHES[target])
    variant = dataclasses.replace(chosen, tile=choice.tile)
    row = inspect(variant, target)
    assert choice.schedule == "split" and row.mma == instruction and failure(row, variant) is None
    assert "expected" in failure(dataclasses.replace(row, mma=instruction.split()[0]), variant)


def test_base_compute_fp8_has_a_tile_where_there_are_fp8_tensor_cores_and_a_reason_elsewhere():
    def problem(dtype: torch.dtype, M: int, R: int = 16, scaled_steps: bool = False) -> Problem:
        return Problem("cuda", M, 4000, 1000, R, dtype, F32, "fp8xfp8", True, scaled_steps=scaled_steps)

    for arch, M, R, scaled_steps, backward in itertools.product(
        ("sm_90", "sm_100", "interpreter"), (1, 17, 64, 8192), (1, 16, 512), (False, True), (False, True)
    ):
        launch = Pass(problem(torch.float16, M, R, scaled_steps), backward)
        choice = select.choose(launch, ARCHES[arch])
        assert choice.schedule == "split" and tiles.supports(launch, choice, ARCHES[arch]) is None
        assert set(tiles.refusals(launch, ARCHES[arch])) == {"one_pass/recompute", "one_pass/shared", "library"}
        long_step = Choice("split", dataclasses.replace(choice.tile, BLOCK_Q=256))
        assert "a step of 256" in tiles.supports(launch, long_step, ARCHES[arch])
    for arch in ("sm_80", "gfx942"):
        assert f"on {arch}" in tiles.codes_refusal(problem(BF16, 64), 0, ARCHES[arch])
    assert "float32 rows" in tiles.codes_refusal(problem(F32, 64), 0, ARCHES["sm_90"])
    assert tiles.codes_refusal(problem(BF16, 64), 0, ARCHES["sm_90"]) is None
