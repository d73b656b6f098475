"""What a patched layer does with an x that is not an ordinary one."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted, linears

import peftkern


def test_an_x_of_the_wrong_width_is_pefts_own_error(calls):
    """The fast path hands x to the kernels as it is, so the predicate must see to its shape."""
    model = adapted()
    peftkern.patch(model)
    layer = next(iter(linears(model).values()))
    for shape in [(3, layer.in_features + 1), (2, 3, layer.in_features // 2), (layer.in_features - 1,), ()]:
        with pytest.raises(RuntimeError):
            layer(torch.zeros(shape))
    assert not calls
