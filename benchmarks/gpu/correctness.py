"""Every schedule, dtype, rank, dropout and tile on the device, against fp64, by the house rule, with poisoned outputs.

    err <= 2 err(torch, same roundings) + 1e-6 + cut_off        for y, s, dx, dA, dB and the bias sums

The backend is called directly, so that a forced schedule and tile holds in both directions (autograd runs backward in
another thread, which does not see the override). A task repeats one call with the same operands; a bit that moves is a
failure by itself, as in a race. What fails here is excluded from all that follows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import backend, external
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import NAMES, Dtypes, Plan
from benchmarks.gpu.task import OK, REFUSED, WRONG, Result, Task
from peftkern.backends.reference import formula
from peftkern.backends.triton import tiles
from peftkern.backends.triton.tiles import Choice
from peftkern.call import Base, Call, Needs, Pair, PairNeeds, Problem, Update
from peftkern.ops import dispatch
from peftkern.testing.numerics import relative_error
from peftkern.weights import DenseWeight

NAMES_OF_RESULTS = ("y", "s", "dx", "dA", "dB", "dbias", "dlora_bias")
_ALL = PairNeeds(True, True, True, True, True)
_SMALLEST = 32  # entries that a judged tensor has at least, pooled over trials
_MOST_TRIALS = 32
_RESULTS = {False: {"y", "s"}, True: {"dx"}}  # of a direction, by whether it is backward
_HUGE_K = 64
_CUT_OFF = 2e-8  # relative: what a Hopper tensor core cuts off, by arithmetic, whenever it adds 16 products to a sum
_SECONDS = 40.0  # a schedule that waits forever costs these
SHARED = tiles.SHARED


class Trial(NamedTuple):
    """One call's tensors."""

    operands: Pair
    x: Tensor
    dy: Tensor


def tasks(bench: Bench) -> list[Task]:
    """The grid's most used dtypes, the sweep over tiles, odd layouts, the whole grid, the sanitizer."""
    plan = bench.plan
    cases = [
        _task(f"grid {schedule} {_named(dtypes)} r={R} p={p:g}", grid, plan, schedule, dtypes, R, p)
        for R, p, dtypes, schedule in itertools.product(plan.ranks, plan.dropout, plan.dtypes, plan.schedules)
    ]
    first = [task for task in cases if f" {_named(plan.dtypes[0])} " in task.key]
    layouts = [
        _task(f"{kind} {schedule} {_named(dtypes)}", _layout, plan, schedule, dtypes, kind)
        for dtypes in plan.dtypes[:2]
        for kind in ("empty", "strided", "huge")
        for schedule in plan.schedules
        if not (kind == "huge" and (plan.dry or dtypes != plan.dtypes[0]))
    ]
    ordered = [*first, *_sweep(plan), *layouts, *cases, *external.sanitizers(bench)]
    return list({task.key: task for task in ordered}.values())


def _task(key: str, run: Any, plan: Plan, schedule: str, dtypes: Dtypes, *rest: Any) -> Task:
    """A task on one schedule and dtype pair, which its result names whatever becomes of it."""
    R = rest[0] if isinstance(rest[0], int) else 16
    return Task(key, lambda: run(plan, schedule, dtypes, *rest), _SECONDS, _about(schedule, dtypes, R))


def _named(dtypes: Dtypes) -> str:
    return "/".join(NAMES[dtype] for dtype in dtypes)


def _about(schedule: str, dtypes: Dtypes, R: int, tile: str | None = None) -> dict[str, Any]:
    dtype = str(dtypes[0]).removeprefix("torch.")
    return {"schedule": schedule, "dtype": dtype, "r": R, "padded": tiles.padded(R), "tile": tile}


# --------------------------------------------------------------------------------------------------- what is judged


