"""What the report says is what runs: calls are counted, fused and not, and a layer that falls back says so."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import pytest
import torch
from conftest import adapted, linears, logits, randomise
from peft import LoraConfig, get_peft_model
from torch import nn

import peftkern
from peftkern.integrations.peft import layer as integration

F64 = torch.float64
WRONG_DTYPE = "x is torch.float64, the base torch.float32, the adapter torch.float32"


def layer(**options) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(**dict(r=4, target_modules=["0"]) | options)
    return randomise(get_peft_model(nn.Sequential(nn.Linear(16, 8)), config))


def counted(model: nn.Module) -> dict[str, int]:
    """Of all layers together."""
    total: dict[str, int] = {}
    for counts in peftkern.report(model).calls.values():
        for what, count in counts.items():
            total[what] = total.get(what, 0) + count
    return total


def test_calls_are_counted_by_reason_and_shown(calls):
    model = adapted()
    report = peftkern.patch(model)
    assert report.calls == {} and "calls" not in report.to_dict() and "calls" not in str(report)
    logits(model)
    with model.disable_adapter():
        logits(model)
    with peftkern.disabled():
        logits(model)
    expected = {"fused": 1, "its adapters are disabled": 1, "peftkern.disabled() is in force": 1}
    assert report.calls == dict.fromkeys(report.fast, expected) == peftkern.report(model).calls
    assert report.to_dict()["calls"] == report.calls
    assert "   14  calls: fused\n" in str(report)
    assert "   14  calls: PEFT's own forward: its adapters are disabled" in str(report)
    assert len(calls) == counted(model)["fused"] == 14
    assert peftkern.report(model) == peftkern.patch(model) == report
    peftkern.unpatch(model)
    again = peftkern.report(model)
    assert again.calls == {} and not again.fast and set(again.skipped.values()) == {"it is not patched"}
    assert not any("tally" in key for module in model.modules() for key in module.__dict__)


def test_a_report_changes_nothing():
    model = layer()
    classes = [type(module) for module in model.modules()]
    peftkern.report(model)
    assert [type(module) for module in model.modules()] == classes and model.base_model.model[0].__dict__.keys() == (
        layer().base_model.model[0].__dict__.keys()
    )


def test_a_layer_that_falls_back_says_so_once_with_its_name_and_the_reason(caplog):
    model = layer()
    peftkern.patch(model)
    wrong = torch.randn(3, 16, dtype=F64)
    for _ in range(3):
        with pytest.raises(RuntimeError):  # PEFT's
            model(wrong)
    line = f"peftkern: layer base_model.model.0 runs PEFT's own forward: {WRONG_DTYPE}"
    assert [record.getMessage() for record in caplog.records] == [line]
    assert counted(model) == {WRONG_DTYPE: 3}
    report = peftkern.report(model)
    assert report.skipped == {"base_model.model.0": WRONG_DTYPE} and not report.fast  # what would run such an x
    model(wrong.float())
    assert peftkern.report(model).fast == ["base_model.model.0"]
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda *_: None)
    for _ in range(2):
        model(wrong.float())
    assert [record.getMessage() for record in caplog.records][1:] == [line.replace(WRONG_DTYPE, "lora_A has hooks")]
    assert counted(model) == {WRONG_DTYPE: 3, "fused": 1, "lora_A has hooks": 2}


def test_what_was_asked_for_or_reported_is_no_news(caplog):
    model = layer()
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.CRITICAL, "peftkern"):
        assert peftkern.patch(model).skipped == {"base_model.model.0": "lora_A has hooks"}
    x = torch.randn(3, 16)
    model(x)
    with peftkern.disabled(), model.disable_adapter():
        model(x)
    with model.disable_adapter():
        model(x)
    model.merge_adapter()
    model(x)
    assert not caplog.records and sum(counted(model).values()) == 4


def test_mixed_batches_are_counted_and_their_reasons_named(caplog):
    model = layer().eval()
    peftkern.patch(model)
    x = torch.randn(2, 3, 16)
    model(x, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError):
        model(x, adapter_names=["default"])
    assert counted(model) == {"fused": 1, "the names of a mixed batch are not one for each sequence": 1}
    assert len(caplog.records) == 1


def test_layers_that_run_together_are_counted_each():
    model = adapted()
    peftkern.patch(model, share=True)
    for _ in range(3):
        logits(model)
    assert counted(model) == {"fused": 3 * 14}


def test_experts_are_counted_and_a_parameter_that_is_formed_whole_is_named(caplog, one_thread):
    experts = pytest.importorskip("test_experts")
    model = experts.adapted()
    peftkern.patch(model)
    logits(model)
    assert set(counted(model)) == {"fused"} and counted(model)["fused"] == 2 + 6
    base = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    genuine = type(base).forward

    def forward(self, *arguments):
        self.down_proj.sum()
        return genuine(self, *arguments)

    forward.__module__ = genuine.__module__
    base.__class__ = type("Summing", (type(base),), {"forward": forward})
    experts.run_experts(model)
    name = "its module does more with down_proj than products"
    assert counted(model)[name] == 1 and name in caplog.text


def test_copies_and_pickles_begin_anew():
    model = layer()
    peftkern.patch(model)
    x = torch.randn(3, 16)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert counted(twin) == {} and torch.equal(twin(x), y) and counted(twin) == {"fused": 1}
    assert counted(model) == {"fused": 1}
    assert model.state_dict().keys() == layer().state_dict().keys()


def test_threads_lose_no_count():
    model = layer()
    peftkern.patch(model)
    x = torch.randn(2, 16)

    def work() -> None:
        for _ in range(200):
            with torch.no_grad():
                model(x)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted(model) == {"fused": 1600}


def test_a_compiled_graph_is_whole_and_counted_when_it_is_traced(caplog):
    model = layer(lora_dropout=0.2)
    peftkern.patch(model)
    twin = copy.deepcopy(model)
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 16)
    for seed in range(4):
        torch.manual_seed(seed)
        y = compiled(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(y, twin(x))
    assert len(graphs) == 1 and counted(model) == {"fused (traced)": 1}
    model(x)  # an eager call in between
    compiled(x)
    assert len(graphs) == 1 and counted(model) == {"fused (traced)": 1, "fused": 1}
    model.base_model.disable_adapter_layers()
    compiled(x)
    model.base_model.enable_adapter_layers()
    for module in linears(model).values():
        module.base_layer.weight.requires_grad_()
    compiled(x)
    assert counted(model) == {
        "fused": 1, "fused (traced)": 1, "its adapters are disabled (traced)": 1,
        "its base weight requires grad (traced)": 1,
    }  # fmt: skip
    (said,) = [record.getMessage() for record in caplog.records if record.name == "peftkern"]
    assert said.endswith("its base weight requires grad")


def test_a_fused_call_costs_one_addition(monkeypatch):
    """No log, no lock, no dictionary of reasons: whatever else a tally has is not touched."""
    model = layer()
    peftkern.patch(model)
    tally = integration.tally.of(model.base_model.model[0])
    touched: list[str] = []
    genuine = type(tally).__setattr__
    monkeypatch.setattr(type(tally), "__setattr__", lambda self, n, v: touched.append(n) or genuine(self, n, v))
    x = torch.randn(3, 16)
    model(x)
    assert touched == ["fused", "memo"]  # what has been found is kept, once
    model(x)
    assert touched == ["fused", "memo", "fused"]
