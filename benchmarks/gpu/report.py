"""report.md, report.png and the summary that is printed last, from whatever the parts have left so far."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu import correctness, goals, measure, store, tuning
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.task import OK, Result

MOST_CHARACTERS = 11_000
_SHORT = 14  # lines of a table in the summary
_AGAIN = measure.again("frozen")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Each part's file; an empty one where there is none."""
    return {part: store.read(folder / f"{part}.json") or {"results": {}, "machine": {}} for part in PARTS}


def write(folder: Path) -> None:
    """report.md, and report.png where matplotlib is installed. An error in here is said, and costs no measurement."""
    try:
        _write(folder, load(folder))
    except Exception as error:  # noqa: BLE001 - the results are in the JSON files; --report writes it again
        print(f"no report: {type(error).__name__}: {error}", flush=True)


def _write(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    record.write_atomically(folder / "report.md", markdown(found).encode())
    if importlib.util.find_spec("matplotlib") is not None:
        figure = plot(found["products"]["results"])
        if figure is not None:
            record.write_png(folder / "report.png", figure)
            record.pyplot().close(figure)  # type: ignore[union-attr]


def summary(folder: Path) -> str:
    """What is printed last: the goals with their numbers, failures, the worst cells; under 12,000 characters."""
    try:
        return _summary(load(folder))
    except Exception as error:  # noqa: BLE001 - the results are in the JSON files
        return f"no summary: {type(error).__name__}: {error}"


def _summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [_head(found), _goals(found), _broken(found, _SHORT)]
    for heading, rows in (
        ("Furthest above the roofline", goals.worst(found["products"]["results"], 8)),
        ("Slower than another", goals.losing(found["products"]["results"])[:_SHORT]),
    ):
        if rows:
            parts.append(f"{heading}\n{record.table(rows)}")
    text = "\n\n".join(part for part in parts if part)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 40] + "\n... (the rest is in report.md)"


def _head(found: Mapping[str, Mapping[str, Any]]) -> str:
    machine = next((part["machine"] for part in found.values() if part["machine"]), {})
    card = found["environment"]["results"].get("card", {})
    roof = found["environment"]["results"].get("ceilings", {})
    versions = machine.get("versions", {})
    lines = [f"peftkern {str(machine.get('commit', 'unknown'))[:12]} on {machine.get('device', 'nothing')}"]
    if card.get("driver_version"):
        lines[0] += f", driver {card['driver_version']}, SM {card.get('clocks.sm')} of {card.get('clocks.max.sm')}"
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed"))
    if roof.get("status") == OK:
        flops = ", ".join(f"{name} {value / 1e12:.1f} TFLOP/s" for name, value in roof["flops"].items())
        lines.append(f"ceilings: {flops}, copy {roof['bandwidth'] / 1e12:.2f} TB/s")
    if machine.get("rehearsal"):
        lines.append("A REHEARSAL: every time in here is invented.")
    lines += [f"{part}: {correctness.spoken(content['results'])}" for part, content in found.items()]
    lines += [tuning.spoken(found["tuning"]["results"])] if found["tuning"]["results"] else []
    return "\n".join(lines)


