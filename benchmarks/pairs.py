"""A training step of several models under PEFT, and the same step patched: the ratio, and how sure it is.

Run by ``python -m benchmarks.model --models smollm2,llama,qwen2,gpt2,mixtral,bert``. All but SmolLM2 have random
weights (``benchmarks.families``). The step is forward and backward with LoRA r=16 on every layer that PEFT's
"all-linear" finds. Loss and gradients are held to the rule before anything is timed (``training.check_gradients``).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import peftkern
from benchmarks import families, harness, record, smollm2

NAMES = ("smollm2", *families.NAMES)
SIZE = families.Size(hidden=512, intermediate=1536, layers=8, heads=8, vocabulary=8192, positions=1024)
CONFIDENCE = 0.99
ALLOWED = 1.03  # a patched step may take 3 % longer, by the far end of the interval


def load(name: str, dtype: torch.dtype, device: str, size: families.Size = SIZE) -> Any:
    """The frozen model of that name."""
    return smollm2.load_model(dtype, device) if name == "smollm2" else families.build(name, size, dtype).to(device)


def compare(name: str, model: Any, shape: tuple[int, int], dropout_p: float, rounds: int) -> dict[str, Any]:
    """Check and time one model.

    Args: name: of NAMES; model: the bare, frozen model, turned into PEFT's in place; shape: rows and tokens of the
        batch; dropout_p: of LoRA; rounds: interleaved; fewer than 8 give no interval.
    Returns: a JSON-ready dict: "row" (what the table shows), "check", "timings", "layers" (per backend or reason).
    Raises: WrongResult where loss or gradients are wrong.
    """
    from benchmarks import training

    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = {key: value.to(model.device) for key, value in families.batch(name, ids).items()}
    models = training.variants(model, families.lora_config(name, dropout_p))
    plain, patched, report = models["peft"], models["peftkern"], peftkern.patch(models["peftkern"])
    checked: dict[str, float] = {}

    def check() -> str | None:
        checked.update(training.check_gradients(plain, patched, batch))
        return None if checked["ok"] else f"it differs from PEFT by more than the base's roundings: {checked}"

    cases = [
        harness.Case("peft", lambda: training.step(plain, batch), lambda: None, lambda: plain.zero_grad()),
        harness.Case("peftkern", lambda: training.step(patched, batch), check, lambda: patched.zero_grad()),
    ]
    unpatched, own = harness.measure(cases, rounds, warmup=2, label=name)
    low, high = harness.median_interval(own.ratios(unpatched), CONFIDENCE) or (None, None)
    row = {
        "model": name, "p": dropout_p, "fast": len(report.fast), "layers": len(report.fast) + len(report.skipped),
        "seconds_peft": unpatched.median, "seconds": own.median, "ratio": own.ratio, "ratio_q1": own.ratio_q1,
        "ratio_q3": own.ratio_q3, "low": low, "high": high, "within": high is not None and high <= ALLOWED,
    }  # fmt: skip
    layers = Counter(report.backends.values()) + Counter(report.skipped.values())
    return {"row": row, "check": checked, "timings": [unpatched.to_dict(), own.to_dict()], "layers": dict(layers)}


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each model."""
    lines = [
        {
            "model": row["model"],
            "p": f"{row['p']:g}",
            "fused layers": f"{row['fast']} of {row['layers']}",
            "PEFT s/step": f"{row['seconds_peft']:.3f}",
            "peftkern": f"{row['seconds']:.3f}",
            "ratio": f"{row['ratio']:.3f}",
            f"{CONFIDENCE:.0%} interval": "too few rounds"
            if row["low"] is None
            else f"{row['low']:.3f}-{row['high']:.3f}",
            f"<= {ALLOWED}": "yes" if row["within"] else "no",
        }
        for row in rows
    ]
    return record.table(lines, ("PEFT s/step", "peftkern", "ratio"))


def run(
    names: Sequence[str], dtype: torch.dtype, device: str, shape: tuple[int, int], dropout_p: float | None, rounds: int,
    out: Path,
) -> None:  # fmt: skip
    """Compare the named models, print the table, write models.json, .csv and .png.

    Args: dropout_p: None is 0.05, and 0 for a Mixtral, whose experts' adapter refuses dropout.
    """
    machine = record.machine()
    record.print_machine(machine)
    results = {}
    for name in names:
        p = (0.0 if name == "mixtral" else 0.05) if dropout_p is None else dropout_p
        results[name] = compare(name, load(name, dtype, device), shape, p, rounds)
        gc.collect()
        print(text([results[name]["row"]]))
        print("\n".join(f"  {count:4d}  {kind}" for kind, count in results[name]["layers"].items()), flush=True)
    rows = [result["row"] for result in results.values()]
    print(f"\n{text(rows)}")
    machine["load_average_at_end"] = record.load_average()
    bars = {
        row["model"]: [{"name": "peft", "ratio": 1.0, "ratio_q1": 1.0, "ratio_q3": 1.0}, {**row, "name": "peftkern"}]
        for row in rows
    }
    figure = record.ratio_figure(
        bars, f"{'x'.join(map(str, shape))} tokens, LoRA r=16: one training step", "time / time of PEFT's step"
    )
    record.save(out, "models", {"machine": machine, "confidence": CONFIDENCE, "results": results}, rows, figure)
