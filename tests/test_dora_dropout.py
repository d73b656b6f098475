"""DoRA with dropout: what is dropped, the product that is dropped as a whole, memory, and PEFT's layers."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Case, Target, assert_equal, linears, logits, make, pooled, step
from test_dora import CASES, STATE, dora, fresh, leaves_of, ours
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from benchmarks.training import with_published_dropout
from peftkern.ops import dispatch, schema
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import DenseWeight

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def test_memory_held_is_x_s_h_and_no_mask(target: Target):
    leaves, W, dy = leaves_of(CASES[5], target.device)
    case, v = CASES[5], fresh(leaves)
    y = ours(v, W, target.backend, case.p)
    operands = [W, *v.values()]
    made = [t for t in y.grad_fn.saved_tensors if t is not None and not any(t is one for one in operands)]
    M, N, R = case.M, case.N, case.R
    assert sorted(t.numel() for t in made) == sorted([M * N, M * R, N, N, 2])  # h, s, the norm, g, RNG integers
    assert sum(t.numel() for t in y.grad_fn.saved_tensors if t is not None and t.shape == (M, case.K)) == M * case.K


def test_opcheck():
    t = make(Case(5, 70, 24, 3))
    for rows, backward in ((t.x, False), (t.dy, True)):
        torch.library.opcheck(
            schema.dropped_product, (rows, t.weight, None, [], "dense", [24, 70, 0, 0], 0.3, STATE, backward, "")
        )


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_what_is_kept_is_the_published_masks(dtype, target: Target, poisoned):
    """Bit for bit, unscaled, of any strides; a NaN is dropped as a 0, and one that is kept is a NaN."""
    kept, state = dispatch.backend_named(target.backend).kept, STATE.to(target.device)
    for M, K, p in ((1, 1, 0.5), (5, 64, 0.1), (9, 515, 0.3), (33, 1130, 0.9999), (4, 66, 1.0), (3, 40, 1e-4)):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(target.device, dtype)
        x[:, ::3] = torch.nan
        expected = torch.where(dropout_mask(M, K, p, state), x, torch.zeros_like(x))
        for rows in (x, x.T.contiguous().T, torch.stack([x, x], 1)[:, 0]):
            result = kept(rows, p, state)
            assert result.dtype == dtype and result.is_contiguous()
            assert torch.equal(result.nan_to_num(123.0), expected.nan_to_num(123.0))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("M", [1, 3, 70])
@pytest.mark.parametrize("conv1d", [False, True], ids=["", "Conv1D"])
def test_the_dropped_product(M, dtype, conv1d, target: Target, poisoned):
    """K(x) W^T and K(dy W), of rows that are not contiguous either; a row of NaN stays in its row."""
    t, state = make(Case(M, 130, 57, 1, dtype), target.device), STATE.to(target.device)
    W = t.weight.T.contiguous().T if conv1d else t.weight
    keep, weight = dropout_mask(M, 130, 0.4, state), schema.weight_arguments(DenseWeight(W))
    for name, rows, backward in (("forward", t.x, False), ("backward", t.dy, True)):
        wide, w = rows.double(), W.double()
        truth = torch.where(keep, wide @ w, 0.0) if backward else torch.where(keep, wide, 0.0) @ w.T
        zero = rows.new_zeros(())
        peer = torch.where(keep, rows @ W, zero) if backward else torch.where(keep, rows, zero) @ W.T
        for strided in (rows, rows.T.contiguous().T):
            result = schema.dropped_product(strided, *weight, 0.4, state, backward, target.backend)
            assert result.dtype == dtype
            assert_as_good_as(result, peer, truth, name)
    assert schema.dropped_product(t.x[:0], *weight, 0.4, state, False, target.backend).shape == (0, 57)


WRONG = [
    (dict(rows=torch.ones(3, 5)), ValueError, r"\[M, 4\] .*\(3, 5\)"),
    (dict(rows=torch.ones(3, 4), backward=True), ValueError, r"\[M, 6\] .*\(3, 4\)"),
    (dict(rows=torch.ones(3, 4).bfloat16()), TypeError, "bfloat16"),
    (dict(rows=torch.ones(3, 4, device="meta")), ValueError, "rows on meta"),
    (dict(rng_state=STATE[:1]), ValueError, r"\(1,\)"),
    (dict(rng_state=STATE.int()), ValueError, "int32"),
    (dict(rng_state=torch.zeros(4, dtype=torch.int64)[::2]), ValueError, r"stride \(2,\)"),
]


@pytest.mark.parametrize(("changed", "error", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_dropped_product_of_what_does_not_fit_is_named(changed, error, words, backend):
    fits = dict(rows=torch.ones(3, 4), rng_state=STATE, backward=False)
    with pytest.raises(error, match=words):
        schema.dropped_product(
            w_data=torch.ones(6, 4), w_scale=None, w_tables=[], w_format="dense", w_facts=[6, 4, 0, 0], dropout_p=0.5,
            backend=backend,
            **(fits | changed),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("base_bias", [False, True], ids=["", "bias"])
def test_dropout_is_pefts_with_the_same_mask(dtype, base_bias, calls):
    model = dora(dtype, lora_dropout=0.2, base_bias=base_bias).train()
    twin = with_published_dropout(model)
    exact = copy.deepcopy(twin).double()
    expected, truth = step(twin), step(exact)
    assert len(peftkern.patch(model).fast) == 14
    results = step(model)
    assert len(calls) == 14 and results.keys() == expected.keys()
    assert_as_good_as(pooled(results, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")
    again, other = step(model), step(model, 1)
    assert_equal(again, results)
    assert not torch.equal(other["loss"], results["loss"])


def test_dropout_is_off_by_the_layers_own_mode_or_dropouts(calls):
    """PEFT asks the layer first: a dropout that alone is in training drops nothing."""
    plain, patched = dora(lora_dropout=0.3).eval(), dora(lora_dropout=0.3).eval()
    peftkern.patch(patched)
    for model in (plain, patched):
        for layer in linears(model).values():
            layer.lora_dropout.train()
    torch.testing.assert_close(logits(patched), logits(plain))
    for model in (plain, patched):
        model.train()
        for layer in linears(model).values():
            layer.lora_dropout.eval()
    torch.testing.assert_close(logits(patched), logits(plain))
    assert len(calls) == 28


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_recomputes_the_same_mask(use_reentrant, calls):
    layer = next(iter(linears(dora(lora_dropout=0.4)).values()))
    holder = nn.ModuleList([layer]).train()
    peftkern.patch(holder)
    x, results = torch.randn(9, 32, requires_grad=True), []
    for run in (layer, lambda rows: checkpoint(layer, rows, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        holder.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad} | gradients)
    assert_equal(results[1], results[0])
    assert len(calls) == 3
