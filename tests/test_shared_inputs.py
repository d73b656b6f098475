"""patch(share=...): layers with one x run as one node, and alone wherever that would not be right."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import adapted, assert_close, logits, pooled, randomise, step
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.peft import PeftkernLoraLinear, shared_input
from peftkern.testing.numerics import assert_as_good_as

BF16 = torch.bfloat16
QKV = [("q", "k", "v")]


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """How many layers ran together, call by call."""
    seen, genuine = [], shared_input.run

    def spy(x, call):
        seen.append(len(call.bases))
        return genuine(x, call)

    monkeypatch.setattr(shared_input, "run", spy)
    return seen


class Block(nn.Module):
    """q, k and v on one x, and o on another; ``between`` runs before each of k and v, and may change their x."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in (("q", 8), ("k", 12), ("v", 4)):
            setattr(self, name, nn.Linear(16, width))
        self.o = nn.Linear(24, 16)
        self.between = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(self.between(x)), self.v(self.between(x))
        return self.o(torch.cat([q.sin(), k * 2, v], -1))


def block(**options) -> nn.Module:
    torch.manual_seed(3)
    settings = dict(r=4, lora_alpha=6, target_modules=["q", "k", "v", "o"]) | options
    return randomise(get_peft_model(Block(), LoraConfig(**settings))).base_model.model


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """The same block, patched without and with groups."""
    alone = block(**options)
    shared = copy.deepcopy(alone)
    peftkern.patch(alone)
    peftkern.patch(shared, share=QKV)
    return alone, shared


def an_x(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, x: Tensor | None = None, call=None, seed: int = 5) -> dict[str, Tensor]:
    """y and every gradient of one step."""
    leaf = an_x() if x is None else x
    leaf.grad = None
    model.zero_grad()
    torch.manual_seed(seed)
    y = (model if call is None else call)(leaf * 1)
    y.square().sum().backward()
    return {"y": y.detach(), "x": leaf.grad} | gradients(model)


