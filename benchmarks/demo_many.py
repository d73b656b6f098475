"""The demo of many adapters: three trained in one batch, all of them served in one batch, and a sweep in one batch.

    python -m benchmarks.demo_many [--steps 20] [--quant nf4] [--out demo_many_out]

With --quant every linear layer but the head is one of bitsandbytes' in 4 bits: many adapters over one packed base.

Writes report.json, report.png and the three adapters, in PEFT's format, into the output folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import demo_many_report, packages, quiet, record, smollm2
from benchmarks.many_trials import CORPORA, figure, grid
from benchmarks.trials import Progress, Trial, TrialRun

STEPS = 20
SWEEP = dict(ranks=(4, 16), rates=(2e-4, 5e-4, 1e-3, 2e-3))
LEARN_ALIKE = 1e-4  # relative: what training in company may change, and one rounding of the base's dtype in bf16
LENGTH = 64  # tokens of a sequence; a trial's step is two of them, one in the sweep
HELD_OUT_ROWS = 4
PROMPT = "The most important thing about a "
CONTINUATION = 28


class Disagreement(RuntimeError):
    """Training together gave other losses than training alone, by more than roundings."""


@dataclass
class Setting:
    """What every part of the demo shares."""

    model: Any
    tokenizer: Any
    texts: Mapping[str, smollm2.Corpus]
    device: str
    steps: int
    dtype: torch.dtype  # that the base computes in
    quant: str = ""  # one of smollm2.FOUR_BIT, where its linear layers are
    rows: int = 2

    def train(self, trial: Trial) -> list[Tensor]:
        """The trial's batches."""
        batches = self.texts[trial.corpus].train_batches(self.steps, self.rows, LENGTH, trial.seed)
        return [ids.to(self.device) for ids in batches]

    def judges(self, corpus: str) -> list[Tensor]:
        """Held-out sequences of a text."""
        return list(self.texts[corpus].held_out_batches(1, HELD_OUT_ROWS, LENGTH)[0].to(self.device))

    def run(self, trials: Sequence[Trial], interval: int) -> TrialRun:
        """The trials, ready to run."""
        return TrialRun(self.model, trials, self.train, lambda trial: self.judges(trial.corpus), interval=interval)


def alone_and_together(setting: Setting, trials: Sequence[Trial]) -> tuple[dict[str, Any], TrialRun]:
    """Train each trial alone, then all in one batch. Returns: losses and times, and the run of all, still open.

    Raises: Disagreement where the losses differ by more than LEARN_ALIKE, or a rounding of a 16-bit base.
    """
    alone: dict[str, Progress] = {}
    seconds = {}
    for trial in trials:
        run = setting.run([trial], setting.steps)
        alone |= run.run(f"{trial.name} alone")
        seconds[trial.name] = run.seconds
        run.close()
    run = setting.run(trials, setting.steps)
    together = run.run("all together")
    difference = max(
        abs(a - b) / abs(a) for name in together for a, b in zip(alone[name].losses, together[name].losses, strict=True)
    )
    bound = max(LEARN_ALIKE, torch.finfo(setting.dtype).eps / 2)
    if not difference <= bound:
        raise Disagreement(f"losses alone and together differ by {difference:.1e} relative, more than {bound:.1e}")
    return {
        "alone": {name: progress.losses for name, progress in alone.items()},
        "together": {name: progress.losses for name, progress in together.items()},
        "largest_relative_difference": difference,
        "bound": bound,
        "seconds_alone": seconds,
        "seconds_together": run.seconds,
    }, run


def cross_table(setting: Setting, run: TrialRun) -> dict[str, dict[str, float]]:
    """The held-out loss of the base and of each adapter on each text, every row of a text in one mixed batch."""
    import torch.nn.functional as F

    setting.model.eval()
    table: dict[str, dict[str, float]] = {}
    for corpus in setting.texts:
        judges = torch.stack(setting.judges(corpus))
        names = [None, *run.bank.names]
        ids = judges.repeat(len(names), 1)
        with torch.no_grad(), run.bank.route([name for name in names for _ in judges]):
            logits = setting.model(input_ids=ids).logits.float()
        for i, name in enumerate(names):
            own = slice(i * len(judges), (i + 1) * len(judges))
            loss = F.cross_entropy(logits[own, :-1].flatten(0, 1), ids[own, 1:].flatten())
            table.setdefault(name or "base", {})[corpus] = loss.item()
    setting.model.train()
    return table


