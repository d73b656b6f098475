"""DoRA by the Triton kernels, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from test_dora import STATE, found, fresh, leaves_of, ours, plain

from peftkern.backends.triton.backend import TritonBackend
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned"),
]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
def test_y_and_every_gradient_against_fp64(dtypes, p):
    case = Case(37, 40, 24, 4, *dtypes, p=p, bias=True)
    leaves, W, dy = leaves_of(case)
    mine, peer, wide = fresh(leaves), fresh(leaves), fresh(leaves, F64)
    results = found(ours(mine, W, "triton", p), mine, dy)
    peers = found(plain(peer, W, case.dtype, p), peer, dy)
    truth = found(plain(wide, W.double(), F64, p, F64), wide, dy.double())
    assert results.keys() == truth.keys()
    for name, value in results.items():
        assert_as_good_as(value, peers[name], truth[name], f"{name} of {case}")


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_what_is_kept_is_the_published_masks(dtype, p):
    """Also of a transposed x, in tiles that overhang, and with NaN where nothing is kept."""
    x = torch.randn(35, 150, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, ::3] = torch.nan
    expected = torch.where(dropout_mask(35, 150, p, STATE), x, torch.zeros_like(x))
    for rows in (x, x.T.contiguous().T):
        result = TritonBackend().kept(rows, p, STATE)
        assert result.is_contiguous() and torch.equal(result.nan_to_num(123.0), expected.nan_to_num(123.0))
