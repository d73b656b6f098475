"""What a benchmark leaves behind: a record of the machine, and tables as text, JSON, CSV and PNG."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import METHOD
from peftkern.environment import env_report

COLOURS = {"frozen": "silver", "peft": "tab:orange", "naive": "gold", "peftkern": "tab:green"}
_MORE_COLOURS = (
    "tab:blue", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "navy", "teal",
    "salmon", "black", "limegreen",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parent.parent


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` whole or not at all, also under Ctrl-C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row, with the first row's keys as the header, atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def pyplot() -> Any | None:
    """matplotlib's pyplot without a display; None, after one line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no PNG: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write_png(path: Path, figure: Any) -> None:
    """A matplotlib figure as PNG, atomically."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, bbox_inches="tight")
    write_atomically(path, data.getvalue())


def load_average() -> list[float] | None:
    """Mean number of runnable processes over 1, 5 and 15 minutes; None where the system does not tell."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _without_folder(argument: str) -> str:
    """A record says nothing of where things lie on the machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def machine() -> dict[str, Any]:
    """Everything that a timing depends on besides the code: machine, load, versions, commit, date, method."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).stem, *(_without_folder(argument) for argument in sys.argv[1:])],
        "commit": commit or "unknown",
        "dirty": bool(changes),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_at_start": load_average(),
        "method": METHOD,
        **env_report(),
    }


def print_machine(record: Mapping[str, Any]) -> None:
    """The machine in two lines."""
    versions = record["versions"]
    state = " + local changes" if record["dirty"] else ""
    print(
        f"{record['cpu']}, {record['cores']} cores, {record['threads']} threads, load {record['load_average_at_start']}"
    )
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "peft"))
    print(f"{record['device']}; {shown}; commit {record['commit'][:10]}{state}; {record['date']}\n")


def table(rows: Sequence[Mapping[str, Any]], right: Sequence[str] = ()) -> str:
    """``rows`` as aligned text under their keys; columns named in ``right`` are right-aligned."""
    header = list(rows[0])
    cells = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    aligned = (
        (
            cell.rjust(width) if key in right else cell.ljust(width)
            for cell, width, key in zip(row, widths, header, strict=True)
        )
        for row in cells
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def ratio_figure(groups: Mapping[str, Sequence[Mapping[str, Any]]], title: str, unit: str) -> Any | None:
    """Horizontal bars of ratios with quartiles, one block of bars per group; None without matplotlib.

    Args:
        groups: heading -> rows with keys name, ratio, ratio_q1, ratio_q3.
        title: of the figure; unit: label of the axis.
    """
    plt = pyplot()
    if plt is None:
        return None
    names = list(dict.fromkeys(row["name"] for rows in groups.values() for row in rows))
    others = [name for name in names if name not in COLOURS]
    colours = COLOURS | dict(zip(others, itertools.cycle(_MORE_COLOURS), strict=False))
    count = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.27 * count))
    position, ticks, seen = 0.0, [], set()
    for heading, rows in groups.items():
        first = position
        for row in rows:
            spread = [[row["ratio"] - row["ratio_q1"]], [row["ratio_q3"] - row["ratio"]]]
            label = None if row["name"] in seen else row["name"]
            seen.add(row["name"])
            axes.barh(
                position, row["ratio"], xerr=spread, color=colours[row["name"]], label=label, capsize=2.5, height=0.82
            )
            axes.annotate(
                f"{row['ratio']:.2f}", (max(row["ratio"], row["ratio_q3"]), position), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
            position += 1
        ticks.append(((first + position - 1) / 2, heading))
        position += 1
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks([tick for tick, _ in ticks], [heading for _, heading in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} (bars: median; whiskers: quartiles)")
    axes.set_title(title, fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure


def save(folder: Path, name: str, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figure: Any) -> None:
    """``name``.json, .csv and, where there is a figure, .png in ``folder``; says where."""
    write_json(folder / f"{name}.json", record)
    write_csv(folder / f"{name}.csv", rows)
    suffixes = "json, csv"
    if figure is not None:
        write_png(folder / f"{name}.png", figure)
        suffixes += ", png"
    print(f"\nwritten: {folder / name}.{{{suffixes}}}")
