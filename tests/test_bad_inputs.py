"""Bad inputs and faults: what a user gets is right, or an error that names what does not fit.

More of them: autocast, repeated backward and tensors changed in place in test_torch_integration.py, subsets of
gradients in test_products.py, missing packages in test_missing_backends.py, files in test_hostile_adapter_files.py.
"""

from __future__ import annotations

import pytest
import torch
from conftest import NAMES, TRAINABLE, Case, Target, check, judge, make, run
from torch import Tensor

import peftkern
from peftkern.call import Problem
from peftkern.ops import dispatch
from peftkern.testing.numerics import assert_as_good_as

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)]
dtypes = pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)], ids=str)
@dtypes
def test_no_tokens(shape, dtype, adapter, target: Target, poisoned, monkeypatch):
    backend = type(dispatch.backend_named(target.backend))
    monkeypatch.setattr(backend, "forward", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(backend, "backward", lambda *_: pytest.fail("launched"))
    case = Case(0, 24, 16, 4, dtype, adapter, 0.5, bias=True, lora_bias=True)
    t = make(case, target.device)
    t.x, t.dy = t.x.new_empty(*shape, 24), t.dy.new_empty(*shape, 16)
    found = run(case, t, target.backend)
    assert found["y"].shape == (*shape, 16) and found["y"].dtype == dtype and found["x"].shape == (*shape, 24)
    for name in NAMES[2:]:
        assert found[name].dtype == getattr(t, name).dtype and torch.equal(found[name], torch.zeros_like(found[name]))


@pytest.mark.parametrize("sizes", [(5, 17, 9, 3), (33, 1, 1, 1), (2, 63, 31, 5), (65, 127, 129, 15)], ids=str)
@dtypes
def test_extents_that_are_multiples_of_nothing(sizes, dtype, adapter, target: Target, poisoned):
    check(Case(*sizes, dtype, adapter, 0.1, bias=True, lora_bias=True), target)


@dtypes
def test_rank_zero_is_the_base_alone(dtype, adapter, target: Target, poisoned):
    if target.backend == "cpp":
        assert "r = 0" in dispatch.backend_named("cpp").supports(Problem("cpu", 9, 24, 16, 0, dtype, adapter))
    backend = "auto" if target.backend == "cpp" else target.backend
    case = Case(9, 24, 16, 0, dtype, adapter, 0.3, bias=True)
    t = make(case, target.device)
    found = run(case, t, backend)
    assert torch.equal(found["y"], torch.nn.functional.linear(t.x, t.weight, t.bias))
    assert torch.equal(found["x"], t.dy @ t.weight)
    assert found["lora_A"].shape == (0, 24) and found["lora_B"].shape == (16, 0)


@pytest.mark.parametrize("R", [1, 2, 3, 7, 24, 512])
def test_ranks_from_one_to_512(R, target: Target, poisoned):
    check(Case(21, 40, 56, R, BF16, F32, 0.1, lora_bias=True), target)


def far_apart(tensor: Tensor, storage: Tensor, start: int) -> Tensor:
    """The same values, rows 2^30 elements apart in ``storage``, of which only the pages in use take memory."""
    view = storage.as_strided(tensor.shape, (2**30, 1), start)
    return view.copy_(tensor)


def test_rows_that_lie_more_than_2_31_elements_apart(backend):
    case = Case(4, 24, 16, 8, BF16, F32, 0.2)
    t = make(case)
    near = run(case, t, backend)
    storage = torch.empty(3 * 2**30 + 4096, dtype=BF16)
    t.x, t.dy = far_apart(t.x, storage, 0), far_apart(t.dy, storage, 1024)
    assert 3 * t.x.stride(0) > 2**31
    far = run(case, t, backend)
    for name in NAMES[:4]:
        assert torch.equal(near[name], far[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("sizes", [(2**19 + 3, 4104, 16), (2**19 + 3, 16, 4104)], ids=["x and dx", "y and dy"])
def test_more_than_2_31_elements(sizes):
    """Rows are independent: the last ones of the whole are those of a small call on them alone."""
    M, K, N = sizes
    tail = 3
    x, dy = (torch.randn(M, width, device="cuda", dtype=BF16) for width in (K, N))
    W, A = torch.randn(N, K, device="cuda", dtype=BF16) * K**-0.5, torch.randn(8, K, device="cuda") * K**-0.5
    B = torch.randn(N, 8, device="cuda")

    def call(x, dy):
        x.requires_grad_()
        y = peftkern.lora_linear(x, W, A, B, backend="triton")
        return y.detach(), *torch.autograd.grad(y, x, dy)

    whole, part = call(x, dy), call(x.detach()[-tail:].clone(), dy[-tail:])
    for large, small in zip(whole, part, strict=True):
        assert (large[-tail:].double() - small.double()).norm() <= 2**-7 * small.double().norm()  # one bf16 rounding


VIEWS = {
    "transposed": lambda v: v.t().contiguous().t(),
    "sliced rows": lambda v: v.repeat_interleave(2, 0)[::2],
    "sliced columns": lambda v: torch.cat([v, v], 1)[:, : v.shape[1]],
    "every second column": lambda v: v.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "dy"])
def test_strided_operands(name, view, target: Target, poisoned):
    case = Case(34, 48, 40, 8, BF16, F32, 0.2, bias=True)
    t = make(case, target.device)
    setattr(t, name, VIEWS[view](getattr(t, name)))
    judge(case, target.backend, (t, run(case, t, target.backend)))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_operands(name, dim, target: Target, poisoned):
    case = Case(34, 48, 40, 8, F32, F32, 0.2)
    t = make(case, target.device)
    tensor = getattr(t, name)
    setattr(t, name, tensor.narrow(dim, 0, 1).expand_as(tensor))
    assert getattr(t, name).stride(dim) == 0
    judge(case, target.backend, (t, run(case, t, target.backend)))


def test_gradient_of_a_sum_is_expanded(target: Target, poisoned):
    case = Case(34, 48, 40, 8, F32, F32, 0.2, bias=True, lora_bias=True)
    t = make(case, target.device)
    t.dy = torch.ones((), device=target.device).expand_as(t.dy)
    judge(case, target.backend, (t, run(case, t, target.backend)))


def test_strided_vectors_and_rng_state(target: Target, poisoned):
    case = Case(34, 48, 40, 8, F32, F32, 0.2, bias=True, lora_bias=True)
    t = make(case, target.device)
    contiguous = run(case, t, target.backend)
    for name in ("bias", "lora_bias", "rng_state"):
        setattr(t, name, getattr(t, name).repeat_interleave(2)[::2])
    strided = run(case, t, target.backend)
    for name in NAMES:
        assert torch.equal(contiguous[name], strided[name]), name


@dtypes
def test_storage_offsets_that_are_not_aligned(dtype, adapter, target: Target, poisoned):
    case = Case(34, 48, 40, 8, dtype, adapter, 0.2, bias=True, lora_bias=True)
    t = make(case, target.device)
    for name in (*TRAINABLE, "weight", "dy"):
        tensor = getattr(t, name)
        shifted = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        assert shifted.data_ptr() % 16 == tensor.element_size()
        setattr(t, name, shifted)
    judge(case, target.backend, (t, run(case, t, target.backend)))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias", "lora_bias"])
def test_devices_that_differ(name):
    t = make(Case(3, 8, 6, 2, bias=True, lora_bias=True))
    setattr(t, name, getattr(t, name).to("meta"))
    with pytest.raises(ValueError, match="all tensors must be on one device") as caught:
        peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, bias=t.bias, lora_bias=t.lora_bias)
    for other in ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias"):
        assert f"{other} on {'meta' if other == name else 'cpu'}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in (*TRAINABLE, "weight") for dtype in (torch.int64, torch.float64, F16)]
    + [("x", F32), ("weight", F32), ("bias", F32), ("lora_A", BF16), ("lora_bias", BF16)],
    ids=str,
)
def test_mixed_dtypes_are_a_type_error_that_lists_them(name, dtype):
    t = make(Case(3, 8, 6, 2, BF16, F32, bias=True, lora_bias=True))
    setattr(t, name, getattr(t, name).to(dtype))
    with pytest.raises(TypeError, match="must share one floating dtype") as caught:
        peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, bias=t.bias, lora_bias=t.lora_bias)
    for other in ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias"):
        assert f"{other} {getattr(t, other).dtype}" in str(caught.value)


