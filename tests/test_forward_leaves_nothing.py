"""A forward leaves nothing on a module, nor is anything on one while it runs: threads may share a model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import adapted
from test_shared_inputs import an_x, pair
from torch import nn

import peftkern

experts = pytest.importorskip("test_experts")


def attributes(model: nn.Module) -> dict[tuple[str, str], object]:
    """Of every module, its class among them, by identity."""
    found: dict[tuple[str, str], object] = {}
    for name, module in model.named_modules():
        found |= {(name, key): value for key, value in module.__dict__.items()} | {(name, "class"): type(module)}
        for group in ("_parameters", "_buffers", "_modules"):
            found |= {(name, f"{group}.{key}"): value for key, value in getattr(module, group).items()}
    return found


def folding(model: nn.Module) -> nn.Module:
    """With experts that read a parameter otherwise, so that it is formed whole."""
    for wrapper in experts.wrappers(model).values():
        base = wrapper.get_base_layer()
        if hasattr(base, "down_proj") and type(base).__name__ != "Summing":
            genuine = type(base).forward

            def forward(self, *arguments, genuine=genuine):
                self.down_proj.sum()
                return genuine(self, *arguments)

            forward.__module__ = genuine.__module__
            base.__class__ = type("Summing", (type(base),), {"forward": forward})
    return model


MODELS = {
    "linears": (adapted, {}),
    "linears that run together": (adapted, {"share": True}),
    "experts": (experts.adapted, {}),
    "grouped experts": (lambda: experts.adapted(implementation="grouped_mm"), {}),
    "experts that fold": (lambda: folding(experts.adapted()), {}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_on_a_module_during_a_forward_or_after_it(kind, one_thread):
    make, options = MODELS[kind]
    model = make()
    peftkern.patch(model, **options)
    before, during = attributes(model), []
    ids = torch.arange(12).view(2, 6)

    class Looker(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            now = attributes(model)
            during.extend(key for key in before.keys() | now.keys() if before.get(key) is not now.get(key))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        model(input_ids=ids)
        with Looker():
            model(input_ids=ids)
    after = attributes(model)
    assert not set(during)
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)


@pytest.mark.parametrize("kind", MODELS)
def test_threads_through_one_model_have_the_results_of_one(kind, one_thread):
    make, options = MODELS[kind]
    model = make().eval()
    peftkern.patch(model, **options)
    inputs = [torch.arange(4 + i).view(1, -1) * 7 % 64 for i in range(6)]

    def step(one: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        loss = one(input_ids=ids, labels=ids).loss
        parameters = [p for p in one.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None] + [loss.detach().view(1)])

    alone = copy.deepcopy(model)
    expected = [step(alone, ids) for ids in inputs]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(5):
                torch.testing.assert_close(step(model, inputs[i]), expected[i], rtol=1e-4, atol=1e-6)
        except Exception as error:  # noqa: BLE001 - a thread's end tells nobody
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    torch.testing.assert_close(step(model, inputs[0]), expected[0], rtol=1e-4, atol=1e-6)


def test_nothing_is_left_over_in_inference_mode():
    """What it computes cannot be saved for backward, and a member called outside may feed what is trained."""
    _, shared = pair()
    x = an_x().detach()
    with torch.inference_mode():
        shared.q(x)
    with torch.no_grad():
        k = shared.k(x)
    assert not k.is_inference()
    (k * torch.ones(1, requires_grad=True)).sum().backward()
