"""``python -m benchmarks.cpu``: what it measures, checks and writes. Nothing here looks at a time."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from benchmarks import harness

pytest.importorskip("peft")
from benchmarks import cpu, linear, smollm2, training  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ["forward", "backward", "forward+backward"]


def run(tmp_path, *arguments: str) -> tuple[dict, list[dict[str, str]]]:
    """The record and the lines of the CSV file."""
    cpu.main(["--quick", "--name", "small", "--out", str(tmp_path), *arguments])
    with (tmp_path / "small.csv").open() as file:
        return json.loads((tmp_path / "small.json").read_text()), list(csv.DictReader(file))


def test_layers_decode_and_ranks(tmp_path, capsys, monkeypatch):
    written, lines = run(tmp_path, "--only", "ranks,decode,layers", "--minutes", "100")
    rows = written["rows"]
    assert written["left_out"] == [] and written["machine"]["cores"] and written["machine"]["load_average_at_end"]
    assert [list(row) for row in rows] == [list(cpu.COLUMNS)] * len(rows) and list(lines[0]) == list(cpu.COLUMNS)
    assert [(line["part"], line["name"], line["phase"]) for line in lines] == [
        (row["part"], row["name"], row["phase"]) for row in rows
    ]

    def found(part: str, *columns: str) -> set[tuple]:
        return {tuple(row[column] for column in columns) for row in rows if row["part"] == part}

    names = {"layers": ("frozen", "naive", "peftkern"), "ranks": ("frozen", "naive", "peftkern", "peft")}
    assert found("layers", "base", "p", "phase", "name") == {
        (base, p, phase, name) for base in ("bf16", "fp32") for p in (0.05, 0.0) for phase in PHASES
        for name in names["layers"]
    }  # fmt: skip
    assert found("ranks", "r", "phase", "name") == {
        (r, phase, name) for r in (1, 16) for phase in PHASES for name in names["ranks"]
    }
    assert found("decode", "base", "M", "phase", "name") == {
        (base, M, "decode", name) for base in ("bf16", "fp32") for M in (1, 4, 16)
        for name in ("merged", "naive", "peftkern", cpu.ALONE)
    }  # fmt: skip
    thin = 16 * (65 + 33) / (65 * 33)
    assert found("layers", "phase", "arithmetic") == {
        ("forward", 1 + thin), ("backward", 1 + 2 * thin), ("forward+backward", 1 + 1.5 * thin),
    }  # fmt: skip
    assert all(row["q1"] <= row["median"] <= row["q3"] for row in rows)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("fw naive", "bw arithmetic", "merged ms", cpu.ALONE, "fw peft "))
    monkeypatch.setattr(cpu.record, "ratio_figure", lambda groups, *_: groups)
    assert {heading: [bar["name"] for bar in bars] for heading, bars in cpu.figure(rows, "").items()} == {
        "65->33, M=24\nforward": ["naive", "peftkern", "arithmetic"],
        "65->33, M=24\nbackward": ["naive", "peftkern", "arithmetic"],
        "decode 64->64, M=1": ["naive", "peftkern", cpu.ALONE],
        "65->33, M=24\nr=1": ["naive", "peftkern", "peft"],
        "65->33, M=24\nr=16": ["naive", "peftkern", "peft"],
    }


@pytest.fixture
def small_model(monkeypatch):
    """In the place of SmolLM2: a Llama of two layers, of widths that bitsandbytes packs, and random tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip

    def build(dtype: torch.dtype, device: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()

    monkeypatch.setattr(smollm2, "load_model", build)
    monkeypatch.setattr(cpu.packages, "require", lambda *modules: None)
    monkeypatch.setattr(cpu, "tokens", lambda length: torch.randint(128, (1, length)))


def test_steps_on_every_base(small_model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(cpu, "MOST_ROUNDS", 3)
    written, lines = run(tmp_path, "--only", "steps", "--minutes", "100")
    assert [(row["base"], row["p"], row["name"]) for row in written["rows"]] == [
        (base, p, name) for base, p in sorted(cpu.STEPS, key=lambda step: cpu._slow(step[0]))
        for name in ("frozen", "peft", "peftkern")
    ]  # fmt: skip
    for row in written["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["M"] / row["median"]) and row["saved_mib"] > 0
        assert row["phase"] == "step" and row["M"] == 16
    assert len(lines) == 15 and "peftkern, tokens/s" in capsys.readouterr().out


def test_a_step_over_four_bits_is_held_to_their_values(small_model, monkeypatch):
    pytest.importorskip("bitsandbytes")
    exact = training.from_bitsandbytes

    def off(module):
        weight = exact(module)
        return type("Off", (), {"materialize": lambda self, dtype: weight.materialize(dtype).flip(0)})()

    monkeypatch.setattr(training, "from_bitsandbytes", off)
    ids = torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(0))
    found = training.variants(cpu.model.load("nf4", "cpu"), smollm2.lora_config(0.0))
    assert training.check_gradients(found["peft"], found["peftkern"], ids)["peft_gradient_error"] > 0.3


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu.products, "measure_cell", lambda *_: pytest.fail("begun without time"))
    with pytest.raises(SystemExit, match="give more --minutes"):
        run(tmp_path, "--only", "layers", "--minutes", "0")
    left_out = f"no time was left for\n  layers: {cpu._bases()[0]}, p=0.05, small.65 65->33, M=24\n"
    assert left_out in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "layers,decoding")
    assert "decoding: not of layers, decode, ranks, steps" in capsys.readouterr().err


