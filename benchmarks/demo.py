"""The demo: a real language model fine-tuned by plain PEFT and then by peftkern, on whatever this machine has.

    python -m benchmarks.demo [--steps 60] [--out demo_out] [--quant nf4]

With --quant the model is fine-tuned by peftkern on a dense base and then on one whose linear layers bitsandbytes has
quantised (QLoRA), after the losses there were held to those of PEFT over bitsandbytes.

The base is bf16 where the machine multiplies bf16 in hardware, else fp32. Without --steps there are 60, or as many as
fit into five minutes of training.
Writes report.json, report.png and the trained adapter into the output folder, each whole or not at all; with --quant
their names end in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import demo_report, harness, memory, packages, quiet, record, smollm2

if TYPE_CHECKING:
    from benchmarks.finetune import Job, Run

AGREEMENT_STEPS = 5
MOST_STEPS = 60
TRAINING_SECONDS = 300  # of both runs together, where --steps does not say how many steps
HELD_OUT_BATCHES = 4
PROMPT = "**LADY MACBETH**  \nMy lord, the hour is late, and"


class Disagreement(RuntimeError):
    """PEFT and peftkern differ by more than the roundings of the base's dtype."""


def agreement_bound(job: Job) -> float:
    """One rounding to the base's dtype, and the 1e-6 that orders of fp32 sums are given everywhere in this project."""
    return torch.finfo(job.dtype).eps / 2 + 1e-6


def agreement(job: Job, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Train a few steps without dropout both ways; the losses must agree to the rounding of the base's dtype.

    Raises: Disagreement with both curves in the text.
    """
    from benchmarks import finetune

    plain = finetune.train(finetune.build(job, 0.0), batches, job, "p=0 PEFT")
    own = finetune.train(finetune.patched(finetune.build(job, 0.0))[0], batches, job, "p=0 ours")
    ours, theirs = own.median_seconds, plain.median_seconds
    largest = max(abs(a - b) / abs(a) for a, b in zip(plain.losses, own.losses, strict=True))
    bound = agreement_bound(job)
    if not largest <= bound:
        raise Disagreement(
            f"without dropout PEFT's losses {plain.losses} and peftkern's {own.losses} differ by {largest:.2e} "
            f"relative, more than one rounding to {job.base} ({bound:.2e})"
        )
    return {
        "peft": plain.losses,
        "peftkern": own.losses,
        "largest_relative_difference": largest,
        "bound": bound,
        "peft_seconds": theirs,
        "peftkern_seconds": ours,
        "seconds": 2 * ours if job.quant else theirs + ours,  # about what a step of both runs takes
    }


def save_adapter(model: Any, folder: Path) -> None:
    """``save_pretrained`` into ``folder``, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(fresh)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)


