"""torch.func, forward-mode AD, torch.export, torch.jit: right, in PyTorch's own operators, or a clear error."""

from __future__ import annotations

import pytest
import torch
from conftest import TOKENS, Case, adapted, logits, make
from torch import Tensor, nn
from torch.autograd import forward_ad

import peftkern
from peftkern.nn import LoRALinear

CASE = Case(5, 8, 6, 3, torch.float64, p=0.4, bias=True, lora_bias=True)


def fused(x: Tensor, A: Tensor, t) -> Tensor:
    vectors = dict(bias=t.bias, lora_bias=t.lora_bias, dropout_p=CASE.p, rng_state=t.rng_state)
    return peftkern.lora_linear(x, t.weight, A, t.lora_B, CASE.scaling, **vectors)


def plain(x: Tensor, A: Tensor, t) -> Tensor:
    keep = peftkern.testing.dropout_mask(CASE.M, CASE.K, CASE.p, t.rng_state).double()
    dropped = x * keep * (65536 / (65536 - round(65536 * CASE.p)))
    return x @ t.weight.T + t.bias + CASE.scaling * (dropped @ A.T @ t.lora_B.T + t.lora_bias)


def loss(function):
    return lambda x, A, t: function(x, A, t).pow(3).sum()


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(loss(f), argnums=(0, 1))(t.x, t.lora_A, t),
    "jacrev": lambda f, t: torch.func.jacrev(f, argnums=1)(t.x, t.lora_A, t),
    "jvp": lambda f, t: torch.func.jvp(lambda x: f(x, t.lora_A, t), (t.x,), (t.x.flip(0),)),
    "hessian": lambda f, t: torch.func.hessian(loss(f), argnums=1)(t.x, t.lora_A, t),
    "vmap": lambda f, t: torch.vmap(lambda A: f(t.x, A, t))(torch.stack([t.lora_A, -t.lora_A])),
    "per-sample gradients": lambda f, t: torch.vmap(torch.func.grad(loss(f)), in_dims=(0, None, None))(
        torch.stack([t.x, -t.x]), t.lora_A, t
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform):
    t = make(CASE)
    found, expected = TRANSFORMS[transform](fused, t), TRANSFORMS[transform](plain, t)
    torch.testing.assert_close(found, expected)


def test_vmap_over_leaves_that_require_grad():
    t = make(CASE)
    gradients = []
    for function in (fused, plain):
        A = torch.stack([t.lora_A, -t.lora_A]).requires_grad_()
        torch.vmap(lambda a, function=function: function(t.x, a, t))(A).pow(3).sum().backward()
        gradients.append(A.grad)
    torch.testing.assert_close(*gradients)


def test_forward_mode():
    t = make(CASE)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(t.x, t.x.flip(0))
        found, expected = (forward_ad.unpack_dual(f(x, t.lora_A, t)) for f in (fused, plain))
    torch.testing.assert_close(found.tangent, expected.tangent)
    torch.testing.assert_close(found.primal, expected.primal)


def test_what_stays_an_error():
    t = make(CASE)
    x = t.x.requires_grad_()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for peftkern::backward"):
        torch.autograd.grad(fused(x, t.lora_A, t), x, torch.stack([t.dy, t.dy]), is_grads_batched=True)
    y = fused(x, t.lora_A, t)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for peftkern::backward"):
        torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(torch.stack([t.dy, t.dy]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda v: peftkern.lora_linear(v, t.weight, t.lora_A, t.lora_B, dropout_p=0.5))(t.x.detach())


# --------------------------------------------------------------------------------------------------- export and trace


def layer(p: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    module = LoRALinear(8, 6, 3, 6, lora_dropout=p, lora_bias=True)
    nn.init.normal_(module.lora_B)
    return module


def operators(program: torch.export.ExportedProgram) -> str:
    return str([node.target for module in program.graph_module.modules() for node in module.graph.nodes])


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_is_plain_pytorch_and_trains(strict):
    module, x = layer(), torch.randn(4, 8)
    rows = torch.export.Dim("rows")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert "peftkern" not in operators(program)
    exported, dy = program.module(), torch.randn(7, 6)
    x = torch.randn(7, 8)
    y, expected = exported(x), module(x)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for name in ("lora_A", "lora_B", "lora_bias"):
        torch.testing.assert_close(exported.get_parameter(name).grad, module.get_parameter(name).grad)


def test_an_exported_layer_draws_a_mask_at_every_call():
    exported = torch.export.export(layer(0.5).train(), (torch.ones(4, 8),)).module()
    torch.manual_seed(1)
    first, second = exported(torch.ones(4, 8)), exported(torch.ones(4, 8))
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(exported(torch.ones(4, 8)), first)


def test_an_exported_patched_model_is_pefts(calls):
    model = adapted().eval()
    peftkern.patch(model)
    program = torch.export.export(Logits(model), (TOKENS,))
    assert not calls and "peftkern" not in operators(program)
    torch.testing.assert_close(program.module()(TOKENS), logits(model))


def test_a_trace_is_plain_pytorch():
    module = layer().eval()
    traced = torch.jit.trace(module, torch.randn(4, 8))
    assert "peftkern::" not in str(traced.inlined_graph)
    x = torch.randn(7, 8)
    torch.testing.assert_close(traced(x), module(x))
