"""A training step of SmolLM2-135M: frozen, under PEFT, and under peftkern.

    python -m benchmarks.model [--base bf16] [--p 0.05] [--length 512] [--rows 1] [--rounds 12] [--compiled]
    python -m benchmarks.model --models smollm2,llama,qwen2,gpt2,mixtral,bert    (see ``benchmarks.pairs``)

The frozen step is forward and backward of the bare model, with dx through every layer and no adapter at all: the floor.
PEFT and peftkern run the same adapter (r=16, fp32, every linear layer) on the same weights. Everything is reported as
a ratio to the frozen step of the same rounds, beside what autograd saved for backward. Before anything is timed, loss
and adapter gradients of one step are compared with PEFT's under the same dropout mask (``training.check_gradients``),
and the frozen loss with that of PEFT's model with its adapters disabled.

A base in 4 bits is bitsandbytes' and computes in bf16 where the machine multiplies that, else in fp32; its frozen step
is bitsandbytes' own.

A CPU without bf16 instructions runs fp32 bases unless --base says otherwise: there PyTorch's own bf16 step takes
minutes, so a bf16 base gets one warm-up and at most SLOW_ROUNDS rounds (--length 64 makes it bearable), and the output
says so.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, memory, packages, pairs, record, smollm2

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASES = (*DTYPES, *smollm2.FOUR_BIT)
SLOW_ROUNDS = 3  # of a 16-bit base where the machine has no instructions for it
# (base, p) -> (ratio to frozen, MiB saved for backward) to reach on 2 CPU cores at 512 tokens
GOALS: dict[tuple[str, float], tuple[float, float | None]] = {
    ("bf16", 0.05): (1.18, 432.0),
    ("fp32", 0.05): (1.15, None),
}


def load(base: str, device: str) -> Any:
    """The bare, frozen SmolLM2-135M on a base of BASES."""
    if base in DTYPES:
        return smollm2.load_model(DTYPES[base], device)
    packages.require("bitsandbytes")
    compute = smollm2.native_dtype(device)
    return smollm2.quantise(smollm2.load_model(compute, device), base, compute)


def compare(model: Any, ids: Tensor, dropout_p: float, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Check, time and weigh the variants of one configuration.

    Args:
        model: the bare, frozen model; it is turned into PEFT's model in place.
        ids: the batch, int64 [rows, length], on the model's device.
        dropout_p: LoRA dropout.
        rounds: interleaved rounds.
        compiled: also time PEFT under torch.compile (its compilation takes minutes on a CPU).
    Returns: a JSON-ready dict: "rows" (one per variant), "check", "timings", "backends".
    Raises: WrongResult where loss or gradients are wrong.
    """
    from benchmarks import training

    models = training.variants(model, smollm2.lora_config(dropout_p))
    plain, patched = models["peft"], models["peftkern"]
    checked: dict[str, float] = {}

    def check_frozen() -> str | None:
        with torch.no_grad(), plain.disable_adapter():
            disabled = training.loss(plain, ids).item()
        with torch.no_grad():
            bare = training.loss(models["frozen"], ids).item()
        return None if disabled == bare else f"loss {bare} is not that of the disabled adapter, {disabled}"

    def check_patched() -> str | None:
        checked.update(training.check_gradients(plain, patched, ids))
        return None if checked["ok"] else f"it differs from PEFT by more than the base's roundings: {checked}"

    def check_compiled() -> str | None:
        own, eager = training.step(models["peft compiled"], ids), training.step(plain, ids)
        near = abs(own - eager) <= 0.02 * eager  # two dropout draws move the loss by less
        return None if near else f"loss {own}, eager {eager}"

    checks = {"frozen": check_frozen, "peft": lambda: None, "peftkern": check_patched}  # PEFT is the yardstick
    if compiled:
        models["peft compiled"], checks["peft compiled"] = torch.compile(training.shared_copy(plain)), check_compiled
    cases = [_case(name, variant, ids, checks[name]) for name, variant in models.items()]
    warmup = 2 if rounds > SLOW_ROUNDS else 1
    timings = harness.measure(cases, rounds, warmup=warmup, label=_label(ids, model, dropout_p))
    saved = {name: memory.saved_for_backward(lambda m=m: training.loss(m, ids), m) for name, m in models.items()}
    for variant in models.values():
        variant.zero_grad(set_to_none=True)
    rows = [_row(timing, saved[timing.name], ids.numel()) for timing in timings]
    return {"rows": rows, "check": checked, "timings": [t.to_dict() for t in timings], "backends": _backends(patched)}


def _label(ids: Tensor, model: Any, dropout_p: float) -> str:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{dtype}, p={dropout_p}, {'x'.join(map(str, ids.shape))} tokens"


def _backends(patched: Any) -> dict[str, int]:
    """Layers per backend."""
    import peftkern

    report = peftkern.patch(patched)
    names = [*report.backends.values(), *("peft" for _ in report.skipped)]
    return {name: names.count(name) for name in sorted(set(names))}


