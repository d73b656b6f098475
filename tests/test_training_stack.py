"""What training code wraps around layers: selective checkpointing, the compiler, loss scaling, replicas, Liger, MPS."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
import torch._dynamo.testing
from conftest import TOKENS, adapted, assert_close, assert_equal, linears, randomise, step
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import peftkern
from peftkern.call import Problem
from peftkern.integrations.peft import PeftkernLoraLinear
from peftkern.nn import LoRALinear
from peftkern.ops import dispatch

# ------------------------------------------------------------------------------------- selective activation checkpoints


@pytest.fixture
def runs(monkeypatch) -> dict[str, int]:
    """How often each direction of a layer has run."""
    seen = {"forward": 0, "backward": 0}
    for backend in map(dispatch.backend_named, ("cpp", "reference")):
        for name, method in (("forward", "pair"), ("backward", "pair_backward")):
            genuine = getattr(type(backend), method)

            def spy(self, *arguments, name=name, genuine=genuine, **how):
                seen[name] += 1
                return genuine(self, *arguments, **how)

            monkeypatch.setattr(type(backend), method, spy)
    return seen


def block_checkpointed(model: nn.Module, policy: CheckpointPolicy | None) -> dict[str, torch.Tensor]:
    """A training step whose blocks are checkpointed; ``policy`` is that of peftkern's forward operator."""

    def choose(context, operator, *arguments, **options):
        return policy if operator is torch.ops.peftkern.forward.default else CheckpointPolicy.PREFER_RECOMPUTE

    def wrap(block: nn.Module) -> None:
        genuine, more = block.forward, {}
        if policy is not None:
            more["context_fn"] = lambda: create_selective_checkpoint_contexts(choose)
        block.forward = lambda *a, **k: checkpoint(genuine, *a, use_reentrant=False, **more, **k)

    blocks = model.base_model.model.model.layers
    for block in blocks:
        wrap(block)
    try:
        return step(model)
    finally:
        for block in blocks:
            del block.forward


def test_selective_checkpointing_sees_the_operators(runs):
    """MUST_SAVE: forward runs once; recomputing: twice; the same masks, so the same bits, always."""
    model = adapted(lora_dropout=0.4).train()
    model.config.use_cache = False  # a block that runs twice would append to the cache twice
    peftkern.patch(model)
    expected = step(model)
    counts = {}
    for policy in (None, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):
        runs.update(forward=0, backward=0)
        assert_equal(block_checkpointed(model, policy), expected)
        counts[policy] = dict(runs)
    once, twice = {"forward": 14, "backward": 14}, {"forward": 28, "backward": 14}
    assert counts == {None: twice, CheckpointPolicy.MUST_SAVE: once, CheckpointPolicy.MUST_RECOMPUTE: twice}


# -------------------------------------------------------------------------------------------------------- the compiler


@pytest.fixture
def compiled():
    """``compiled(module)``: in one graph, by a compiler that knows nothing yet; and the counter of compilations."""

    def compile(module: nn.Module):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        return torch.compile(module, fullgraph=True, backend=counter), counter

    yield compile
    torch._dynamo.reset()


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))


