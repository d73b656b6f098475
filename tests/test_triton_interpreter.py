"""The Triton kernels in the interpreter, on the CPU: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import NAMES, TRAINABLE, Case, Tensors, expect, leaves_of, make, run, run_truth
from pairwise import pairwise

import peftkern
from peftkern import _env
from peftkern.backends.triton import select, shipped
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.backend import TritonBackend
from peftkern.backends.triton.tiles import RECOMPUTE, SHARED, Choice, Pass, TileConfig
from peftkern.call import Pair, PairNeeds
from peftkern.ops import dispatch
from peftkern.testing import dropout_mask, problems
from peftkern.testing.numerics import assert_as_good_as, relative_error
from peftkern.weights import DenseWeight, FrozenWeight

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned"),
]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, F32)]  # of x and W; of the adapter
SCHEDULES = list(_env.SCHEDULES)
SMALL = TileConfig(64, 32, 64, 4, 1, GROUP_M=2)  # several tiles of everything, even where there is little


def choice(schedule: str, **changed) -> Choice:
    """A schedule on the small tile."""
    return Choice(schedule, replace(SMALL, **({"resident": 1} if schedule == SHARED else {}) | changed))


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> Iterator[str]:
    with select.forced(choice(request.param)):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Waking a second thread takes longer than these products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(case: Case, t: Tensors | None = None, **options) -> dict:
    """Run a case and hold y and every gradient to the error rule."""
    t = t or make(case)
    found, (peer, truth) = run(case, t, "triton", **options), expect(case, t, "triton", **options)
    for name in NAMES:
        like = t.dy if name == "y" else getattr(t, name)
        if like is None:
            assert found[name] is None
            continue
        assert (found[name].shape, found[name].dtype) == (like.shape, like.dtype), name
        assert_as_good_as(found[name], peer[name], truth[name], f"{name} of {case}")
    return found


WAYS = {name: choice(name) for name in SCHEDULES} | {
    "tma": choice(RECOMPUTE, tma=True),
    "tma in sub-tiles": choice(RECOMPUTE, tma=True, SUBTILES=2),
    "slices": choice(RECOMPUTE, SLICES=2, BLOCK_Q=16),
}
ROWS, SHAPES, RANKS = (70, 1, 17, 64), ((65, 40), (129, 97), (40, 130)), (7, 1, 16, 24, 33)
BIASES = ((True, True), (False, False), (True, False), (False, True))
FEATURES = (DTYPES, ("base", "fp32"), ("dense", "int8"), (0.3, 0.0))


def combinations() -> list:
    """Cases and ways: every two choices together; in the long lane dtypes x precision x format x dropout x way."""

    def cell(dtypes, precision, weight_format, p, way, M, shape, R, biases) -> tuple[Case, str]:
        return Case(M, *shape, R, *dtypes, p, *biases, precision, 1.75, weight_format), way

    few = [cell(*row) for row in pairwise(*FEATURES, list(WAYS), ROWS, SHAPES, RANKS, BIASES)]
    rest = zip(*map(itertools.cycle, (ROWS, SHAPES, RANKS, BIASES)), strict=True)  # goes round
    every = [cell(*row, *next(rest)) for row in itertools.product(*FEATURES, WAYS)]
    cells = {c: () for c in few} | {c: pytest.mark.long for c in every if c not in few}
    return [pytest.param(*c, marks=marks, id=f"{c[0]}-{c[1]}") for c, marks in cells.items()]


@pytest.mark.parametrize(("case", "way"), combinations())
def test_combinations(case: Case, way: str):
    """Several tiles along each dimension that the case has room for, with an edge."""
    with select.forced(WAYS[way]):
        check(case)


TILES = ({"tma": True, "SUBTILES": 2}, {"GROUP_M": 1, "resident": 2}, {"GROUP_M": 8})


@pytest.mark.parametrize(
    ("schedule", "tile", "K", "N"), [(*two, *shape) for *two, shape in pairwise(SCHEDULES, TILES, [(80, 72), (66, 40)])]
)
def test_tiles_of_every_schedule(schedule: str, tile: dict, K: int, N: int):
    """80 and 72 bf16 are 16-byte aligned, 66 are not: descriptors and pointers."""
    with select.forced(choice(schedule, **tile)):
        check(Case(70, K, N, 5, BF16, F32, 0.2, bias=True, lora_bias=True))


@pytest.mark.parametrize("R", problems.SMALL_RANKS)
def test_ranks(R: int):
    check(Case(17, 65, 33, R, BF16, F32, 0.1, bias=True, lora_bias=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_the_environment(name: str, dispatch_env):
    dispatch_env(PEFTKERN_SCHEDULE=name)
    case = Case(40, 65, 70, 7, BF16, F32, 0.1)
    check(case)
    t = make(case)
    text = str(peftkern.explain(t.x, t.weight, t.lora_A, t.lora_B, backend="triton"))
    assert f"schedule {name}" in text


@pytest.mark.parametrize("R", [65, 512])
def test_one_pass_refuses_large_ranks_when_it_is_forced(R: int, dispatch_env):
    dispatch_env(PEFTKERN_SCHEDULE="one_pass/recompute")
    case = Case(4, 16, 16, R, BF16)
    with pytest.raises(RuntimeError, match=f"PEFTKERN_SCHEDULE=one_pass/recompute cannot run this call: .*R={R}"):
        run(case, make(case), "triton")
    dispatch_env(PEFTKERN_SCHEDULE="auto")
    t = make(case)
    explanation = peftkern.explain(t.x, t.weight, t.lora_A, t.lora_B, backend="triton")
    assert f"R={R}" in explanation.refused["schedule one_pass/recompute"]


@pytest.mark.parametrize("p", [0.05, 1.0])
def test_dropout(p: float, schedule: str):
    check(Case(35, 100, 70, 5, BF16, F32, p))


def test_masks_are_those_of_the_definition():
    """With A = I and B = I, s is D(x) and dx - dy W is c D(t): both show the mask bit by bit."""
    M, K, p = 70, 129, 0.37
    x, dy, eye, state = torch.ones(M, K), torch.ones(M, K), torch.eye(K), torch.tensor([-(2**62) - 12345, 2**40 + 77])
    weight = DenseWeight(torch.zeros(K, K))
    operands = Pair(weight, eye, eye, None, None, 1.0, None, p, state, "base")
    backend = TritonBackend()
    _, s = backend.pair(operands, x)
    needs = PairNeeds(True, False, False, False, False)
    gradients = backend.pair_backward(operands, dy, None, None, None, needs)
    keep = dropout_mask(M, K, p, state)
    assert torch.equal(s != 0, keep)
    assert torch.equal(gradients.x != 0, keep)
    scale = 65536 / (65536 - round(65536 * p))
    assert torch.allclose(s[keep], torch.tensor(scale))


def _strided(t: Tensors, how: str) -> None:
    """Change strides, not values (all rows equal for "expanded")."""

    def change(tensor):
        rows, columns = tensor.shape
        if how == "transposed":
            return tensor.T.contiguous().T
        if how == "sliced":
            wide = tensor.new_full((rows, 2 * columns + 3), float("nan"))
            wide[:, 1 : 2 * columns + 1 : 2] = tensor
            return wide[:, 1 : 2 * columns + 1 : 2]
        if how == "misaligned":
            flat = torch.cat([tensor.new_full((1,), float("nan")), tensor.reshape(-1)])
            return flat[1:].view(rows, columns)
        return tensor[:1].expand(rows, columns)

    t.x, t.dy, t.weight = change(t.x), change(t.dy), change(t.weight)
    if how != "expanded":
        t.lora_A, t.lora_B = change(t.lora_A), change(t.lora_B)


@pytest.mark.parametrize("how", ["transposed", "sliced", "misaligned", "expanded"])
def test_strides(how: str, schedule: str):
    case = Case(35, 65, 33, 7, BF16, F32, 0.2, bias=True)
    t = make(case)
    _strided(t, how)
    check(case, t)


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.long), 0.25])
@pytest.mark.parametrize("size", range(1, 6))
def test_subsets_of_gradients(size: int, p: float):
    case = Case(19, 40, 24, 5, BF16, F32, p, bias=True, lora_bias=True)
    t = make(case)
    everything = check(case, t)
    for needs in itertools.combinations(TRAINABLE, size):
        found = run(case, t, "triton", needs)
        assert [name for name in TRAINABLE if found[name] is not None] == list(needs)
        for name in needs:
            # t comes from another body where dx is not wanted
            same = torch.equal(found[name], everything[name])
            assert same or (name == "lora_A" and relative_error(found[name], everything[name].double()) < 3e-3)


def test_backward_is_deterministic():
    case = Case(64, 129, 65, 7, BF16, F32, 0.1, bias=True, lora_bias=True)
    t = make(case)
    first, second = run(case, t, "triton"), run(case, t, "triton")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_scaling_as_a_tensor(dtype: torch.dtype, schedule: str):
    case = Case(19, 40, 36, 5, BF16, F32, 0.1, lora_bias=True, scaling=0.75)
    check(case, scaling=torch.tensor(0.75, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_int8_equals_its_dense_weight(dtype: torch.dtype):
    case = Case(33, 65, 72, 8, dtype, F32, 0.2, weight_format="int8")
    t = make(case)
    packed = run(case, t, "triton")
    t.weight = t.weight.materialize(dtype)
    dense = run(case, t, "triton")
    assert all(torch.equal(packed[name], dense[name]) for name in ("y", "x", "lora_A", "lora_B"))


@pytest.mark.parametrize(("size", "of_B"), [(1e-3, 1.0), (1.0, 1.0), (1e4, 1e-3)])
def test_fp16_does_not_overflow_or_underflow_in_t(size: float, of_B: float, schedule: str):
    """T reaches 1e5, beyond fp16, or 1e-6, deep in its denormals, while x, A, B, y and the gradients fit."""
    case = Case(17, 64, 40, 4, F16, F32, scaling=1.0 if size > 1 else size**-1.5)
    t = make(case)
    t.x = t.x * min(size, 10.0)
    t.lora_A, t.lora_B, t.weight = t.lora_A * size, t.lora_B * of_B, t.weight * 0
    found, truth = run(case, t, "triton"), run_truth(case, t)
    for name in ("y", "x", "lora_A", "lora_B"):
        assert relative_error(found[name], truth[name]) < 2e-3, name


def _with_nan(tensor: torch.Tensor, *index) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = float("nan")
    return changed


@pytest.mark.parametrize(("dtype", "precision"), [(F32, "base"), (BF16, "base"), (F16, "fp32"), (F16, "base")])
def test_where_a_nan_goes(dtype, precision, schedule: str):
    """A row of x to that row; a row of W or B to that column; never through padding."""
    case = Case(35, 65, 33, 7, dtype, F32, bias=True, precision=precision)
    t = make(case)

    def forward(**changed):
        leaf = leaves_of(t) | {"weight": t.weight} | changed
        x, weight, A, B = leaf["x"], leaf["weight"], leaf["lora_A"], leaf["lora_B"]
        with torch.no_grad():
            return peftkern.lora_linear(x, weight, A, B, bias=t.bias, precision=precision, backend="triton").isnan()

    nothing = torch.zeros(35, 33, dtype=torch.bool)
    row, column = nothing.clone(), nothing.clone()
    row[34], column[:, 32] = True, True
    assert torch.equal(forward(), nothing)
    assert torch.equal(forward(x=_with_nan(t.x, 34, 64)), row)
    assert torch.equal(forward(weight=_with_nan(t.weight, 32, 64)), column)
    assert torch.equal(forward(lora_B=_with_nan(t.lora_B, 32, 6)), column)
    assert forward(lora_A=_with_nan(t.lora_A, 6, 64)).all()


def test_a_nan_that_is_dropped_becomes_0(schedule: str):
    """It still goes through the frozen weight, but neither into s nor into dA."""
    case = Case(35, 65, 33, 7, BF16, F32, 0.5)
    t = make(case)
    keep = dropout_mask(35, 65, 0.5, t.rng_state)
    row, column = (~keep).nonzero()[40].tolist()
    weight = DenseWeight(t.weight)
    operands = Pair(weight, t.lora_A, t.lora_B, None, None, 1.0, None, 0.5, t.rng_state, "base")
    x = _with_nan(t.x, row, column)
    _, s = TritonBackend().pair(operands, x)
    assert s.isfinite().all()
    needs = PairNeeds(False, True, False, False, False)
    assert TritonBackend().pair_backward(operands, t.dy, x, None, None, needs).lora_A.isfinite().all()


def test_many_tiles_and_runs():
    """More rows than one run of ``grad``, more groups than one of the tile order."""
    check(Case(200, 72, 300, 16, F32, F32, 0.1, bias=True, lora_bias=True))


def test_what_is_refused():
    backend = dispatch.backend_named("triton")

    def reason(case: Case) -> str:
        t = make(case)
        weight = t.weight if isinstance(t.weight, FrozenWeight) else DenseWeight(t.weight)
        operands = Pair(weight, t.lora_A, t.lora_B, None, None, 1.0, None, 0.0, None, "base")
        return backend.supports(operands.problem(case.M, case.dtype)) or ""

    assert backend.unavailable() is None
    assert "float64" in reason(Case(2, 8, 8, 2, F64))
    assert reason(Case(2, 8, 8, 0)) == "r = 0 has no low-rank pair"
    assert "513" in reason(Case(2, 8, 8, 513))
    assert reason(Case(2, 8, 8, 512)) == ""


def test_the_plan_names_schedule_and_tile(schedule: str):
    t = make(Case(4, 16, 80, 4))
    text = str(peftkern.explain(t.x, t.weight, t.lora_A, t.lora_B, backend="triton"))
    assert "triton" in text and schedule in text and "64x32x64" in text


def test_batch_invariant_rows(dispatch_env, monkeypatch):
    """A row's result does not depend on how many others there are; without the mode the choice follows M."""
    few, many = (16, 32, 32, 4, 1), (64, 64, 64, 8, 1)
    monkeypatch.setitem(shipped.SHIPPED["plain"], "interpreter", dict.fromkeys((few, many), (99, 99, 99)))

    def estimate(launch: Pass, choice: Choice, arch: Arch) -> tuple[int, int]:
        return abs(choice.tile.BLOCK_M - launch.problem.M), -choice.tile.SLICES

    monkeypatch.setattr(select, "estimate", estimate)
    case = Case(100, 200, 40, 7, BF16, F32, bias=True)
    t = make(case)

    def forward(rows: int) -> torch.Tensor:
        return peftkern.lora_linear(t.x[:rows], t.weight, t.lora_A, t.lora_B, bias=t.bias, backend="triton")

    dispatch_env(PEFTKERN_BATCH_INVARIANT="1")
    whole = forward(100)
    assert all(torch.equal(forward(rows), whole[:rows]) for rows in (1, 17))
    dispatch_env(PEFTKERN_BATCH_INVARIANT="0")
    assert not torch.equal(forward(17), forward(100)[:17])


