"""Several fine-tuning trials over one frozen model, trained in one batch: own data, rank, rate, optimiser, early stop.

A trial's checkpoint is a folder ``<out>/<trial>/step-000020``: the adapter in PEFT's format, the optimiser, and
``progress.json``. It appears whole or not at all, so a run that is killed goes on from every trial's last one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftkern
from benchmarks import harness
from peftkern.adapters import LoRAConfig
from peftkern.bank import AdapterBank, join_batches, losses_by_job, pack_jobs


@dataclass(frozen=True)
class Trial:
    """One job. ``patience``: how many evaluations without an improvement end it; 0 for never."""

    name: str
    corpus: str
    r: int = 16
    learning_rate: float = 5e-4
    lora_dropout: float = 0.05
    seed: int = 0
    patience: int = 0

    def config(self) -> LoRAConfig:
        """LoRA on every linear layer with alpha = 2 r."""
        return LoRAConfig(self.r, 2 * self.r, "all-linear", lora_dropout=self.lora_dropout)


@dataclass
class Progress:
    """What a trial has done: training losses by step, [step, held-out loss] by evaluation, and why it ended."""

    losses: list[float] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    ended: str = ""

    @property
    def best(self) -> float:
        """The lowest held-out loss."""
        return min((loss for _, loss in self.held_out), default=float("inf"))

    def impatient(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations brought no new best."""
        losses = [loss for _, loss in self.held_out]
        return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


