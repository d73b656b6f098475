"""LoRA fine-tuning of SmolLM2-135M on Shakespeare: what the demo runs twice, under PEFT and under peftkern."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

import peftkern
from benchmarks import harness, memory, smollm2

WARMUP_STEPS = 2  # not counted in the median time of a step


@dataclass(frozen=True)
class Job:
    """One fine-tuning job. ``dtype`` is the base's; the seed fixes the initial adapter, the batches and the dropout."""

    device: str
    cache: Path
    steps: int
    dtype: torch.dtype = torch.bfloat16
    rows: int = 2
    length: int = 256
    learning_rate: float = 5e-4
    seed: int = 0

    @property
    def base(self) -> str:
        """The base's dtype in short, for tables."""
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length


@dataclass
class Run:
    """What one training run left behind; times in seconds, memory in MiB."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = float("nan")
    saved_mib: float = float("nan")

    @property
    def median_seconds(self) -> float:
        """Median time of a step, without the first ones."""
        return harness.quartiles(self.seconds[WARMUP_STEPS:] or self.seconds)[1]


def build(job: Job, dropout_p: float) -> Any:
    """The model in the job's dtype with PEFT's default fp32 adapter (B = 0), the same one at every call."""
    torch.manual_seed(job.seed)
    model = smollm2.load_model(job.dtype, job.device, job.cache)
    return get_peft_model(model, smollm2.lora_config(dropout_p))


def patched(model: Any) -> tuple[Any, peftkern.PatchReport]:
    """The one line that this project asks of a user, and its report."""
    return model, peftkern.patch(model)


def train(model: Any, batches: Sequence[Tensor], job: Job, label: str) -> Run:
    """AdamW on the adapter, one step per batch, with a progress bar."""
    from tqdm import tqdm

    run = Run()
    torch.manual_seed(job.seed)
    model.train()
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), job.learning_rate, weight_decay=0)
    bar = tqdm(batches, desc=label.ljust(8), unit="step", leave=False, dynamic_ncols=True)
    for ids in bar:
        harness.synchronise()
        start = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        run.losses.append(loss.item())
        harness.synchronise()
        run.seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
    optimiser.zero_grad(set_to_none=True)
    run.saved_mib = memory.saved_for_backward(lambda: model(input_ids=batches[0], labels=batches[0]).loss, model).mib
    return run


@torch.no_grad()
def held_out_loss(model: Any, batches: Sequence[Tensor]) -> float:
    """Mean loss over batches that training never saw, without dropout."""
    was_training = model.training
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in batches]
    model.train(was_training)
    return sum(losses) / len(losses)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of one batch on the CPU, without dropout."""
    was_training = model.training
    model.eval()
    values = model(input_ids=ids).logits.float().cpu()
    model.train(was_training)
    return values


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = 48, seed: int = 1) -> str:
    """What the model makes of ``prompt``, sampled with a fixed seed."""
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
