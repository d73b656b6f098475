"""QLoRA of a real model, SmolLM2-135M, on the CPU; and the demo on a quantised base, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import types

import pytest
import torch

import peftkern

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from conftest import llama  # noqa: E402

from benchmarks import demo, demo_report, finetune, memory, packages, smollm2  # noqa: E402


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, packages.REAL_MODEL)), reason="the demo's model and text are not installed"
)
@pytest.mark.parametrize("layers", [2, pytest.param(30, marks=pytest.mark.long)])
def test_smollm2_in_nf4_learns_from_shakespeare(layers, tmp_path, monkeypatch):
    """Losses beside those of PEFT over bitsandbytes, against fp64; bytes held; the adapter read again."""
    whole = smollm2.load_model

    def shortened(*arguments):
        model = whole(*arguments)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        return model

    monkeypatch.setattr(smollm2, "load_model", shortened)
    job = finetune.Job("cpu", tmp_path / "model", 3, torch.float32, rows=1, length=24, quant="nf4")
    batches = smollm2.Plays(smollm2.load_tokenizer(job.cache)).train_batches(1, job.rows, job.length) * job.steps
    unpatched = finetune.build(job, 0.0)
    twin = finetune.dequantised(unpatched, job)
    wide = memory.frozen_bytes(twin)
    model, report = finetune.patched(finetune.build(job, 0.0))
    assert len(report.fast) == 7 * layers and not report.skipped
    theirs, own, true = (
        finetune.train(each, batches, job, name).losses
        for each, name in ((unpatched, "PEFT"), (model, "ours"), (twin.double(), "fp64"))
    )
    for peer, loss, truth in zip(theirs, own, true, strict=True):
        assert abs(loss - truth) <= 2 * abs(peer - truth) + 1e-6 * truth, (theirs, own, true)
    assert own[2] < own[1] < own[0]

    held = memory.frozen_bytes(model)
    assert held.elements == wide.elements == wide.linears // 4 == 3_538_944 * layers
    assert 3.85 * held.linears <= 2 * held.elements  # of what bf16 takes; the tables of small layers count, too
    assert held.total - held.linears == wide.total - wide.linears  # the embedding and the norms

    y = finetune.logits(model, batches[0])
    model.save_pretrained(tmp_path / "adapter")
    base = smollm2.quantise(smollm2.load_model(job.dtype, "cpu", job.cache), job.quant, job.dtype)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert len(peftkern.patch(again).fast) == 7 * layers
    assert torch.equal(finetune.logits(again, batches[0]), y)


@pytest.fixture
def tiny(monkeypatch):
    """The demo with a tiny Llama that reads letters; its fresh process is this one.

    Its rows are whole blocks of 64: bitsandbytes, the peer, decodes others wrongly with AVX-512 (0.50.2).
    """

    class Letters:
        def __call__(self, text: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(input_ids=[ord(letter) % 64 for letter in text])

    def reloaded(ids, adapter, job):
        base = smollm2.load_model(job.dtype)
        if job.quant:
            smollm2.quantise(base, job.quant, job.dtype)
        return finetune.logits(peft.PeftModel.from_pretrained(base, adapter), ids)

    monkeypatch.setattr(
        smollm2, "load_model", lambda dtype, *_: llama(dtype, widths=(64, 128)).requires_grad_(False).train()
    )
    monkeypatch.setattr(smollm2, "load_tokenizer", lambda cache: Letters())
    monkeypatch.setattr(smollm2, "native_dtype", lambda device: torch.float32)
    monkeypatch.setattr(finetune, "continuation", lambda *_: "words")
    monkeypatch.setattr(demo, "logits_in_fresh_process", reloaded)


@pytest.mark.parametrize("quant", ["", *smollm2.FOUR_BIT])
def test_the_demo_compares_and_writes(quant, tiny, tmp_path, capsys, one_thread):
    pytest.importorskip("matplotlib")
    demo.main(["--steps", "6", "--out", str(tmp_path), *(["--quant", quant] if quant else [])])
    suffix = f"-{quant}" if quant else ""
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}{suffix}{e}" for n, e in zip(
        ("report", "report", "adapter"), (".json", ".png", ""), strict=True
    )}  # fmt: skip
    report = json.loads((tmp_path / f"report{suffix}.json").read_text())
    first, second = report["runs"].values()
    assert list(report["runs"]) == (["fp32 base", f"{quant} base"] if quant else ["PEFT", "peftkern"])
    assert len(first["losses"]) == len(second["losses"]) == 6
    assert set(report["layers"]["backends"].values()) and report["layers"]["skipped"] == {}
    text = capsys.readouterr().out
    if quant:
        assert (
            second["frozen_linears_mib"] < first["frozen_linears_mib"] / 2
            and second["frozen_mib"] < first["frozen_mib"]
        )
        assert "MiB of frozen linear layers" in text and "PEFT over bitsandbytes" in text
        assert first["held_out_before"] != second["held_out_before"]
    else:
        assert "MiB of frozen" not in text and first["frozen_mib"] == second["frozen_mib"]
        assert abs(first["held_out_before"] - second["held_out_before"]) < 1e-5


def test_the_demo_names_what_it_quantises_to(capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--quant", "int3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "the demo quantises to nf4 or fp4, not to 'int3'\n"


def test_a_wrong_quantised_product_stops_the_demo(tiny, tmp_path, monkeypatch, one_thread):
    from peftkern.integrations.peft import memo

    exact = memo.run_pair
    monkeypatch.setattr(memo, "run_pair", lambda *call: exact(*call) * 1.001)
    with pytest.raises(demo.Disagreement, match="nf4|fp32"):
        demo.main(["--steps", "5", "--quant", "nf4", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_bits_in_the_explanation_are_counted():
    """4.13 bit a weight and 3.87 times less than bf16, for what holds 4.13 bit a weight."""
    run = {"frozen_linears_mib": 4.13, "frozen_linears_elements": 8 * 2**20, "seconds": [1.0], "fastest_seconds": 1.0}
    report = {
        "job": {"quant": "nf4", "steps": 1, "tokens": 1, "base": "bf16", "held_out_play": "macbeth"},
        "agreement": {
            "peft": [1.0], "largest_relative_difference": 0.0, "bound": 1.0,
            "peft_seconds": 1.0, "peftkern_seconds": 1.0,
        },
        "machine": {"device": "cpu"},
        "runs": {"bf16 base": run, "nf4 base": run},
        "reload": {"fresh_peft_to_peft_here": 0.0, "peft_error": 1.0, "peftkern_error": 1.0},
    }  # fmt: skip
    text = demo_report.explanation(report)
    assert "4.13 bit per weight" in text and "3.87x less than\n    bf16" in text
