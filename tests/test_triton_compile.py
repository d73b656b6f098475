"""What the Triton kernels compile to for chips that are not here, and that every problem has a legal tile on them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
from binaries import inspect_kernels
from binaries.inspect_kernels import TARGETS, Row, Variant
from conftest import ROOT

from peftkern.__main__ import main
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.arch import ARCHES, nvidia
from peftkern.backends.triton.tiles import Choice, Pass, TileConfig
from peftkern.call import Problem
from peftkern.testing import problems

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Name = tuple[str, str, str]  # target, variant, tile

AGAIN = "python -m peftkern kernels --json > tests/binaries/triton-VERSION.json, by each of the versions recorded"


@functools.cache
def recorded() -> tuple[str, dict[Name, Row]]:
    """The version of Triton, of those with a record the one that is here or the pinned one, and the record's rows."""
    here = triton.__version__.split("+")[0]
    version = here if here in inspect_kernels.RECORDED else inspect_kernels.PINNED
    return version, record(version)[1]


@functools.cache
def record(version: str) -> tuple[str, dict[Name, Row]]:
    """The digest of the pinned keys that a version's record was made beside, and its rows."""
    content = json.loads(inspect_kernels.record_of(version).read_text())
    assert content["triton"] == version
    assert content["columns"] == [field.name for field in dataclasses.fields(Row)], AGAIN
    rows = [Row(*row) for row in content["rows"]]
    return content["beside"], {(row.target, row.variant, row.tile): row for row in rows}


@functools.cache
def canaries() -> set[Name]:
    """As few binaries as show every target, body, dtype, format and matrix instruction of the record."""

    def shows(row: Row) -> set:
        return {row.target, row.mma, row.tma, *row.variant.replace("grad with t", "grad-with-t").split()[:4]}

    _, rows = recorded()
    missing, found = set().union(*map(shows, rows.values())), set()
    while missing:
        name = max(rows, key=lambda name: len(missing & shows(rows[name])))
        found.add(name)
        missing -= shows(rows[name])
    return found


def variants(target: str) -> list[Variant]:
    return list(dict.fromkeys(inspect_kernels.variants(ARCHES[target])))


def check_binaries(target: str, every: bool) -> None:
    """Each may be shipped and, under the record's Triton, is what the record says: registers to within a few.

    Compiled are the canaries, what is made from something else than the record's, and by another Triton all.
    """
    version, rows = recorded()
    same_triton = triton.__version__.split("+")[0] == version
    faults, stale = [], []
    for variant in variants(target):
        tile, key = inspect_kernels.key(variant, target)
        name = (target, str(variant), tile)
        row = expected = rows.get(name) if same_triton else None
        if expected is None or expected.key != key or every or name in canaries():
            row = inspect_kernels.inspect(variant, target)
        reason = inspect_kernels.failure(row, variant)
        if reason is not None:
            faults.append(f"{name}: {reason}")
        if same_triton and (expected is None or expected.key != key):
            stale.append(name)
        if expected is not None:
            close = abs(row.registers - expected.registers) <= 8
            if not close or dataclasses.replace(row, registers=expected.registers, key=expected.key) != expected:
                faults.append(f"{row}, where the record has {expected}")
    assert not faults, "\n".join(faults)
    assert not stale, f"{len(stale)} binaries may be shipped, but are not those of the record: {AGAIN}"


@pytest.mark.compile_lane
@pytest.mark.parametrize("target", TARGETS)
def test_the_canaries_and_what_this_tree_changed(target: str):
    check_binaries(target, every=False)


@pytest.mark.compile_lane
@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_binary(target: str):
    check_binaries(target, every=True)


def test_an_edit_is_compiled_and_compared_and_a_stale_record_is_seen(monkeypatch):
    """A tree in which one binary is made from something else than the record's."""
    (variant,) = [v for v in variants("sm_90") if str(v).startswith("kept fp32")]
    name = ("sm_90", str(variant), inspect_kernels.key(variant, "sm_90")[0])
    version, rows = recorded()
    compiled = []

    def inspect(variant: Variant, target: str) -> Row:
        compiled.append(variant)
        return rows[target, str(variant), inspect_kernels.key(variant, target)[0]]

    monkeypatch.setitem(globals(), "variants", lambda target: [variant])
    monkeypatch.setitem(globals(), "canaries", lambda: set())
    monkeypatch.setattr(inspect_kernels, "inspect", inspect)
    monkeypatch.setattr(triton, "__version__", version)
    check_binaries("sm_90", every=False)
    assert compiled == []
    check_binaries("sm_90", every=True)
    assert compiled == [variant]
    edited = dataclasses.replace(rows[name], key="of another text")
    monkeypatch.setitem(globals(), "recorded", lambda: (version, {name: edited}))
    with pytest.raises(AssertionError, match="1 binaries may be shipped, but are not those of the record"):
        check_binaries("sm_90", every=False)
    monkeypatch.setitem(globals(), "recorded", lambda: (version, {name: dataclasses.replace(edited, tma=True)}))
    with pytest.raises(AssertionError, match="where the record has"):
        check_binaries("sm_90", every=False)
    monkeypatch.setitem(globals(), "recorded", lambda: (version, {}))
    with pytest.raises(AssertionError, match="are not those of the record"):
        check_binaries("sm_90", every=False)
    monkeypatch.setitem(globals(), "recorded", lambda: ("2.0.0", {name: edited}))
    check_binaries("sm_90", every=False)
    assert compiled == 5 * [variant]


