"""Layers that read one x by the Triton kernels, in the interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import pytest
import torch
from test_shared_input_operators import exact_dx, members, together

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dx_is_accumulated_in_one_buffer(dtype):
    layers = members(dtype, M=19, K=40)[:3]
    _, dx = together(layers, "triton")
    _, peer = together(layers, "reference")
    truth = sum(exact_dx(case, t) for case, t in layers)
    assert (dx.double() - truth).norm() <= 2 * (peer.double() - truth).norm() + 1e-6 * truth.norm()
