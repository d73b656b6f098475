"""A grid of (rank, learning rate) trials of SmolLM2-135M on one text, all in one batch.

    python -m benchmarks.many_trials --ranks 4,16 --rates 2e-4,1e-3 --steps 100 --out trials_out

The same command again goes on where a killed run was. Trials that no longer improve stop by themselves (--patience).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import packages, record, smollm2
from benchmarks.trials import Progress, Trial, TrialRun

CORPORA = ("comedies", "tragedies", "documentation")
HELD_OUT_ROWS = 4


def grid(ranks: Sequence[int], rates: Sequence[float], corpus: str, patience: int = 0) -> list[Trial]:
    """One trial for each pair."""
    return [Trial(f"r{r}-lr{rate:g}", corpus, r, rate, patience=patience) for r in ranks for rate in rates]


def results_table(trials: Mapping[str, Trial], progress: Mapping[str, Progress]) -> str:
    """The trials, best first."""
    rows = [
        {
            "trial": name,
            "r": trials[name].r,
            "learning rate": f"{trials[name].learning_rate:g}",
            "steps": len(done.losses),
            "held-out, first": f"{done.held_out[0][1]:.3f}",
            "best": f"{done.best:.3f}",
            "ended": done.ended,
        }
        for name, done in sorted(progress.items(), key=lambda item: item[1].best)
    ]
    return record.table(rows, ("r", "learning rate", "steps", "held-out, first", "best"))


def figure(progress: Mapping[str, Progress], title: str) -> Any | None:
    """Held-out loss over steps, a line a trial; None without matplotlib."""
    plt = record.pyplot()
    if plt is None:
        return None
    drawing, axes = plt.subplots(figsize=(8, 4.5))
    for name, done in progress.items():
        axes.plot([step for step, _ in done.held_out], [loss for _, loss in done.held_out], marker="o", label=name)
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    return drawing


def _numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.many_trials", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=_numbers(int), default=[4, 16], help="4,16")
    parser.add_argument("--rates", type=_numbers(float), default=[2e-4, 5e-4, 1e-3, 2e-3], help="2e-4,1e-3")
    parser.add_argument("--corpus", choices=CORPORA, default="comedies")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1, help="sequences of a trial in a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--interval", type=int, default=10, help="steps between evaluations and checkpoints")
    parser.add_argument("--patience", type=int, default=3, help="evaluations without improvement that end a trial")
    parser.add_argument("--out", type=Path, default=Path("trials_out"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the grid, or the rest of it."""
    options = _parse(arguments)
    packages.require("tqdm", *packages.REAL_MODEL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = record.machine()
    record.print_machine(machine)
    cache = Path("demo_out") / smollm2.CACHE.name
    model = smollm2.load_model(smollm2.native_dtype(device), device, cache)
    texts = smollm2.corpora(smollm2.load_tokenizer(cache))

    def train(trial: Trial) -> list[torch.Tensor]:
        batches = texts[trial.corpus].train_batches(options.steps, options.rows, options.length, trial.seed)
        return [ids.to(device) for ids in batches]

    def held_out(trial: Trial) -> list[torch.Tensor]:
        return list(texts[trial.corpus].held_out_batches(1, HELD_OUT_ROWS, options.length)[0].to(device))

    trials = grid(options.ranks, options.rates, options.corpus, options.patience)
    run = TrialRun(model, trials, train, held_out, out=options.out, interval=options.interval)
    progress = run.run(f"{len(trials)} trials")
    print(results_table(run.trials, progress))
    summary = {
        name: {"losses": done.losses, "held_out": done.held_out, "ended": done.ended} for name, done in progress.items()
    }
    record.write_json(options.out / "report.json", {"machine": machine, "trials": summary})
    picture = figure(progress, f"{len(trials)} trials in one batch, {options.corpus}")
    if picture is not None:
        record.write_png(options.out / "report.png", picture)
    print(f"\nwritten to {options.out}: report.json, report.png, and each trial's adapter")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last checkpoints", file=sys.stderr)
        raise SystemExit(130) from None