@pytest.mark.parametrize(("dtype", "R"), [(BF16, 7), (F16, 33), (F32, 7), (BF16, 100)])
def test_t_and_dB_from_one_read_of_dy(dtype: torch.dtype, R: int):
    """Where x needs no gradient: 200 columns are two column blocks, 300 rows are several runs."""
    case = Case(300, 20, 200, R, dtype, F32, 0.2, bias=True)
    t = make(case)
    found = run(case, t, "triton", ("lora_A", "lora_B", "bias"))
    peer, truth = expect(case, t, "triton")
    for name in ("lora_A", "lora_B", "bias"):
        assert_as_good_as(found[name], peer[name], truth[name], name)
    assert found["x"] is None


def test_rows_that_lie_far_apart(schedule: str):
    """Strides whose multiples within a tile pass 2^31: x, dy and the weight in one wide sheet of address space."""
    case = Case(70, 40, 36, 5, BF16, F32, 0.2)
    t = make(case)
    near = run(case, t, "triton")
    distance = 2**25 + 2**21  # 63 rows of it are more than 2^31 elements

    def far(tensor: torch.Tensor) -> torch.Tensor:
        sheet = torch.empty(distance * tensor.shape[0], dtype=tensor.dtype).as_strided(tensor.shape, (distance, 1))
        return sheet.copy_(tensor)

    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages between stay untouched
    t.x, t.dy, t.weight = far(t.x), far(t.dy), far(t.weight)
    found = run(case, t, "triton")
    assert all(torch.equal(found[name], near[name]) for name in ("y", "x", "lora_A", "lora_B"))


def test_biases_that_are_columns_of_something_wide():
    """A stride of a vector times its length passes 2^31."""
    case = Case(5, 65, 1100, 5, BF16, F32, bias=True, lora_bias=True)
    t = make(case)
    near = run(case, t, "triton")
    torch.utils.deterministic.fill_uninitialized_memory = False

    def far(vector: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**21 * len(vector), dtype=vector.dtype).as_strided(vector.shape, (2**21,)).copy_(vector)

    t.bias, t.lora_bias = far(t.bias), far(t.lora_bias)
    found = run(case, t, "triton")
    assert all(torch.equal(found[name], near[name]) for name in NAMES)
