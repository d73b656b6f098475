"""The demo's tables, explanation and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import record

_BUSY = 2.5  # slowest over fastest step; a quiet machine stays below 1.5
_SMOOTH = 5  # losses of single batches jump; the table shows means of this many steps


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def curve_table(losses: Mapping[str, Sequence[float]], points: int = 8) -> str:
    """Both loss curves at about ``points`` steps, with their difference."""
    count = len(next(iter(losses.values())))
    chosen = sorted({round(i * (count - 1) / max(1, points - 1)) for i in range(points)})
    rows = []
    for step in chosen:
        values = [curve[step] for curve in losses.values()]
        row = {"step": step + 1} | {name: f"{curve[step]:.3f}" for name, curve in losses.items()}
        rows.append(row | {"difference": f"{values[1] - values[0]:+.3f}"})
    return record.table(rows, ("step", *losses, "difference"))


def summary_table(report: Mapping[str, Any]) -> str:
    """The final table: PEFT beside peftkern, or the dense base beside the quantised one."""
    (one, first), (other, second) = report["runs"].items()

    def row(label: str, key: str, form: str, compare: str = "") -> dict[str, str]:
        return {"": label, one: format(first[key], form), other: format(second[key], form), " ": compare}

    def less(key: str) -> str:
        factor = first[key] / second[key]
        return f"{factor:.2f}x less" if factor >= 1 else f"{factor:.2f}x"

    faster = first["median_seconds"] / second["median_seconds"]
    quickest = first["fastest_seconds"] / second["fastest_seconds"]
    rows = [
        row("training loss, first steps", "first_loss", ".3f"),
        row("training loss, last steps", "last_loss", ".3f"),
        row("held-out loss before", "held_out_before", ".3f"),
        row("held-out loss after", "held_out_after", ".3f"),
        row("median s/step", "median_seconds", ".3f", f"{faster:.2f}x faster" if faster >= 1 else f"{faster:.2f}x"),
        row("fastest s/step", "fastest_seconds", ".3f", f"{quickest:.2f}x"),
        row("tokens/s", "tokens_per_second", ".0f"),
        row("MiB saved for backward", "saved_mib", ".0f", less("saved_mib")),
    ]
    if report["job"]["quant"]:
        rows += [
            row("MiB of frozen linear layers", "frozen_linears_mib", ".1f", less("frozen_linears_mib")),
            row("MiB of the frozen model", "frozen_mib", ".1f", less("frozen_mib")),
        ]
    return record.table(rows, (one, other))


def first_and_last(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss of the first and of the last few steps."""
    return _mean(losses[:_SMOOTH]), _mean(losses[-_SMOOTH:])


def _explanation_of_quantised(report: Mapping[str, Any]) -> str:
    job, agreed, place = report["job"], report["agreement"], report["machine"]["device"]
    quantised, steps = report["runs"][f"{job['quant']} base"], len(agreed["peft"])
    largest, bound = agreed["largest_relative_difference"], agreed["bound"]
    bits = 8 * quantised["frozen_linears_mib"] * 2**20 / quantised["frozen_linears_elements"]
    return f"""What you see
  A language model (SmolLM2-135M-Instruct) was fine-tuned twice on Shakespeare's plays, {job["steps"]} steps of
  {job["tokens"]} tokens each, on {place}, in {job["base"]}, both times by peftkern: on its dense
  weights, and with its linear layers in {job["quant"]} (double quantised, by bitsandbytes), which is QLoRA. Those
  stay frozen; what is trained is a small low-rank adapter beside each of them (r=16, alpha=32, dropout 0.05).
  - The quantised linear layers hold {bits:.2f} bit per weight with all scales and tables, {16 / bits:.2f}x less than
    bf16. The embedding, which is the output layer too, stays dense.
  - Without dropout, the first {steps} steps on the quantised base have the losses of PEFT over bitsandbytes:
    they differ by at most {largest:.1e} (relative); one rounding to {job["base"]} and 1e-6 are {bound:.1e}.
    A step took PEFT {agreed["peft_seconds"]:.2f} s and peftkern {agreed["peftkern_seconds"]:.2f} s there.
  - The held-out loss is measured on {job["held_out_play"].title()}, which neither run was trained on.
  - "MiB saved for backward" is what autograd keeps from the forward pass for the backward pass.
  - The adapter that was trained on the quantised base was saved, and loaded by plain PEFT over bitsandbytes in a
    fresh process that never imported peftkern: {_reload_sentence(report["reload"], job["base"])}
  Timings are of this machine and this minute; python -m benchmarks.quant measures interleaved, with spread.
{_busy(report)}"""


