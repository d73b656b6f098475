"""The tables and the explanation of the demo of many adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import record


def training_table(training: Mapping[str, Any]) -> str:
    """Losses of each adapter trained alone and together, and the times."""
    rows = []
    for name, alone in training["alone"].items():
        together = training["together"][name]
        row = {"adapter": name, "first loss": f"{alone[0]:.4f}", "last loss, alone": f"{alone[-1]:.4f}"}
        row |= {"last loss, together": f"{together[-1]:.4f}", "seconds alone": f"{training['seconds_alone'][name]:.1f}"}
        rows.append(row)
    return record.table(rows, tuple(rows[0])[1:])


def held_out_table(held_out: Mapping[str, Mapping[str, float]]) -> str:
    """Held-out loss: an adapter a row, a text a column; the best of a column is starred."""
    best = {text: min(row[text] for row in held_out.values()) for text in next(iter(held_out.values()))}
    rows = [
        {"adapter": name} | {text: f"{loss:.3f}{'*' if loss == best[text] else ' '}" for text, loss in row.items()}
        for name, row in held_out.items()
    ]
    return record.table(rows, tuple(best))


def sweep_table(sweep: Mapping[str, Mapping[str, Any]]) -> str:
    """The trials of the sweep, best first."""
    rows = [
        {"trial": name, "held-out loss": f"{done['best']:.3f}"}
        for name, done in sorted(sweep.items(), key=lambda item: item[1]["best"])
    ]
    return record.table(rows, ("held-out loss",))


def text(report: Mapping[str, Any]) -> str:
    """The whole report, for a newcomer."""
    training = report["training"]
    one_by_one = sum(training["seconds_alone"].values())
    faster = one_by_one / training["seconds_together"]
    continuations = "\n".join(f"    {name:14s} {line}" for name, line in report["continuations"].items())
    return f"""
Trained alone and in one batch ({report["steps"]} steps, base in {report["base"]})
{training_table(training)}

Held-out loss, from one mixed batch a text (* best)
{held_out_table(report["held_out"])}

One prompt, one batch, four answers
    {report["prompt"]!r}
{continuations}

A sweep in one batch
{sweep_table(report["sweep"])}

What you see
  SmolLM2-135M stays frozen. Three small adapters (LoRA: r=16 on every linear layer) were trained on comedies,
  tragedies and technical prose: first one after the other, {one_by_one:.0f} s, then all in one batch,
  {training["seconds_together"]:.0f} s ({faster:.2f}x as fast; without the first step of each).
  - The losses agree: the largest difference of any step is {training["largest_relative_difference"]:.1e} (relative;
    allowed {training["bound"]:.1e}), dropout included, since an adapter's mask is keyed by its own seed and rows.
  - Each adapter was judged on all three texts, in the same batch as the others and the base.
  - The sweep trained 8 pairs of rank and learning rate at once over the same base; report.png has its curves.
  - Each adapter was saved in PEFT's format."""