def small(p: float = 0.0) -> nn.Module:
    """Two adapted layers and nothing else, which compile in a second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 12))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=["0", "2"])
    return randomise(get_peft_model(model, config)).train()


def set_scaling(model: nn.Module, value: float | torch.Tensor) -> None:
    for layer in linears(model).values():
        layer.scaling["default"] = value


def small_step(function, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = function(X)
    y.square().mean().backward()
    return [y.detach(), *(q.grad.clone() for q in model.parameters() if q.grad is not None)]


def test_a_scaling_that_changes_compiles_as_often_as_pefts(compiled, runs):
    """Once more, when the compiler first sees it change, and then never again."""
    compilations = []
    for patched in (False, True):
        model = small(p=0.3)
        if patched:
            peftkern.patch(model)
        graph, counter = compiled(model)
        for value in (2.0, 2.5, 3.0, -1.0, 0.25, 0.0):
            set_scaling(model, value)
            with torch._inductor.config.patch(fallback_random=True):
                found = small_step(graph, model)
            torch.testing.assert_close(found, small_step(model, model))
        compilations.append(counter.frame_count)
    assert compilations == [2, 2] and runs["backward"] == 6 * 2 * 2


def test_a_tensor_scaling_that_changes_never_compiles_again(compiled):
    model = small()
    peftkern.patch(model)
    scaling = torch.tensor(2.0)
    set_scaling(model, scaling)
    graph, counter = compiled(model)
    for value in (2.0, 2.5, -1.0):
        scaling.fill_(value)
        torch.testing.assert_close(small_step(graph, model), small_step(model, model))
    assert counter.frame_count == 1


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_lora_linear_trains_compiled(p, compiled):
    torch.manual_seed(0)
    layer = LoRALinear(16, 12, 4, 8, lora_dropout=p, lora_bias=True)
    nn.init.normal_(layer.lora_B)
    graph, counter = compiled(layer)
    x, dy = torch.randn(2, 5, 16), torch.randn(2, 5, 12)
    results = []
    for function in (layer, graph, graph):
        layer.zero_grad()
        torch.manual_seed(1)
        y = function(x)
        y.backward(dy)
        results.append([y.detach(), *(q.grad.clone() for q in layer.parameters() if q.grad is not None)])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])
    layer.scaling = 0.5
    torch.manual_seed(1)
    y = graph(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer(x))
    assert counter.frame_count == 2


# ------------------------------------------------------------------------------------------------------ loss scaling


def scaled_steps(model: nn.Module) -> tuple[list[float], list[torch.Tensor], float]:
    """Losses and adapters of fp16 training under a GradScaler, one step of which overflows; the last scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for number in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        before = [p.detach().clone() for p in trained]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = any(not torch.equal(p, q) for p, q in zip(trained, before, strict=True))
        assert changed == (number != 2)
        losses.append(loss.item())
    return losses, [p.detach() for p in trained], scaler.get_scale()


def test_fp16_grad_scaler(calls):
    expected = scaled_steps(adapted().train())
    model = adapted().train()
    peftkern.patch(model)
    found = scaled_steps(model)
    assert len(calls) == 4 * 14 and found[2] == expected[2] == 2.0**9
    torch.testing.assert_close(found[0], expected[0], rtol=2e-3, atol=0)
    for value, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------------------------------------- replicas, other devices


def test_data_parallel_replicas(monkeypatch):
    """nn.DataParallel's own replication, with copies on the CPU in place of a broadcast to GPUs."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: 0)
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor * 1 for tensor in tensors] for _ in devices],
    )  # fmt: skip
    model = adapted().train()
    expected = step(model)
    peftkern.patch(model)
    layers = linears(replicate.replicate(model, [0, 1])[1]).values()
    assert all(type(layer) is PeftkernLoraLinear for layer in layers)
    model.zero_grad()
    replicas = replicate.replicate(model, [0, 1])
    loss = sum(replica(input_ids=TOKENS, labels=TOKENS).loss for replica in replicas) / 2
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close({"loss": loss.detach()} | found, expected)


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone"])
def test_other_devices_take_the_library_path(device):
    problem = Problem(device, 64, 32, 48, 4, torch.bfloat16, torch.float32, dropout=True)
    assert [backend.name for backend in dispatch.candidates(device)] == ["reference"]
    assert dispatch.select(problem, "auto").name == "reference"
    for name in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"{name!r} was requested and cannot run"):
            dispatch.select(problem, name)


# ---------------------------------------------------------------------------------------------------------------- Liger


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("first", ["liger", "peftkern"])
def test_liger_in_either_order(first, monkeypatch, calls):
    """Each leaves the other's patches: the MLP runs Liger's forward around fused layers, its GPU kernel replaced."""
    from liger_kernel.transformers import monkey_patch, swiglu

    model = adapted()
    expected = step(model)
    only = dict(rope=False, rms_norm=False, fused_linear_cross_entropy=False, swiglu=True)
    modeling = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(modeling, "LlamaMLP", modeling.LlamaMLP)  # put back afterwards
    liger = lambda: monkey_patch.apply_liger_kernel_to_llama(model=model.base_model.model, **only)  # noqa: E731
    for apply in (liger, lambda: peftkern.patch(model))[:: 1 if first == "liger" else -1]:
        apply()
    assert all(type(layer) is PeftkernLoraLinear for layer in linears(model).values())
    used = []

    class SiLUMul:
        @staticmethod
        def apply(gate, up, *more):
            used.append(1)
            return nn.functional.silu(gate) * up

    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SiLUMul)
    assert_close(step(model), expected)
    assert len(used) == 2 and len(calls) == 14
    assert len(peftkern.patch(model).fast) == 14