def explanation(report: Mapping[str, Any]) -> str:
    """What one sees, for a newcomer."""
    if report["job"]["quant"]:
        return _explanation_of_quantised(report)
    job, agreed, place = report["job"], report["agreement"], report["machine"]["device"]
    largest, bound = agreed["largest_relative_difference"], agreed["bound"]
    return f"""What you see
  A language model (SmolLM2-135M-Instruct) was fine-tuned twice on Shakespeare's plays, {job["steps"]} steps of
  {job["tokens"]} tokens each, on {place}, in {job["base"]}. Its own weights stay frozen; what is trained is a small
  low-rank adapter beside every linear layer (LoRA: r=16, alpha=32, dropout 0.05). The first run is plain
  PEFT, the second the same model after one more line, peftkern.patch(model).
  - The losses agree: same batches, same initial adapter, same mathematics. They are not equal to the last
    digit, because dropout draws differently. Without dropout, the first {len(agreed["peft"])} steps differ by at most
    {largest:.1e} (relative); one rounding to {job["base"]} and 1e-6 are {bound:.1e}.
  - The held-out loss is measured on {job["held_out_play"].title()}, which neither run was trained on.
  - "MiB saved for backward" is what autograd keeps from the forward pass for the backward pass.
  - The adapter that peftkern trained was saved, and loaded by plain PEFT in a fresh process that never
    imported peftkern: {_reload_sentence(report["reload"], job["base"])}
  Timings are of this machine and this minute; python -m benchmarks.model measures interleaved, with spread.
{_busy(report)}"""


def _busy(report: Mapping[str, Any]) -> str:
    """A warning where the steps of a run took very different times."""
    if all(max(run["seconds"][1:] or [0.0]) < _BUSY * run["fastest_seconds"] for run in report["runs"].values()):
        return ""
    return "  CAUTION: other work kept this machine busy (some steps took far longer); these timings say little."


def _reload_sentence(reload: Mapping[str, float], base: str) -> str:
    same = reload["fresh_peft_to_peft_here"]
    plain = "bit-identical to PEFT's here" if same == 0 else f"{same:.1e} (relative) from PEFT's here"
    return (
        f"its logits are {plain}.\n"
        f"    Against the same model one precision up, PEFT's {base} logits err by {reload['peft_error']:.1e} "
        f"and peftkern's by {reload['peftkern_error']:.1e}."
    )


def figure(report: Mapping[str, Any]) -> Any | None:
    """Loss curves and bars; None without matplotlib."""
    plt = record.pyplot()
    if plt is None:
        return None
    job = report["job"]
    one, other = report["runs"]
    colours = {one: record.COLOURS["peft"], other: record.COLOURS["peftkern"]}
    columns = 4 if job["quant"] else 3
    picture, (left, time, space, *held) = plt.subplots(
        1, columns, figsize=(12, 4.2), width_ratios=(2.4, *[1] * (columns - 1)), layout="constrained"
    )
    for name, run in report["runs"].items():
        steps = range(1, len(run["losses"]) + 1)
        dashes = (0, (4, 2)) if name == other else "solid"
        left.plot(steps, run["losses"], color=colours[name], label=f"{name}: training", linestyle=dashes, linewidth=1.6)
        last = len(run["losses"])
        left.plot(
            [0, last], [run["held_out_before"], run["held_out_after"]], color=colours[name], linestyle="none",
            marker="o" if name == one else "x", markersize=8, label=f"{name}: held-out, before and after",
        )  # fmt: skip
    left.set(xlabel="training step", ylabel="loss (nats per token)", title="Losses")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8, frameon=False)
    _bars(time, report["runs"], "median_seconds", "Time", "seconds per step (median, quartiles)", colours)
    _bars(space, report["runs"], "saved_mib", "Memory", "MiB saved for backward", colours)
    for axes in held:
        _bars(axes, report["runs"], "frozen_mib", "Base", "MiB of the frozen model", colours)
    picture.suptitle(
        f"LoRA fine-tuning of SmolLM2-135M on Shakespeare: {job['rows']}x{job['length']} tokens a step, "
        f"{report['machine']['device']}, {report['machine']['threads']} threads",
        fontsize=11,
    )
    return picture


def _bars(axes: Any, runs: Mapping[str, Any], key: str, title: str, unit: str, colours: Mapping[str, str]) -> None:
    for position, (name, run) in enumerate(runs.items()):
        value = run[key]
        q1, q3 = run["seconds_quartiles"] if key == "median_seconds" else (value, value)
        spread = None if q1 == q3 else [[value - q1], [q3 - value]]
        axes.bar(position, value, color=colours[name], width=0.65, yerr=spread, capsize=4)
        label = f"{value:.2f}" if value < 100 else f"{value:.0f}"
        axes.annotate(
            label, (position, max(value, q3)), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.15)