WRONG_SHAPES = {
    "x": [(3, 9), ()],
    "weight": [(6,), (6, 8, 1), (6, 9)],
    "lora_A": [(2, 9), (8,), (3, 8)],
    "lora_B": [(6, 3), (5, 2), (6,)],
    "bias": [(5,), (6, 1), ()],
    "lora_bias": [(1,), (7,)],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
def test_wrong_shapes_are_value_errors_with_both_shapes(name, shape):
    t = make(Case(3, 8, 6, 2, bias=True, lora_bias=True))
    setattr(t, name, torch.zeros(shape))
    with pytest.raises(ValueError) as caught:
        peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, bias=t.bias, lora_bias=t.lora_bias)
    assert str(shape) in str(caught.value) and "6" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(precision="half"), ValueError, "precision='half' is not one of"),
        (dict(backend="cuda"), ValueError, "backend='cuda' is not one of auto, triton, cpp, reference"),
        (dict(scaling=inf), ValueError, "scaling=inf is not finite"),
        (dict(scaling=torch.ones(1)), ValueError, "0-d and floating"),
        (dict(scaling=torch.tensor(2)), ValueError, "0-d and floating"),
        (dict(scaling=torch.tensor(2.0, requires_grad=True)), ValueError, "scaling is not trained"),
        (dict(bias=[0.0] * 6), TypeError, "bias is not a tensor but list"),
        (dict(weight=torch.zeros(6, 8, requires_grad=True)), ValueError, "weight requires grad"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(change, error, words):
    t = make(Case(3, 8, 6, 2))
    with pytest.raises(error, match=words):
        peftkern.lora_linear(**(dict(x=t.x, weight=t.weight, lora_A=t.lora_A, lora_B=t.lora_B) | change))


# ---------------------------------------------------------------------------------------------------- NaN and infinity


def row_18(target: Target, name: str, at: tuple[int, int], value: float, p: float = 0.0):
    """(clean, dirty) results of an odd-sized call, dirty with ``value`` at one place of one operand."""
    case = Case(19, 37, 23, 5, F32, F32, p)
    t = make(case, target.device)
    clean = run(case, t, target.backend)
    getattr(t, name)[at] = value
    return clean, run(case, t, target.backend)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("end", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "dy"])
