"""fp32 adapters beside an fp16 base, of any size: no factor is lost, nor made infinite, where fp16 would not hold it.

A step of warm-up at a learning rate of 1e-6 leaves |B| near 1e-6; fp16's digits end at 6e-8, its range at 65504.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import Case, make, randomise, run, run_truth
from torch import Tensor, nn

import peftkern

F16, F32 = torch.float16, torch.float32
SIZES = [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e3]
UNITS = 2 * torch.finfo(F16).eps  # of what is rounded to fp16 once or twice: y, dx, and factors by default


def errors_at(size: float, factor: str, backend: str, case: Case) -> dict[str, float]:
    """y and the gradients against fp64, where the scaling brings the update to the size of the frozen product's."""
    t = make(case)
    setattr(t, factor, getattr(t, factor) * size)
    found, truth = run(case, t, backend, scaling=1 / size), run_truth(dataclasses.replace(case, scaling=1 / size), t)
    return {name: relative(found[name], truth[name]) for name in ("y", "x", "lora_A", "lora_B")}


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


CASES = [
    Case(40, 64, 48, 5, F16, F32),
    Case(3, 64, 48, 5, F16, F32, p=0.2),
    Case(40, 64, 48, 5, F16, F32, weight_format="nf4"),
    Case(2, 64, 48, 5, F16, F32, weight_format="nf4"),
    Case(40, 64, 48, 5, F16, F32, precision="fp32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("size", SIZES)
def test_no_factor_is_lost(size, factor, case, backend):
    found = errors_at(size, factor, backend, case)
    assert max(found.values()) <= UNITS, found
    if case.precision == "fp32":
        assert max(found["lora_A"], found["lora_B"]) <= UNITS**2, found


def batch_errors_at(size: float, backend: str) -> list[float]:
    """The same of rows that belong to two adapters or to none."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 64), (48, 64), (20, 48), (5, 64), (48, 5), (3, 64), (48, 3))
    x, W, dy, *factors = (torch.randn(shape, generator=generator) for shape in shapes)
    x, W, dy, ids = x.half(), W.half(), dy.half(), torch.arange(20) % 3 - 1
    factors = [factor * (size if i % 2 else 1) for i, factor in enumerate(factors)]

    def step(wide: bool) -> list[Tensor]:
        leaves = [(one.double() if wide else one).detach().requires_grad_() for one in (x, *factors)]
        if wide:
            y = leaves[0] @ W.double().T
            for e, (A, B) in enumerate(zip(leaves[1::2], leaves[2::2], strict=True)):
                mine = (ids == e).double().unsqueeze(1)
                y = y + mine * (leaves[0] @ A.T @ B.T) / size
        else:
            factors_of, c = (leaves[1::2], leaves[2::2]), [1 / size] * 2
            y = peftkern.multi_lora_linear(leaves[0], W, *factors_of, c, ids, backend=backend)
        y.backward(dy.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    return [relative(own, truth) for own, truth in zip(step(False), step(True), strict=True)]


@pytest.mark.parametrize("size", SIZES)
def test_nor_in_a_batch_of_several_adapters(size, backend):
    found = batch_errors_at(size, backend)
    assert max(found) <= UNITS, found


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-5])
def test_the_warm_up_of_a_patched_layer(size, dora):
    """dA of PEFT's layer, with its own scaling."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["0"], use_dora=dora)
    model = randomise(peft.get_peft_model(nn.Sequential(nn.Linear(64, 64, dtype=F16)), config))
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data.mul_(size)
    x, dy = torch.randn(32, 64).half(), torch.randn(32, 64).half()
    truth = copy.deepcopy(model).double()
    truth(x.double()).backward(dy.double())
    assert peftkern.patch(model).fast
    model(x).backward(dy)
    exact = truth.base_model.model[0].lora_A["default"].weight.grad
    assert relative(layer.lora_A["default"].weight.grad, exact) <= UNITS