def _goals(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [goal.row() for goal in goals.all_goals(found["products"]["results"], found["models"]["results"])]
    missed = [row["goal"] for row in rows if row[""] == "MISSED"]
    return (
        record.table(rows, ("found",)) + f"\n{len(missed)} goals missed" + (f": {'; '.join(missed)}" if missed else "")
    )


def _broken(found: Mapping[str, Mapping[str, Any]], most: int | None = None) -> str:
    """What did not end well, one line each."""
    lines = []
    for part, content in found.items():
        for key, result in content["results"].items():
            if result["status"] not in (OK, "refused"):
                why = result.get("error") or _first_failure(result) or result.get("output", "")[-160:]
                lines.append(f"{part} | {key} | {result['status']} | {' '.join(str(why).split())[:220]}")
    if not lines:
        return ""
    shown = lines if most is None else lines[:most]
    rest = f"\n... and {len(lines) - len(shown)} more" if len(shown) < len(lines) else ""
    return f"Did not end well ({len(lines)})\n" + "\n".join(shown) + rest


def _first_failure(result: Result) -> str:
    failures = result.get("failures") or []
    return f"{len(failures)} failures, first {failures[0]}" if failures else ""


# --------------------------------------------------------------------------------------------------------- markdown


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole record as text: every cell, slow ones too."""
    products, models = found["products"]["results"], found["models"]["results"]
    parts = ["# GPU benchmark", _block(_head(found)), "## Goals", _block(_goals(found))]
    broken = _broken(found)
    parts += ["## What did not end well", _block(broken)] if broken else []
    for heading, rows in (
        ("Furthest above the roofline", goals.worst(products, 20)),
        ("Slower than another by more than 2 % and 2 us at 99 % confidence", goals.losing(products)),
        ("Products, x frozen (99 % interval), microseconds of the frozen products", _cells(products)),
        ("Schedules side by side", _schedules(products)),
        ("Decode, x merged weights", _decode(products)),
        ("Several adapters in a batch, x frozen", _banks(products)),
        ("One PEFT layer, x frozen", _layers(models)),
        ("Training step of the small Llama, x frozen", _models(models)),
    ):
        if rows:
            parts += [f"## {heading}", _markdown_table(rows)]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    return f"```\n{text}\n```"


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [header, ["---"] * len(header), *([str(row.get(key, "")) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _cells(products: goals.Results) -> list[dict[str, Any]]:
    rows = []
    for cell in goals.cells(products):
        for phase, times in cell["times"].items():
            about, roof = cell["about"], cell["roofline"][phase]
            own = times.get("peftkern")
            row = {
                "layer": about["layer"],
                "M": about["M"],
                "r": about["r"],
                "p": about["p"],
                "adapter": about["adapter"],
            }
            row |= {"phase": phase.replace("forward+backward", "f+b"), "frozen us": f"{times['frozen']['us']:.1f}"}
            row["interval"], row["A/A"] = _interval(own), _interval(times.get(_AGAIN))
            row |= {"roofline": f"{roof['ratio']:.3f}", "overlapped": f"{roof['overlapped']:.3f}"}
            row |= {name: f"{value['ratio']:.3f}" for name, value in times.items() if name not in ("frozen", _AGAIN)}
            row |= {"MiB": cell.get("peak_mib", {}).get("peftkern", ""), "choice": cell["choice"].get("forward", "")}
            rows.append(row)
    return rows


def _interval(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['low']:.3f}-{value['high']:.3f}"


def _schedules(products: goals.Results) -> list[dict[str, Any]]:
    """The best tile of each schedule and direction."""
    rows = []
    for key, result in products.items():
        if not key.startswith("schedules ") or result["status"] != OK:
            continue
        for direction in ("forward", "backward"):
            best: dict[str, tuple[float, str]] = {}
            for label, value in result[direction]["times"].items():
                schedule, _, tile = label.partition(" ")
                if label not in ("frozen", _AGAIN):
                    best[schedule] = min(best.get(schedule, (float("inf"), "")), (value["ratio"], tile))
            row = {"cell": goals.title(result["about"]), "direction": direction}
            rows.append(row | {name: f"{value:.3f} ({tile})" for name, (value, tile) in best.items()})
    return rows


def _decode(products: goals.Results) -> list[dict[str, Any]]:
    rows = []
    for key, result in products.items():
        if key.startswith("decode ") and result["status"] == OK:
            times = {name: f"{value['ratio']:.3f}" for name, value in result["times"].items() if name != "merged"}
            row = {"layer": result["about"]["layer"], "M": result["about"]["M"]}
            row["merged us"] = f"{result['times']['merged']['us']:.2f}"
            kernels = result.get("kernels")
            rows.append(row | times | {"launches": sum(kernels.values()) if kernels else ""})
    return rows


def _banks(products: goals.Results) -> list[dict[str, Any]]:
    rows = []
    for key, result in products.items():
        if key.startswith("bank ") and result["status"] == OK:
            times = {name: f"{value['ratio']:.3f}" for name, value in result["times"].items() if name != "frozen"}
            row = {name: result["about"][name] for name in ("phase", "layer", "M", "E")}
            kernels = result.get("kernels")
            row |= {"frozen us": f"{result['times']['frozen']['us']:.1f}"} | times
            rows.append(row | {"launches": sum(kernels.values()) if kernels else ""})
    return rows


def _layers(models: goals.Results) -> list[dict[str, Any]]:
    rows = []
    for key, result in models.items():
        if key.startswith(("layer", "unsloth")) and result["status"] == OK:
            for phase, times in result["times"].items():
                row = {"layer": key, "phase": phase, "frozen us": f"{times['frozen']['us']:.1f}"}
                rows.append(row | {name: f"{value['ratio']:.3f}" for name, value in times.items() if name != "frozen"})
    return rows


def _models(models: goals.Results) -> list[dict[str, Any]]:
    rows = []
    for key, result in models.items():
        if key.startswith("model") and result["status"] == OK:
            for kind, times in (("eager", result["times"]), ("CUDA graph", result.get("graphs", {}).get("times", {}))):
                for name, value in times.items():
                    row = {"model": key, "kind": kind, "variant": name, "x frozen": f"{value['ratio']:.3f}"}
                    rows.append(row | {"us": f"{value['us']:.0f}", "saved MiB": result["saved_mib"].get(name, "")})
    return rows


# --------------------------------------------------------------------------------------------------------------- plot


def plot(products: goals.Results) -> Any | None:
    """Ratio to the frozen products over M, a line a layer, forward and forward+backward; None without cells."""
    found = goals.cells(products, r=16, p=0.05, dtype="bf16")
    plt = record.pyplot() if found else None
    if plt is None:
        return None
    adapters = sorted({cell["about"]["adapter"] for cell in found})
    phases = ("forward", "forward+backward")
    figure, axes = plt.subplots(len(adapters), 2, figsize=(13, 4.5 * len(adapters)), squeeze=False, sharex=True)
    for row, adapter in zip(axes, adapters, strict=True):
        for ax, phase in zip(row, phases, strict=True):
            mine = [cell for cell in found if cell["about"]["adapter"] == adapter]
            for layer in dict.fromkeys(cell["about"]["layer"] for cell in mine):
                points = sorted((c["about"]["M"], goals.ratio(c, phase)) for c in mine if c["about"]["layer"] == layer)
                known = [(M, value) for M, value in points if value is not None]
                ax.plot(
                    *zip(*known, strict=True), marker="o", markersize=3, linewidth=1, label=layer
                ) if known else None
            ax.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
            ax.set(xscale="log", title=f"peftkern, {phase}, {adapter} adapters", xlabel="M", ylabel="x frozen")
    axes[0][1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8, frameon=False)
    return figure
