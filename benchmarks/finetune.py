"""LoRA fine-tuning of SmolLM2-135M on Shakespeare: what the demo runs twice, under PEFT and under peftkern."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

import peftkern
from benchmarks import harness, memory, smollm2
from peftkern.integrations.bitsandbytes import from_bitsandbytes

WARMUP_STEPS = 2  # not counted in the median time of a step


@dataclass(frozen=True)
class Job:
    """One fine-tuning job. ``dtype`` is the base's; the seed fixes the initial adapter, the batches and the dropout.

    ``quant``: one of smollm2.FOUR_BIT where the linear layers are quantised; ``dtype`` is then what they compute in.
    """

    device: str
    cache: Path
    steps: int
    dtype: torch.dtype = torch.bfloat16
    rows: int = 2
    length: int = 256
    learning_rate: float = 5e-4
    seed: int = 0
    quant: str = ""

    @property
    def base(self) -> str:
        """The dtype in short, for tables."""
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    @property
    def dense(self) -> Job:
        """The same job with a base that is not quantised."""
        return replace(self, quant="")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length


@dataclass
class Run:
    """What one training run left behind; times in seconds, memory in MiB.

    ``before`` and ``held_out`` are the held-out loss before and after, ``frozen`` what the base holds.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = float("nan")
    before: float = float("nan")
    saved_mib: float = float("nan")
    frozen: memory.Frozen | None = None

    @property
    def median_seconds(self) -> float:
        """Median time of a step, without the first ones."""
        return harness.quartiles(self.seconds[WARMUP_STEPS:] or self.seconds)[1]


def build(job: Job, dropout_p: float) -> Any:
    """The model as the job wants it, with PEFT's default fp32 adapter (B = 0), the same one at every call."""
    model = smollm2.load_model(job.dtype, job.device, job.cache)
    if job.quant:
        smollm2.quantise(model, job.quant, job.dtype)
    torch.manual_seed(job.seed)
    return get_peft_model(model, smollm2.lora_config(dropout_p))


@torch.no_grad()
def dequantised(model: Any, job: Job) -> Any:
    """The job's model under plain PEFT with dense linear layers that hold the same values, and the same adapter.

    Args: model: of ``build`` with a quantised base, patched or not; before bitsandbytes has computed with it without
        gradients, when it may repack its weights.
    """
    twin = build(job.dense, 0.0)
    theirs = dict(model.named_modules())
    for name, module in twin.named_modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.copy_(from_bitsandbytes(theirs[name].base_layer).materialize(job.dtype))
    adapter = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    found = twin.load_state_dict(adapter, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    return twin


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
