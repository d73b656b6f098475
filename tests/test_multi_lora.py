"""One batch, several adapters: values, every gradient, and independence of whoever else is in the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import all_of, bank_of, check_operators
from conftest import CPU_TARGETS
from torch import Tensor

from peftkern.backends.reference import formula
from peftkern.call import Call, Pair, Span
from peftkern.multi_lora import multi_lora_linear, run_rows
from peftkern.ops import dispatch
from peftkern.segments import Routing, plan_rows
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import DenseWeight

pytestmark = pytest.mark.parametrize("backend", [target.backend for target in CPU_TARGETS])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = (4, 1, 0, 7, 24, 3, 40)
ROUTINGS = {
    "interleaved": [e % 8 - 1 for e in range(37)],
    "sorted, long": [0] * 40 + [3] * 20 + [4] * 19,
    "one row each": [6, 2, -1, 0, 4, 3, 1, 5],
    "99 % skew": [4] * 98 + [0],
    "one adapter only": [3] * 21,
    "two rows each, the base between": [0, -1, 3, 3, -1, -1, 0, 5, 5, -1],
}


@dataclasses.dataclass
class Batch:
    """The operands of one call; ``alone`` keeps one adapter's rows of them."""

    x: Tensor
    W: Tensor
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float]
    p: list[float]
    states: list[tuple[int, int]]
    ids: Tensor
    dy: Tensor
    precision: str | None = None

    def alone(self, e: int) -> Batch:
        rows = self.ids == e
        return dataclasses.replace(self, x=self.x[rows], dy=self.dy[rows], ids=self.ids[rows])


def make(
    ids, dtype=torch.float32, K=65, N=33, p=0.0, adapter_dtype=torch.float32, ranks=RANKS, bias=True, precision=None
):
    g = torch.Generator().manual_seed(len(ids) + K)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g).mul_(scale).to(dtype)

    E, M = len(ranks), len(ids)
    return Batch(
        normal(M, K), normal(N, K, scale=K**-0.5), normal(N) if bias else None,
        [normal(r, K, dtype=adapter_dtype, scale=K**-0.5) for r in ranks],
        [normal(N, r, dtype=adapter_dtype, scale=max(r, 1) ** -0.5) for r in ranks],
        [0.5 + e / 4 for e in range(E)], [p * (e % 3) / 2 for e in range(E)],
        [(7 * e - 20, e * 2**33) for e in range(E)], torch.tensor(ids, dtype=torch.int64), normal(M, N), precision,
    )  # fmt: skip


def call_of_batch(batch: Batch, backend: str, plan: Routing | None = None, bias: bool = True) -> Call:
    """The call that ``multi_lora_linear`` makes of a batch."""
    plan = plan_rows(batch.ids) if plan is None else plan
    found = {id: (start, length) for id, start, length in plan.spans}
    spans = [Span(*found.get(e, (0, 0)), *batch.states[e]) for e in range(len(batch.A))]
    return bank_of(
        batch.W, batch.bias if bias else None, list(zip(batch.A, batch.B, strict=True)), spans, plan.rows, plan.inside,
        scaling=batch.scaling, p=batch.p, precision=batch.precision or "base", backend=backend,
    )  # fmt: skip


def run(batch: Batch, backend: str, needs=("x", "bias", "A", "B")) -> dict[str, Tensor]:
    """y and every gradient by name."""
    leaves = {"x": batch.x, "bias": batch.bias}
    leaves |= {f"A{e}": A for e, A in enumerate(batch.A)} | {f"B{e}": B for e, B in enumerate(batch.B)}
    leaves = {
        n: None if t is None else t.detach().requires_grad_(n.rstrip("0123456789") in needs) for n, t in leaves.items()
    }
    E = len(batch.A)
    y = multi_lora_linear(
        leaves["x"], batch.W, [leaves[f"A{e}"] for e in range(E)], [leaves[f"B{e}"] for e in range(E)], batch.scaling,
        batch.ids, bias=leaves["bias"], dropout_p=batch.p, rng_states=batch.states, precision=batch.precision,
        backend=backend,
    )  # fmt: skip
    y.backward(batch.dy)
    return {"y": y.detach()} | {n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}