@pytest.mark.parametrize("version", inspect_kernels.RECORDED)
def test_the_records_hold_every_variant_and_nothing_else(version: str):
    """Those of other Tritons, which are not here, were made of the same tree."""
    beside, rows = record(version)
    pinned = [row.key for row in record(inspect_kernels.PINNED)[1].values()]
    assert beside == inspect_kernels.digest(pinned), AGAIN
    targets = inspect_kernels.RECORDED[version]
    named = {(target, str(v), inspect_kernels.key(v, target)[0]): v for target in targets for v in variants(target)}
    assert rows.keys() == named.keys()
    assert [row for name, row in rows.items() if inspect_kernels.failure(row, named[name])] == []
    assert len({row.key for row in rows.values()}) == len({(row.target, row.key) for row in rows.values()})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"stack": 8}, "stack"),
        ({"traps": True}, "trap"),
        ({"shared_memory": 240_000}, "shared memory"),
        ({"mma": "mma.sync"}, "wgmma"),
        ({"mma": "none"}, "matrix"),
        ({"tma": False}, "bulk"),
        ({"serialised": True}, "in flight"),
    ],
)
def test_what_may_not_be_shipped(changed: dict, reason: str):
    tile = TileConfig(128, 256, 64, 8, 3, SUBTILES=4, tma=True)
    variant = Variant("split", tile=tile)
    row = Row("sm_90", str(variant), str(tile), 200, 0, 0, 160_000, 227 * 1024, "wgmma", True, False, False, "")
    assert inspect_kernels.failure(row, variant) is None
    assert reason in inspect_kernels.failure(dataclasses.replace(row, **changed), variant)
    twice = dataclasses.replace(variant, tile=dataclasses.replace(tile, resident=2))
    assert "do not fit" in inspect_kernels.failure(row, twice)