class TrialRun:
    """Trials on one model.

    Args:
        model: frozen and without adapters; ``close`` gives it back as it was.
        trials: with names of their own.
        train: the training batches of a trial, one a step: the same ones whenever it is asked.
        held_out: the sequences that it is judged by.
        out: folder of the checkpoints, from which a run goes on; None for neither.
        interval: steps between evaluations, each followed by a checkpoint; at most so many are lost by a kill.
        max_tokens: of a batch; more trials than fit take turns.
    """

    def __init__(
        self,
        model: Any,
        trials: Sequence[Trial],
        train: Callable[[Trial], Sequence[Tensor]],
        held_out: Callable[[Trial], Sequence[Tensor]],
        *,
        out: Path | None = None,
        interval: int = 10,
        max_tokens: int = 2048,
    ) -> None:
        self.model, self.out, self.interval, self.max_tokens = model, out, interval, max_tokens
        self.trials = {trial.name: trial for trial in trials}
        self.batches = {name: train(trial) for name, trial in self.trials.items()}
        self.judges = {name: held_out(trial) for name, trial in self.trials.items()}
        self.bank: AdapterBank = peftkern.serve(model, target_modules="all-linear")
        self.progress: dict[str, Progress] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.times: list[float] = []
        for trial in trials:
            self._start(trial)

    def close(self) -> None:
        """Take the bank out of the model."""
        peftkern.unserve(self.bank)

    @property
    def seconds(self) -> float:
        """Time of the training steps but the first, which warms up."""
        return sum(self.times[1:] or self.times)

    def active(self) -> list[str]:
        """The trials that are not over."""
        return [name for name, progress in self.progress.items() if not progress.ended]

    def run(self, label: str = "trials") -> Mapping[str, Progress]:
        """Train every trial to its end, behind a progress bar. Returns: what each has done."""
        from tqdm import tqdm

        total = sum(len(batches) for batches in self.batches.values())
        bar = tqdm(total=total, desc=label, unit="step", leave=False, dynamic_ncols=True)
        bar.update(sum(len(progress.losses) for progress in self.progress.values()))
        while names := self.active():
            self._step(names)
            due = [n for n in names if self._due(n)]
            if due:
                self._evaluate(due)
            bar.update(len(names))
            bar.set_postfix({name: f"{self.progress[name].losses[-1]:.3f}" for name in names[:4]}, refresh=False)
        bar.close()
        return self.progress

    def held_out_losses(self, names: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
        """The loss of each named adapter on the sequences beside it, without dropout."""
        was_training = self.model.training
        self.model.eval()
        batch = join_batches(names)
        with torch.no_grad(), self.bank.route(batch.route):
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            losses = losses_by_job(logits, batch)
        self.model.train(was_training)
        return {name: loss.item() for name, loss in losses.items()}

    def _start(self, trial: Trial) -> None:
        """A fresh adapter, or the one of the last checkpoint."""
        found = sorted((self.out / trial.name).glob("step-*")) if self.out else []
        for half_written in (self.out / trial.name).glob(".step-*") if self.out else ():  # a killed run's
            shutil.rmtree(half_written)
        self.progress[trial.name] = Progress()
        if found:
            self.bank.load(trial.name, found[-1], is_trainable=True)
            content = json.loads((found[-1] / "progress.json").read_text())
            if content["trial"] != asdict(trial):
                raise ValueError(f"{found[-1]} is of {content['trial']}, not of {asdict(trial)}: choose another folder")
            self.progress[trial.name] = Progress(**content["progress"])
            self.bank[trial.name].seed, self.bank[trial.name].batches = trial.seed, content["batches"]
        else:
            torch.manual_seed(trial.seed)
            self.bank.add(trial.name, trial.config(), is_trainable=True, seed=trial.seed)
        optimiser = torch.optim.AdamW(self.bank.parameters(trial.name), trial.learning_rate, weight_decay=0, fused=True)
        if found:
            optimiser.load_state_dict(torch.load(found[-1] / "optimizer.pt", weights_only=True))
        self.optimisers[trial.name] = optimiser

    def _step(self, names: Sequence[str]) -> None:
        now = {name: self.batches[name][len(self.progress[name].losses)] for name in names}
        harness.synchronise()
        start = time.perf_counter()
        for pack in pack_jobs({name: ids.numel() for name, ids in now.items()}, self.max_tokens):
            batch = join_batches({name: now[name] for name in pack})
            with self.bank.route(batch.route):
                logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                losses = losses_by_job(logits, batch)
                torch.stack(list(losses.values())).sum().backward()
            for name in pack:
                self.optimisers[name].step()
                self.optimisers[name].zero_grad(set_to_none=True)
                self.progress[name].losses.append(losses[name].item())
        harness.synchronise()
        self.times.append(time.perf_counter() - start)

    def _due(self, name: str) -> bool:
        done = len(self.progress[name].losses)
        return done % self.interval == 0 or done == len(self.batches[name])

    def _evaluate(self, names: Sequence[str]) -> None:
        for pack in pack_jobs({n: sum(map(len, self.judges[n])) for n in names}, max(self.max_tokens, 8192)):
            for name, loss in self.held_out_losses({name: self.judges[name] for name in pack}).items():
                self.progress[name].held_out.append([len(self.progress[name].losses), loss])
        for name in names:
            progress = self.progress[name]
            if len(progress.losses) == len(self.batches[name]):
                progress.ended = "all steps done"
            elif progress.impatient(self.trials[name].patience):
                progress.ended = f"no better for {self.trials[name].patience} evaluations"
            if self.out:
                self._save(name, self.out / name)

    def _save(self, name: str, folder: Path) -> None:
        progress = self.progress[name]
        final = folder / f"step-{len(progress.losses):06d}"
        fresh = folder / f".{final.name}.{os.getpid()}"
        try:
            self.bank.save(name, fresh, task_type="CAUSAL_LM")
            torch.save(self.optimisers[name].state_dict(), fresh / "optimizer.pt")
            content = {
                "trial": asdict(self.trials[name]),
                "progress": asdict(progress),
                "batches": self.bank[name].batches,
            }
            (fresh / "progress.json").write_text(json.dumps(content, indent=2))
            os.replace(fresh, final)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        for older in sorted(folder.glob("step-*"))[:-1]:
            shutil.rmtree(older)