def test_every_part_ends_at_its_share(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cpu.time, "monotonic", lambda: now[0])
    clock = cpu.Clock(10, ("layers", "ranks"), start=0.0)
    assert [clock.end(name) for name in ("layers", "ranks")] == [pytest.approx(420), pytest.approx(600)]
    given = []

    def cell(left: float) -> list[dict]:
        given.append(left)
        now[0] += 200
        return [{"name": "a"}]

    part = cpu.Part([(title, cell) for title in "abc"], (), {})
    assert clock.run("layers", part) == 2 * [{"part": "layers", "name": "a"}]  # a third would end after 420 s
    assert given == [pytest.approx(420), pytest.approx(220)] and clock.left_out == ["layers: c"]


@pytest.mark.parametrize("wrong", ["merged", "naive", "peftkern", cpu.ALONE])
def test_a_wrong_decode_is_not_timed(wrong, monkeypatch):
    cell = linear.Cell("square", 4, 64, 64, 4, 0.0, torch.float32, torch.float32, "cpu")
    o = linear.operands(cell)
    off = lambda made: lambda *given: made(*given) * 1.001  # noqa: E731
    if wrong == "merged":
        monkeypatch.setattr(cpu, "SCALING", 2.01)
    elif wrong == "naive":
        monkeypatch.setattr(cpu.linear, "naive", off(linear.naive))
    else:
        exact, alone = cpu.peftkern.lora_linear, wrong == cpu.ALONE
        scaled = lambda x, W, A, *rest: exact(x, W, A, *rest) * (1.001 if (len(A) == 0) == alone else 1)  # noqa: E731
        monkeypatch.setattr(cpu.peftkern, "lora_linear", scaled)
    with pytest.raises(harness.WrongResult, match=f"^{wrong} is wrong"):
        harness.check(cpu._decode_cases(cell, o))


@pytest.mark.parametrize(("left", "rounds"), [(1000, 12), (160, 10), (100, 4), (90, 3), (89, 0)])
def test_a_step_has_as_many_rounds_as_fit(left, rounds):
    """10 s a round, and the time of six for the rest."""
    assert cpu._rounds_of_a_step(1.0, left, 1) == rounds
    assert cpu._rounds_of_a_step(1.0, 2 * left, 2) == max(rounds, 3)  # the other one's time, if need be
    assert cpu._rounds_of_a_step(0.01, 0.9, 5) == 3


def test_the_whole_table():
    cells = [cpu.layers(cpu.FULL).cells, cpu.decode(cpu.FULL).cells, cpu.ranks(cpu.FULL).cells]
    assert [len(found) for found in cells] == [24, 24, 10]
    assert {(where.K, where.N, M) for where, M in cpu.FULL.shapes} == {
        (576, 576, 1024), (576, 192, 1024), (576, 1536, 1024), (1536, 576, 1024), (4096, 4096, 64), (4096, 1024, 256),
    }  # fmt: skip
    assert cpu.FULL.ranks[:4] == (1, 16, 64, 512) and len(set(cpu.FULL.ranks)) == 10


def test_a_machine_without_bf16_takes_it_last_and_shortly(monkeypatch):
    monkeypatch.setattr(cpu.smollm2, "native_dtype", lambda device: torch.float32)
    asked = []
    monkeypatch.setattr(cpu, "_step", lambda base, p, length, left, steps: asked.append((base, length, steps)))
    for _, measure in cpu.steps(cpu.FULL).cells:
        measure(60.0)
    assert asked == [("fp32", 512, 5), ("nf4", 512, 4), ("fp32", 512, 3), ("bf16", 16, 2), ("bf16", 16, 1)]
    assert cpu.decode(cpu.FULL).cells[0][0].startswith("fp32") and cpu._rounds("bf16", 15) == 3
