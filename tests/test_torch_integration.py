"""What PyTorch asks of an operator: gradcheck, opcheck, the compiler, autocast, autograd's rules, a quiet import."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from calls import all_of, call_of, check_operators
from conftest import (
    ATTENTION,
    NAMES,
    ROOT,
    TRAINABLE,
    Case,
    Target,
    adapted,
    assert_close,
    grads,
    judge,
    leaves_of,
    linears,
    logits,
    make,
    pooled,
    run,
    step,
)
from torch import Tensor
from torch.utils import _pytree as pytree

import peftkern
from peftkern.call import Call, Pair, arguments
from peftkern.ops import schema
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import DenseWeight, FrozenWeight

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", [("x",), ("lora_A", "lora_B"), ("bias", "lora_bias"), TRAINABLE], ids="+".join)
def test_gradcheck(needs, p):
    t = make(Case(5, 7, 4, 3, F64, F64, p, bias=True, lora_bias=True))
    leaf = leaves_of(t, needs)

    def call(x, lora_A, lora_B, bias, lora_bias):
        return peftkern.lora_linear(
            x, t.weight, lora_A, lora_B, 1.3, bias=bias, lora_bias=lora_bias, dropout_p=p, rng_state=t.rng_state
        )

    assert torch.autograd.gradcheck(call, tuple(leaf[name] for name in TRAINABLE))


# ------------------------------------------------------------------------------------------------- the two operators

OPERAND_SETS = {
    "plain": Case(6, 24, 16, 4),
    "everything": Case(6, 24, 16, 4, BF16, F32, 0.25, bias=True, lora_bias=True, precision="fp32"),
    "int8": Case(6, 24, 16, 4, BF16, F32, 0.25, weight_format="int8"),
    "nf4": Case(6, 25, 15, 4, BF16, F32, 0.25, weight_format="nf4"),
    "rank 0": Case(6, 24, 16, 0),
    "no rows": Case(0, 24, 16, 4, bias=True, lora_bias=True),
    "odd": Case(3, 5, 7, 1, F16, F16, lora_bias=True),
}


def a_call(case: Case, t, backend: str, tensor_scaling: bool) -> Call:
    weight = t.weight if isinstance(t.weight, FrozenWeight) else DenseWeight(t.weight)
    c, tensor = (1.0, torch.tensor(1.5, device=t.x.device)) if tensor_scaling else (1.75, None)
    state = t.rng_state if case.p else None
    pair = Pair(weight, t.lora_A, t.lora_B, t.bias, t.lora_bias, c, tensor, case.p, state, case.precision)
    return call_of([pair], backend=backend)


@pytest.mark.parametrize("tensor_scaling", [False, True])
@pytest.mark.parametrize("which", OPERAND_SETS)
def test_opcheck(which, tensor_scaling, target: Target):
    case = OPERAND_SETS[which]
    backend = "auto" if case.R == 0 else target.backend
    t = make(case, target.device)
    call = a_call(case, t, backend, tensor_scaling)
    every = all_of(call)
    for needs in (every, all_of(call, True, False, [False]), every._replace(x=False, bias=[False], lora_bias=[False])):
        check_operators(call, t.x, [t.dy], needs)


@pytest.mark.parametrize("which", OPERAND_SETS)
@pytest.mark.parametrize("strided", [False, True])
def test_fake_kernels_have_the_real_shapes_strides_and_dtypes(which, strided, target: Target):
    case = OPERAND_SETS[which]
    t = make(case, target.device)
    if strided:
        t.x, t.dy = t.x.t().contiguous().t(), t.dy.t().contiguous().t()
        t.lora_A, t.lora_B = t.lora_A.t().contiguous().t(), t.lora_B.t().contiguous().t()
    call = a_call(case, t, "auto" if case.R == 0 else target.backend, False)
    given, needs = arguments(call), all_of(call)
    real = schema.forward(t.x, *given)
    real += schema.backward([t.dy], t.x, [real[1]], *given, *needs)
    with torch._subclasses.FakeTensorMode() as mode:
        x, dy, fakes = pytree.tree_map_only(Tensor, mode.from_tensor, (t.x, t.dy, given))
        fake = schema.forward(x, *fakes)
        fake += schema.backward([dy], x, [fake[1]], *fakes, *needs)
    describe = lambda v: (tuple(v.shape), v.stride() if v.numel() else None, v.dtype, v.device.type)  # noqa: E731
    assert [describe(v) for v in fake] == [describe(v) for v in real]


# ------------------------------------------------------------------------------------------------------- the compiler


def layer_of(t, case: Case, backend: str, rng_state: Tensor | None):
    def layer(x, lora_A, lora_B, bias, lora_bias):
        y = peftkern.lora_linear(
            torch.sin(x), t.weight, lora_A, lora_B, case.scaling, bias=bias, lora_bias=lora_bias,
            dropout_p=case.p, rng_state=rng_state, backend=backend,
        )  # fmt: skip
        return torch.cos(y)

    return layer


def call_layer(layer, t, dy: Tensor | None = None):
    leaf = leaves_of(t)
    return grads(layer(*(leaf[name] for name in TRAINABLE)), leaf, t.dy if dy is None else dy)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "case",
    [Case(9, 24, 16, 4, F32, F32, 0.3, bias=True, lora_bias=True), Case(9, 24, 16, 4, F32, F32)],
    ids=str,
)
def test_compiled_equals_eager(case, target: Target, fresh_compiler):
    t = make(case, target.device)
    layer = layer_of(t, case, target.backend, t.rng_state)
    eager = call_layer(layer, t)
    compiled = call_layer(torch.compile(layer, fullgraph=True), t)
    for name in NAMES:
        if eager[name] is not None:
            torch.testing.assert_close(compiled[name], eager[name])  # sin and cos around it are the compiler's own


def test_compiled_draws_the_mask_that_eager_draws(target: Target, fresh_compiler):
    case = Case(9, 24, 16, 4, F32, F32, 0.5)
    t = make(case, target.device)
    layer = layer_of(t, case, target.backend, None)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True)
        found = []
        for function in (layer, compiled, compiled):
            torch.manual_seed(3)
            found.append(call_layer(function, t))
    for name in NAMES[:4]:
        torch.testing.assert_close(found[1][name], found[0][name])
        assert torch.equal(found[1][name], found[2][name])


def test_compiled_forward_and_backward_share_one_mask(target: Target, fresh_compiler):
    """Without fallback_random the compiler draws its own numbers; forward and backward must still see the same ones."""
    eye, A, B = (torch.eye(40, device=target.device) for _ in range(3))
    layer = torch.compile(
        lambda x: peftkern.lora_linear(x, torch.zeros_like(eye), A, B, dropout_p=0.5, backend=target.backend),
        fullgraph=True,
    )
    x = torch.ones(30, 40, device=target.device, requires_grad=True)
    first = layer(x)
    (dx,) = torch.autograd.grad(first, x, torch.ones_like(first))
    assert torch.equal(first, dx) and set(first.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(layer(x), first)


def test_dynamic_shapes_compile_once(target: Target, fresh_compiler):
    case = Case(9, 24, 16, 4, F32, F32, 0.3, bias=True, lora_bias=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    t = make(case, target.device)
    layer = layer_of(t, case, target.backend, t.rng_state)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for M in (9, 2, 33, 128):
        other = make(Case(M, 24, 16, 4, F32, F32, 0.3, bias=True, lora_bias=True), target.device)
        other.weight, other.rng_state = t.weight, t.rng_state
        found, eager = call_layer(compiled, other), call_layer(layer, other)
        for name in NAMES:
            torch.testing.assert_close(found[name], eager[name])
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_compiled_module_with_a_tensor_scaling_and_a_packed_weight(weight_format, target, fresh_compiler):
    case = Case(9, 24, 16, 4, BF16, F32, weight_format=weight_format)
    t = make(case, target.device)
    scaling = torch.tensor(0.5, device=target.device)
    compiled = torch.compile(
        lambda x: peftkern.lora_linear(x, t.weight, t.lora_A, t.lora_B, scaling, backend=target.backend),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for value in (0.5, 2.0):
        scaling.fill_(value)
        expected = peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, scaling, backend=target.backend)
        assert torch.equal(compiled(t.x), expected)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_patched_peft_model_compiles_in_one_graph(lora_bias, fresh_compiler):
    model = adapted(lora_bias=lora_bias, base_bias=lora_bias, target_modules=ATTENTION)
    peftkern.patch(model)
    expected = step(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled).items()}
    assert_close(found, expected)


# ----------------------------------------------------------------------------------------------------------- autocast

AUTOCAST = [  # x, weight and bias, adapter, autocast's dtype
    (F32, BF16, F32, BF16),
    (F32, F32, F32, BF16),
    (BF16, F32, F32, BF16),
    (F32, BF16, BF16, BF16),
    (F32, F32, F32, F16),
    (BF16, F16, F32, F16),
]


@pytest.mark.parametrize("kinds", AUTOCAST, ids=str)
@pytest.mark.parametrize("precision", ["base", "fp32"])
def test_autocast_is_f_linears_rule(kinds, precision, target: Target):
    """y as F.linear's dtype; every gradient in its parameter's dtype; values as of a call on cast operands."""
    x_dtype, w_dtype, a_dtype, dtype = kinds
    case = Case(19, 40, 24, 5, F32, F32, 0.25, bias=True, lora_bias=True, precision=precision)
    t = make(case, target.device)
    t.x, t.weight, t.bias = t.x.to(x_dtype), t.weight.to(w_dtype), t.bias.to(w_dtype)
    t.lora_A, t.lora_B, t.lora_bias = (v.to(a_dtype) for v in (t.lora_A, t.lora_B, t.lora_bias))
    t.dy = t.dy.to(dtype)
    with torch.autocast(target.device, dtype):
        assert torch.nn.functional.linear(t.x, t.weight, t.bias).dtype == dtype
        found = run(case, t, target.backend)
    assert found["y"].dtype == dtype
    assert [found[name].dtype for name in TRAINABLE] == [getattr(t, name).dtype for name in TRAINABLE]
    t.x, t.weight, t.bias = t.x.to(dtype), t.weight.to(dtype), t.bias.to(dtype)
    cast = run(case, t, target.backend)
    for name in NAMES:
        assert torch.equal(found[name], cast[name].to(found[name].dtype)), name


def test_autocast_leaves_fp64_and_a_disabled_region_alone():
    case = Case(9, 24, 16, 4, F64, F64)
    t = make(case)
    with torch.autocast("cpu", BF16):
        assert run(case, t, "reference")["y"].dtype == F64
        with torch.autocast("cpu", enabled=False):
            t = make(Case(9, 24, 16, 4))
            assert peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B).dtype == F32


def test_backward_outside_the_autocast_region(target: Target):
    case = Case(19, 40, 24, 5, BF16, F32)
    t = make(case, target.device)
    leaf = leaves_of(t)
    with torch.autocast(target.device, BF16):
        inside = run(case, t, target.backend)
        y = peftkern.lora_linear(
            leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], case.scaling, backend=target.backend
        )
    outside = grads(y, leaf, t.dy)
    judge(case, target.backend, (t, outside))
    for name in NAMES[:4]:
        assert torch.equal(inside[name], outside[name]), name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_of_a_patched_fp32_model(dtype, calls):
    model = adapted()
    truth = step(copy.deepcopy(model).double())
    with torch.autocast("cpu", dtype):
        expected = step(model)
        peftkern.patch(model)
        found = step(model)
        assert logits(model).dtype == dtype
    assert len(calls) == 28
    assert found.keys() == truth.keys() and all(value.dtype == F32 for value in found.values())
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")


def test_fp32_input_of_a_bf16_layer_without_autocast_is_pefts_error(calls):
    layer = linears(adapted(BF16))["base_model.model.model.layers.0.mlp.up_proj"]
    peftkern.patch(torch.nn.ModuleList([layer]))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.ones(2, 32))
    assert not calls


# ----------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice_over_a_retained_graph(target: Target, poisoned):
    t = make(Case(19, 40, 24, 5, F32, F32, 0.3), target.device)
    leaves = [tensor.requires_grad_() for tensor in (t.x, t.lora_A, t.lora_B)]
    y = peftkern.lora_linear(t.x, t.weight, t.lora_A, t.lora_B, dropout_p=0.3, backend=target.backend)
    first = torch.autograd.grad(y, leaves, t.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, t.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, t.dy)


def test_double_backward_is_an_error_that_says_so(target: Target):
    t = make(Case(19, 40, 24, 5), target.device)
    y = peftkern.lora_linear(t.x.requires_grad_(), t.weight, t.lora_A, t.lora_B, backend=target.backend)
    (dx,) = torch.autograd.grad(y.square().sum(), t.x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "rng_state"])
def test_a_saved_tensor_changed_in_place_is_torchs_error(name, target: Target):
    case = Case(19, 40, 24, 5, p=0.3)
    t = make(case, target.device)
    t.x.requires_grad_(), t.lora_A.requires_grad_(), t.lora_B.requires_grad_()
    y = peftkern.lora_linear(
        t.x, t.weight, t.lora_A, t.lora_B, dropout_p=0.3, rng_state=t.rng_state, backend=target.backend
    )
    with torch.no_grad():
        getattr(t, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------------------------- import


def in_a_fresh_process(program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_loads_nothing_heavy_and_says_nothing():
    done = in_a_fresh_process("""