def test_nan_and_inf_go_where_the_mathematics_says(name, end, value, target: Target, poisoned):
    clean, dirty = row_18(target, name, (end, end), value)
    everywhere, row, column = slice(None), (end, slice(None)), (slice(None), end)
    reached = {  # which part of each result depends on that element; None: nothing
        "x": {"y": row, "x": None, "lora_A": column, "lora_B": everywhere},
        "weight": {"y": column, "x": column, "lora_A": None, "lora_B": None},
        "lora_A": {"y": everywhere, "x": column, "lora_A": None, "lora_B": column},
        "lora_B": {"y": column, "x": everywhere, "lora_A": row, "lora_B": None},
        "dy": {"y": None, "x": row, "lora_A": everywhere, "lora_B": row},
    }[name]
    for result, index in reached.items():
        mask = torch.zeros_like(dirty[result], dtype=torch.bool)
        if index is not None:
            mask[index] = True
        assert not dirty[result][mask].isfinite().any(), f"{result} hides it"
        assert torch.equal(dirty[result][~mask], clean[result][~mask]), f"{result} spreads it"


@pytest.mark.parametrize("value", [nan, inf])
def test_a_dropped_nan_is_zero(value, target: Target, poisoned):
    """Seen in dB = c dy^T D(x) A^T and dA = c t^T D(x), which read the dropped x alone."""
    p = 0.5
    state = make(Case(19, 37, 23, 5)).rng_state
    kept = peftkern.testing.dropout_mask(19, 37, p, state)
    (drop, keep) = ((~kept[-1]).nonzero()[-1].item(), kept[-1].nonzero()[-1].item())
    _, zero = row_18(target, "x", (-1, drop), 0.0, p)
    _, dropped = row_18(target, "x", (-1, drop), value, p)
    for name in ("x", "lora_A", "lora_B"):
        assert torch.equal(dropped[name], zero[name]), name
    assert not dropped["y"][-1].isfinite().any()  # the base product sees the undropped x
    _, seen = row_18(target, "x", (-1, keep), value, p)
    assert not seen["lora_B"].isfinite().any()


