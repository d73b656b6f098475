"""The demo of many adapters and ``benchmarks.many`` on a tiny model: what they show is right, or they refuse."""

from __future__ import annotations

import pytest
import torch
from conftest import llama

from benchmarks import demo_many, demo_many_report, harness, many
from benchmarks.trials import Trial


class Text:
    """Stands where a corpus stands: one token, mostly."""

    def __init__(self, favourite: int) -> None:
        self.favourite = favourite

    def _batches(self, count: int, rows: int, length: int, seed: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 64, (count, rows, length), generator=g)
        return list(torch.where(torch.rand(ids.shape, generator=g) < 0.7, self.favourite, ids))

    def train_batches(self, count: int, rows: int, length: int, seed: int = 0) -> list[torch.Tensor]:
        return self._batches(count, rows, length, seed + 1)

    def held_out_batches(self, count: int, rows: int, length: int) -> list[torch.Tensor]:
        return self._batches(count, rows, length, 0)


class Tokenizer:
    eos_token_id = 0

    def __call__(self, text: str, return_tensors: str):
        return type("Encoded", (), {"input_ids": torch.tensor([[1, 2, 3]])})

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.fixture
def setting(monkeypatch) -> demo_many.Setting:
    monkeypatch.setattr(demo_many, "LENGTH", 16)
    texts = {name: Text(3 * i + 1) for i, name in enumerate(demo_many.CORPORA)}
    return demo_many.Setting(llama().train(), Tokenizer(), texts, "cpu", 8, torch.float32)


def test_the_demo_shows_what_it_says(setting, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo_many, "SWEEP", dict(ranks=(2, 3), rates=(1e-3, 1e-2)))
    rates = {"learning_rate": 2e-2}
    monkeypatch.setattr(demo_many, "Trial", lambda *given, **options: Trial(*given, **options, **rates))
    report, _ = demo_many.demonstrate(setting, tmp_path)
    assert report["training"]["largest_relative_difference"] <= report["training"]["bound"]
    for name in demo_many.CORPORA:  # each is best where it was trained
        assert min(report["held_out"], key=lambda adapter: report["held_out"][adapter][name]) == name
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    assert set(report["continuations"]) == {"base", *demo_many.CORPORA} and len(report["sweep"]) == 4
    shown = demo_many_report.text(report)
    assert "Trained alone and in one batch (8 steps, base in float32)" in shown and shown.count("*") >= 3
    assert not hasattr(setting.model.model.layers[0].mlp.up_proj, "bank")


def test_the_demo_refuses_losses_that_differ(setting, monkeypatch) -> None:
    genuine = demo_many.TrialRun.run

    def wrong(self, label: str):
        progress = genuine(self, label)
        if label == "all together":
            progress["tragedies"].losses[3] *= 1.01
        return progress

    monkeypatch.setattr(demo_many.TrialRun, "run", wrong)
    with pytest.raises(demo_many.Disagreement, match="differ by 1.0e-02|differ by 9.9e-03"):
        demo_many.alone_and_together(setting, [Trial(name, name) for name in demo_many.CORPORA])


@pytest.mark.parametrize("cell", [many.Cell(1, "equal", "uniform", 8), many.Cell(6, "mixed", "zipf", 40)], ids=str)
def test_every_way_of_the_benchmark_is_right(cell: many.Cell) -> None:
    found = many.measure(cell, 160, 144, torch.bfloat16, 1)
    assert [row["name"] for row in found] == [
        "base", "vendor", "peftkern", "patched", "peft", "loop", "masked", "grouped_mm", "merged",
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in found)


def test_the_benchmark_refuses_a_wrong_way(monkeypatch) -> None:
    monkeypatch.setattr(many.Operands, "own", many.Operands.base)
    with pytest.raises(harness.WrongResult, match="peftkern is wrong"):
        many.measure(many.Cell(6, "mixed", "zipf", 40), 160, 144, torch.bfloat16, 1)


def test_the_patched_layer_of_the_benchmark_is_fast_and_pefts_is_its_own(monkeypatch) -> None:
    from peftkern.integrations.peft import mixed_batch

    calls: list[int] = []
    genuine = mixed_batch.run_rows
    monkeypatch.setattr(mixed_batch, "run_rows", lambda *given: calls.append(1) or genuine(*given))
    operands = many.Operands.make(many.Cell(6, "mixed", "zipf", 40), 160, 144, torch.bfloat16)
    operands.peft()
    assert not calls
    operands.patched()
    assert calls


def test_the_benchmark_keeps_its_time_and_leaves_a_record(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        many, "telling_cells", lambda: [many.Cell(2, "equal", "uniform", 8), many.Cell(3, "mixed", "one", 8)]
    )
    clock = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(many.time, "monotonic", lambda: next(clock))
    many.main(["--layer", "64x48", "--rounds", "1", "--minutes", "1", "--out", str(tmp_path)])
    assert "no time for E=3 mixed one M=8" in capsys.readouterr().out
    lines = (tmp_path / "many.csv").read_text().splitlines()
    assert lines[0].startswith("cell,name,median") and len(lines) == 1 + 9
    assert (tmp_path / "many.json").exists() and not (tmp_path / "many.csv").read_text().count("samples")


def test_cells_and_popularity() -> None:
    telling = many.telling_cells()
    assert {cell.E for cell in telling} == {1, 8, 32, 64} and sum(not cell.decoding for cell in telling) == 3
    found = many.cells([1, 8])
    assert len(found) == 2 + 12 and len({str(cell) for cell in found}) == len(found)
    assert torch.equal(many.Cell(8, "equal", "uniform", 16).ids().bincount(), torch.full((8,), 2))
    assert not many.Cell(8, "equal", "one", 16).ids().any()
    zipf = many.Cell(8, "equal", "zipf", 512).ids().bincount(minlength=8)
    assert zipf[0] > 2 * zipf[3] > 0