def plain(batch: Batch) -> dict[str, Tensor]:
    """The same by a loop over adapters of out-of-place PyTorch, with the same roundings."""
    x, A, B = (
        batch.x.clone().requires_grad_(),
        *([f.clone().requires_grad_() for f in fs] for fs in (batch.A, batch.B)),
    )
    bias = None if batch.bias is None else batch.bias.clone().requires_grad_()
    wide = batch.precision == "fp32" or x.dtype == torch.float16
    thin = torch.float32 if wide else x.dtype
    y = torch.nn.functional.linear(x, batch.W, bias)
    for e in range(len(A)):
        rows = (batch.ids == e).nonzero().flatten()
        if len(rows) == 0:
            continue
        own = x[rows]
        if batch.p[e]:
            keep = dropout_mask(len(rows), own.shape[1], batch.p[e], torch.tensor(batch.states[e]))
            own = torch.where(keep, own, 0) * (65536 / (65536 - round(65536 * batch.p[e])))
        F = [f if batch.precision == "fp32" else f.to(x.dtype) for f in (A[e], B[e])]
        update = batch.scaling[e] * (own.to(thin) @ F[0].to(thin).T @ F[1].to(thin).T)
        y = y.index_add(0, rows, update.to(y.dtype))
    y.backward(batch.dy)
    found = {"y": y.detach(), "x": x.grad} | ({} if bias is None else {"bias": bias.grad})
    for e in range(len(A)):
        found |= {
            f"{n}{e}": torch.zeros_like(f[e]) if f[e].grad is None else f[e].grad for n, f in (("A", A), ("B", B))
        }
    return found


def truth(batch: Batch) -> dict[str, Tensor]:
    """The same by the formula of one adapter, on each one's rows, in fp64."""
    x, dy, W = batch.x.double(), batch.dy.double(), batch.W.double()
    bias = None if batch.bias is None else batch.bias.double()
    found = {"y": x @ W.T + (0 if bias is None else bias), "x": dy @ W}
    found |= {} if bias is None else {"bias": dy.sum(0)}
    for e, (A, B) in enumerate(zip(batch.A, batch.B, strict=True)):
        rows, p = batch.ids == e, batch.p[e]
        state = torch.tensor(batch.states[e]) if p else None
        operands = Pair(DenseWeight(W), A.double(), B.double(), bias, None, batch.scaling[e], None, p, state, "fp32")
        if not rows.any():
            found |= {f"A{e}": torch.zeros_like(A.double()), f"B{e}": torch.zeros_like(B.double())}
            continue
        found["y"][rows], s = formula.forward(operands, x[rows])
        gradients = formula.backward(operands, dy[rows], x[rows], s)
        found["x"][rows] = gradients.x
        found |= {f"A{e}": gradients.lora_A, f"B{e}": gradients.lora_B}
    return found