def trial(shape: tuple[int, int, int], dtypes: Dtypes, R: int, p: float, device: str, seed: int = 0) -> Trial:
    """Gaussian operands of magnitude 1 in, about 1 out; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    M, K, N = shape
    wide, adapter = dtypes

    def normal(*extents: int, dtype: torch.dtype = wide, scale: float = 1.0) -> Tensor:
        return torch.randn(*extents, generator=generator).mul_(scale).to(device, dtype)

    state = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device)
    operands = Pair(
        DenseWeight(normal(N, K, scale=K**-0.5)), normal(R, K, dtype=adapter, scale=K**-0.5),
        normal(N, R, dtype=adapter, scale=R**-0.5), normal(N), normal(N, dtype=adapter), 1.75, None, p,
        state if p else None, "base",
    )  # fmt: skip
    return Trial(operands, normal(M, K), normal(M, N))


def truth(one: Trial) -> list[Tensor]:
    """The formula in fp64."""
    o = one.operands
    wide = o._replace(
        weight=DenseWeight(o.weight.materialize(torch.float64)), lora_A=o.lora_A.double(), lora_B=o.lora_B.double(),
        bias=None if o.bias is None else o.bias.double(),
        lora_bias=None if o.lora_bias is None else o.lora_bias.double(),
    )  # fmt: skip
    y, s = formula.forward(wide, one.x.double())
    return [y, s, *formula.backward(wide, one.dy.double(), one.x.double(), s)]


def run(runner: Any, one: Trial, forward: Choice | None, backward: Choice | None) -> list[Tensor]:
    """y, s and every gradient by direct calls of a backend."""
    with backend.forced(forward):
        y, s = runner.pair(one.operands, one.x)
    with backend.forced(backward):
        return [y, s, *runner.pair_backward(one.operands, one.dy, one.x, s, None, _ALL)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN until somebody writes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def judge(trials: list[Trial], found: list[list[Tensor]], where: str) -> list[dict[str, Any]]:
    """The failures of one shape, pooled over its trials."""
    peer_of = dispatch.backend_named("reference")
    pools: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = [([], [], []) for _ in NAMES_OF_RESULTS]
    for one, results in zip(trials, found, strict=True):
        peers, wanted = run(peer_of, one, None, None), truth(one)
        for pool, values in zip(pools, zip(results, peers, wanted, strict=True), strict=True):
            for kept, value in zip(pool, values, strict=True):
                kept.append(value.flatten().double())
    failures = []
    for name, pool in zip(NAMES_OF_RESULTS, pools, strict=True):
        own, peer, wanted = (torch.cat(kept) for kept in pool)
        error, allowed = relative_error(own, wanted), 2 * relative_error(peer, wanted) + 1e-6 + cut_off(trials[0], name)
        if not error <= allowed:
            failures.append(
                {"name": name, "where": where, "error": float(f"{error:.3e}"), "allowed": float(f"{allowed:.3e}")}
            )
    return failures


def cut_off(one: Trial, name: str) -> float:
    """What tensor cores may lose of a result where the peer's product, in fp32, loses nothing; elsewhere 0."""
    if not one.x.is_cuda or one.x.dtype == torch.float32:
        return 0.0
    (M, K), N = one.x.shape, one.dy.shape[1]
    return _CUT_OFF * {"y": K, "s": K, "dx": N, "dA": M, "dB": M}.get(name, 0) / 16


def moving(runner: Any, one: Trial, choices: Sequence[Choice | None], repeats: int) -> list[dict[str, Any]]:
    """Which results differ between runs with the same operands."""
    first, moved = run(runner, one, *choices), {}
    for _ in range(repeats):
        for name, value, again in zip(NAMES_OF_RESULTS, first, run(runner, one, *choices), strict=True):
            if not torch.equal(value, again):
                moved[name] = moved.get(name, 0) + 1
    return [
        {"name": f"repeat {name}", "where": "same operands", "runs": repeats, "moved": n} for name, n in moved.items()
    ]


# -------------------------------------------------------------------------------------------------------- the tasks


def _choice(plan: Plan, problem: Problem, backward: bool, schedule: str) -> Choice | str | None:
    """The schedule's most promising tile, or why it has none; None where the backend has no schedules."""
    if plan.backend != "triton":
        return None
    arch = backend.arch_here(plan.device)
    found = backend.legal(problem, backward, schedule, arch)
    return found[0] if found else backend.refusal(problem, backward, schedule, arch)