def logits_in_fresh_process(ids: Tensor, adapter: Path, job: Job) -> Tensor:
    """What plain PEFT computes with the saved adapter where peftkern is never imported.

    Raises: RuntimeError with the other process's error output.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        ids_file, logits_file = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids.cpu()}, ids_file)
        dtype = str(job.dtype).removeprefix("torch.")
        arguments = [adapter, job.cache, job.device, dtype, job.quant or "dense", ids_file, logits_file]
        command = [sys.executable, "-m", "benchmarks.reload_adapter", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"reloading the adapter in a fresh process failed:\n{done.stderr}")
        return load_file(logits_file)["logits"]


def reload_check(model: Any, ids: Tensor, adapter: Path, job: Job) -> dict[str, float]:
    """Compare the reloaded adapter's logits with PEFT's and peftkern's in this process, all relative.

    The size of the base's roundings is measured: the same model one precision up (fp32 for bf16, fp64 for fp32) is the
    truth that both errors are taken against, a quantised base dequantised. ``model`` may be left in that precision.

    Raises: Disagreement where the fresh process computes something else than PEFT does here, or where peftkern's error
        is more than twice PEFT's.
    """
    import peftkern
    from benchmarks import finetune

    fused = finetune.logits(model, ids)
    fresh = logits_in_fresh_process(ids, adapter, job)
    exact = finetune.dequantised(model, job) if job.quant else model
    with peftkern.disabled():
        plain = finetune.logits(model, ids)
        truth = finetune.logits(exact.to(torch.float32 if job.dtype == torch.bfloat16 else torch.float64), ids)

    def distance(value: Tensor, other: Tensor) -> float:
        return ((value - other).norm() / other.norm()).item()

    found = {
        "fresh_peft_to_peft_here": distance(fresh, plain),
        "fresh_peft_to_peftkern": distance(fresh, fused),
        "peft_error": distance(fresh, truth),
        "peftkern_error": distance(fused, truth),
    }
    same = found["fresh_peft_to_peft_here"] <= agreement_bound(job)
    if not (same and found["peftkern_error"] <= 2 * found["peft_error"] + 1e-6):
        raise Disagreement(f"the reloaded adapter gives other logits: {found}")
    return found


def _run_record(run: Run, job: Job) -> dict[str, Any]:
    from benchmarks.finetune import WARMUP_STEPS

    assert run.frozen is not None
    first, last = demo_report.first_and_last(run.losses)
    q1, median, q3 = harness.quartiles(run.seconds[WARMUP_STEPS:] or run.seconds)
    return {
        "losses": run.losses,
        "seconds": run.seconds,
        "first_loss": first,
        "last_loss": last,
        "held_out_before": run.before,
        "held_out_after": run.held_out,
        "median_seconds": median,
        "seconds_quartiles": [q1, q3],
        "fastest_seconds": min(run.seconds),
        "tokens_per_second": job.tokens / median,
        "saved_mib": run.saved_mib,
        "frozen_linears_mib": run.frozen.linears / memory.MIB,
        "frozen_linears_elements": run.frozen.elements,
        "frozen_mib": run.frozen.total / memory.MIB,
    }


def contenders(job: Job) -> dict[str, tuple[Job, bool]]:
    """The two runs, by name: the job of each, and whether its model is patched."""
    if job.quant:
        return {f"{job.base} base": (job.dense, True), f"{job.quant} base": (job, True)}
    return {"PEFT": (job, False), "peftkern": (job, True)}


def named(stem: str, quant: str, suffix: str = "") -> str:
    """The name of a file or folder that the demo writes."""
    return f"{stem}-{quant}{suffix}" if quant else f"{stem}{suffix}"


def fine_tune(job: Job, out: Path) -> dict[str, Any]:
    """Everything the demo does but printing its tables; a JSON-ready report."""
    from benchmarks import finetune

    tokenizer = smollm2.load_tokenizer(job.cache)
    plays = smollm2.Plays(tokenizer)
    count = max(job.steps or MOST_STEPS, AGREEMENT_STEPS)
    batches = [ids.to(job.device) for ids in plays.train_batches(count, job.rows, job.length, job.seed)]
    held_out = [ids.to(job.device) for ids in plays.held_out_batches(HELD_OUT_BATCHES, job.rows, job.length)]

    print(f"1. {AGREEMENT_STEPS} steps without dropout, PEFT and then peftkern: the losses must agree", flush=True)
    agreed = agreement(job, batches[:AGREEMENT_STEPS])
    print(f"   they do: largest relative difference {agreed['largest_relative_difference']:.1e}", flush=True)

    if not job.steps:
        fitting = max(AGREEMENT_STEPS, int(TRAINING_SECONDS / agreed["seconds"]))
        job = dataclasses.replace(job, steps=min(MOST_STEPS, fitting))

    runs: dict[str, Run] = {}
    samples = {"prompt": PROMPT}
    for number, (name, (own_job, patch)) in enumerate(contenders(job).items(), 2):
        how = "under peftkern" if patch else "under plain PEFT"
        print(f"{number}. {job.steps} steps with dropout 0.05 {how}{f', {name}' if job.quant else ''}", flush=True)
        model = finetune.build(own_job, 0.05)
        if patch:
            model, layers = finetune.patched(model)
        before = finetune.held_out_loss(model, held_out)
        if own_job == job and "before" not in samples:
            samples["before"] = finetune.continuation(model, tokenizer, PROMPT)
        runs[name] = finetune.train(model, batches[: job.steps], job, name)
        runs[name].before, runs[name].frozen = before, memory.frozen_bytes(model)
        runs[name].held_out = finetune.held_out_loss(model, held_out)
    samples["after"] = finetune.continuation(model, tokenizer, PROMPT)

    print("4. save the adapter, load it with plain PEFT in a fresh process", flush=True)
    adapter = out / named("adapter", job.quant)
    save_adapter(model, adapter)
    return {
        "machine": record.machine(),
        "job": {
            "steps": job.steps,
            "rows": job.rows,
            "length": job.length,
            "tokens": job.tokens,
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "held_out_play": smollm2.HELD_OUT_PLAY,
            "base": job.base,
            "quant": job.quant,
        },
        "agreement": agreed,
        "runs": {name: _run_record(run, job) for name, run in runs.items()},
        "layers": layers.to_dict(),
        "layers_text": str(layers),
        "reload": reload_check(model, held_out[0], adapter, job),
        "samples": samples,
    }


def show(report: dict[str, Any]) -> None:
    """Print the report's tables, samples and explanation."""
    print("\nLoss at some steps (one batch each)")
    print(demo_report.curve_table({name: run["losses"] for name, run in report["runs"].items()}))
    print(f"\n{demo_report.summary_table(report)}")
    print(f"\nWhich layers ran where\n{report['layers_text']}")
    samples = report["samples"]
    for label in ("before", "after"):
        text = samples[label].replace("\n", "\n    ")
        print(f"\nContinuation {label} training\n    {samples['prompt']}".replace("  \n", "\n    ") + f" [...] {text}")
    print(f"\n{demo_report.explanation(report).rstrip()}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help=f"training steps of each run ({MOST_STEPS}, or what fits)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder of report.json, report.png, adapter/"
    )
    parser.add_argument(
        "--quant", default="", help=f"quantise the base's linear layers to one of {', '.join(smollm2.FOUR_BIT)}"
    )
    options = parser.parse_args(arguments)
    if options.quant and options.quant not in smollm2.FOUR_BIT:
        parser.exit(2, f"the demo quantises to {' or '.join(smollm2.FOUR_BIT)}, not to {options.quant!r}\n")
    if options.steps is not None and options.steps < 1:
        parser.error("--steps is at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo and write its report."""
    options = _parse(arguments)
    packages.require("tqdm", *packages.REAL_MODEL, *(["bitsandbytes"] if options.quant else []))
    start = time.monotonic()
    record.print_machine(record.machine())
    quiet.others()
    from benchmarks.finetune import Job  # seconds: PEFT and transformers come with it

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, quant = smollm2.native_dtype(device), options.quant
    job = Job(device, options.out / smollm2.CACHE.name, options.steps or 0, dtype, quant=quant)
    why = "bf16" if job.base == "bf16" else "no bf16"
    print(f"base model in {job.base}: this machine has {why} instructions", flush=True)
    report = fine_tune(job, options.out)
    report["seconds_in_all"] = time.monotonic() - start
    show(report)
    written = [named("report", quant, ".json")]
    record.write_json(options.out / written[0], report)
    picture = demo_report.figure(report)
    if picture is not None:
        written.append(named("report", quant, ".png"))
        record.write_png(options.out / written[1], picture)
    print(f"\nwritten to {options.out}: {', '.join(written)}, {named('adapter', quant)}/")
    print(f"{report['seconds_in_all']:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-written is left behind", file=sys.stderr)
        raise SystemExit(130) from None
