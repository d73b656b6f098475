"""What the Triton kernels compile to for chips that are not here, and that every problem has a legal tile on them."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch

from peftkern.__main__ import main
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.tiles import ARCHES, Pass, TileConfig
from peftkern.ops.problem import Problem
from peftkern.testing import problems

pytest.importorskip("triton")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MMA = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def _cells() -> list:
    """Every variant for sm_90 and gfx942; for the two targets whose assembler is slow, every other one."""
    from peftkern.backends.triton import inspect_kernels

    if os.environ.get("TRITON_INTERPRET") == "1":
        return []
    cells = []
    for target in inspect_kernels.TARGETS:
        for i, variant in enumerate(inspect_kernels.variants(ARCHES[target])):
            if target not in ("sm_80", "sm_100") or i % 2 == (target == "sm_80"):
                cells.append(pytest.param(variant, target, id=f"{target} {variant}"))
    return cells


@pytest.mark.parametrize(("variant", "target"), _cells())
@pytest.mark.compile_lane
def test_binary(variant, target: str):
    from peftkern.backends.triton import inspect_kernels

    row = inspect_kernels.inspect(variant, target)
    assert row.shared_memory <= row.shared_memory_limit, row
    assert (row.stack, row.spills) == (0, 0), row
    block_m = 0 if variant.body in ("shrink", "grad") else int(row.tile.split("x")[0])
    if block_m >= 64 and variant.dtype != F32:
        assert row.mma == MMA[target], row
    elif variant.dtype != F32:
        assert row.mma != "none", row


def test_kernels_command(monkeypatch, capsys):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter does not compile")
    from peftkern.backends.triton import inspect_kernels

    monkeypatch.setattr(inspect_kernels, "variants", lambda arch: iter([inspect_kernels.Variant("shrink")]))
    assert main(["kernels", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["target"] for row in found] == list(inspect_kernels.TARGETS)
    assert all(row["registers"] > 0 and row["shared_memory"] > 0 for row in found)
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("target") and "gfx942" in lines[4]


@pytest.mark.parametrize("arch", ARCHES)
def test_every_problem_has_a_schedule_and_a_tile(arch: str):
    """Automatic choice never fails, and a forced split never does."""
    features = itertools.product((BF16, F16, F32), (False, True), ("base", "fp32"), ("dense", "int8"), (False, True))
    for dtype, dropout, precision, weight_format, backward in features:
        for M, R in itertools.product((1, 64, 8192), problems.RANKS):
            problem = Problem("cuda", M, 4096, 1024, R, dtype, F32, weight_format, dropout, precision=precision)
            for schedule in ("auto", "split"):
                choice = select.best(problem, ARCHES[arch], backward, schedule)
                launch = Pass(problem, backward, choice.one_pass)
                assert tiles.supports(launch, choice.tile, ARCHES[arch]) is None


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (TileConfig(96, 64, 32, 4, 2), "powers of two"),
        (TileConfig(8, 64, 32, 4, 2), "at least 16"),
        (TileConfig(256, 256, 64, 8, 2), "registers"),
        (TileConfig(128, 128, 128, 8, 8), "shared memory"),
    ],
)
def test_illegal_tiles(tile: TileConfig, reason: str):
    problem = Problem("cuda", 8192, 4096, 4096, 16, BF16, BF16)
    assert reason in tiles.supports(Pass(problem, False, True), tile, ARCHES["sm_90"])
    assert tiles.supports(Pass(problem, False, True), TileConfig(128, 128, 64, 8, 3), ARCHES["sm_90"]) is None


def test_large_ranks_and_many_columns_are_split():
    arch = ARCHES["sm_90"]

    def one_pass(M: int, N: int, R: int, dropout: bool = False) -> bool:
        return select.choose(Problem("cuda", M, 4096, N, R, BF16, BF16, "dense", dropout), arch, False).one_pass

    assert one_pass(1, 4096, 16) and one_pass(16, 4096, 16, dropout=True)
    assert not one_pass(8192, 4096, 128)
    assert not one_pass(8192, 14336, 64, dropout=True)