def grid(plan: Plan, schedule: str, dtypes: Dtypes, R: int, p: float) -> Result:
    """One schedule, dtype, rank and dropout at all small and odd shapes, both directions."""
    runner = dispatch.backend_named(plan.backend)
    failures, refused, ran = [], {}, 0
    for shape in plan.shapes:
        where = "x".join(map(str, shape))
        smallest = min(shape[0] * R, shape[0] * shape[1], shape[0] * shape[2], shape[1] * R, shape[2] * R)
        count = min(_MOST_TRIALS, -(-_SMALLEST // smallest))
        trials = [trial(shape, dtypes, R, p, plan.device, seed) for seed in range(count)]
        problem = trials[0].operands.problem(shape[0], dtypes[0])
        pair, mine = [], {"dA", "dB", "dbias", "dlora_bias"}
        for name, backward in backend.DIRECTIONS:
            found = _choice(plan, problem, backward, schedule)
            if isinstance(found, str):
                refused[f"{where} {name}"] = found
                found = _other(plan, problem, backward)
            else:
                mine |= _RESULTS[backward]
            pair.append(found)
        if not mine & {"y", "dx"}:
            continue
        with poisoned():
            judged = judge(trials, [run(runner, one, *pair) for one in trials], where)
            judged += moving(runner, trials[0], pair, plan.repeats * (3 if schedule == SHARED else 1))
        failures += _only(judged, mine)
        ran += 1
    status = WRONG if failures else OK if ran else REFUSED
    result: Result = {"status": status, "failures": failures, "ran": ran}
    return result | ({"refused": refused} if refused else {})


def _sweep(plan: Plan) -> list[Task]:
    """Every legal tile of every schedule, direction by direction, at r=16 and 64 with dropout."""
    if plan.backend != "triton":
        return []
    arch, found = backend.arch_here(plan.device), []
    for R, dtypes in itertools.product((16, 64), plan.dtypes[:2]):
        M, K, N = plan.medium[-1]
        problem = Problem(plan.device, M, K, N, R, dtypes[0], dtypes[1], dropout=True, bias=True, lora_bias=True)
        for schedule, (name, backward) in itertools.product(plan.schedules, backend.DIRECTIONS):
            for choice in backend.legal(problem, backward, schedule, arch):
                key = f"tile {schedule} {choice.tile} {name} {_named(dtypes)} r={R}"
                about = _about(schedule, dtypes, R, str(choice.tile))
                run = functools.partial(_tile, plan, choice, backward, dtypes, R)
                found.append(Task(key, run, _SECONDS, about))
    return found


def _tile(plan: Plan, choice: Choice, backward: bool, dtypes: Dtypes, R: int) -> Result:
    """One tile in one direction at shapes with whole and with ragged tiles."""
    runner, failures, refused = dispatch.backend_named(plan.backend), [], {}
    for shape in plan.medium:
        where = "x".join(map(str, shape))
        one = trial(shape, dtypes, R, 0.05, plan.device)
        launch = tiles.Pass(one.operands.problem(shape[0], dtypes[0]), backward)
        reason = tiles.supports(launch, choice, backend.arch_here(plan.device))
        if reason is not None:
            refused[where] = reason
            continue
        other = _other(plan, launch.problem, not backward)
        pair = (other, choice) if backward else (choice, other)
        with poisoned():
            judged = judge([one], [run(runner, one, *pair)], where) + moving(runner, one, pair, plan.repeats)
        failures += _only(judged, _RESULTS[backward])
    return {"status": WRONG if failures else OK, "failures": failures, "refused": refused}


def _other(plan: Plan, problem: Problem, backward: bool) -> Choice | None:
    """How the direction runs that a task is not about: by the plainest schedule."""
    found = _choice(plan, problem, backward, tiles.LIBRARY)
    return None if isinstance(found, str) else found


def _only(failures: list[dict[str, Any]], mine: set[str]) -> list[dict[str, Any]]:
    return [failure for failure in failures if failure["name"].removeprefix("repeat ") in mine]


def _layout(plan: Plan, schedule: str, dtypes: Dtypes, kind: str) -> Result:
    """No rows; strides and addresses that no descriptor takes; more elements than 32 bits count."""
    runner, shape = dispatch.backend_named(plan.backend), (130, 576, 192)
    if kind == "huge":
        return _huge(plan, (2**31 // _HUGE_K + 300, _HUGE_K, _HUGE_K), schedule, dtypes)
    one = trial(shape, dtypes, 16, 0.05, plan.device)
    if kind == "empty":
        return _empty(one)
    x = torch.zeros(shape[0], shape[1] + 3, dtype=dtypes[0], device=plan.device)[:, 1 : 1 + shape[1]].copy_(one.x)
    W = one.operands.weight.materialize(dtypes[0]).T.contiguous().T
    one = Trial(one.operands._replace(weight=DenseWeight(W)), x, one.dy.T.contiguous().T)
    pair = []
    for _, backward in backend.DIRECTIONS:
        found = _choice(plan, one.operands.problem(shape[0], dtypes[0]), backward, schedule)
        if isinstance(found, str):
            return {"status": REFUSED, "error": found}
        pair.append(found)
    with poisoned():
        failures = judge([one], [run(runner, one, *pair)], "strided and misaligned")
    return {"status": WRONG if failures else OK, "failures": failures}


def _empty(one: Trial) -> Result:
    """M = 0 through the dispatcher: empty y and dx, exact zeros for the parameters."""
    o, yes = one.operands, [True]
    update = Update(o.lora_A, o.lora_B, o.lora_bias, o.scaling_tensor, o.rng_state, o.scaling, o.dropout_p)
    call = Call((Base(o.weight, o.bias),), (update,), o.precision)
    (y,), thin = dispatch.forward(call, one.x[:0])
    found = dispatch.backward(call, [one.dy[:0]], one.x[:0], thin, Needs(True, yes, yes, yes, yes))
    right = y.shape == one.dy[:0].shape and all(not gradient.any() for gradient in found.asked_for())
    right = right and found.x.shape == one.x[:0].shape and len(found.asked_for()) == 5
    return {"status": OK} if right else {"status": WRONG, "failures": [{"name": "y", "where": "M=0"}]}


def _huge(plan: Plan, shape: tuple[int, int, int], schedule: str, dtypes: Dtypes) -> Result:
    """y and dx of the first and last rows where M K is beyond 2^31. Without dropout, whose truth would not fit."""
    M, K, N = shape
    small = trial((300, K, N), dtypes, 16, 0.0, plan.device)
    runner, failures = dispatch.backend_named(plan.backend), []
    needs = PairNeeds(True, False, False, False, False)
    peer, wanted = run(dispatch.backend_named("reference"), small, None, None), truth(small)
    for index, (_, backward) in zip((0, 2), backend.DIRECTIONS, strict=True):
        choice = _choice(plan, small.operands.problem(M, dtypes[0]), backward, schedule)
        if isinstance(choice, str):
            return {"status": REFUSED, "error": choice}
        source = small.dy if backward else small.x
        X = torch.zeros(M, source.shape[1], dtype=dtypes[0], device=plan.device)
        X[:300], X[-300:] = source, source
        with backend.forced(choice):
            if backward:
                found = runner.pair_backward(small.operands, X, None, None, None, needs).x
            else:
                found = runner.pair(small.operands, X)[0]
        for where, part in (("first rows", found[:300]), ("last rows", found[-300:])):
            error, allowed = relative_error(part, wanted[index]), 2 * relative_error(peer[index], wanted[index]) + 1e-6
            if not error <= allowed:
                name = NAMES_OF_RESULTS[index]
                failures.append({"name": name, "where": where, "error": error, "allowed": allowed})
        del X, found, part
    return {"status": WRONG if failures else OK, "failures": failures}


def spoken(results: dict[str, Result]) -> str:
    """One line: how many tasks, and how they ended."""
    counts: dict[str, int] = {}
    for result in results.values():
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing ran"