def test_a_dropped_nan_of_the_update_is_zero_in_dx(target: Target, poisoned):
    p = 0.5
    kept = peftkern.testing.dropout_mask(19, 37, p, make(Case(19, 37, 23, 5)).rng_state)[:, -1].to(target.device)
    clean, dirty = row_18(target, "lora_A", (0, -1), nan, p)
    assert torch.equal(dirty["x"][:, -1].isnan(), kept)
    assert torch.equal(dirty["x"][~kept], clean["x"][~kept]) and torch.equal(dirty["x"][:, :-1], clean["x"][:, :-1])


# ------------------------------------------------------------------------------- zero scaling, fp16 out of range


@dtypes
def test_scaling_zero_and_a_zeroed_adapter_are_the_base(dtype, adapter, target: Target, poisoned):
    case = Case(34, 48, 40, 8, dtype, adapter, 0.2, bias=True, scaling=0.0)
    t = make(case, target.device)
    x, W, bias, dy = (tensor.double() for tensor in (t.x, t.weight, t.bias, t.dy))
    found = run(case, t, target.backend)
    assert_as_good_as(found["y"], torch.nn.functional.linear(t.x, t.weight, t.bias), x @ W.T + bias)
    assert_as_good_as(found["x"], t.dy @ t.weight, dy @ W)
    assert not (found["lora_A"].any() or found["lora_B"].any())
    t.lora_B.zero_()  # the first step of every LoRA training
    zeroed = run(case, t, target.backend, scaling=2.0)
    assert all(torch.equal(zeroed[name], found[name]) for name in ("y", "x"))  # not one bit of the adapter
    assert not zeroed["lora_A"].any() and zeroed["lora_B"].any()


@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_zero_times_infinity_is_nan_as_in_eager(scaling, target: Target):
    case = Case(3, 8, 6, 2, scaling=0.0)
    t = make(case, target.device)
    t.lora_B[1] = inf
    y = run(case, t, target.backend, scaling=0.0 if scaling == "float" else torch.tensor(0.0))["y"]
    assert y[:, 1].isnan().all() and y[:, 0].isfinite().all() and y[:, 2:].isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["base", "fp32"])
@pytest.mark.parametrize("adapter", [F16, F32], ids=["fp16", "fp32"])
def test_s_and_t_beyond_the_range_of_fp16(adapter, precision, p, target: Target):
    """s, or t, is 4 times fp16's largest number; y, or dx, is 4 for each surviving element: exact in fp16."""
    case = Case(4, 64, 64, 2, F16, adapter, p, precision=precision, scaling=2.0**-4)
    kept = peftkern.testing.dropout_mask(4, 64, p, make(case).rng_state).to(target.device)
    for large in ("forward", "backward"):
        t = make(case, target.device)
        inner, outer = (t.lora_A, t.lora_B) if large == "forward" else (t.lora_B, t.lora_A)
        near, far = (t.x, t.dy) if large == "forward" else (t.dy, t.x)
        near.fill_(64), inner.fill_(64), outer.fill_(2.0**-8), far.fill_(2.0**-10), t.weight.zero_()
        found = run(case, t, target.backend)
        assert all(found[name].isfinite().all() for name in NAMES[:4]), large
        survivors = kept.sum(1, keepdim=True).expand(4, 64) if large == "forward" else kept * 64
        result = found["y" if large == "forward" else "x"]
        assert torch.equal(result, (survivors * (4.0 if p else 2.0)).half()), large
