"""What only a GPU can show: streams, devices, graphs, memory. ``pytest -m gpu`` on a machine that has one.

Correctness on the GPU is in the other files, whose ``target`` runs there too.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import Case, Tensors, judge, leaves_of, make, run

import peftkern
from peftkern.backends.triton import schedule, select, tiles
from peftkern.backends.triton.arch import arch_of
from peftkern.backends.triton.tiles import Choice, Pass
from peftkern.call import Problem
from peftkern.testing.numerics import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASE = Case(512, 512, 768, 16, BF16, F32, p=0.1, bias=True, lora_bias=True)
DECODE = Case(16, 1024, 1024, 16, BF16, F32)


def equal(found: dict, expected: dict) -> bool:
    return (
        all(torch.equal(found[name], expected[name]) for name in expected if expected[name] is not None)
        and found.keys() == expected.keys()
    )


def every_choice(case: Case, per_schedule: int = 3) -> list[Choice]:
    """Some legal choices of both directions, spread over each schedule's tiles."""
    arch, found = arch_of(torch.device("cuda", 0)), []
    adapter = case.adapter_dtype or case.dtype
    problem = Problem("cuda", case.M, case.K, case.N, case.R, case.dtype, adapter, dropout=case.p > 0)
    for name in tiles.SCHEDULES:
        both = [c for c in tiles.choices(Pass(problem, False), arch) if c.schedule == name]
        both = [c for c in both if tiles.supports(Pass(problem, True), c, arch) is None]
        found += both[:: max(1, len(both) // per_schedule)]
    return found


@pytest.mark.parametrize("case", [CASE, DECODE, Case(1000, 1100, 1000, 24, F16, F16, p=0.05)], ids=str)
def test_every_schedule(case: Case):
    """The error rule, and the same bits twice: a moving result is a race."""
    t = make(case, "cuda")
    chosen = every_choice(case)
    assert {choice.schedule for choice in chosen} >= {"one_pass/recompute", "split", "library"}
    for choice in chosen:
        with select.forced(choice):
            found = run(case, t, "triton")
            judge(case, "triton", (t, found))
            assert all(equal(run(case, t, "triton"), found) for _ in range(5)), choice


def test_overlap_changes_nothing(dispatch_env, monkeypatch):
    monkeypatch.setattr(schedule, "OVERLAP_BYTES", 0)
    t = make(CASE, "cuda")
    for choice in every_choice(CASE, 1):
        with select.forced(choice):
            dispatch_env(PEFTKERN_OVERLAP="0")
            alone = run(CASE, t, "triton")
            dispatch_env(PEFTKERN_OVERLAP="1")
            beside = run(CASE, t, "triton")
        judge(CASE, "triton", (t, beside))
        assert torch.equal(beside["x"], alone["x"])


def test_a_side_stream_and_no_synchronisation():
    """Launches go to the caller's stream: nothing there waits for the host."""
    t = make(CASE, "cuda")
    expected = run(CASE, t, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            found = run(CASE, t, "triton")
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA GPU")
def test_another_than_the_current_device():
    t = make(CASE, "cuda:1")
    assert torch.cuda.current_device() == 0
    found = run(CASE, t, "triton")
    judge(CASE, "triton", (t, found))
    assert found["y"].device == torch.device("cuda", 1)


def _captured(step: Callable[[], dict]) -> tuple[torch.cuda.CUDAGraph, dict]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("case", [CASE, DECODE], ids=str)
def test_graph_of_a_training_step(case: Case, monkeypatch):
    """Captured with every schedule, replayed on new data and a new RNG state; overlap's fork is captured with it."""
    monkeypatch.setattr(schedule, "OVERLAP_BYTES", 0)
    for choice in every_choice(case, 1):
        t, fresh = make(case, "cuda"), make(case, "cuda", seed=1)
        with select.forced(choice):
            graph, result = _captured(lambda t=t: run(case, t, "triton"))
            with torch.no_grad():
                for name in ("x", "dy", "lora_A", "lora_B", "rng_state"):
                    getattr(t, name).copy_(getattr(fresh, name))
            for _ in range(2):
                graph.replay()
                torch.cuda.synchronize()
                judge(
                    case,
                    "triton",
                    (t, {name: v.clone() for name, v in result.items() if v is not None} | _none(result)),
                )


def _none(result: dict) -> dict:
    return {name: None for name, value in result.items() if value is None}


def test_graph_draws_a_new_mask_at_every_replay():
    x, eye = torch.ones(64, 64, device="cuda", dtype=BF16), torch.eye(64, device="cuda", dtype=BF16)
    nothing = torch.zeros_like(eye)

    def step() -> dict:
        return {"y": peftkern.lora_linear(x, nothing, eye, eye, dropout_p=0.5, backend="triton")}

    graph, result = _captured(step)
    masks = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        masks.append(result["y"] != 0)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    assert all(0.4 < mask.float().mean() < 0.6 for mask in masks)


def test_first_calls_of_many_threads():
    t = make(CASE, "cuda")
    found: list[dict] = []
    select.forget()
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(run(CASE, t, "triton"))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = run(CASE, t, "triton")
    assert len(found) == 4 and all(equal(one, expected) for one in found)


def test_out_of_memory_leaves_everything_as_it_was():
    t = make(CASE, "cuda")
    expected = run(CASE, t, "triton")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**19) / total)
    big = torch.empty(0, device="cuda", dtype=BF16)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            rows = t.x[:1].expand(2**20, CASE.K)
            big = peftkern.lora_linear(rows, t.weight, t.lora_A, t.lora_B, backend="triton")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert big.numel() == 0
    assert equal(run(CASE, t, "triton"), expected)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_only_where_torch_allows_it(allowed: bool):
    case = Case(256, 512, 512, 16, F32)
    t = make(case, "cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        y = run(case, t, "triton")["y"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    truth = t.x.double() @ t.weight.double().T + 1.75 * (t.x.double() @ t.lora_A.double().T @ t.lora_B.double().T)
    error = relative_error(y, truth)
    assert 1e-5 < error < 3e-3 if allowed else error < 1e-6


def _rows(t: Tensors, rows: int) -> torch.Tensor:
    with torch.no_grad():
        leaf = leaves_of(t)
        return peftkern.lora_linear(leaf["x"][:rows], t.weight, leaf["lora_A"], leaf["lora_B"], backend="triton")


def test_batch_invariant_rows(dispatch_env):
    dispatch_env(PEFTKERN_BATCH_INVARIANT="1")
    t = make(replace(CASE, M=4096, p=0.0, bias=False, lora_bias=False), "cuda")
    whole = _rows(t, 4096)
    assert all(torch.equal(_rows(t, rows), whole[:rows]) for rows in (1, 7, 16, 130, 1024, 3000))


def test_more_elements_than_32_bits_count():
    """x and y beyond 2^31 elements: the last rows are right."""
    M, K = 2**31 // 1024 + 64, 1024
    if torch.cuda.mem_get_info()[0] < 5 * M * K * 2:
        pytest.skip("not enough memory for 2^31 elements")
    x = torch.zeros(M, K, device="cuda", dtype=BF16)
    t = make(Case(64, K, K, 16, BF16), "cuda")
    x[-64:] = t.x
    for choice in every_choice(Case(M, K, K, 16, BF16), 1):
        with select.forced(choice):
            y = peftkern.lora_linear(x, t.weight, t.lora_A, t.lora_B, backend="triton")
        truth = t.x.double() @ (t.weight.double() + t.lora_B.double() @ t.lora_A.double()).T
        assert relative_error(y[-64:], truth) < 5e-3, choice
        assert not y[:-64].any()
        del y


def test_compiled_with_graphs():
    """The compiler warms up in a memory pool of its own, which must not end up with the counters."""
    t = make(DECODE, "cuda")
    call = torch.compile(
        lambda x: peftkern.lora_linear(x, t.weight, t.lora_A, t.lora_B, 1.75, backend="triton"), mode="reduce-overhead"
    )
    with torch.no_grad():
        expected = peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, 1.75, backend="triton")
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(call(t.x), expected)
    assert torch.equal(peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, 1.75, backend="triton"), expected)


def test_an_error_beside_dx_joins_the_streams(monkeypatch):
    """The caller's stream has waited for the other one when it gets the error; the next call is right."""
    monkeypatch.setattr(schedule, "OVERLAP_BYTES", 0)
    t = make(CASE, "cuda")
    expected = run(CASE, t, "triton")
    genuine = schedule.backward

    def broken(*arguments):
        plan = genuine(*arguments)

        class Fails:
            def run(self) -> None:
                raise RuntimeError("broken")

        plan.steps.append(Fails())
        return plan

    with monkeypatch.context() as patched:
        patched.setattr(schedule, "backward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            run(CASE, t, "triton")
    assert equal(run(CASE, t, "triton"), expected)