import sys, torch
before, threads, generator = set(sys.modules), torch.get_num_threads(), torch.get_rng_state()
import peftkern
new = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith("peftkern")}
assert "peftkern._C" not in sys.modules and "peftkern.integrations.peft" not in sys.modules
assert threads == torch.get_num_threads() and torch.equal(generator, torch.get_rng_state())
assert not torch.cuda.is_initialized()
import copy
import json
sys.stderr.write(json.dumps(sorted(new)))
""")
    assert done.stdout == ""
    heavy = {"triton", "peft", "transformers", "bitsandbytes", "numpy", "accelerate", "safetensors", "pybind11"}
    assert not heavy & set(json.loads(done.stderr))


def test_public_names_exist_and_private_ones_do_not():
    done = in_a_fresh_process("""
import peftkern
for name in ("lora_linear", "patch", "unpatch", "disabled", "PatchReport", "explain", "env_report"):
    assert callable(getattr(peftkern, name)), name
assert peftkern.nn.LoRALinear and peftkern.weights.FrozenWeight and peftkern.testing.dropout_mask
assert set(peftkern.__all__) <= set(dir(peftkern)) | set(peftkern._LAZY)
assert not hasattr(peftkern, "no_such_name")
""")
    assert done.stdout == ""  # stderr has what packages say that PEFT imports