def check(batch: Batch, backend: str) -> dict[str, Tensor]:
    """The error rule for y and the gradients; those of all adapters are pooled: one tiny tensor is mostly luck."""
    found, expected, peer = run(batch, backend), truth(batch), plain(batch)
    assert found.keys() == expected.keys()
    pools = {
        "y": ["y"],
        "x": ["x"],
        "A": [n for n in expected if n[0] == "A"],
        "B": [n for n in expected if n[0] == "B"],
    }
    for pool, names in pools.items():
        joined = (torch.cat([of[n].flatten().double() for n in names]) for of in (found, peer, expected))
        assert_as_good_as(*joined, pool)
    if batch.bias is not None:
        assert_as_good_as(found["bias"], peer["bias"], expected["bias"], "bias")
    for e in range(len(batch.A)):
        assert found[f"A{e}"].dtype == batch.A[e].dtype
    return found


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_is_a_loop_over_its_adapters(backend: str, routing: str, p: float, poisoned) -> None:
    for dtype in DTYPES:
        check(make(ROUTINGS[routing], dtype, p=p), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_precision_and_adapters_in_the_dtype_of_the_base(backend: str, dtype: torch.dtype) -> None:
    ids = ROUTINGS["interleaved"]
    check(make(ids, dtype, p=0.1, precision="fp32", bias=False), backend)
    check(make(ids, dtype, p=0.1, adapter_dtype=dtype), backend)


def test_large_ranks_and_extents(backend: str) -> None:
    check(make([0, 1, 2, 1, 1, 1, 1, 1, 1], torch.bfloat16, K=600, N=517, ranks=(512, 2, 128)), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_the_base_has_the_bits_of_the_batch_without_adapters(backend: str, dtype: torch.dtype) -> None:
    for routing in ROUTINGS.values():
        batch = make(routing, dtype, p=0.1)
        base = multi_lora_linear(
            batch.x, batch.W, [], [], [], torch.full_like(batch.ids, -1), bias=batch.bias, backend=backend
        )
        rows = batch.ids == -1
        found = run(batch, backend)
        assert torch.equal(found["y"][rows], base[rows])
        assert rows.all() or not torch.equal(found["y"], base)


def test_an_adapter_learns_in_company_what_it_learns_alone(backend: str) -> None:
    batch = make(ROUTINGS["interleaved"], p=0.2)
    together = run(batch, backend)
    for e in range(len(RANKS)):
        alone = run(batch.alone(e), backend)
        for name in (f"A{e}", f"B{e}"):
            assert torch.equal(together[name], alone[name]), name


def test_an_adapter_without_rows_has_exactly_zero_gradients(backend: str, poisoned) -> None:
    found = run(make([0, 5, -1, 0], p=0.1), backend)
    for e in (1, 2, 3, 4, 6):
        assert not found[f"A{e}"].any() and not found[f"B{e}"].any()
        assert found[f"A{e}"].shape == (RANKS[e], 65)
    assert found["A0"].any() and found["B5"].any()


def test_stacked_factors_are_read_up_to_their_true_rank(backend: str) -> None:
    batch = make(ROUTINGS["interleaved"])
    E, R = len(RANKS), max(RANKS)
    A, B = torch.full((E, R, 65), float("nan")), torch.full((E, 33, R), float("nan"))
    for e, r in enumerate(RANKS):
        A[e, :r], B[e, :, :r] = batch.A[e], batch.B[e]
    A.requires_grad_(), B.requires_grad_()
    y = multi_lora_linear(
        batch.x,
        batch.W,
        A,
        B,
        torch.tensor(batch.scaling),
        batch.ids.int(),
        ranks=RANKS,
        bias=batch.bias,
        backend=backend,
    )
    y.backward(batch.dy)
    expected = run(batch, backend)
    torch.testing.assert_close(y, expected["y"])
    for e, r in enumerate(RANKS):
        torch.testing.assert_close(A.grad[e, :r], expected[f"A{e}"])
        torch.testing.assert_close(B.grad[e, :, :r], expected[f"B{e}"])
        assert not A.grad[e, r:].any() and not B.grad[e, :, r:].any()


@pytest.mark.parametrize("needs", [("x",), ("A",), ("B",), ("bias",)])
def test_only_what_is_needed_has_a_gradient(backend: str, needs: tuple[str, ...]) -> None:
    batch = make(ROUTINGS["interleaved"], p=0.1)
    found, expected = run(batch, backend, needs), run(batch, backend)
    assert {name.rstrip("0123456789") for name in found} == {"y", *needs}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_strides_and_leading_dimensions(backend: str) -> None:
    batch = make([0, 3, -1, 3, 4, 4], p=0.1)
    expected = run(batch, backend)
    transposed = dataclasses.replace(batch, x=batch.x.T.contiguous().T, dy=batch.dy.T.contiguous().T)
    torch.testing.assert_close(run(transposed, backend), expected)
    expanded = dataclasses.replace(batch, dy=batch.dy[:1].expand(6, -1))
    copied = dataclasses.replace(batch, dy=batch.dy[:1].repeat(6, 1))
    torch.testing.assert_close(run(expanded, backend), run(copied, backend))
    y = multi_lora_linear(
        batch.x.view(2, 3, 65), batch.W, batch.A, batch.B, batch.scaling, plan_rows(batch.ids), bias=batch.bias,
        dropout_p=batch.p, rng_states=batch.states, backend=backend,
    )  # fmt: skip
    assert y.shape == (2, 3, 33) and torch.equal(y.view(6, 33), expected["y"])


def test_no_rows_and_no_adapters(backend: str) -> None:
    batch = make([])
    found = run(batch, backend)
    assert found["y"].shape == (0, 33) and found["x"].shape == (0, 65)
    assert all(not found[f"A{e}"].any() and found[f"A{e}"].shape == batch.A[e].shape for e in range(len(RANKS)))


def test_threads_do_not_change_a_bit_of_y_and_runs_repeat(backend: str) -> None:
    batch = make(ROUTINGS["interleaved"] * 2, torch.bfloat16, p=0.2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, second = run(batch, backend), run(batch, backend)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_nan_in_one_adapter_stays_with_its_rows(backend: str) -> None:
    batch = make(ROUTINGS["interleaved"])
    batch.A[3][2, 5] = float("nan")
    bad = run(batch, backend)["y"].isnan().any(1)
    assert torch.equal(bad, batch.ids == 3)
    batch = make(ROUTINGS["interleaved"])
    batch.x[4, 7] = float("inf")
    bad = ~run(batch, backend)["y"].isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [4]


def test_operators_pass_opcheck(backend: str) -> None:
    batch = make([0, 3, -1, 3], ranks=(2, 3, 1, 4))
    call = call_of_batch(batch, backend)
    check_operators(call, batch.x, [batch.dy], all_of(call, updates=[True, True, False, True]))


def test_gradients_of_no_rows_lie_as_the_operator_promises(backend: str) -> None:
    """Row-major, also where the factors are not."""
    batch = make([], ranks=(2, 3))
    A, B = ([factor.T.contiguous().T for factor in factors] for factors in (batch.A, batch.B))
    call = call_of_batch(dataclasses.replace(batch, A=A, B=B), backend, bias=False)
    check_operators(call, batch.x, [batch.dy], all_of(call))


def test_an_adapter_on_another_device_is_an_error(backend: str) -> None:
    """Layers of a bank come here directly; a backend would read memory that is not there."""
    batch = make([0, 1, -1], ranks=(2, 3))
    (base,), (first, second), *_, rows = call_of_batch(batch, backend)
    updates = [first, second._replace(lora_B=second.lora_B.to("meta"))]
    with pytest.raises(ValueError, match="update 1: .*lora_A on cpu, lora_B on meta"):
        run_rows(batch.x, *base, updates, rows)


def test_autocast_casts_x_and_the_base(backend: str) -> None:
    batch = make([0, 3, -1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        y = multi_lora_linear(batch.x, batch.W, batch.A, batch.B, batch.scaling, batch.ids, backend=backend)
    narrow = multi_lora_linear(
        batch.x.bfloat16(), batch.W.bfloat16(), batch.A, batch.B, batch.scaling, batch.ids, backend=backend
    )
    assert y.dtype == torch.bfloat16 and torch.equal(y, narrow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.tensor([0, 7])), "adapter id 7 is out of range for 7 adapters"),
        (dict(ids=torch.tensor([0, -2])), "adapter id -2 is below -1"),
        (dict(ids=torch.tensor([0])), "1 adapter ids for the 2 rows"),
        (dict(scaling=[1.0]), "scaling is one number for each of the 7"),
        (dict(scaling=[float("inf")] * 7), "adapter 0: scaling=inf"),
        (dict(p=[1.5] * 7), "adapter 0: dropout_p=1.5"),
        (dict(states=[(0, 0)]), "rng_states has 1 entries"),
        (dict(A=[torch.ones(4, 64)] * 7), r"adapter 0: lora_A is \[R, 65\]"),
        (dict(B=[torch.ones(33, 5)] * 7), r"adapter 0: lora_B is \[33, 4\]"),
    ],
)
def test_errors_name_the_value(backend: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(make([0, 3]), **change), backend)


def test_a_plan_of_a_larger_batch_is_refused(backend: str) -> None:
    batch, plan = make([0, 3, -1]), plan_rows(torch.tensor([0, 3, -1, 2]))
    with pytest.raises(ValueError, match="rows are numbers of x's 3 rows, from 0 on, got 0 to 3"):
        multi_lora_linear(batch.x, batch.W, batch.A, batch.B, batch.scaling, plan, backend=backend)


def test_a_factor_that_has_lost_its_shape_is_refused(backend: str) -> None:
    """Layers of a bank have checked their factors when these were added, and somebody may have set ``.data`` since."""
    batch = make([0, 1, -1], ranks=(2, 3))
    (base,), updates, *_, rows = call_of_batch(batch, backend)
    batch.A[1].data = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"update 1: lora_A is \[R, 65\].*got \(3, 8\)"):
        run_rows(batch.x, *base, updates, rows)


def test_dtypes_and_kinds_are_checked(backend: str) -> None:
    batch = make([0, 3])
    with pytest.raises(TypeError, match="adapter ids are int64 or int32, not torch.float32"):
        run(dataclasses.replace(batch, ids=batch.ids.float()), backend)
    with pytest.raises(TypeError, match="lora_A torch.float64"):
        run(dataclasses.replace(batch, A=[A.double() for A in batch.A], B=[B.double() for B in batch.B]), backend)
    with pytest.raises(ValueError, match="weight requires grad"):
        run(dataclasses.replace(batch, W=batch.W.clone().requires_grad_()), backend)


def test_a_backend_without_these_products_says_so(backend: str) -> None:
    factors = (torch.ones(2, 4), torch.ones(3, 2))
    call = bank_of(torch.ones(3, 4), None, [factors], [Span(0, 1, 0, 0)], torch.arange(1))
    problem = call.problem(1, torch.float32)
    assert dispatch.backend_named(backend).supports(problem) is None
    there = dataclasses.replace(problem, device_type="cuda")
    triton = dispatch.backend_named("triton")
    assert triton.supports(there) is None
    assert triton.supports(dataclasses.replace(there, dropout=True)) is None