@torch.no_grad()
def mixed_continuations(setting: Setting, run: TrialRun) -> dict[str, str]:
    """One prompt continued by the base and by each adapter, in one batch of ``generate``."""
    names = [None, *run.bank.names]
    ids = setting.tokenizer(PROMPT, return_tensors="pt").input_ids.to(setting.device).repeat(len(names), 1)
    setting.model.eval()
    torch.manual_seed(1)
    with run.bank.route(names):
        output = setting.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUATION, do_sample=True, temperature=0.7,
            top_k=40, use_cache=True, pad_token_id=setting.tokenizer.eos_token_id,
        )  # fmt: skip
    setting.model.train()
    texts = setting.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return {name or "base": " ".join(text.split()) for name, text in zip(names, texts, strict=True)}


def sweep(setting: Setting) -> dict[str, Progress]:
    """Eight trials on the comedies in one batch."""
    setting.rows = 1
    run = setting.run(grid(SWEEP["ranks"], SWEEP["rates"], "comedies"), max(1, setting.steps // 4))
    progress = dict(run.run("sweep of 8"))
    run.close()
    return progress


def demonstrate(setting: Setting, out: Path) -> tuple[dict[str, Any], Any]:
    """Everything; a JSON-ready report and a figure or None."""
    trials = [Trial(corpus, corpus, seed=seed) for seed, corpus in enumerate(CORPORA)]
    print(f"1. three adapters, {setting.steps} steps each: one after the other, then all in one batch", flush=True)
    trained, run = alone_and_together(setting, trials)
    for name in run.bank.names:
        run.bank.save(name, out / name, task_type="CAUSAL_LM")
    print("2. one mixed batch serves the three adapters and the base", flush=True)
    table, samples = cross_table(setting, run), mixed_continuations(setting, run)
    run.close()
    print("3. a sweep of 8 trials (rank, learning rate) in one batch", flush=True)
    swept = sweep(setting)
    report = {
        "machine": record.machine(),
        "steps": setting.steps,
        "base": setting.quant or str(setting.dtype).removeprefix("torch."),
        "training": trained,
        "held_out": table,
        "prompt": PROMPT,
        "continuations": samples,
        "sweep": {name: {"losses": p.losses, "held_out": p.held_out, "best": p.best} for name, p in swept.items()},
    }
    return report, figure(swept, "SmolLM2-135M on comedies: 8 trials in one batch")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo and write its report."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo_many", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each adapter")
    parser.add_argument(
        "--quant", default="", choices=("", *smollm2.FOUR_BIT), help="quantise the base's linear layers"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_many_out"))
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps is at least 1")
    packages.require("tqdm", *packages.REAL_MODEL, *(["bitsandbytes"] if options.quant else []))
    quiet.others()
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record.print_machine(record.machine())
    cache = Path("demo_out") / smollm2.CACHE.name
    dtype = smollm2.native_dtype(device)
    model, tokenizer = smollm2.load_model(dtype, device, cache), smollm2.load_tokenizer(cache)
    if options.quant:
        smollm2.quantise(model, options.quant, dtype)
    setting = Setting(model, tokenizer, smollm2.corpora(tokenizer), device, options.steps, dtype, options.quant)
    report, picture = demonstrate(setting, options.out)
    report["seconds_in_all"] = time.monotonic() - start
    print(demo_many_report.text(report))
    record.write_json(options.out / "report.json", report)
    if picture is not None:
        record.write_png(options.out / "report.png", picture)
    print(f"\nwritten to {options.out}: report.json, {'report.png, ' if picture else ''}{', '.join(CORPORA)}")
    print(f"{report['seconds_in_all']:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
