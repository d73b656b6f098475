"""Binaries of packed weights' loaders for GPUs that are not here, and when they are decoded once."""

import dataclasses
import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from peftkern.backends.triton import codes, select, tiles
from peftkern.backends.triton.arch import ARCHES
from peftkern.backends.triton.tiles import Choice, Pass, TileConfig
from peftkern.ops.problem import Problem
from peftkern.weights import formats

BF16, F32 = torch.bfloat16, torch.float32
PACKED = [name for name in formats() if name != "dense"]


@pytest.mark.compile_lane
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("backward", [False, True], ids=["y", "dx"])
def test_nf4_128x128x64_on_hopper_has_at_most_90_kb_of_shared_memory(backward):
    from peftkern.backends.triton.inspect_kernels import Variant, inspect

    tile = TileConfig(128, 128, 64, 8, 3)
    row = inspect(Variant("split", weight_format="nf4", backward=backward, tile=tile), "sm_90")
    assert row.shared_memory <= 90 * 1024 and row.mma == "wgmma"
    assert (row.stack, row.spills) == (0, 0) and not row.traps


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_many_rows_decode_once(name, arch):
    """In the tile W is decoded by every row of tiles anew; how many rows that pays for is the estimate's to say."""
    for backward in (False, True):

        def decoded(M: int, backward: bool = backward) -> bool:
            launch = Pass(Problem("cuda", M, 4096, 4096, 16, BF16, F32, name), backward)
            choice = select.choose(launch, ARCHES[arch])
            assert tiles.supports(launch, choice, ARCHES[arch]) is None
            return tiles.decodes(name, choice)

        assert decoded(8192)
        found = [decoded(M) for M in (16, 64, 256, 1024, 4096)]
        assert found == sorted(found)
        if arch in ("sm_80", "sm_90"):  # elsewhere no tile that decodes is known not to spill, but int8's
            assert not found[0]


def test_what_cannot_be_decoded():
    problem = Problem("cuda", 64, 4096, 4096, 16, BF16, F32, "dense")
    tile = TileConfig(64, 64, 64, 4, 3)
    assert "no decoding" in tiles.supports(Pass(problem, False), Choice("split", tile, True), ARCHES["sm_90"])
    packed = Pass(dataclasses.replace(problem, weight_format="nf4"), False)
    assert tiles.supports(packed, Choice("split", tile, True), ARCHES["sm_90"]) is None
    assert "no decoding" in tiles.supports(packed, Choice("library", tile, True), ARCHES["sm_90"])


@pytest.mark.compile_lane
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
@pytest.mark.parametrize("backward", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize(("target", "instruction"), [("sm_90", "wgmma fp8"), ("sm_100", "tcgen05 fp8")])
def test_base_compute_fp8_multiplies_e4m3(target, instruction, backward, scaling):
    """By the tile that 4096 rows get: FP8 matrix instructions, whatever the weight's scales share."""
    from peftkern.backends.triton.inspect_kernels import Variant, failure, inspect

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
        assert f"on {arch}" in codes.refusal(problem(BF16, 64), 0, ARCHES[arch])
    assert "float32 rows" in codes.refusal(problem(F32, 64), 0, ARCHES["sm_90"])
    assert codes.refusal(problem(BF16, 64), 0, ARCHES["sm_90"]) is None
