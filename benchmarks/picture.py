"""The README's picture, from a record of ``benchmarks.model``: time and saved memory of one training step.

python -m benchmarks.picture benchmarks/results/2026-11-24-epyc-zen5-2core-model.json docs/step.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_SHOWN = {"frozen": ("frozen, no adapter", "#b8b8b8"), "peft": ("PEFT", "#ff7f0e"), "peftkern": ("peftkern", "#2ca02c")}
_PANELS = (("seconds", "seconds a step"), ("saved_mib", "MiB saved for backward"))


def draw(record: dict[str, Any], cases: list[str], path: Path) -> None:
    """One panel a figure, one group of bars a case. Raises: KeyError for a case or a bar that the record lacks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(9, 3))
    for axis, (field, title) in zip(axes, _PANELS, strict=True):
        for place, (name, (label, color)) in enumerate(_SHOWN.items()):
            rows = [{row["name"]: row for row in record["results"][case]["rows"]}[name] for case in cases]
            bars = axis.bar([i + 0.27 * (place - 1) for i in range(len(cases))], [row[field] for row in rows], 0.25,
                            color=color, label=label)  # fmt: skip
            axis.bar_label(bars, fmt="%.2f" if field == "seconds" else "%.0f", fontsize=8)
        axis.set_xticks(range(len(cases)), cases)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--cases", nargs="+", default=["bf16 base, p=0.05", "fp32 base, p=0.05"])
    given = parser.parse_args()
    draw(json.loads(given.record.read_text()), given.cases, given.picture)


if __name__ == "__main__":
    main()