# -------------------------------------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("options", [{}, dict(lora_dropout=0.3), dict(lora_bias=True), dict(bias="lora_only")], ids=str)
def test_a_block_equals_its_layers_alone(options, fused):
    alone, shared = pair(**options)
    expected, found = run(alone), run(shared)
    assert fused == [3] and torch.equal(found["y"], expected["y"])
    assert_close(found, expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != "x")


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_models_loss_and_gradients_against_fp64(dtype, fused):
    alone = adapted(dtype)
    shared = copy.deepcopy(alone)
    truth = step(copy.deepcopy(alone).double())
    peftkern.patch(alone)
    report = peftkern.patch(shared, share=True)
    assert len(report.fast) == 14
    expected, found = step(alone), step(shared)
    assert fused == [3, 2, 3, 2]
    groups = [[name.rsplit(".", 1)[1] for name in group] for group in peftkern.shared_inputs(shared)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    assert torch.equal(found["loss"], expected["loss"]) and found.keys() == expected.keys()
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")


def test_autocast_and_evaluation(fused):
    alone, shared = pair(lora_dropout=0.3)
    with torch.autocast("cpu", BF16):
        expected, found = run(alone), run(shared)
    assert fused == [3] and torch.equal(found["y"], expected["y"])
    assert all(value.dtype == expected[name].dtype for name, value in found.items())
    x = (alone.eval(), shared.eval(), an_x().detach())[2]
    with torch.no_grad():
        assert torch.equal(shared(x), alone(x))
    assert torch.equal(shared(x), alone(x)) and fused == [3, 3, 3]
    with torch.inference_mode():
        assert torch.equal(shared(x * 1), alone(x * 1)) and fused == [3, 3, 3]


def test_an_unused_result_has_no_gradient_and_the_graph_can_be_kept():
    alone, shared = pair()
    for model in (alone, shared):
        x = an_x()
        run(model)
        model.zero_grad()
        shared_x = x * 1
        q, k, v = model.q(shared_x), model.k(shared_x), model.v(shared_x)
        (q.sum() + v.sum()).backward(retain_graph=True)
        assert k.requires_grad and model.k.lora_A["default"].weight.grad is None
        k.sum().backward()
        model.result = gradients(model) | {"x": x.grad}
    assert_close(shared.result, alone.result)


def test_a_frozen_member_needs_no_gradient_where_x_needs_none():
    alone, shared = pair()
    for model in (alone, shared):
        for parameter in model.k.parameters():
            parameter.requires_grad_(False)
        x = an_x().detach()
        q, k, _ = model.q(x), model.k(x), model.v(x)
        assert q.requires_grad and not k.requires_grad


def test_no_rows_and_a_scaling_in_a_tensor(fused):
    alone, shared = pair()
    for model in (alone, shared):
        model.k.scaling["default"] = torch.tensor(0.75)
    assert_close(run(shared), run(alone))
    empty = run(shared, torch.zeros(2, 0, 16, requires_grad=True))
    assert empty["x"].shape == (2, 0, 16) and not any(value.any() for value in empty.values()) and fused == [3, 3]


# --------------------------------------------------------------------------------------------------------- falls apart


CHANGES = {
    "adapter missing": lambda model: model.k.delete_adapter("default"),
    "disabled": lambda model: model.v.enable_adapters(False),
    "merged": lambda model: model.k.merge(),
    "hooked": lambda model: model.k.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2),
    "unfrozen": lambda model: model.q.base_layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_member_that_cannot_take_part(change, fused):
    alone, shared = pair()
    CHANGES[change](alone), CHANGES[change](shared)
    expected, found = run(alone), run(shared)
    assert found.keys() == expected.keys() and not fused
    assert all(torch.equal(found[name], expected[name]) for name in expected)


BETWEEN = {
    "another x": lambda model, x: x + 1,
    "x changed in place": lambda model, x: x.add_(1),
    "a factor changed in place": lambda model, x: (nudge(model.k.lora_B["default"].weight), x)[1],
    "a scaling changed": lambda model, x: (model.v.set_scale("default", 3.0), x)[1],
    "disabled": lambda model, x: (model.k.enable_adapters(False), x)[1],
    "another grad mode": lambda model, x: (torch.set_grad_enabled(False), x)[1],
}


@torch.no_grad()
def nudge(parameter: Tensor) -> None:
    parameter.add_(0.25)


@pytest.mark.parametrize("case", BETWEEN)
def test_what_changes_between_the_members_calls(case, fused):
    results = []
    for model in pair():
        model.between = functools.partial(BETWEEN[case], model)
        try:
            results.append(model(an_x() * 1).detach())
        finally:
            torch.set_grad_enabled(True)
    assert torch.equal(*results) and fused == [3]


def test_a_patched_layer_inside_disabled_runs_pefts_forward(fused):
    alone, shared = pair()
    x = an_x() * 1
    shared.q(x)
    with peftkern.disabled():
        k, v = shared.k(x), shared.v(x)
    peftkern.unpatch(alone)
    assert torch.equal(k, alone.k(x)) and torch.equal(v, alone.v(x)) and fused == [3]


def test_a_share_without_sense_is_refused():
    for share in ("qkv", [("q",)], ["qkv"], [("q", "k"), ("k", "v")]):
        with pytest.raises(ValueError, match="groups of two names or more"):
            peftkern.patch(block(), share=share)


def test_results_left_over_twice_dissolve_the_group(fused, caplog):
    alone, shared = pair()
    for seed in range(4):
        x = an_x(seed) * 1
        assert torch.equal(shared.q(x), alone.q(x)) and torch.equal(shared.v(x), alone.v(x))
    assert fused == [3, 3] and peftkern.shared_inputs(shared) == []
    assert "q, k, v do not share their x" in caplog.text
    assert_close(run(shared), run(alone))
    assert fused == [3, 3]


def test_another_order_and_repeated_calls(fused):
    alone, shared = pair()
    x = an_x() * 1
    for names in ("vkq", "kqv", "qkqvkq", "qqq"):
        for name in names:
            assert torch.equal(getattr(shared, name)(x), getattr(alone, name)(x)), names


def test_the_members_of_a_smaller_set_of_targets(fused):
    alone, shared = block(target_modules=["q", "v"]), block(target_modules=["q", "v"])
    peftkern.patch(shared, share=QKV)
    for _ in range(2):
        assert_close(run(shared), run(alone))
    assert peftkern.shared_inputs(shared) == [["q", "v"]] and fused == [2, 2]


def test_unpatch_and_patching_otherwise_forget_the_groups(fused):
    _, shared = pair()
    peftkern.patch(shared)
    assert type(shared.q) is PeftkernLoraLinear and peftkern.shared_inputs(shared) == []
    peftkern.patch(shared, share=QKV)
    run(shared)
    assert fused == [3]
    peftkern.unpatch(shared)
    assert type(shared.q).__module__ == "peft.tuners.lora.layer"


def test_a_copys_layers_are_alone_until_it_is_patched(fused):
    alone, shared = pair()
    shared.between = alone.between = nn.Identity()
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert peftkern.shared_inputs(twin) == []
        assert_close(run(twin), run(alone))
        peftkern.patch(twin, share=QKV)
        assert peftkern.shared_inputs(twin) == [["q", "k", "v"]]
        assert_close(run(twin), run(alone))
    assert fused == [3, 3]


# ------------------------------------------------------------------------------------------------------------- lifetime


def waiting() -> list[Tensor]:
    return [result.y for result in shared_input._waiting.results.values() if result is not None]


def test_a_result_ends_with_its_x_or_with_the_next_x():
    _, shared = pair()
    x = an_x().detach()
    with torch.no_grad():
        shared.q(x)
        ends = [weakref.ref(y) for y in waiting()]
        assert len(ends) == 2
        del x
        gc.collect()
        assert not any(end() is not None for end in ends)
        shared.q(an_x().detach()), shared.o(torch.ones(3, 24))
    assert not waiting()


def test_an_exception_between_the_members(fused):
    alone, shared = pair()

    def fail(x):
        raise RuntimeError("between")

    shared.between = fail
    with pytest.raises(RuntimeError, match="between"):
        shared(an_x(1) * 1)
    shared.between = lambda x: x
    assert_close(run(shared), run(alone))
    assert fused == [3, 3] and peftkern.shared_inputs(shared) and not waiting()


def test_the_layers_can_end():
    _, shared = pair()
    assert peftkern.shared_inputs(shared) == [["q", "k", "v"]]
    ends = [weakref.ref(layer) for layer in (shared.q, shared.k, shared.v)]
    del shared
    gc.collect()
    assert not any(end() is not None for end in ends)


# ----------------------------------------------------------------------------------- checkpoints, threads, the compiler


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpoints_from_the_very_first_forward(reentrant, forwards, fused):
    """Forward and recomputation save the same tensors."""
    alone = block(lora_dropout=0.3)
    shared = copy.deepcopy(alone)
    peftkern.patch(alone)
    peftkern.patch(shared, share=QKV)
    results = []
    for model in (alone, shared):
        for _ in range(3):
            torch.manual_seed(9)
            model.zero_grad()
            leaves = [an_x(seed) for seed in range(forwards)]
            losses = [checkpoint(model, x, use_reentrant=reentrant).square().sum() for x in leaves]
            for loss in losses:
                loss.backward()
        results.append(gradients(model) | {"x": leaves[-1].grad})
    assert_close(*reversed(results))
    assert len(fused) == 6 * forwards


@pytest.mark.parametrize("apart", ["q", "k"])
def test_a_checkpoint_around_one_member(apart):
    alone, shared = pair()
    results = []
    for model in (alone, shared):
        for _ in range(3):
            x = an_x()
            model.zero_grad()
            shared_x, ys = x * 1, []
            for name in "qkv":
                layer = getattr(model, name)
                ys.append(checkpoint(layer, shared_x, use_reentrant=False) if name == apart else layer(shared_x))
            torch.cat(ys, -1).square().sum().backward()
        results.append(gradients(model) | {"x": x.grad})
    assert_close(*reversed(results))


def test_threads_have_their_own_x():
    alone, shared = pair()
    barrier, wrong = threading.Barrier(3), []

    def work(seed: int) -> None:
        x = an_x(seed).detach()
        expected = alone(x)
        barrier.wait()
        for _ in range(40):
            wrong.append(not torch.equal(shared(x * 1), expected))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    assert len(wrong) == 120 and not any(wrong)


def test_compiled_in_one_graph(fused):
    torch._dynamo.reset()
    alone, shared = pair()
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    assert_close(run(shared, call=compiled), run(alone))
    assert not fused


def test_a_model_under_gradient_checkpointing(fused):
    alone = adapted(lora_dropout=0.1).train()
    alone.enable_input_require_grads()
    alone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shared = copy.deepcopy(alone)
    peftkern.patch(alone), peftkern.patch(shared, share=True)
    for _ in range(3):
        expected, found = step(alone), step(shared)
        assert_close(found, expected)
    assert len(fused) == 3 * 2 * 4
    assert torch.equal(logits(shared.eval()), logits(alone.eval()))