def _case(name: str, variant: Any, ids: Tensor, check: Any) -> harness.Case:
    from benchmarks import training

    return harness.Case(name, lambda: training.step(variant, ids), check, lambda: variant.zero_grad(set_to_none=True))


def _row(timing: harness.Timing, saved: memory.SavedBytes, tokens: int) -> dict[str, Any]:
    return {
        "name": timing.name,
        "ratio": timing.ratio,
        "ratio_q1": timing.ratio_q1,
        "ratio_q3": timing.ratio_q3,
        "ratio_best": timing.ratio_best,
        "seconds": timing.median,
        "seconds_q1": timing.q1,
        "seconds_q3": timing.q3,
        "tokens_per_second": tokens / timing.median,
        "saved_mib": saved.mib,
    }


def text(result: Mapping[str, Any], goal: tuple[float, float | None] | None) -> str:
    """One configuration as a table, with the goals beside what was reached."""
    lines = []
    for row in result["rows"]:
        line = {
            "variant": row["name"],
            "x frozen": f"{row['ratio']:.3f}",
            "quartiles": f"{row['ratio_q1']:.3f}-{row['ratio_q3']:.3f}",
            "fastest": f"{row['ratio_best']:.3f}",
            "s/step": f"{row['seconds']:.3f}",
            "tokens/s": f"{row['tokens_per_second']:.0f}",
            "saved MiB": f"{row['saved_mib']:.1f}",
        }
        if goal is not None:
            wanted = f"<= {goal[0]:.2f}x" + (f", <= {goal[1]:.0f} MiB" if goal[1] else "")
            line["goal"] = wanted if row["name"] == "peftkern" else ""
        lines.append(line)
    right = ("x frozen", "fastest", "s/step", "tokens/s", "saved MiB")
    return record.table(lines, right)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in pairs.NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(pairs.NAMES)}")
    return names


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--base", choices=BASES, action="append", help="of the base, repeatable (default: what the machine multiplies)"
    )
    parser.add_argument("--p", type=float, action="append", help="LoRA dropout, repeatable (default: 0.05 and 0)")
    parser.add_argument("--rows", type=int, default=1, help="sequences in the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds")
    parser.add_argument(
        "--compiled", action="store_true", help="also PEFT under torch.compile (compiling takes minutes)"
    )
    parser.add_argument(
        "--models",
        type=_names,
        help=f"only patched against PEFT, on any of {','.join(pairs.NAMES)} (comma between them)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of model.json, model.csv, model.png")
    return parser.parse_args(arguments)


def _run_pairs(options: argparse.Namespace, device: str) -> None:
    packages.require(*(packages.REAL_MODEL if "smollm2" in options.models else ("transformers", "peft")))
    if len(options.base or []) > 1 or len(options.p or []) > 1:
        raise SystemExit("--models takes one --base and one --p")
    if options.base and options.base[0] not in DTYPES:
        raise SystemExit(f"--models takes a base of {', '.join(DTYPES)}")
    dtype = DTYPES[options.base[0]] if options.base else smollm2.native_dtype(device)
    p = options.p[0] if options.p else None
    pairs.run(options.models, dtype, device, (options.rows, options.length), p, options.rounds, options.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen configurations, print their tables, write the record."""
    options = _parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.models:
        _run_pairs(options, device)
        return
    packages.require(*packages.REAL_MODEL)
    machine = record.machine()
    record.print_machine(machine)
    ids = smollm2.Plays(smollm2.load_tokenizer()).train_batches(1, options.rows, options.length)[0].to(device)
    results: dict[str, Any] = {}
    rows = []
    native = smollm2.native_dtype(device) == torch.bfloat16
    for base in options.base or (["bf16", "fp32"] if native else ["fp32"]):
        rounds = options.rounds if native or base not in ("bf16", "fp16") else min(options.rounds, SLOW_ROUNDS)
        if rounds < options.rounds:
            print(f"{base}: this CPU has no instructions for it and PyTorch is very slow; {rounds} rounds only\n")
        for p in options.p or [0.05, 0.0]:
            result = compare(load(base, device), ids, p, rounds, options.compiled)
            gc.collect()
            name = f"{base} base, p={p:g}"
            goal = GOALS.get((base, p)) if device == "cpu" and ids.numel() == 512 else None
            results[name] = result | {"goal": goal}
            rows += [{"base": base, "p": p, **row} for row in result["rows"]]
            print(f"{name}, {options.rows}x{options.length} tokens; layers per backend: {result['backends']}")
            errors = {key: f"{value:.3g}" for key, value in result["check"].items() if key.endswith("error")}
            print(f"check passed: {errors}")
            print(text(result, goal), flush=True)
            print()
    machine["load_average_at_end"] = record.load_average()
    figure = record.ratio_figure(
        {name: result["rows"] for name, result in results.items()},
        f"SmolLM2-135M, {options.rows}x{options.length} tokens, LoRA r=16: one training step",
        "time / time of the frozen step",
    )
    record.save(options.out, "model", {"machine": machine, "results": results}, rows, figure)


if __name__ == "__main__":
    main()