def test_kernels_command(monkeypatch, capsys):
    monkeypatch.setattr(inspect_kernels, "variants", lambda arch: iter([Variant("shrink")]))
    assert main(["kernels", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    found = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    assert [row["target"] for row in found] == list(TARGETS)
    assert all(row["registers"] > 0 and row["shared_memory"] > 0 and len(row["key"]) == 16 for row in found)
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("target") and "gfx942" in lines[4]
    monkeypatch.setattr(inspect_kernels, "failure", lambda row, variant: "it is Friday")
    assert main(["kernels"]) == 2
    assert capsys.readouterr().err.count("it is Friday") == 4


def test_kernels_command_is_a_source_checkouts(monkeypatch, capsys, tmp_path):
    program = "from peftkern import __main__; print(__main__._inspector().__file__)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == inspect_kernels.__file__ == str(ROOT / "tests" / "binaries" / "inspect_kernels.py")
    monkeypatch.setattr("peftkern.__main__.__file__", str(tmp_path / "peftkern" / "__main__.py"))  # as installed
    assert main(["kernels"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "needs a source checkout" in output.err


@pytest.mark.parametrize("arch", ARCHES)
def test_every_problem_has_a_schedule_and_a_tile(arch: str):
    """Automatic choice never fails, and neither a forced split nor a forced library does."""
    features = itertools.product((BF16, F16, F32), (False, True), ("base", "fp32"), ("dense", "int8"), (False, True))
    for dtype, dropout, precision, weight_format, backward in features:
        for M, R in itertools.product((1, 64, 8192), problems.RANKS):
            problem = Problem("cuda", M, 4096, 1024, R, dtype, F32, weight_format, dropout, precision=precision)
            launch = Pass(problem, backward)
            for schedule in ("auto", "split", "library"):
                choice = select._choose(launch, ARCHES[arch], schedule)
                assert tiles.supports(launch, choice, ARCHES[arch]) is None
                assert schedule in ("auto", choice.schedule)


TRAINING = Problem("cuda", 8192, 4096, 4096, 16, BF16, BF16)


@pytest.mark.parametrize(
    ("schedule", "tile", "reason"),
    [
        ("split", TileConfig(96, 64, 32, 4, 2), "powers of two"),
        ("split", TileConfig(8, 64, 32, 4, 2), "at least 16"),
        ("split", TileConfig(64, 64, 32, 4, 2, SUBTILES=8), "at least 16"),
        ("split", TileConfig(256, 256, 64, 8, 2), "spill"),
        ("split", TileConfig(64, 96, 64, 4, 2, SUBTILES=3), "powers of two"),
        ("split", TileConfig(64, 64, 64, 3, 2), "powers of two"),
        ("split", TileConfig(64, 64, 64, 4, 2, GROUP_M=0), "GROUP_M=0"),
        ("one_pass/recompute", TileConfig(32, 64, 64, 4, 2, SUBTILES=2, SLICES=2), "whole tiles"),
        ("split", TileConfig(128, 128, 128, 8, 8, tma=True), "shared memory"),
        ("split", TileConfig(16, 64, 64, 4, 5, SLICES=2), "does not slice"),
        ("one_pass/recompute", TileConfig(16, 64, 64, 4, 5, SLICES=128), "fewer than 128 steps"),
        ("one_pass/shared", TileConfig(128, 256, 64, 8, 3), "persistent"),
        ("fastest", TileConfig(128, 128, 64, 8, 3), "no schedule"),
    ],
)
def test_illegal_choices(schedule: str, tile: TileConfig, reason: str):
    assert reason in tiles.supports(Pass(TRAINING, False), Choice(schedule, tile), ARCHES["sm_90"])
    legal = Choice("one_pass/shared", TileConfig(128, 256, 64, 8, 3, SUBTILES=4, resident=1, tma=True))
    assert tiles.supports(Pass(TRAINING, False), legal, ARCHES["sm_90"]) is None


def test_what_programs_cannot_do_together():
    shared = Choice("one_pass/shared", TileConfig(64, 64, 64, 4, 3, resident=1))

    def reason(arch: str = "sm_90", **changed) -> str:
        problem = dataclasses.replace(TRAINING, **changed)
        return tiles.supports(Pass(problem, False), shared, ARCHES[arch]) or ""

    assert reason() == ""
    assert "gfx942's binaries" in reason("gfx942")
    assert "nothing to share" in reason(N=64)
    blocks = tiles.COUNTERS - 2  # beside the tickets and the retired programs
    assert reason(M=64 * blocks) == "" and "counters" in reason(M=64 * blocks + 1)
    assert "R=65" in reason(R=65)


def test_large_ranks_are_not_one_pass():
    arch = ARCHES["sm_90"]

    def one_pass(M: int, N: int, R: int, dropout: bool = False) -> bool:
        return select.choose(Pass(Problem("cuda", M, 4096, N, R, BF16, BF16, "dense", dropout), False), arch).one_pass

    assert one_pass(1, 4096, 16) and one_pass(16, 4096, 16, dropout=True)
    assert not one_pass(8192, 4096, 128)


def test_an_unknown_chip_is_its_nearest_relative():
    """Little shared memory leaves smaller tiles; none at all leaves a reason for every schedule."""
    ada = nvidia((8, 9), 128, 99 * 1024)
    hopper, blackwell, turing = (nvidia(c, 64, 64 * 1024) for c in ((9, 0), (12, 0), (7, 5)))
    assert (ada.name, hopper.name, blackwell.name, turing.name) == ("sm_80", "sm_90", "sm_80", "sm_80")
    assert not blackwell.tma and hopper.tma
    for arch in (ada, hopper, blackwell):
        choice = select.choose(Pass(TRAINING, False), arch)
        assert tiles.shared_memory(Pass(TRAINING, False), choice) <= arch.shared_memory
    tiny = dataclasses.replace(ada, shared_memory=1024)
    with pytest.raises(RuntimeError, match="shared memory"):
        select.choose(Pass(TRAINING, False), tiny)
    assert set(tiles.refusals(Pass(TRAINING, False), tiny)) == set(tiles.SCHEDULES)


@pytest.mark.parametrize(("K", "N"), [(28672, 8192), (14336, 4096), (64, 64)])
def test_batch_invariant_choices(K: int, N: int, dispatch_env):
    """Neither the vendor's product nor what counts row blocks; one choice for every number of rows."""
    dispatch_env(PEFTKERN_BATCH_INVARIANT="1")
    for arch, backward in itertools.product(("sm_80", "sm_90", "gfx942"), (False, True)):
        found = set()
        for M in (1, 16, 512, 2**23):
            launch = select.pass_of(Problem("cuda", M, K, N, 16, BF16, BF16, "dense", True), backward)
            found.add((select.choose(launch, ARCHES[arch]), tiles.shrink_tile(launch, ARCHES[arch])))
        ((choice, shrink),) = found
        assert choice.schedule in ("one_pass/recompute", "split")
        assert choice.tile.SLICES == shrink.SLICES == 1


@pytest.mark.parametrize(
    ("dtype", "allowed", "precision"), [(F32, False, "ieee"), (F32, True, "tf32"), (BF16, True, "ieee")]
)
def test_tf32_is_torchs_switch(dtype: torch.dtype, allowed: bool, precision: str):
    from peftkern.backends.triton.launch.operands import numerics
    from peftkern.call import Pair
    from peftkern.weights import DenseWeight

    operands = Pair(
        DenseWeight(torch.empty(8, 8)), torch.empty(2, 8), torch.empty(8, 2), None, None, 1.0, None, 0.0, None, "base"
    )
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert numerics(operands, dtype)["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
